import logging
import os

import numpy as np
import pytest

from avion.data.video import VideoError, VideoStore, find_layout, strided_frame_ids, uniform_frame_ids
from avion.data.video import store as video_store
from avion.errors import UserError
from tests.data.conftest import LAST_CHUNK
from tests.videos import read_barcode, write_video

LAYOUTS = {"avion": "abc", "vms": "abc", "whole": "abc", "ek": "P01/P01_01", "ek_vms": "P01/P01_01"}


def barcodes(clip) -> list[int]:
    return [read_barcode(frame) for frame in clip.frames]


@pytest.fixture
def chunks_of(tmp_path):
    """Write chunks of 15 s at 10 frames per second: {chunk number: frames}."""

    def write(lengths: dict[int, int], fps: int = 10, **kwargs) -> VideoStore:
        for k, n in lengths.items():
            write_video(tmp_path / f"v.mp4/{15 * k}.mp4", n, first=15 * fps * k, fps=fps, **kwargs)
        return VideoStore(tmp_path)

    return write


class TestUniformFrameIds:
    """facts: [start, end) in equal segments, each one's middle; in training moved by up to half a segment, which
    is then (end - start - 1) / n long; truncated."""

    def test_middles_by_hand(self):
        assert uniform_frame_ids(0, 8, 4).tolist() == [1, 3, 5, 7]
        assert uniform_frame_ids(100, 130, 4).tolist() == [103, 111, 118, 126]  # 103.75 111.25 118.75 126.25
        assert uniform_frame_ids(10, 14, 4).tolist() == [10, 11, 12, 13]
        assert uniform_frame_ids(0, 30, 1).tolist() == [15]

    def test_jitter_by_hand(self):
        class Fixed:
            def random(self, n):
                return np.array([0.0, 0.25, 0.75, 0.999])[:n]

        # segment (30 - 1) / 4 = 7.25; middles 3.75 11.25 18.75 26.25; shifts -3.625 -1.8125 +1.8125 +3.618
        assert uniform_frame_ids(0, 30, 4, Fixed()).tolist() == [0, 9, 20, 29]

    def test_jitter_stays_in_the_span_and_reaches_all_of_it(self):
        rng = np.random.default_rng()
        ids = np.stack([uniform_frame_ids(40, 80, 4, rng) for _ in range(3000)])
        assert ids.min() == 40 and ids.max() == 79
        assert (np.diff(ids, axis=1) >= 0).all()
        edges = [(40, 50), (50, 60), (60, 70), (70, 80)]
        for column, (low, high) in zip(ids.T, edges, strict=True):
            inside = (column >= low) & (column < high)
            assert inside.all() and len(np.unique(column)) == 10


class TestStridedFrameIds:
    def test_centred_by_hand(self):
        assert strided_frame_ids(0, 30, 4, 4).tolist() == [8, 12, 16, 20]  # window 13 in 30: 8 before, 9 after
        assert strided_frame_ids(100, 104, 4, 4).tolist() == [95, 99, 103, 107]  # window 13 around a span of 4
        assert strided_frame_ids(2, 4, 4, 4).tolist() == [0, 4, 8, 12]

    def test_random_windows_stay_inside_and_reach_both_ends(self):
        rng = np.random.default_rng()
        firsts = [int(strided_frame_ids(10, 30, 3, 4, rng)[0]) for _ in range(500)]
        assert min(firsts) == 10 and max(firsts) == 30 - 9


