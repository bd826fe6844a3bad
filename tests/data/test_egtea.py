"""EGTEA: classes and splits as they are released, and the windows of trimmed clips."""

import numpy as np
import pytest
import torch

from avion.data.egtea import TrimmedClips, read_egtea_classes, read_egtea_split, window_frame_ids
from avion.data.transforms import CropsTransform
from avion.data.video import VideoStore, open_video
from avion.errors import UserError
from tests.videos import read_barcode, write_video

# As in action_idx.txt: names of one or several words, underscores and slashes, a number at the end.
CLASSES = [
    ("Inspect/Read recipe", "inspect/read recipe"), ("Open fridge", "open fridge"),
    ("Put eating_utensil", "put eating utensil"), ("Cut_tomato", "cut tomato"),
    ("Divide/Pull_Apart lettuce", "divide/pull apart lettuce"), ("Move Around patty", "move around patty"),
]  # fmt: skip
SPLIT = [
    "OP01-R01-PastaSalad-1002316-1004005-F024051-F024101 2 1 13",
    "P26-R05-Cheeseburger-1228540-1230510-F029478-F029537 6 12 4 31 ",
    "OP06-R07-Pizza-37210-38260-F000889-F000920 1 9 40",
]


def classes_file(path, eol="\n"):
    path.write_bytes("".join(f"{name} {i}{eol}" for i, (name, _) in enumerate(CLASSES, 1)).encode())
    return path


@pytest.mark.parametrize("eol", ["\n", "\r\n"])
def test_classes_in_order_in_lower_case(tmp_path, eol):
    assert read_egtea_classes(classes_file(tmp_path / "a.txt", eol)) == [name for _, name in CLASSES]
    lines = (tmp_path / "a.txt").read_text().splitlines()
    (tmp_path / "b.txt").write_text("\n".join(reversed(lines)) + "\n\n")
    assert read_egtea_classes(tmp_path / "b.txt") == [name for _, name in CLASSES]


def test_a_split_and_the_paths_of_its_clips(tmp_path):
    (tmp_path / "s.txt").write_text("\n".join(SPLIT) + "\n")
    split = read_egtea_split(tmp_path / "s.txt", 6)
    assert split.labels.tolist() == [1, 5, 0]
    assert split.videos[1] == "P26-R05-Cheeseburger/P26-R05-Cheeseburger-1228540-1230510-F029478-F029537"


@pytest.mark.parametrize(
    "text, what",
    [
        ("", "is empty"), ("Open fridge\n", "line 1: `Name_of_action N`"), ("7\n", "line 1: `Name_of_action N`"),
        ("A 1\nB 1\n", "line 2: class 1 is there twice"), ("A 1\nB 3\n", "class 2 is missing"),
        ("A 0\nB 1\n", "class 2 is missing"),
    ],
)  # fmt: skip
def test_damaged_classes_cost_a_line(tmp_path, text, what):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(UserError, match=what) as error:
        read_egtea_classes(tmp_path / "a.txt")
    assert str(tmp_path / "a.txt") in str(error.value)


@pytest.mark.parametrize(
    "line, what",
    [
        ("../../x 1", "an id such as"), ("a/b-c-d-e 1", "an id such as"), ("OP01-R01 1", "an id such as"),
        ("OP01-R01-Pizza-1 7", "from 1 to 6"), ("OP01-R01-Pizza-1 0", "from 1 to 6"),
        ("OP01-R01-Pizza-1 x", "from 1 to 6"),
        ("OP01-R01-Pizza-1", "found nothing"), (SPLIT[0], "is there twice"),
        ("O-R-P-" + "x" * 200 + " 1", "an id such as"),
    ],
)  # fmt: skip
def test_damaged_splits_cost_a_line(tmp_path, line, what):
    (tmp_path / "s.txt").write_text(f"{SPLIT[0]}\n\n{line}\n")
    with pytest.raises(UserError, match=f"line 3: .*{what}"):
        read_egtea_split(tmp_path / "s.txt", 6)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"Open \xff 1\n")
    for path, what in (
        (tmp_path / "none.txt", "no such file"),
        (tmp_path, "cannot be read"),
        (tmp_path / "b.txt", "UTF-8"),
    ):
        with pytest.raises(UserError, match=what):
            read_egtea_classes(path)


