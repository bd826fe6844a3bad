"""The packet index: the frames of the plain way, from as few bytes as decoding needs; what is refused."""

import logging
import multiprocessing
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from avion.data.video import INDEX_NAME, VideoError, VideoStore, index_videos, open_video
from avion.data.video import indexing as indexing_module
from avion.data.video.columns import Column, pack
from avion.data.video.index_file import PLAIN, PacketIndex
from avion.data.video.indexed_reader import IndexedReader, joined
from avion.data.video.packets import DISPOSABLE, KEY
from avion.errors import UserError
from tests.data.video.cases import FOLDER, NAMES
from tests.videos import read_barcode, write_video

ROOT = Path(__file__).parents[3]
INDEXED = [n for n in NAMES if n not in ("b.ts", "null.avi", "sjis.avi")]


def indexed(path: Path, threads: int = 1) -> IndexedReader:
    """A reader by way of an index of the file's folder, made here if there is none."""
    if not (path.parent / INDEX_NAME).exists():
        index_videos(path.parent)
    store = VideoStore(path.parent, layout="whole", threads=threads)
    reader = store._open(path.stem, 0)
    assert isinstance(reader, IndexedReader)
    return reader


def same_in_both_ways(path: Path, trials: int = 4, plain_threads: int = 1, index_threads: int = 1) -> None:
    rng = np.random.default_rng()
    with open_video(path, "pyav", plain_threads) as plain, indexed(path, index_threads) as quick:
        assert (quick.num_frames, quick.fps, quick.constant_rate) == (
            plain.num_frames,
            plain.fps,
            plain.constant_rate,
        )
        every = range(plain.num_frames)
        np.testing.assert_array_equal(quick.get_frames(every), plain.get_frames(every))
        assert [quick.seconds_of(i) for i in every] == [plain.seconds_of(i) for i in every]
        for _ in range(trials):
            wanted = rng.integers(0, plain.num_frames, 5)
            np.testing.assert_array_equal(quick.get_frames(wanted), plain.get_frames(wanted))
            second = float(rng.uniform(-1, plain.seconds_of(plain.num_frames) + 2))
            assert quick.frame_at(second) == plain.frame_at(second)