class TestLayouts:
    @pytest.mark.parametrize("folder, video", LAYOUTS.items())
    @pytest.mark.parametrize("decoder", ["pyav", "decord"])
    def test_frames_of_every_layout(self, chunked, folder, video, decoder):
        """10 fps, [13, 17): frames 130 to 169; eighths are 5 frames, middles 132.5, 137.5, ..."""
        pytest.importorskip({"pyav": "av"}.get(decoder, decoder))
        store = VideoStore(getattr(chunked, folder), decoder=decoder)
        clip = store.read_clip(video, 13.0, 17.0, 8)
        assert barcodes(clip) == [132, 137, 142, 147, 152, 157, 162, 167]
        assert clip.clamped == 0 and clip.frames.dtype == np.uint8

    def test_recognised_once_and_logged(self, chunked, caplog):
        patterns = {
            "avion": "{video}.mp4/{start}.mp4",
            "vms": "{video}/{chunk:04d}.mp4",
            "whole": "{video}.mp4",
            "ek": "{video}.MP4/{start}.MP4",
            "ek_vms": "{video}/{chunk:04d}.mp4",
        }
        kinds = {"ek": "avion", "ek_vms": "vms"}
        for folder, pattern in patterns.items():
            with caplog.at_level(logging.INFO):
                store = VideoStore(getattr(chunked, folder))
            assert store.pattern == pattern and store.layout.kind == kinds.get(folder, folder)
            assert sum(pattern in record.getMessage() for record in caplog.records) == 1
            caplog.clear()

    def test_vms_below_participants_and_named_layout(self, chunked, tmp_path):
        target = tmp_path / "P02/P02_03/0000.mp4"
        target.parent.mkdir(parents=True)
        target.hardlink_to(chunked.vms / "abc/0000.mp4")
        assert barcodes(VideoStore(tmp_path).read_clip("P02/P02_03", 0, 15, 3)) == [25, 75, 125]
        with pytest.raises(UserError, match="no videos in the layout 'avion'"):
            VideoStore(tmp_path, layout="avion")

    def test_other_chunk_lengths(self, tmp_path):
        for k in range(2):
            write_video(tmp_path / f"v.mp4/{5 * k}.mp4", 50, first=50 * k, fps=10)
        assert barcodes(VideoStore(tmp_path, chunk_length=5).read_clip("v", 4, 6, 4)) == [42, 47, 52, 57]

    def test_roots_that_hold_nothing(self, tmp_path):
        with pytest.raises(UserError, match="no such folder"):
            find_layout(tmp_path / "gone")
        (tmp_path / "notes.txt").write_text("no video")
        with pytest.raises(UserError, match="no videos in a known layout"):
            find_layout(tmp_path)
        with pytest.raises(UserError, match="'flat' is not one of"):
            find_layout(tmp_path, "flat")

    def test_bad_chunk_length(self, chunked):
        with pytest.raises(UserError, match="chunk length"):
            VideoStore(chunked.avion, chunk_length=0)


class TestWithoutParticipants:
    """EPIC-KITCHENS without the folders of the participants, as Video Mamba Suite has it."""

    FILES = {
        "vms": ("P01_01/0000.mp4", "P01_01/0001.mp4"),
        "avion": ("P01_01.MP4/0.MP4", "P01_01.MP4/15.MP4"),
        "whole": ("P01_01.MP4",),
    }

    @pytest.fixture
    def link(self, chunked, tmp_path):
        """Link chunk k of "abc", or the whole of it, under another name."""

        def link(name: str, k: int | None = 0):
            target = tmp_path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.hardlink_to(chunked.whole / "abc.mp4" if k is None else chunked.vms / f"abc/{k:04d}.mp4")

        return link

    @pytest.mark.parametrize("named", [False, True])
    @pytest.mark.parametrize("kind", FILES)
    def test_every_layout(self, link, tmp_path, kind, named):
        files = self.FILES[kind]
        for k, name in enumerate(files):
            link(name, k if len(files) > 1 else None)
        store = VideoStore(tmp_path, layout=kind if named else "auto")
        assert (store.layout.kind, store.layout.flat) == (kind, True)
        assert barcodes(store.read_clip("P01/P01_01", 13.0, 17.0, 4)) == [135, 145, 155, 165]
        assert store.chunk_path("P01/P01_01", 0) == tmp_path / files[0]
        assert store.last_chunk("P01/P01_01") == len(files) - 1

    @pytest.mark.parametrize("folder", ["ek_vms", "ek"])
    def test_a_missing_video_is_looked_for_where_the_others_are(self, chunked, folder):
        store = VideoStore(getattr(chunked, folder))
        missing = {"ek_vms": "ek_vms/P01_02/0000.mp4", "ek": "ek/P01/P01_02.MP4/0.MP4"}[folder]
        with pytest.raises(VideoError, match=f"/{missing}: no such file, and none else of this video"):
            store.read_clip("P01/P01_02", 0, 1, 4)
        assert store.last_chunk("P01/P01_02") is None

    def test_a_video_that_is_copied_later_is_found(self, link, tmp_path):
        link("P01_01/0000.mp4")
        store = VideoStore(tmp_path)
        with pytest.raises(VideoError, match="P02_03/0000.mp4: no such file"):
            store.read_clip("P02/P02_03", 0, 1, 4)
        link("P02_03/0000.mp4")
        assert barcodes(store.read_clip("P02/P02_03", 0, 15, 3)) == [25, 75, 125]

    def test_a_first_chunk_that_is_missing_is_named_there(self, link, tmp_path):
        link("P01_01/0001.mp4", 1)
        store = VideoStore(tmp_path)
        assert barcodes(store.read_clip("P01/P01_01", 15.0, 30.0, 3)) == [175, 225, 275]
        with pytest.raises(VideoError, match="P01_01/0000.mp4: no such file: this chunk is missing, though later"):
            store.read_clip("P01/P01_01", 0, 1, 4)

    def test_the_participants_folder_comes_first_where_there_is_one(self, link, tmp_path):
        """A stray video at the root, and a copy of another one, change nothing for a root that has the folders."""
        link("P01/P01_01/0000.mp4", 0)
        link("P01_01/0000.mp4", 1)
        link("preview.mp4", 2)
        store = VideoStore(tmp_path, layout="vms")
        assert barcodes(store.read_clip("P01/P01_01", 0, 15, 3)) == [25, 75, 125]

    def test_no_other_folder_is_left_out_of_a_name(self, link, tmp_path):
        """Two folders may hold videos of one name; only a name that repeats its folder says which it is."""
        link("take/0000.mp4")
        store = VideoStore(tmp_path)
        for name in ("kitchen/take", "take/take", "a/P01/P01_01"):
            with pytest.raises(VideoError, match=f"/{name}/0000.mp4: no such file"):
                store.read_clip(name, 0, 1, 4)


