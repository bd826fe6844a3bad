"""Windows over videos: which there are, their frames in every layout, files and names, and what cannot be read."""

import math

import numpy as np
import pytest
import torch

from avion.data.transforms import EvalTransform
from avion.data.video import VideoStore, find_layout, index_videos, list_videos
from avion.data.windows import MOST_WINDOWS, Block, BlockDataset, VideoFinder, windows_of
from avion.errors import UserError
from tests.videos import read_barcode, write_video


@pytest.mark.parametrize(
    ("length", "window", "stride", "wanted"),
    [
        (10.0, 4, 2, [(0, 4), (2, 6), (4, 8), (6, 10)]),
        (11.0, 4, 2, [(0, 4), (2, 6), (4, 8), (6, 10), (8, 11)]),  # the rest has a window of its own
        (10.05, 4, 2, [(0, 4), (2, 6), (4, 8), (6, 10)]),  # unless it is very short
        (3.0, 4, 2, [(0, 3)]),
        (4.0, 4, 4, [(0, 4)]),
        (9.9999999, 5, 5, [(0, 5), (5, 9.9999999)]),
        (14.0, 2, 5, [(0, 2), (5, 7), (10, 12)]),  # between windows lies what no window shows
        (16.0, 2, 5, [(0, 2), (5, 7), (10, 12), (15, 16)]),
        (0.5, 0.2, 0.1, [(0, 0.2), (0.1, 0.3), (0.2, 0.4), (0.3, 0.5)]),
    ],
)
def test_windows(length, window, stride, wanted):
    np.testing.assert_allclose(windows_of(length, window, stride), wanted, atol=1e-9)


def test_windows_cover_the_video_and_begin_at_multiples_of_the_stride(rng):
    for _ in range(200):
        stride = float(rng.uniform(0.1, 5))
        window = stride * float(rng.uniform(1, 4))
        length = float(rng.uniform(0.2, 60))
        found = windows_of(length, window, stride)
        np.testing.assert_allclose(found[:, 0], np.arange(len(found)) * stride)
        assert (found[:, 1] - found[:, 0] <= window + 1e-9).all() and (found[:, 1] > found[:, 0]).all()
        assert length - 0.1 - 1e-6 <= found[-1, 1] <= length + 1e-6 * stride
        assert len(found) == 1 or found[-2, 1] <= length + 1e-6 * stride


def test_a_length_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="would have"):
        windows_of(1e9, 1.0, 10.0 / MOST_WINDOWS)
    assert math.isfinite(windows_of(3600.0 * 24, 1.0, 0.5)[-1, 1])


@pytest.mark.parametrize("layout", ["avion", "vms", "whole"])
@pytest.mark.parametrize("indexed", [False, True])
def test_clips_of_a_video_are_read_as_one_by_one(chunked, layout, indexed, tmp_path):
    """340 frames of 10 per second in chunks of 15 s: windows that overlap, cross chunks, and end after the video."""
    root = getattr(chunked, layout)
    index = index_videos(root, index=tmp_path / "packets.index").path if indexed else None
    store = VideoStore(root, index=index)
    spans = [(0.0, 4.0), (2.0, 6.0), (13.0, 17.0), (14.0, 32.0), (29.5, 30.5), (32.0, 34.5)]
    frames, clamped = store.read_clips("abc", spans, 8)
    assert frames.shape == (6, 8, 64, 96, 3) and frames.dtype == np.uint8
    for (start, end), found, late in zip(spans, frames, clamped, strict=True):
        alone = store.read_clip("abc", start, end, 8)
        np.testing.assert_array_equal(found, alone.frames)
        assert late == alone.clamped
        edges = np.linspace(round(start * 10), round(end * 10), 9)
        assert [read_barcode(f) for f in found] == [min(int(m), 339) for m in (edges[:-1] + edges[1:]) / 2]
    assert clamped.tolist() == [0, 0, 0, 0, 0, 2] and store.unindexed == 0