class TestSameFrames:
    @pytest.mark.parametrize("name", INDEXED)
    def test_reported_files(self, name, tmp_path):
        shutil.copy(FOLDER / name, tmp_path)
        same_in_both_ways(tmp_path / name)

    @pytest.mark.parametrize("x264", [
        "", "keyint=8:b-pyramid=none:bframes=3:ref=1:cabac=0:b-adapt=0", "open-gop=1:keyint=30:bframes=4",
        "b-pyramid=strict:bframes=8:b-adapt=0", "intra-refresh=1:keyint=40", "keyint=1", "slices=4:keyint=20",
        "ref=5:bframes=2:weightp=2", "interlaced=1:keyint=20", "keyint=infinite:bframes=0",
    ])  # fmt: skip
    def test_h264(self, x264, tmp_path):
        same_in_both_ways(write_video(tmp_path / "x.mp4", 90, x264=x264))

    @pytest.mark.parametrize("extension", ["mp4", "mkv", "mov", "avi"])
    def test_containers_and_a_sound_track(self, extension, tmp_path):
        path = write_video(tmp_path / f"x.{extension}", 60, bframes=0, gop=12, with_audio=extension != "avi")
        same_in_both_ways(path)

    def test_random_encodings(self, tmp_path):
        rng = np.random.default_rng()
        for k in range(5):
            keyint, bframes, ref = int(rng.integers(2, 60)), int(rng.integers(0, 9)), int(rng.integers(1, 6))
            pyramid = rng.choice(["none", "strict", "normal"])
            x264 = f"keyint={keyint}:bframes={bframes}:ref={ref}:b-pyramid={pyramid}:open-gop={int(rng.integers(2))}"
            folder = tmp_path / str(k)
            try:
                same_in_both_ways(write_video(folder / "x.mp4", int(rng.integers(1, 90)), x264=x264))
            except AssertionError as error:
                raise AssertionError(x264) from error

    @pytest.mark.parametrize("codec", ["libx265", "libvpx", "libvpx-vp9", "libsvtav1", "libaom-av1", "mjpeg"])
    def test_other_codecs(self, codec, tmp_path):
        import av

        if codec not in av.codecs_available:
            pytest.skip(f"{codec} is not in this PyAV")
        path = write_video(tmp_path / "x.mkv", 40, codec=codec)
        same_in_both_ways(path, trials=2)

    @pytest.mark.parametrize("rotation", [90, 180, 270])
    def test_rotated(self, rotation, tmp_path):
        same_in_both_ways(write_video(tmp_path / "x.mp4", 20, rotation=rotation))

    def test_threads(self, videos, tmp_path):
        shutil.copy(videos.gop250, tmp_path / "x.mp4")
        same_in_both_ways(tmp_path / "x.mp4", trials=2, index_threads=2)

    def test_damage_is_told_as_in_the_plain_way(self, videos, tmp_path):
        """Times and size of the file are as they were when it was indexed: a bit fell over afterwards."""
        path = tmp_path / "x.mp4"
        shutil.copy(videos.gop250, path)
        with indexed(path) as reader:
            places = [(int(reader.table.offset[p]), int(reader.table.size[p])) for p in range(100, 110)]
        before, data = path.stat(), bytearray(path.read_bytes())
        for offset, size in places:
            data[offset : offset + size] = bytes(size)
        path.write_bytes(bytes(data))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        with indexed(path) as reader:
            with pytest.raises(VideoError, match="x.mp4: (is damaged|cannot be decoded|frame 200)"):
                reader.get_frames([0, 200])
            assert read_barcode(reader.get_frames([255])[0]) == 255


class TestBytesRead:
    @pytest.mark.parametrize(
        "x264", ["", "keyint=8:b-pyramid=none:bframes=3:b-adapt=0"], ids=["default", "random access"]
    )
    @pytest.mark.parametrize("with_audio", [False, True])
    def test_a_clip_reads_hardly_more_than_the_packets_it_needs(self, tmp_path, x264, with_audio):
        """Needed: from the keyframe before each wanted frame to that frame, without what nothing refers to. Counted by
        the operating system as well, where it counts."""
        path = write_video(tmp_path / "x.mp4", 450, x264=x264, with_audio=with_audio)
        rng = np.random.default_rng()
        for _ in range(10):
            with indexed(path) as reader:
                first = int(rng.integers(0, 420))
                wanted = sorted({int(i) for i in rng.integers(first, first + 30, 4)})
                needed = needed_bytes(reader, wanted)
                before = bytes_read_by_this_process()
                reader.get_frames(wanted)
                asked_of_system = bytes_read_by_this_process() - before
            assert needed <= reader.bytes_read <= 1.2 * needed
            assert asked_of_system <= reader.bytes_read + 4096  # /proc/self/io itself is read

    def test_ranges_are_joined_within_a_budget(self):
        assert joined([(0, 100), (100, 50)]) == [(0, 150)]
        assert joined([(0, 100), (110, 100)]) == [(0, 210)]  # 10 of 200 in vain
        assert joined([(0, 100), (150, 100)]) == [(0, 100), (150, 100)]
        assert joined([(500, 100), (0, 100), (620, 100)]) == [(0, 100), (500, 220)]
        rng = np.random.default_rng()
        for _ in range(50):
            starts = np.sort(rng.choice(5000, 20, replace=False))
            ranges = [(int(s), int(rng.integers(1, 60))) for s in starts]
            held = set().union(*(range(o, o + n) for o, n in ranges))
            spans = joined(ranges)
            assert held <= set().union(*(range(o, o + n) for o, n in spans))
            assert sum(n for _, n in spans) <= 1.2 * len(held)

    def test_an_hour_costs_what_a_chunk_costs(self, tmp_path):
        """What is done per clip does not grow with the file: the same number of positioned reads, of column entries and
        of bytes. (benchmarks/bench_loader.py measures time.)"""
        counts = {}
        for name, frames in (("chunk", 90), ("long", 3000)):
            path = write_video(tmp_path / name / "x.mp4", frames, gop=8, scenecut=False, bframes=0)
            with indexed(path) as reader:
                touched: list[int] = []
                for column in ("pts", "flags", "display", "offset", "size"):
                    setattr(reader.table, column, Counting(getattr(reader.table, column), touched))
                assert [read_barcode(f) for f in reader.get_frames([50, 58, 66, 74])] == [50, 58, 66, 74]
                counts[name] = (sum(touched), reader.bytes_read)
        assert counts["long"][0] == counts["chunk"][0]
        assert counts["long"][1] < 1.1 * counts["chunk"][1]