# ---- windows -----------------------------------------------------------------------------------


def test_windows_by_hand():
    # A window of 3 frames, 2 apart, spans 6 of 11 frames: the four windows begin at 0, 5/3, 10/3 and 5, truncated.
    assert window_frame_ids(11, 3, 2, 4).tolist() == [[0, 2, 4], [1, 3, 5], [3, 5, 7], [5, 7, 9]]
    assert window_frame_ids(11, 3, 2, 1).tolist() == [[2, 4, 6]]
    assert window_frame_ids(6, 3, 2, 3).tolist() == [[0, 2, 4]] * 3
    assert window_frame_ids(5, 3, 2, 2).tolist() == [[0, 2, 4]] * 2
    assert window_frame_ids(4, 3, 2, 2).tolist() == [[0, 2, -1]] * 2  # black from the end of the clip on
    assert window_frame_ids(1, 3, 2, 1).tolist() == [[0, -1, -1]]


def test_lavilas_protocol_on_a_clip_of_100_frames():
    ids = window_frame_ids(100, 16, 2, 10)
    assert ids.shape == (10, 16) and ids[0, 0] == 0 and ids[-1].tolist() == list(range(68, 100, 2))
    assert np.diff(ids, axis=1).tolist() == [[2] * 15] * 10
    assert ids[:, 0].tolist() == [0, 7, 15, 22, 30, 37, 45, 52, 60, 68]  # 68 · i / 9, truncated


@pytest.fixture
def store(tmp_path):
    for name, frames in (("A-R-P/A-R-P-1", 41), ("A-R-P/A-R-P-2", 7)):
        write_video(tmp_path / f"{name}.mp4", frames, width=64, height=64, gop=6)
    (tmp_path / "A-R-P/A-R-P-3.mp4").write_bytes(b"no video")
    return VideoStore(tmp_path, layout="whole")


def test_the_frames_of_every_window(store):
    videos = [f"A-R-P/A-R-P-{k}" for k in (1, 2, 3, 4)]
    clips = TrimmedClips(videos, store, num_frames=5, stride=3, windows=4, transform=CropsTransform(64, 1, fused=True))
    sample = clips[0]
    assert sample["video"].shape == (4, 3, 5, 64, 64) and sample["video"].dtype == torch.uint8 and not sample["error"]
    shown = [[read_barcode(frame.permute(1, 2, 0).numpy()) for frame in view.unbind(1)] for view in sample["video"]]
    assert shown == window_frame_ids(41, 5, 3, 4).tolist() == [[s + 3 * k for k in range(5)] for s in (0, 8, 17, 26)]
    short = clips[1]["video"]  # 7 frames, of which 0, 3 and 6 are shown
    assert [read_barcode(frame.permute(1, 2, 0).numpy()) for frame in short[2, :, :3].unbind(1)] == [0, 3, 6]
    assert not short[:, :, 3:].any() and short[:, :, :3].any()
    for index in (2, 3):
        assert "A-R-P-" in clips[index]["error"] and not clips[index]["video"].any()


def test_crops_follow_each_other_within_a_window(tmp_path):
    write_video(tmp_path / "A-R-P/A-R-P-9.mp4", 30, width=112, height=64)
    transform = CropsTransform(32, 3, fused=True)
    clips = TrimmedClips(
        ["A-R-P/A-R-P-9"], VideoStore(tmp_path, layout="whole"), num_frames=4, stride=2, windows=2, transform=transform
    )
    video = clips[0]["video"]
    assert video.shape == (6, 3, 4, 32, 32)
    ids = window_frame_ids(30, 4, 2, 2)
    with open_video(tmp_path / "A-R-P/A-R-P-9.mp4") as reader:
        for window in range(2):
            wanted = transform(reader.get_frames(ids[window].tolist()))  # (3 crops, 3, 4, 32, 32)
            difference = (video[3 * window : 3 * window + 3].int() - wanted.int()).abs()
            assert difference.float().mean() < 3  # another way of conversion, the same places
    assert not torch.equal(video[0], video[2])