def test_every_frame_is_decoded_once(chunked, monkeypatch):
    store, asked = VideoStore(chunked.whole), []
    real = VideoStore._decode

    def counted(reader, ids, scaling):
        asked.append(np.unique(ids))
        return real(reader, ids, scaling)

    monkeypatch.setattr(VideoStore, "_decode", staticmethod(counted))
    store.read_clips("abc", [(k, k + 4.0) for k in range(10)], 8)
    assert len(asked) == 1 and len(asked[0]) < 80  # of 80 that were asked for


@pytest.mark.parametrize(
    ("layout", "names"),
    [("avion", ["abc"]), ("vms", ["abc"]), ("whole", ["abc"]), ("ek", ["P01/P01_01"]), ("ek_vms", ["P01_01"])],
)
def test_videos_are_listed_in_every_layout(chunked, layout, names):
    root = getattr(chunked, layout)
    assert list_videos(root, find_layout(root)) == names


def test_listing_leaves_out_what_is_no_video_and_circles(tmp_path):
    write_video(tmp_path / "a.mp4", 2)
    write_video(tmp_path / "deep/er/b.MKV", 2)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / ".hidden").mkdir()
    write_video(tmp_path / ".hidden/c.mp4", 2)
    (tmp_path / "deep/up").symlink_to(tmp_path)
    layout = find_layout(tmp_path)
    assert layout.kind == "whole" and list_videos(tmp_path, layout) == ["a", "deep/er/b"]


def test_the_finder_takes_files_and_names_of_chunked_videos(chunked, tmp_path):
    finder = VideoFinder(chunked.avion, in_store=False)
    for name in ("abc", "abc.mp4", "abc.mp4/"):
        store, found = finder.find(name)
        assert (store.layout.kind, found) == ("avion", "abc"), name
    store, found = finder.find("abc.mp4/15.mp4")
    assert (store.layout.kind, found) == ("files", "abc.mp4/15.mp4") and store.length_of(found) == 15.0
    assert finder.find(str(chunked.whole / "abc.mp4"))[0].length_of(str(chunked.whole / "abc.mp4")) == 34.0
    for name in ("gone", "../whole/abc", "/etc/passwd/"):
        assert finder.find(name)[0].layout.kind == "files", name
    (tmp_path / "empty").mkdir()
    assert VideoFinder(tmp_path / "empty", in_store=False).find("gone")[0].layout.kind == "files"


def test_blocks_and_what_cannot_be_read(chunked, tmp_path):
    """A chunk is missing in the middle: the windows that need it are errors, the others are there."""
    for k in (0, 30):
        (tmp_path / "abc.mp4").mkdir(exist_ok=True)
        (tmp_path / f"abc.mp4/{k}.mp4").hardlink_to(chunked.avion / f"abc.mp4/{k}.mp4")
    dataset = BlockDataset(["abc"], VideoFinder(tmp_path, in_store=True), num_frames=2, size=32)
    blocks = [Block(0, 0, ((0.0, 4.0), (13.0, 17.0))), Block(0, 2, ((20.0, 24.0), (30.0, 34.0)))]
    batch = dataset[blocks]
    assert batch["blocks"] == blocks and batch["video"].shape == (4, 3, 2, 32, 32)
    assert [bool(e) for e in batch["error"]] == [False, True, True, False]
    assert "this chunk is missing" in batch["error"][1]
    assert not batch["video"][1].any() and not batch["video"][2].any()
    whole = VideoStore(chunked.whole)
    for row, (start, end) in ((0, (0.0, 4.0)), (3, (30.0, 34.0))):
        frames = whole.read_clip("abc", start, end, 2).frames
        wanted = EvalTransform(32, fused=True)(frames, None)
        assert batch["video"].dtype == torch.uint8
        assert (batch["video"][row].float() - wanted.float()).abs().mean() < 2  # encoded twice, and scaled in one pass


def test_no_videos_are_a_mistake(tmp_path):
    with pytest.raises(UserError, match="no videos in a known layout"):
        VideoFinder(tmp_path, in_store=True)