class Counting:
    """A column that notes how many of its entries are looked at."""

    def __init__(self, column, touched: list[int]):
        self.column, self.touched = column, touched

    def __len__(self):
        return len(self.column)

    def __getitem__(self, key):
        found = self.column[key]
        self.touched.append(np.size(found))
        return found


def needed_bytes(reader: IndexedReader, wanted: list[int]) -> int:
    """Counted anew from the columns, packet by packet."""
    table = reader.table
    positions = [int(table.display[i]) for i in wanted]
    needed = set()
    for position in positions:
        start = max(p for p in range(position + 1) if table.flags[p] & KEY and table.pts[p] <= table.pts[position])
        needed |= {p for p in range(start, position + 1) if not table.flags[p] & DISPOSABLE or p in positions}
    return sum(int(table.size[p]) for p in needed)


def bytes_read_by_this_process() -> int:
    try:
        text = Path("/proc/self/io").read_text()
    except OSError:
        return 0
    return int(text.split("rchar: ")[1].split()[0])


class TestColumns:
    def test_values_and_widths(self):
        rng = np.random.default_rng()
        cases = [
            (np.arange(500) * 512 + 7, 0),
            (np.zeros(3), 0),
            (rng.integers(0, 200, 50), 1),
            (np.arange(50) * 10**6 + rng.integers(0, 255, 50), 2),
            (rng.integers(0, 60000, 90), 2),
            (rng.integers(-(2**30), 2**30, 90), 4),
            (rng.integers(-(2**60), 2**60, 90), 8),
            (np.array([-5]), 0),
        ]
        for values, width in cases:
            values = values.astype(np.int64)
            data = pack(values)
            column = Column(memoryview(b"xyz" + data), 3, len(values))
            assert len(data) <= 17 + width * len(values)
            np.testing.assert_array_equal(column[:], values)
            np.testing.assert_array_equal(column[1:3], values[1:3])
            places = rng.integers(0, len(values), 4)
            np.testing.assert_array_equal(column[places], values[places])
            assert [column[int(p)] for p in places] == values[places].tolist()
            with pytest.raises(IndexError):
                column[len(values)]

    @pytest.mark.parametrize("head", [(3, 0, 0), (1, 2**63 - 1, 0), (0, 0, 2**62)], ids=["width", "base", "slope"])
    def test_hostile_heads(self, head):
        with pytest.raises(ValueError):
            Column(memoryview(struct.pack("<Bqq", *head) + bytes(100)), 0, 10)