class TestFrames:
    def test_jittered_clips_are_the_rules_frames(self, chunked):
        store = VideoStore(chunked.avion)
        seed = int(np.random.default_rng().integers(2**31))
        clip = store.read_clip("abc", 10.0, 20.0, 6, rng=np.random.default_rng(seed))
        assert barcodes(clip) == uniform_frame_ids(100, 200, 6, np.random.default_rng(seed)).tolist()

    def test_strided_across_chunks(self, chunked):
        clip = VideoStore(chunked.avion).read_clip("abc", 14.0, 16.0, 5, sampling="strided", stride=4)
        assert barcodes(clip) == [141, 145, 149, 153, 157]  # window 17 in 140 to 159

    def test_each_video_has_its_own_frame_rate(self, tmp_path):
        for video, fps in (("slow", 10), ("fast", 25)):
            write_video(tmp_path / f"{video}.mp4/0.mp4", 4 * fps, fps=fps)
        store = VideoStore(tmp_path)
        assert barcodes(store.read_clip("slow", 1.0, 3.0, 2)) == [15, 25]
        assert barcodes(store.read_clip("fast", 1.0, 3.0, 2)) == [37, 62]  # 37.5, 62.5

    def test_a_rate_that_does_not_divide_the_chunks(self, tmp_path):
        """30000/1001 fps: 5 s are 149.85 frames, so that frame 150 is the first of the second chunk."""
        from fractions import Fraction

        for k in range(2):
            write_video(tmp_path / f"v.mp4/{5 * k}.mp4", 150, first=150 * k, fps=Fraction(30000, 1001))
        clip = VideoStore(tmp_path, chunk_length=5).read_clip("v", 4.9, 5.1, 6)
        assert barcodes(clip) == [147, 148, 149, 150, 151, 152]

    def test_a_short_narration_is_widened_to_distinct_frames(self, chunked):
        store = VideoStore(chunked.avion)
        assert barcodes(store.read_clip("abc", 3.0, 3.0, 4)) == [30, 31, 32, 33]
        assert barcodes(store.read_clip("abc", 3.0, 3.1, 4, rng=np.random.default_rng())) == [30, 31, 32, 33]

    def test_chunks_are_opened_once_and_only_those_needed(self, chunked, monkeypatch):
        opened = []
        real = video_store.open_video
        monkeypatch.setattr(
            video_store, "open_video", lambda path, *a: opened.append(os.path.basename(path)) or real(path, *a)
        )
        store = VideoStore(chunked.avion)
        store.read_clip("abc", 1.0, 14.0, 8)
        assert opened == ["0.mp4"]
        opened.clear()
        store.read_clip("abc", 10.0, 32.0, 8)
        assert opened == ["0.mp4", "15.mp4", "30.mp4"]

    def test_unknown_sampling(self, chunked):
        with pytest.raises(UserError, match="'dense' is not one of uniform, strided"):
            VideoStore(chunked.avion).read_clip("abc", 0, 1, 2, sampling="dense")


