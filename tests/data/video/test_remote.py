"""Videos on S3, against moto's server on loopback: the frames of the local files, ranges, cache, retries, refusals."""

import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[3]

pytest.importorskip("s3fs")
moto_server = pytest.importorskip("moto.server")

from torch.utils.data import DataLoader  # noqa: E402

from avion import remote as remote_module  # noqa: E402
from avion.data.clip_dataset import ClipDataset  # noqa: E402
from avion.data.narrations import TableBuilder  # noqa: E402
from avion.data.transforms import EvalTransform  # noqa: E402
from avion.data.video import VideoError, VideoStore, find_layout, index_videos, list_videos, open_video  # noqa: E402
from avion.data.video.indexed_reader import IndexedReader  # noqa: E402
from avion.data.video.remote import RangeCache, RemoteStorage  # noqa: E402
from avion.data.windows import VideoFinder  # noqa: E402
from avion.errors import UserError  # noqa: E402
from tests.videos import read_barcode, write_video  # noqa: E402


@pytest.fixture(scope="module")
def server():
    running = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture(autouse=True)
def surroundings(server, tmp_path, monkeypatch):
    for name, value in {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AVION_CACHE": str(tmp_path / "cache"),
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote_module, "FIRST_WAIT_S", 0.01)


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    root = tmp_path_factory.mktemp("local") / "videos"
    for video in ("a", "b"):
        for k in range(2):
            write_video(root / f"{video}.mp4/{15 * k}.mp4", 150, first=150 * k, fps=10, gop=20)
    return root


@pytest.fixture
def bucket(server, local, surroundings):
    """The URL of the same files."""
    import s3fs

    fs = s3fs.S3FileSystem(skip_instance_cache=True)
    if not fs.exists("bucket"):
        fs.mkdir("bucket")
    if fs.exists("bucket/videos"):
        fs.rm("bucket/videos", recursive=True)
    for path in sorted(local.rglob("*.mp4")):
        if path.is_file():
            fs.put_file(str(path), f"bucket/videos/{path.relative_to(local)}")
    return "s3://bucket/videos"


def codes(frames):
    return [read_barcode(frame) for frame in frames]


class TestReading:
    def test_without_an_index(self, bucket, local):
        store = VideoStore(bucket)
        assert store.pattern == "{video}.mp4/{start}.mp4"
        clip = store.read_clip("b", 13.0, 17.0, 8)
        assert codes(clip.frames) == [132, 137, 142, 147, 152, 157, 162, 167]
        with open_video(f"{bucket}/a.mp4/0.mp4") as there, open_video(local / "a.mp4/0.mp4") as here:
            np.testing.assert_array_equal(there.get_frames([3, 140]), here.get_frames([3, 140]))

    def test_windows_over_all_videos(self, bucket, local):
        """As features of windows and the search index read a folder."""
        names = list_videos(bucket, find_layout(bucket))
        assert names == list_videos(local, find_layout(local)) == ["a", "b"]
        spans = [(0.0, 2.0), (14.0, 16.0), (27.0, 30.0)]
        for in_store in (True, False):
            store, name = VideoFinder(bucket, in_store=in_store).find(names[1])
            assert store.length_of(name) == 30.0
            frames, clamped = store.read_clips(name, spans, 4)
            assert not clamped.any()
            np.testing.assert_array_equal(frames, VideoStore(local).read_clips("b", spans, 4)[0])

    @pytest.mark.parametrize("workers", [0, 2])
    def test_with_an_index_built_there(self, bucket, local, workers, monkeypatch):
        made = index_videos(bucket, workers=workers)
        assert (made.path, made.files, made.frames, made.plain) == (f"{bucket}/packets.index", 4, 600, {})
        assert index_videos(bucket).reused == 4
        due = VideoStore(local).read_clip("b", 13.0, 17.0, 8)
        monkeypatch.setattr("avion.data.video.store.open_video", lambda *a: pytest.fail("opened the plain way"))
        store = VideoStore(bucket)
        clip = store.read_clip("b", 13.0, 17.0, 8)
        np.testing.assert_array_equal(clip.frames, due.frames)
        assert store.unindexed == 0

    def test_only_ranges_cross_the_network_and_only_once(self, bucket, local):
        index_videos(bucket)
        store = VideoStore(bucket)
        reader = store._open("a", 0)
        assert isinstance(reader, IndexedReader)
        size = (local / "a.mp4/0.mp4").stat().st_size
        assert codes(reader.get_frames([45])) == [45] and 0 < reader.bytes_read < size / 3
        again = VideoStore(bucket)._open("a", 0)
        assert codes(again.get_frames([45])) == [45] and again.bytes_read == 0

    def test_an_object_that_was_written_anew_is_stale(self, bucket, tmp_path):
        index_videos(bucket)
        write_video(tmp_path / "new.mp4", 150, first=1000, fps=10)
        RemoteStorage(bucket).put(str(tmp_path / "new.mp4"), f"{bucket}/a.mp4/0.mp4")
        store = VideoStore(bucket)
        assert codes(store.read_clip("a", 0.0, 1.0, 1).frames) == [1005] and store.unindexed == 1

    @pytest.mark.parametrize("workers, kind", [(2, "fork"), (1, "spawn")])
    def test_in_data_loading_processes(self, bucket, workers, kind):
        index_videos(bucket)
        builder = TableBuilder()
        for video in "ab" * 4:
            builder.add(video, 13.0, 17.0, "text")
        store = VideoStore(bucket)
        store.read_clip("a", 1.0, 2.0, 1)  # this process has connections open
        clips = ClipDataset(
            builder.build(), store, num_frames=4, transform=EvalTransform(64, fused=True), tokenizer=None, train=False
        )
        loader = DataLoader(clips, batch_size=2, num_workers=workers, multiprocessing_context=kind, timeout=60)
        errors = [error for batch in loader for error in batch["error"]]
        assert errors == [""] * 8