class TestStore:
    def test_clips_across_chunks_are_read_with_the_index(self, dataset, monkeypatch):
        monkeypatch.setattr("avion.data.video.store.open_video", lambda *a: pytest.fail("opened the plain way"))
        store = VideoStore(dataset)
        clip = store.read_clip("b", 13.0, 17.0, 8)
        assert [read_barcode(f) for f in clip.frames] == [132, 137, 142, 147, 152, 157, 162, 167]
        assert store.unindexed == 0

    def test_files_that_changed_or_are_new_are_read_plainly_and_told_once(self, dataset, caplog):
        write_video(dataset / "a.mp4/0.mp4", 150, first=1000, fps=10)
        write_video(dataset / "c.mp4/0.mp4", 150, first=2000, fps=10)
        store = VideoStore(dataset)
        with caplog.at_level(logging.WARNING):
            for video, code in (("a", 1005), ("c", 2005), ("b", 5), ("a", 1005)):
                assert read_barcode(store.read_clip(video, 0.0, 1.0, 1).frames[0]) == code
        assert store.unindexed == 3
        assert len(caplog.records) == 1 and "0.mp4 was written since" in caplog.text
        caplog.clear()
        made = index_videos(dataset)
        assert (made.files, made.reused) == (5, 3)
        assert read_barcode(VideoStore(dataset).read_clip("c", 0.0, 1.0, 1).frames[0]) == 2005

    def test_a_file_touched_but_not_changed_is_stale(self, dataset):
        os.utime(dataset / "a.mp4/0.mp4", ns=(1, 1))
        store = VideoStore(dataset)
        store.read_clip("a", 0.0, 1.0, 1)
        assert store.unindexed == 1

    def test_missing_and_damaged_clips_are_told_as_without_index(self, dataset):
        (dataset / "a.mp4/0.mp4").unlink()
        (dataset / "b.mp4/15.mp4").write_bytes(b"no video")
        store = VideoStore(dataset)
        with pytest.raises(VideoError, match="this chunk is missing"):
            store.read_clip("a", 1.0, 2.0, 1)
        with pytest.raises(VideoError, match="is not a readable video"):
            store.read_clip("b", 16.0, 17.0, 1)

    def test_named_none_and_other_decoders(self, dataset, tmp_path):
        shutil.move(dataset / INDEX_NAME, tmp_path / "my.index")
        assert VideoStore(dataset)._index is None
        store = VideoStore(dataset, index=tmp_path / "my.index")
        store.read_clip("a", 1.0, 2.0, 1)
        assert store._index is not None and store.unindexed == 0
        assert VideoStore(dataset, index=None)._index is None
        with pytest.raises(UserError, match="gone.index: cannot be read"):
            VideoStore(dataset, index=tmp_path / "gone.index")
        with pytest.raises(UserError, match="used by the decoder pyav only"):
            VideoStore(dataset, index=tmp_path / "my.index", decoder="decord")

    def test_a_store_is_handed_to_processes_of_any_kind(self, dataset):
        store = pickle.loads(pickle.dumps(VideoStore(dataset)))
        assert read_barcode(store.read_clip("a", 3.0, 4.0, 1).frames[0]) == 35
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            assert pool.apply(_first_code, (store,)) == 35

    def test_memory_is_shared_and_small(self, dataset):
        """What is in memory per store does not hold the records."""
        assert len(pickle.dumps(VideoStore(dataset))) < 4000


def _first_code(store):
    return read_barcode(store.read_clip("a", 3.0, 4.0, 1).frames[0])


