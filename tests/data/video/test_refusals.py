"""What the operating system refuses below a video root, and extensions in other letters."""

import errno
import logging
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from avion.data.clip_dataset import ClipDataset
from avion.data.transforms import EvalTransform
from avion.data.video import VideoError, VideoStore, index_videos, open_video
from avion.data.video import storage as storage_module
from avion.errors import UserError
from tests.videos import read_barcode, write_video

ROOT = Path(__file__).parents[3]


class Refusing:
    """Stands before functions of `os` and lets them fail for paths that hold `part`."""

    def __init__(self, monkeypatch, part: str, number: int):
        self.part, self.number = part, number
        for name in ("stat", "open", "scandir", "listdir"):
            monkeypatch.setattr(os, name, self.before(getattr(os, name)))
        real_open = open
        monkeypatch.setattr("builtins.open", self.before(real_open))

    def before(self, function):
        def guarded(path=".", *args, **kwargs):
            if isinstance(path, str | os.PathLike) and self.part in os.fspath(path):
                raise OSError(self.number, os.strerror(self.number), os.fspath(path))
            return function(path, *args, **kwargs)

        return guarded


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("refusals") / "root"
    for video in ("good", "gone"):
        for k in range(2):
            write_video(root / f"{video}.mp4/{15 * k}.mp4", 150, first=150 * k, fps=10)
    return root


class TestErrorsOfTheSystem:
    @pytest.mark.parametrize("number", [errno.EACCES, errno.ESTALE, errno.EIO, errno.EPERM])
    @pytest.mark.parametrize("part", ["gone.mp4", "gone.mp4/0.mp4", "gone.mp4/15.mp4"])
    @pytest.mark.parametrize("with_index", [False, True])
    def test_they_are_clips_that_cannot_be_read(self, dataset, tmp_path, monkeypatch, number, part, with_index):
        index = None
        if with_index:
            index = index_videos(dataset, index=tmp_path / "x.index").path
        store = VideoStore(dataset, index=index)
        Refusing(monkeypatch, part, number)
        with pytest.raises(VideoError, match=f"gone.mp4.*{os.strerror(number)}") as caught:
            store.read_clip("gone", 13.0, 17.0, 4)
        assert caught.value.unreadable and "\n" not in str(caught.value)
        assert read_barcode(store.read_clip("good", 13.0, 17.0, 1).frames[0]) == 150

    def test_a_dataset_replaces_them(self, dataset, monkeypatch):
        from avion.data.narrations import TableBuilder

        builder = TableBuilder()
        for video in ("good", "gone"):
            builder.add(video, 1.0, 2.0, "text")
        store = VideoStore(dataset)
        Refusing(monkeypatch, "gone.mp4", errno.EIO)
        for train in (True, False):
            clips = ClipDataset(
                builder.build(), store, num_frames=2, transform=EvalTransform(32), tokenizer=None, train=train
            )
            assert "Input/output error" in clips[1]["error"] and clips[0]["error"] == ""

    @pytest.mark.skipif(os.geteuid() != 0, reason="another user can be taken by root only")
    def test_a_folder_without_permission_as_another_user(self, dataset):
        """The real thing, in a process that is not root."""
        (dataset / "gone.mp4").chmod(0)
        for folder in dataset.parents:  # one more of them in each process of pytest-xdist
            if folder == Path(tempfile.gettempdir()):
                break
            folder.chmod(0o755)
        code = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from avion.data.video import VideoError, VideoStore
