"""tools/check_data.py on a small root with one fault of each kind."""

import pickle
from pathlib import Path

import pytest

from avion.commands import check_data as tool
from tests.videos import write_video

ROOT = Path(__file__).parents[2]


@pytest.fixture
def root(tmp_path):
    """Video "a": chunks of 15 s at 4 frames per second, the last one of 5 s. Video "b": one short chunk."""
    for k, frames in ((0, 60), (1, 60), (2, 20)):
        write_video(tmp_path / f"root/a.mp4/{15 * k}.mp4", frames, fps=4)
    write_video(tmp_path / "root/b.mp4/0.mp4", 20, fps=4)
    return tmp_path / "root"


@pytest.fixture
def annotate(tmp_path):
    def annotate(*rows):
        (tmp_path / "train.pkl").write_bytes(pickle.dumps([(*row, "text") for row in rows]))
        return str(tmp_path / "train.pkl")

    return annotate


def check(capsys, annotations, root, *flags):
    status = tool.main([annotations, "--root", str(root), *flags])
    captured = capsys.readouterr()
    return status, captured.out.splitlines(), captured.err


@pytest.mark.parametrize("flags", [(), ("--decode", "all"), ("--decode", "open"), ("-j", "2")], ids=" ".join)
def test_all_is_well(capsys, root, annotate, flags):
    path = annotate(("a", 1.0, 2.0), ("a", 10.0, 20.0), ("a", 31.0, 35.5), ("b", 0.0, 5.0))
    status, lines, _ = check(capsys, path, root, *flags)
    assert status == 0
    assert lines == ["4 clips of 2 videos need 4 files ({video}.mp4/{start}.mp4)", "all is well"]