class TestBuilding:
    def test_summary_and_what_is_read_plainly(self, tmp_path):
        for name in ("null.avi", "hflip.mp4", "cover_first.mp4"):
            shutil.copy(FOLDER / name, tmp_path)
        (tmp_path / "broken.mp4").write_bytes(b"no video")
        (tmp_path / "empty.MKV").write_bytes(b"")
        (tmp_path / "notes.txt").write_text("not looked at")
        made = index_videos(tmp_path)
        assert (made.files, made.reused, made.frames) == (5, 0, 180)
        assert sorted(made.plain) == ["broken.mp4", "empty.MKV", "null.avi"]
        assert "mpeg4" in made.plain["null.avi"] and "not a readable video" in made.plain["broken.mp4"]
        store = VideoStore(tmp_path)
        assert read_barcode(store.read_clip("null", 0.0, 0.1, 1).frames[0]) >= 0 and store.unindexed == 0

    def test_processes_make_the_same_index(self, dataset, tmp_path):
        seen = []
        made = index_videos(dataset, index=tmp_path / "p.index", workers=2, progress=lambda *at: seen.append(at))
        assert made.files == 4 and seen == [(k, 4) for k in range(1, 5)]
        assert (tmp_path / "p.index").read_bytes() == (dataset / INDEX_NAME).read_bytes()

    def test_named_files_are_added(self, dataset):
        write_video(dataset / "c.mp4/0.mp4", 20, fps=10)
        write_video(dataset / "d.mp4/0.mp4", 20, fps=10)
        made = index_videos(dataset, [dataset / "c.mp4/0.mp4"])
        assert made.files == 5
        index = PacketIndex(dataset / INDEX_NAME)
        assert index.find("c.mp4/0.mp4") is not None and index.find("d.mp4/0.mp4") is None
        with pytest.raises(UserError, match="does not lie below"):
            index_videos(dataset, ["../outside.mp4"])
        (dataset / "c.mp4/0.mp4").unlink()
        assert index_videos(dataset).files == 5  # c has gone, d is new

    def test_a_killed_run_goes_on(self, dataset, tmp_path):
        """kill -9 in the middle: the old index stands, and what was done is not done again."""
        target = tmp_path / "k.index"
        code = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from avion.data.video import index_videos
def progress(done, total):
    print(done, flush=True)
    time.sleep(0 if done < 2 else 600)
index_videos({str(dataset)!r}, index={str(target)!r}, progress=progress)
"""
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert [process.stdout.readline().strip() for _ in range(2)] == ["1", "2"]
        with pytest.raises(UserError, match="another process is building this index"):
            index_videos(dataset, index=target)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not target.exists()
        with open(f"{target}.journal", "ab") as journal:
            journal.write(b"half an entry")
        done = []
        made = index_videos(dataset, index=target, progress=lambda *at: done.append(at))
        assert made.files == 4 and done == [(3, 4), (4, 4)]
        assert target.read_bytes() == (dataset / INDEX_NAME).read_bytes()
        assert not Path(f"{target}.journal").exists()

    def test_places_that_cannot_be_written(self, dataset, tmp_path):
        with pytest.raises(UserError, match="cannot be written"):
            index_videos(dataset, index=tmp_path / "no/such/folder/x.index")
        with pytest.raises(UserError, match="no such folder"):
            index_videos(tmp_path / "gone")

    def test_links_folders_without_permission_and_odd_names(self, dataset, tmp_path, monkeypatch):
        (dataset / "loop").symlink_to(dataset)
        elsewhere = write_video(tmp_path / "elsewhere/0.mp4", 20, fps=10).parent
        (dataset / "linked.mp4").symlink_to(elsewhere)
        write_video(dataset / "closed.mp4/0.mp4", 20, fps=10)
        os.rename(dataset / "a.mp4/0.mp4", os.fsencode(dataset) + b"/a.mp4/\xff.mp4")
        real = os.scandir

        def refusing(folder="."):
            if str(folder).endswith("closed.mp4"):
                raise PermissionError(13, "Permission denied", str(folder))
            return real(folder)

        monkeypatch.setattr(os, "scandir", refusing)
        made = index_videos(dataset)
        assert made.files == 6 and list(made.plain) == ["closed.mp4"]
        index = PacketIndex(dataset / INDEX_NAME)
        assert index.find("linked.mp4/0.mp4") is not None and index.find(os.fsdecode(b"a.mp4/\xff.mp4")) is not None

    def test_a_root_without_videos(self, tmp_path):
        (tmp_path / "notes.txt").write_text("no video")
        with pytest.raises(UserError, match="holds no videos"):
            index_videos(tmp_path)

    def test_packets_that_decode_to_other_pictures_are_not_indexed(self, dataset, monkeypatch):
        monkeypatch.setattr(indexing_module, "_reads_the_same", lambda *a: False)
        (dataset / INDEX_NAME).unlink()
        made = index_videos(dataset)
        assert set(made.plain.values()) == {"its packets alone decode to other pictures"}
        assert all(e.kind == PLAIN for e in PacketIndex(made.path).entries())