class TestEdges:
    """340 frames: chunks of 150, 150 and 40."""

    @pytest.mark.parametrize("folder", ["avion", "vms", "whole"])
    def test_a_short_last_chunk_is_clamped_and_counted(self, chunked, folder):
        clip = VideoStore(getattr(chunked, folder)).read_clip("abc", 32.0, 36.0, 4)  # middles 325 335 345 355
        assert barcodes(clip) == [325, 335, 339, 339] and clip.clamped == 2

    @pytest.mark.parametrize("folder", ["avion", "vms"])
    def test_a_clip_that_runs_into_chunks_after_the_last(self, chunked, folder):
        clip = VideoStore(getattr(chunked, folder)).read_clip("abc", 33.0, 49.0, 4)  # 350 390 430 470
        assert barcodes(clip) == [339, 339, 339, 339] and clip.clamped == 4
        clip = VideoStore(getattr(chunked, folder)).read_clip("abc", 28.0, 68.0, 4)  # 330 430 530 630
        assert barcodes(clip) == [330, 339, 339, 339] and clip.clamped == 3

    def test_a_clip_after_the_end_is_an_error(self, chunked):
        store = VideoStore(chunked.avion)
        with pytest.raises(VideoError, match=f"30.mp4: the clip starts after the video's end .{LAST_CHUNK} frames"):
            store.read_clip("abc", 40.0, 42.0, 4)
        with pytest.raises(VideoError, match="75.mp4: no such file: the clip starts after the video's last chunk"):
            store.read_clip("abc", 80.0, 82.0, 4)
        assert store.read_clip("abc", 34.2, 34.6, 4).clamped == 4  # within the second that times may be off

    def test_a_missing_chunk_is_an_error_that_names_it(self, chunks_of):
        store = chunks_of({0: 150, 2: 150})
        for start, end in ((13.0, 17.0), (16.0, 17.0), (10.0, 40.0)):
            with pytest.raises(VideoError, match="v.mp4/15.mp4: no such file: this chunk is missing"):
                store.read_clip("v", start, end, 4)
        assert barcodes(store.read_clip("v", 31.0, 32.0, 2)) == [312, 317]

    def test_a_missing_video_is_an_error_that_names_it(self, chunked):
        for folder in ("avion", "vms", "whole"):
            with pytest.raises(VideoError, match=r"xyz.*no such file"):
                VideoStore(getattr(chunked, folder)).read_clip("xyz", 0, 1, 4)

    def test_a_chunk_cut_short_in_the_middle_is_an_error(self, chunks_of):
        store = chunks_of({0: 80, 1: 150})
        with pytest.raises(VideoError, match="0.mp4: is cut short: 80 frames, 150 are expected"):
            store.read_clip("v", 6.0, 12.0, 4)
        assert barcodes(store.read_clip("v", 1.0, 3.0, 2)) == [15, 25]  # what is there can be read

    def test_a_frame_lost_at_a_cut_is_clamped(self, chunks_of):
        store = chunks_of({0: 148, 1: 150})
        clip = store.read_clip("v", 14.6, 15.4, 8)  # frames 146 to 153, 148 and 149 are not there
        assert barcodes(clip) == [146, 147, 147, 147, 150, 151, 152, 153] and clip.clamped == 2

    def test_a_damaged_chunk_is_an_error_even_if_the_other_is_fine(self, chunks_of, tmp_path):
        store = chunks_of({0: 150, 1: 150})
        (tmp_path / "v.mp4/15.mp4").write_bytes(b"no video")
        with pytest.raises(VideoError, match="15.mp4: is not a readable video"):
            store.read_clip("v", 13.0, 17.0, 4)

    def test_chunks_of_different_size(self, chunks_of, tmp_path):
        store = chunks_of({0: 150, 1: 20})
        write_video(tmp_path / "v.mp4/15.mp4", 20, fps=10, width=64, height=64)
        with pytest.raises(VideoError, match="15.mp4: has frames of 64 x 64"):
            store.read_clip("v", 14.0, 16.0, 4)

    def test_a_start_before_zero(self, chunked):
        assert barcodes(VideoStore(chunked.avion).read_clip("abc", -2.0, 1.0, 2)) == [2, 7]


@pytest.mark.parametrize("layout", ["whole", "avion", "vms"])
def test_a_clip_to_the_end_of_its_video(tmp_path, layout):
    if layout == "whole":
        write_video(tmp_path / "v.mp4", 100, fps=30)
    for chunk, frames in enumerate((30, 30, 30, 10) if layout != "whole" else ()):
        name = f"v.mp4/{chunk}.mp4" if layout == "avion" else f"v/{chunk:04d}.mp4"
        write_video(tmp_path / name, frames, first=30 * chunk, fps=30)
    store = VideoStore(tmp_path, layout=layout, chunk_length=1)
    assert store.length_of("v") == pytest.approx(100 / 30)
    clip = store.read_clip("v", 0.0, float("inf"), 10)
    assert [read_barcode(f) for f in clip.frames] == list(range(5, 100, 10)) and clip.clamped == 0
    assert [read_barcode(f) for f in store.read_clip("v", 3.0, float("inf"), 2).frames] == [92, 97]
    with pytest.raises(VideoError, match="no such file"):
        store.length_of("w")