store = VideoStore({str(dataset)!r})
store.read_clip("good", 1.0, 2.0, 2)  # what is imported lies where the other user may not look
os.setuid(65534)
for video in ("gone", "good"):
    try:
        print(video, store.read_clip(video, 1.0, 2.0, 2).frames.shape)
    except VideoError as error:
        print(video, error.unreadable, error.reason)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
        (dataset / "gone.mp4").chmod(0o755)
        assert done.stdout.splitlines() == [
            "gone True cannot be opened (Permission denied)",
            "good (2, 64, 96, 3)",
        ], done.stderr

    def test_too_many_open_files_is_no_fault_of_the_video(self, dataset):
        store = VideoStore(dataset)
        store.read_clip("good", 1.0, 2.0, 1)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        held = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
        try:
            with pytest.raises(OSError):
                while True:
                    held.append(os.open(os.devnull, os.O_RDONLY))
            with pytest.raises(UserError, match="too many files are open.*ulimit -n") as caught:
                store.read_clip("good", 1.0, 2.0, 1)
            assert not isinstance(caught.value, VideoError)
        finally:
            for handle in held:
                os.close(handle)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    def test_reads_that_come_in_parts(self, dataset, tmp_path, monkeypatch):
        index = index_videos(dataset, index=tmp_path / "x.index").path
        real = os.pread
        monkeypatch.setattr(storage_module.os, "pread", lambda handle, n, at: real(handle, min(n, 1000), at))
        clip = VideoStore(dataset, index=index).read_clip("good", 13.0, 17.0, 4)
        assert [read_barcode(f) for f in clip.frames] == [135, 145, 155, 165]


class TestExtensions:
    def code(self, store, video, second):
        return read_barcode(store.read_clip(video, second, second + 0.2, 1).frames[0])

    def test_whole_videos_of_mixed_extensions(self, tmp_path):
        for k, name in enumerate(["a.mp4", "b.MP4", "c.mkv", "d.Mp4"]):
            write_video(tmp_path / ("x.mkv" if name.endswith("mkv") else "x.mp4"), 20, first=100 * k, fps=10)
            source = tmp_path / ("x.mkv" if name.endswith("mkv") else "x.mp4")
            (tmp_path / "root").mkdir(exist_ok=True)
            source.rename(tmp_path / "root" / name)
        store = VideoStore(tmp_path / "root")
        assert [self.code(store, v, 1.0) for v in "abc"] == [11, 111, 211]
        assert store.has_chunk("b", 0) and store.chunk_path("b", 0).name == "b.MP4"
        index_videos(tmp_path / "root")
        store = VideoStore(tmp_path / "root")
        assert [self.code(store, v, 1.0) for v in "abc"] == [11, 111, 211] and store.unindexed == 0

    def test_chunks_of_mixed_extensions(self, tmp_path):
        write_video(tmp_path / "a.mp4/0.mp4", 150, fps=10)
        write_video(tmp_path / "a.mp4/x.mp4", 150, first=150, fps=10).rename(tmp_path / "a.mp4/15.MP4")
        write_video(tmp_path / "b.MP4/x.mp4", 150, first=300, fps=10).rename(tmp_path / "b.MP4/0.MP4")
        store = VideoStore(tmp_path)
        assert [self.code(store, "a", 3.0), self.code(store, "a", 18.0), self.code(store, "b", 3.0)] == [31, 181, 331]
        clip = store.read_clip("a", 13.0, 17.0, 4)
        assert [read_barcode(f) for f in clip.frames] == [135, 145, 155, 165]
        assert store.last_chunk("a") == 1 and store.last_chunk("b") == 0

    def test_a_missing_one_is_told_under_its_usual_name(self, tmp_path):
        write_video(tmp_path / "a.mp4", 20, fps=10)
        with pytest.raises(VideoError, match="z.mp4: no such file"):
            VideoStore(tmp_path).read_clip("z", 0.0, 1.0, 1)


def test_the_decoder_says_nothing_of_broken_tags(tmp_path, caplog):
    data = bytearray(write_video(tmp_path / "v.mp4", 5).read_bytes())
    at = data.find(b"Lavf")
    data[at : at + 4] = b"\xff\xfe\x82\xa0"
    (tmp_path / "v.mp4").write_bytes(bytes(data))
    with caplog.at_level(logging.WARNING), open_video(tmp_path / "v.mp4") as reader:
        assert np.all([read_barcode(f) for f in reader.get_frames(range(5))] == np.arange(5))
