"""Lists of videos: three kinds of file, spans of seconds, and clips that cannot be read."""

import pickle

import numpy as np
import pytest
import torch

from avion.data.transforms import EvalTransform
from avion.data.video import VideoError
from avion.data.video_list import Span, SpanDataset, read_span, read_video_list
from avion.data.windows import VideoFinder
from avion.errors import UserError
from tests.videos import read_barcode, write_video

SIDE = 64


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """a.mp4: 100 frames, 10 per second; b/c.mp4: frames 500 to 520; broken.mp4."""
    root = tmp_path_factory.mktemp("videos")
    write_video(root / "a.mp4", 100, fps=10)
    write_video(root / "b/c.mp4", 20, first=500, fps=10)
    (root / "broken.mp4").write_bytes(b"no video")
    return root


@pytest.fixture
def written(tmp_path):
    def write(content, name="list.txt"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def shown(video):
    """(3, T, H, W) uint8 to the barcodes of its frames."""
    return [read_barcode(frame) for frame in video.permute(1, 2, 3, 0).numpy()]


# Lists


def test_a_line_per_video(written):
    spans = read_video_list(written("# mine\na.mp4\n\nb/c.mp4, 0.5, 1.25\n"))
    assert not spans.in_store
    assert list(spans) == [Span("a.mp4"), Span("b/c.mp4", 0.5, 1.25)]
    assert list(read_video_list(written('video,start,end\n"a, b.mp4",1,2\n'))) == [Span("a, b.mp4", 1.0, 2.0)]
    assert list(read_video_list(written("\ufeffvideo\nvideo.mp4\n"))) == [Span("video.mp4")]


def test_ego4d_pickles_and_ek100_tables_go_through_their_readers(written):
    rows = [("uid", 1.0, 2.5, "#C C walks"), ("uid2", 3.0, 4.0, "#C C runs")]
    spans = read_video_list(written(pickle.dumps(rows), "list.pkl"))
    assert spans.in_store and list(spans) == [Span("uid", 1.0, 2.5), Span("uid2", 3.0, 4.0)]
    table = written(
        "narration_id,participant_id,video_id,start_timestamp,stop_timestamp,narration\n"
        "P01_01_0,P01,P01_01,00:00:01.00,00:01:04.50,put cup\n",
        "list.csv",
    )
    spans = read_video_list(table)
    assert spans.in_store and list(spans) == [Span("P01/P01_01", 1.0, 64.5, "P01_01_0")]


def test_captions_go_through_their_reader(written):
    spans = read_video_list(written("video,caption,start\na.mp4,one,2\nb,two,\n", "c.csv"))
    assert spans.in_store and list(spans) == [Span("a", 2.0, None), Span("b", 0.0, None)]
    assert list(read_video_list(written('{"video": "a", "caption": "x", "end": 3}\n', "c.jsonl"))) == [
        Span("a", 0.0, 3.0)
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no videos"),
        ("video,start,end\n", "holds no videos"),
        ("a.mp4\na.mp4,1\n", "line 2: `file` or `file,start,end` is required, found 'a.mp4,1'"),
        ("a.mp4,2,1\n", "line 1: 0 <= start < end in seconds is required, found '2' and '1'"),
        ("a.mp4,-1,1\n", "line 1: 0 <= start"),
        ("a.mp4,0,nan\n", "line 1: 0 <= start"),
        ("a.mp4,0,inf\n", "line 1: 0 <= start"),
        ("a.mp4,zero,1\n", "line 1: 0 <= start"),
        (",0,1\n", "line 1: `file`"),
        (b"\xff\xfe\x00", "neither a pickle (.pkl) nor text"),
        ('"a.mp4\n', "neither a pickle"),
    ],
)
def test_bad_lists_are_one_line(written, content, message):
    path = written(content)
    with pytest.raises(UserError) as caught:
        read_video_list(path)
    assert str(caught.value).startswith(f"video list {path}: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_list_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_video_list(tmp_path / "gone.txt")


# Clips


@pytest.mark.parametrize(
    ("name", "start", "end", "count", "wanted"),
    [
        ("a.mp4", 0.0, None, 4, [12, 37, 62, 87]),  # the middles of four quarters of 100
        ("a.mp4", 2.0, 4.0, 4, [22, 27, 32, 37]),
        ("b/c.mp4", 0.0, None, 40, [500 + k // 2 for k in range(40)]),  # more than there are: each twice
        ("a.mp4", 9.0, 30.0, 2, [92, 97]),  # the end is the video's
        ("a.mp4", 3.0, 3.01, 3, [30, 30, 30]),
        ("a.mp4", 10.5, 12.0, 2, [99, 99]),  # half a second late
    ],
)
def test_frames_of_a_span(root, name, start, end, count, wanted):
    clip = read_span(root / name, count, EvalTransform(SIDE, fused=True), start=start, end=end)
    assert clip.shape == (3, count, SIDE, SIDE) and clip.dtype == torch.uint8
    # The square crop cuts the barcode's sides off: compare with the pictures that ought to be there.
    frames = EvalTransform(SIDE, fused=True)(_pictures(root / name, wanted), None)
    assert torch.equal(clip, frames)


def _pictures(path, barcodes):
    from avion.data.video import open_video

    with open_video(path, "pyav") as reader:
        frames = reader.get_frames(range(reader.num_frames))
    codes = [read_barcode(frame) for frame in frames]
    return np.stack([frames[codes.index(code)] for code in barcodes])


def test_a_span_after_the_video_s_end_is_an_error(root):
    with pytest.raises(VideoError, match="after the video's end"):
        read_span(root / "a.mp4", 2, EvalTransform(SIDE), start=11.5, end=14.0)


def test_a_dataset_of_files(root, written):
    spans = read_video_list(written(f"a.mp4\nbroken.mp4\n{root / 'b/c.mp4'},0,1\ngone.mp4\n"))
    dataset = SpanDataset(spans, VideoFinder(root, in_store=False), num_frames=3, size=32)
    samples = [dataset[i] for i in range(len(dataset))]
    assert [s["index"] for s in samples] == [0, 1, 2, 3]
    assert [bool(s["error"]) for s in samples] == [False, True, False, True]
    assert "broken.mp4: is not a readable video" in samples[1]["error"] and "no such file" in samples[3]["error"]
    assert all(s["video"].shape == (3, 3, 32, 32) and s["video"].dtype == torch.uint8 for s in samples)
    assert not samples[1]["video"].any() and samples[0]["video"].any()
    frames = _pictures(root / "b/c.mp4", [501, 505, 508])
    assert torch.equal(samples[2]["video"], EvalTransform(32, fused=True)(frames, None))


def test_a_dataset_of_chunks(chunked, written):
    rows = [("abc", 14.0, 17.0, "text"), ("nobody", 0.0, 1.0, "text")]
    spans = read_video_list(written(pickle.dumps(rows), "list.pkl"))
    dataset = SpanDataset(spans, VideoFinder(chunked.avion, in_store=True), num_frames=3, size=32)
    frames = _pictures(chunked.whole / "abc.mp4", [145, 155, 165])
    wanted = EvalTransform(32, fused=True)(frames, None).float()
    assert (dataset[0]["video"].float() - wanted).abs().mean() < 2  # encoded twice, so not to the bit
    assert "none else of this video" in dataset[1]["error"]


@pytest.mark.parametrize("folder", ["ek", "ek_vms"])
def test_a_dataset_of_epic_kitchens_with_and_without_participants(chunked, written, folder):
    table = (
        "narration_id,participant_id,video_id,start_timestamp,stop_timestamp,narration\n"
        "P01_01_0,P01,P01_01,00:00:14.00,00:00:17.00,put cup\n"
    )
    finder = VideoFinder(getattr(chunked, folder), in_store=True)
    dataset = SpanDataset(read_video_list(written(table, "clips.csv")), finder, num_frames=3, size=32)
    frames = _pictures(chunked.whole / "abc.mp4", [145, 155, 165])
    wanted = EvalTransform(32, fused=True)(frames, None).float()
    assert (dataset[0]["video"].float() - wanted).abs().mean() < 2  # encoded twice, so not to the bit


def test_no_frames_are_a_mistake(root, written):
    with pytest.raises(UserError, match="number of frames: 0"):
        SpanDataset(read_video_list(written("a.mp4")), VideoFinder(root, in_store=False), num_frames=0, size=32)


def test_a_csv_with_named_columns(written):
    text = "label,end,video,start,id\ncut,0:00:04.5,a.mp4,1,first\npeel,,b/c.mp4,,\n"
    assert list(read_video_list(written(text, "l.csv"))) == [Span("a.mp4", 1.0, 4.5, "first"), Span("b/c.mp4")]
    assert list(read_video_list(written("video,duration\na,12\n", "l.csv"))) == [Span("a")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("video,start,end\na.mp4,0\n", "line 2: has 2 fields, the header has 3"),
        ("video,start,start\na,1,2\n", "the column 'start' is there twice"),
        ("video,start\n,1\n", "line 2: column 'video': a file or the name of a video is required"),
        ("video,start,end\na,soon,2\n", "line 2: columns 'start' and 'end': 'soon' is no number of seconds"),
        ("video,start,end\na,2,1\n", "line 2: 0 <= start < end in seconds is required, found 2 and 1"),
        ("video,start,end\na,-1,1\n", "line 2: 0 <= start"),
    ],
)
def test_bad_csvs_are_one_line(written, content, message):
    path = written(content, "l.csv")
    with pytest.raises(UserError) as caught:
        read_video_list(path)
    assert str(caught.value).startswith(f"video list {path}: ") and message in str(caught.value)


@pytest.mark.parametrize("layout", ["avion", "vms", "whole"])
def test_a_text_list_names_chunked_videos(chunked, written, layout):
    spans = read_video_list(written("abc,14,17\n"))
    dataset = SpanDataset(spans, VideoFinder(getattr(chunked, layout), in_store=False), num_frames=3, size=32)
    frames = _pictures(chunked.whole / "abc.mp4", [145, 155, 165])
    wanted = EvalTransform(32, fused=True)(frames, None).float()
    assert not dataset[0]["error"]
    assert (dataset[0]["video"].float() - wanted).abs().mean() < 2  # encoded twice, so not to the bit