@pytest.mark.parametrize("workers", ["0", "2"])
def test_each_fault_is_listed_with_the_clips_that_suffer(capsys, root, annotate, workers):
    (root / "a.mp4/15.mp4").unlink()
    data = (root / "a.mp4/0.mp4").read_bytes()
    (root / "a.mp4/0.mp4").write_bytes(data[: len(data) // 2])
    path = annotate(
        ("a", 1.0, 2.0),
        ("a", 3.0, 4.0),
        ("a", 14.0, 16.0),
        ("a", 31.0, 33.0),
        ("a", 40.0, 44.0),
        ("b", 1.0, 9.0),
        ("b", 1.0, 35.0),
        ("c", 0.0, 1.0),
    )
    status, lines, _ = check(capsys, path, root, "--workers", workers)
    assert status == 1
    found = {tuple(line.split()[:2]): line for line in lines[1:-1]}
    assert found.keys() == {
        ("missing", f"{root}/a.mp4/15.mp4"),
        ("undecodable", f"{root}/a.mp4/0.mp4"),
        ("short", f"{root}/a.mp4/30.mp4"),  # holds 5 s, the clip at 40 s ends 14 s into it
        ("short", f"{root}/b.mp4/0.mp4"),
        ("short", f"{root}/b.mp4/15.mp4"),
        ("short", f"{root}/b.mp4/30.mp4"),
        ("missing", f"{root}/c.mp4/0.mp4"),
    }
    assert "(3 clips)" in found[("undecodable", f"{root}/a.mp4/0.mp4")]
    assert "(2 clips): holds 5.00 s, 14.00 s are needed" in found[("short", f"{root}/a.mp4/30.mp4")]
    assert "(2 clips): holds 5.00 s, 15.00 s are needed" in found[("short", f"{root}/b.mp4/0.mp4")]
    assert lines[-1] == "2 missing, 4 short, 1 undecodable"


def test_a_chunk_cut_short_before_others_is_found_even_if_no_clip_needs_its_end(capsys, root, annotate):
    write_video(root / "a.mp4/0.mp4", 30, fps=4)
    status, lines, _ = check(capsys, annotate(("a", 1.0, 2.0)), root)
    assert status == 1 and lines[1].endswith("(1 clips): holds 7.50 s, 15.00 s are needed")


def test_damage_in_the_middle_needs_decode_all(capsys, root, annotate):
    path = root / "a.mp4/0.mp4"
    data = bytearray(path.read_bytes())
    middle = data.find(b"mdat") + 2500
    data[middle : middle + 1500] = bytes(1500)
    path.write_bytes(bytes(data))
    assert check(capsys, annotate(("a", 1.0, 2.0)), root, "--decode", "open")[0] == 0
    status, lines, _ = check(capsys, annotate(("a", 1.0, 2.0)), root, "--decode", "all")
    assert status == 1 and lines[1].startswith(f"undecodable  {path}  (1 clips)")


def test_csv_and_whole_files(capsys, tmp_path):
    write_video(tmp_path / "videos/P01/P01_01.MP4", 20, fps=4)
    csv = tmp_path / "clips.csv"
    csv.write_text(
        "narration_id,participant_id,video_id,start_timestamp,stop_timestamp,narration\n"
        "P01_01_0,P01,P01_01,00:00:01.00,00:00:04.00,put cup\n"
        "P01_02_0,P01,P01_02,00:00:01.00,00:00:04.00,put cup\n"
    )
    status, lines, _ = check(capsys, str(csv), tmp_path / "videos")
    assert status == 1
    assert lines[1:] == [f"missing  {tmp_path}/videos/P01/P01_02.MP4  (1 clips)", "1 missing"]


def test_epic_kitchens_without_the_folders_of_participants(capsys, tmp_path):
    for k, frames in ((0, 60), (1, 20)):
        write_video(tmp_path / f"videos/P01_101/{k:04d}.mp4", frames, fps=4)
    csv = tmp_path / "clips.csv"
    rows = [("P01_101", 1, 4), ("P01_101", 13, 19), ("P01_102", 16, 18)]
    csv.write_text(
        "narration_id,participant_id,video_id,start_timestamp,stop_timestamp,narration\n"
        + "".join(
            f"{video}_{i},P01,{video},00:00:{start:05.2f},00:00:{stop:05.2f},put cup\n"
            for i, (video, start, stop) in enumerate(rows)
        )
    )
    status, lines, _ = check(capsys, str(csv), tmp_path / "videos", "--decode", "all")
    assert status == 1 and lines == [
        "3 clips of 2 videos need 3 files ({video}/{chunk:04d}.mp4)",
        f"missing  {tmp_path}/videos/P01_102/0001.mp4  (1 clips)",
        "1 missing",
    ]


@pytest.mark.parametrize("case", ["no annotations", "no root", "empty root", "two csv", "workers"])
def test_mistakes_are_one_line_and_status_2(capsys, tmp_path, root, annotate, case):
    path = annotate(("a", 1.0, 2.0))
    argv = {
        "no annotations": [str(tmp_path / "gone.pkl"), "--root", str(root)],
        "no root": [path, "--root", str(tmp_path / "gone")],
        "empty root": [path, "--root", str(tmp_path / "empty")],
        "two csv": ["a.csv", "b.csv", "--root", str(root)],
        "workers": [path, "--root", str(root), "-j", "-1"],
    }[case]
    (tmp_path / "empty").mkdir()
    try:
        status = tool.main(argv)
    except SystemExit as exit:  # argparse's way for words that it refuses
        status = exit.code
    assert status == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("tools/check_data.py: error: ") and captured.err.count("\n") == 1


def test_what_the_system_refuses_has_a_status_of_its_own(capsys, root, annotate, monkeypatch):
    import os

    real = os.scandir

    def refusing(folder="."):
        if str(folder).endswith("b.mp4"):
            raise PermissionError(13, "Permission denied", str(folder))
        return real(folder)

    monkeypatch.setattr(os, "scandir", refusing)
    path = annotate(("a", 1.0, 2.0), ("b", 1.0, 2.0))
    status, lines, _ = check(capsys, path, root)
    assert status == 1
    assert lines[1:] == [
        f"unreadable  {root}/b.mp4/0.mp4  (1 clips): cannot be opened (Permission denied)",
        "1 unreadable",
    ]


def test_captions(capsys, root, tmp_path):
    """A clip to the end of its video needs all chunks up to there; other columns are named."""
    (tmp_path / "c.csv").write_text("clip,caption,start,end\na.mp4,one,,\na,two,1,2\nb,three,3,\nd,four,,\n")
    words = ["--caption-columns", "video=clip"]
    status, lines, _ = check(capsys, str(tmp_path / "c.csv"), root, *words)
    assert status == 1 and lines[0].startswith("4 clips of 3 videos need 5 files")
    assert [line.split()[0] for line in lines[1:-1]] == ["missing"] and "d.mp4" in lines[1]
    (root / "a.mp4/15.mp4").unlink()
    status, lines, _ = check(capsys, str(tmp_path / "c.csv"), root, *words)
    assert status == 1 and any(line.startswith("missing") and "15.mp4" in line for line in lines)
    status, _, error = check(capsys, str(tmp_path / "c.csv"), root)
    assert status == 2 and "the column 'video' is missing" in error and error.count("\n") == 1