class TestRefusals:
    def test_missing_and_broken_clips(self, bucket, tmp_path):
        (tmp_path / "x.mp4").write_bytes(b"no video")
        RemoteStorage(bucket).put(str(tmp_path / "x.mp4"), f"{bucket}/a.mp4/15.mp4")
        store = VideoStore(bucket)
        with pytest.raises(VideoError, match="s3://bucket/videos/a.mp4/15.mp4: is not a readable video"):
            store.read_clip("a", 16.0, 17.0, 1)
        with pytest.raises(VideoError, match="s3://bucket/videos/c.mp4/0.mp4: no such file, and none else"):
            store.read_clip("c", 1.0, 2.0, 1)

    def test_roots_that_are_not_there(self, bucket):
        with pytest.raises(UserError, match="video root s3://bucket/gone: no such folder"):
            VideoStore("s3://bucket/gone")
        with pytest.raises(UserError, match="nosuch://x/y: is of no kind that fsspec knows"):
            VideoStore("nosuch://x/y")

    def test_a_server_that_is_not_there(self, monkeypatch):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        with pytest.raises(UserError, match="video root s3://bucket/videos: cannot be listed") as caught:
            VideoStore("s3://bucket/videos")
        assert "\n" not in str(caught.value)

    def test_decord_reads_no_urls(self, bucket):
        pytest.importorskip("decord")
        with pytest.raises(UserError, match="read by the decoder pyav only"):
            VideoStore(bucket, decoder="decord").read_clip("a", 1.0, 2.0, 1)

    def test_without_the_packages(self):
        code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
sys.modules["s3fs"] = None
from avion.data.video import VideoStore
from avion.errors import UserError
try:
    VideoStore("s3://bucket/videos")
except UserError as error:
    print(error)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert "need more packages" in done.stdout and "[remote]" in done.stdout, done.stderr


class TestRetries:
    def test_what_fails_at_first_is_asked_again(self, bucket, monkeypatch):
        index_videos(bucket)
        store = VideoStore(bucket)
        real, failures = store.storage.fs.cat_ranges, [ConnectionResetError("reset"), TimeoutError("late")]

        def flaky(*args, **kwargs):
            if failures:
                raise failures.pop()
            return real(*args, **kwargs)

        monkeypatch.setattr(store.storage.fs, "cat_ranges", flaky)
        assert codes(store.read_clip("a", 3.0, 4.0, 1).frames) == [35] and not failures

    def test_what_always_fails_is_a_clip_that_cannot_be_read(self, bucket, monkeypatch):
        index_videos(bucket)
        store = VideoStore(bucket)

        def broken(*args, **kwargs):
            raise ConnectionResetError("connection\nreset")

        monkeypatch.setattr(store.storage.fs, "cat_ranges", broken)
        with pytest.raises(VideoError, match="a.mp4/0.mp4: cannot be opened .connection reset.") as caught:
            store.read_clip("a", 3.0, 4.0, 1)
        assert caught.value.unreadable


class TestCache:
    def test_it_stays_within_its_bound_and_keeps_what_was_used_last(self, tmp_path):
        cache = RangeCache(tmp_path, limit=100_000)
        for k in range(60):
            cache.put("key", k, 5000, bytes(5000))
            assert cache.get("key", 0, 5000) is not None or k == 0  # used all the time
            os.utime(cache._path("key", k, 5000), ns=(k, k)) if k else None
        held = sum(path.stat().st_size for path in Path(tmp_path).rglob("*") if path.is_file())
        assert held <= 100_000 and cache.get("key", 0, 5000) is not None and cache.get("key", 1, 5000) is None

    def test_damaged_copies_and_full_disks_do_not_matter(self, tmp_path, monkeypatch):
        cache = RangeCache(tmp_path / "c", limit=10**6)
        cache.put("key", 0, 10, b"0123456789")
        cache._path("key", 0, 10).write_bytes(b"012")
        assert cache.get("key", 0, 10) is None
        (tmp_path / "file").write_text("in the way")
        RangeCache(tmp_path / "file", limit=10**6).put("key", 0, 10, b"0123456789")

    def test_a_storage_is_handed_to_other_processes(self, bucket):
        storage = pickle.loads(pickle.dumps(RemoteStorage(bucket)))
        assert [name for name, _ in storage.entries(bucket)] == ["a.mp4", "b.mp4"]
