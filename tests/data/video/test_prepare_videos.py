"""Folders of raw videos: names and layouts, runs that are killed, failures, shards."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import pytest

from avion.commands import prepare_videos as tool
from avion.data.video import VideoStore
from avion.data.video.prepare import prepare_videos, share_out
from avion.data.video.prepare_encode import Encoding
from avion.data.video.prepare_manifest import State, write_manifest
from avion.data.video.prepare_plan import Settings, make_plan, parse_shard
from avion.data.video.prepare_pool import prepare_all
from avion.errors import UserError
from tests.videos import barcode_frame, read_barcode, write_video

ROOT = Path(__file__).resolve().parents[3]


def run(source, target, *, settings=None, **options):
    return prepare_videos(source, target, settings or Settings(), **{"processes": 1, "threads": 1, **options})


def visible_files(target):
    return sorted(
        str(p.relative_to(target)) for p in Path(target).rglob("*") if p.is_file() and ".prepare" not in p.parts
    )


def write_still(path, frames):
    """A video that takes a second or more to prepare, and little to write."""
    path.parent.mkdir(exist_ok=True)
    picture = av.VideoFrame.from_ndarray(barcode_frame(5, 240, 320), format="rgb24").reformat(format="yuv420p")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        for i in range(frames):
            picture.pts = i
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Three sound videos, in folders, and one that is none."""
    root = tmp_path_factory.mktemp("raw")
    write_video(root / "a.mp4", 40, first=0)
    write_video(root / "more" / "b.MOV", 70, first=100, with_audio=True)
    write_video(root / "more" / "c.mkv", 30, first=200, fps=10)
    (root / "more" / "broken.mp4").write_bytes((root / "a.mp4").read_bytes()[:700])
    (root / "notes.txt").write_text("no video")
    (root / "more" / "back").symlink_to(root, target_is_directory=True)
    (root / ".hidden.mp4").write_text("no video")
    return root


@pytest.mark.parametrize(
    ("layout", "files"),
    [
        ("whole", ["a.mp4", "more/b.mp4", "more/c.mp4"]),
        ("avion", ["a.mp4/0.mp4", "a.mp4/1.mp4", "more/b.mp4/0.mp4", "more/b.mp4/1.mp4", "more/b.mp4/2.mp4",
                   "more/c.mp4/0.mp4", "more/c.mp4/1.mp4", "more/c.mp4/2.mp4"]),
        ("vms", ["a/0000.mp4", "a/0001.mp4", "more/b/0000.mp4", "more/b/0001.mp4", "more/b/0002.mp4",
                 "more/c/0000.mp4", "more/c/0001.mp4", "more/c/0002.mp4"]),
    ],
)  # fmt: skip
def test_a_folder_in_each_layout(raw, tmp_path, layout, files):
    told = []
    settings = Settings(layout=layout, chunk_length=1)
    report = run(raw, tmp_path, settings=settings, failed=lambda path, reason: told.append(path))
    assert visible_files(tmp_path) == sorted([*files, "manifest.jsonl", "packets.index"])
    assert told == [str(raw / "more" / "broken.mp4")]
    assert list(report.totals.failed) == ["more/broken"]
    assert (report.prepared, report.totals.videos, report.totals.frames) == (3, 3, 140)
    assert report.index.files == len(files) and not report.index.plain
    manifest = {line["video"]: line for line in map(json.loads, (tmp_path / "manifest.jsonl").read_text().splitlines())}
    assert manifest["more/b"]["frames"] == 70 and "audio dropped" in manifest["more/b"]["notes"]
    assert "error" in manifest["more/broken"] and manifest["a"]["psnr"] > 25
    store = VideoStore(tmp_path, layout=layout, chunk_length=1)
    assert [read_barcode(f) for f in store.read_clip("more/b", 0.5, 1.5, 30).frames] == list(range(115, 145))
    assert store.unindexed == 0


def test_the_names_of_the_datasets(tmp_path):
    for name in ("P01/videos/P01_01.MP4", "P02/videos/P02_101.MP4", "P02/videos/other.MP4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    plan = make_plan(tmp_path, tmp_path / "out", Settings("ek100"))
    settings = Settings("ek100")
    assert [raw.name for raw in plan.raws] == ["P01/P01_01", "P02/P02_101"]
    assert settings.layout == "avion" and settings.target("P01/P01_01") == "P01/P01_01.MP4"
    assert settings.chunk_name(3) == "45.MP4"
    assert [path for path, _ in plan.refused] == [str(tmp_path / "P02/videos/other.MP4")]
    uid = "0b0c7f3e-1d5a-4c1c-8f2a-000000000001"
    (tmp_path / "ego" / "v2").mkdir(parents=True)
    (tmp_path / "ego" / "v2" / f"{uid}.mp4").write_text("x")
    plan = make_plan(tmp_path / "ego", tmp_path / "out", Settings("ego4d"))
    assert [raw.name for raw in plan.raws] == [uid]
    assert Settings("ego4d").target(uid) == f"{uid}.mp4" and Settings("ego4d").chunk_name(2) == "30.mp4"
    assert Settings("egoschema").layout == "whole" and Settings("folder", "vms").chunk_name(2) == "0002.mp4"


def test_two_files_of_one_name_and_the_target_inside_the_source(tmp_path):
    for name in ("a.mp4", "a.avi", "out/b.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    plan = make_plan(tmp_path, tmp_path / "out", Settings())
    assert [raw.path for raw in plan.raws] == [str(tmp_path / "a.avi")]
    assert plan.refused == [(str(tmp_path / "a.mp4"), f"would become the same video as {tmp_path / 'a.avi'}")]


def test_a_second_run_does_nothing_and_retry_tries_again(raw, tmp_path):
    source = tmp_path / "raw"
    shutil.copytree(raw, source, ignore=shutil.ignore_patterns("back"))
    target = tmp_path / "out"
    first = run(source, target)
    before = {name: (target / name).stat().st_mtime_ns for name in visible_files(target) if name.endswith(".mp4")}
    told = []
    again = run(source, target, failed=lambda path, reason: told.append(path))
    assert (first.prepared, again.prepared, told) == (3, 0, [])
    assert again.totals == first.totals and list(again.totals.failed) == ["more/broken"]
    run(source, target, retry=True, failed=lambda path, reason: told.append(path))
    assert len(told) == 1, "--retry tries the broken one, and nothing else"
    write_video(source / "more" / "broken.mp4", 20)
    mended = run(source, target)  # the file has changed: no --retry needed
    assert mended.prepared == 1 and not mended.totals.failed
    assert before == {name: (target / name).stat().st_mtime_ns for name in before}


def test_a_raw_video_that_changes_is_prepared_again(tmp_path):
    write_video(tmp_path / "raw" / "a.mp4", 20)
    run(tmp_path / "raw", tmp_path / "out", settings=Settings(layout="avion", chunk_length=1))
    write_video(tmp_path / "raw" / "a.mp4", 50, first=300)
    report = run(tmp_path / "raw", tmp_path / "out", settings=Settings(layout="avion", chunk_length=1))
    assert (report.prepared, report.totals.frames) == (1, 50)
    assert visible_files(tmp_path / "out") == ["a.mp4/0.mp4", "a.mp4/1.mp4", "manifest.jsonl", "packets.index"]
    store = VideoStore(tmp_path / "out", chunk_length=1)
    assert read_barcode(store.read_clip("a", 0, 1, 1).frames[0]) == 315 and store.unindexed == 0


def test_a_chunk_that_was_deleted_is_made_again(tmp_path):
    write_video(tmp_path / "raw" / "a.mp4", 70)
    settings = Settings(layout="avion", chunk_length=1)
    run(tmp_path / "raw", tmp_path / "out", settings=settings)
    (tmp_path / "out" / "a.mp4" / "1.mp4").unlink()
    assert run(tmp_path / "raw", tmp_path / "out", settings=settings).prepared == 1
    assert (tmp_path / "out" / "a.mp4" / "1.mp4").exists()


def test_files_of_others_are_left_alone(tmp_path):
    write_video(tmp_path / "raw" / "a.mp4", 10)
    write_video(tmp_path / "raw" / "b.mp4", 10)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.mp4").write_text("mine")
    report = run(tmp_path / "raw", tmp_path / "out")
    assert (tmp_path / "out" / "a.mp4").read_text() == "mine"
    assert "did not write it" in report.totals.failed["a"] and report.totals.videos == 1
    (tmp_path / "out" / "a.mp4").unlink()
    assert not run(tmp_path / "raw", tmp_path / "out", retry=True).totals.failed


def test_a_target_has_one_way_of_preparing(tmp_path):
    write_video(tmp_path / "raw" / "a.mp4", 10)
    run(tmp_path / "raw", tmp_path / "out")
    with pytest.raises(UserError, match=r"was begun with crf 23.0 \(not 30\)"):
        run(tmp_path / "raw", tmp_path / "out", settings=Settings(encoding=Encoding(crf=30)))
    run(tmp_path / "raw", tmp_path / "out", settings=Settings(chunk_length=30))  # of no meaning for whole videos


def test_shards_share_out_the_videos_and_the_last_one_finishes(raw, tmp_path):
    reports = [run(raw, tmp_path, shard=(i, 3)) for i in (2, 0)]
    assert [r.index for r in reports] == [None, None]
    assert not (tmp_path / "manifest.jsonl").exists()
    last = run(raw, tmp_path, shard=(1, 3))
    assert last.index.files == 3
    assert sum(r.prepared for r in (*reports, last)) == 3
    whole = run(raw, tmp_path)  # without --shard: all is there
    assert (whole.prepared, whole.totals.videos, list(whole.totals.failed)) == (0, 3, ["more/broken"])


def test_a_shard_runs_once_at_a_time(raw, tmp_path):
    state = State(tmp_path, Settings(), (0, 2))
    with pytest.raises(UserError, match="another process is preparing"):
        run(raw, tmp_path, shard=(0, 2))
    run(raw, tmp_path, shard=(1, 2))
    state.close()


@pytest.mark.parametrize("text", ["3/3", "0/0", "-1/4", "1", "a/b", "1/4/2"])
def test_a_wrong_shard(text):
    with pytest.raises(UserError, match="--shard"):
        parse_shard(text)


def test_processes_times_threads_are_the_cores():
    assert [share_out(8, n) for n in (100, 8, 3, 1, 0)] == [(8, 1), (8, 1), (3, 2), (1, 8), (1, 8)]


def children():
    """Process ids of the children that prepare videos."""
    pids = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    return [int(pid) for pid in pids if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.parametrize(
    ("number", "reason"), [(signal.SIGKILL, "ended by SIGKILL"), (signal.SIGSTOP, "made no progress for 3 s")]
)
def test_a_process_that_dies_or_is_stuck_costs_its_video_only(tmp_path, number, reason):
    write_still(tmp_path / "raw" / "long.mp4", 3000)
    write_video(tmp_path / "raw" / "short.mp4", 10)
    (tmp_path / "out").mkdir()
    raws = make_plan(tmp_path / "raw", tmp_path / "out", Settings()).raws
    news, sent = [], False
    for item in prepare_all(
        raws, Settings(), tmp_path / "out", 1, 1, stuck_s=3.0 if number == signal.SIGSTOP else 600.0
    ):
        if item.result is None and item.reason is None and not sent:
            sent = True
            for child in children():
                os.kill(child, number)
        elif item.share == 1.0:
            news.append(item)
    assert sent
    assert [(n.raw.name, n.result is not None) for n in news] == [("long", False), ("short", True)]
    assert reason in news[0].reason


def test_a_journal_whose_last_line_is_torn(tmp_path):
    write_video(tmp_path / "raw" / "a.mp4", 10)
    write_video(tmp_path / "raw" / "b.mp4", 10)
    run(tmp_path / "raw", tmp_path / "out")
    journal = tmp_path / "out" / ".prepare" / "journal-0-of-1.jsonl"
    journal.write_bytes(journal.read_bytes()[:-40])
    report = run(tmp_path / "raw", tmp_path / "out")
    assert "did not write it" in next(iter(report.totals.failed.values())), "told, and nothing overwritten"


def test_kill_9_in_a_loop(tmp_path):
    """However often the tool is killed, what has its final name is whole, and in the end all is there."""
    source, target = tmp_path / "raw", tmp_path / "out"
    for i in range(6):
        write_video(source / f"v{i}.mp4", 60, first=100 * i)
    command = [
        sys.executable,
        str(ROOT / "tools" / "prepare_videos.py"),
        str(source),
        str(target),
        "--layout",
        "avion",
        "--chunk-length",
        "1",
        "--processes",
        "2",
        "--threads",
        "1",
        "--preset",
        "slow",
    ]
    dice, kills = random.Random(3), 0
    for _ in range(4):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        before = partial_files(target)
        while process.poll() is None and partial_files(target) <= before:
            time.sleep(0.01)
        time.sleep(dice.uniform(0, 0.1))
        kills += process.poll() is None
        process.kill()
        process.communicate(timeout=60)  # the pipe ends when the processes that were killed with it have ended
        check_chunks(target)
    output = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120)
    assert output.returncode == 0, output.stdout
    assert kills >= 2, "the kills came too late to show anything"
    check_chunks(target)
    assert len(list(target.glob("*.mp4"))) == 6 and not partial_files(target)
    store = VideoStore(target, chunk_length=1)
    store.read_clip("v3", 0, 2, 8)
    assert store.unindexed == 0


def partial_files(target):
    """What is being written now; the tool may remove a folder of it at any moment."""
    return {
        os.path.join(folder, name)
        for folder, _, names in os.walk(target / ".prepare" / "partial")
        for name in names
        if name.endswith(".mp4")
    }


def check_chunks(target):
    for folder in target.glob("*.mp4"):
        first = 100 * int(folder.stem[1:])
        codes = []
        for name in ("0.mp4", "1.mp4"):
            with av.open(str(folder / name)) as container:
                codes += [read_barcode(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]
        assert codes == list(range(first, first + 60)) and len(os.listdir(folder)) == 2


def test_killed_between_the_journal_and_the_rename(tmp_path):
    write_video(tmp_path / "raw" / "a.mp4", 10)
    run(tmp_path / "raw", tmp_path / "out")
    state = State(tmp_path / "out", Settings(), (0, 1))
    entry = state.entries()["a"]
    os.rename(tmp_path / "out" / "a.mp4", state.partial_of(entry))
    state.close()
    report = run(tmp_path / "raw", tmp_path / "out")
    assert (report.prepared, visible_files(tmp_path / "out")) == (0, ["a.mp4", "manifest.jsonl", "packets.index"])


def test_sigterm_ends_it_with_its_processes(tmp_path):
    for i in range(3):
        write_still(tmp_path / "raw" / f"{i}.mp4", 3000)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tools" / "prepare_videos.py"), str(tmp_path / "raw"), str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out").glob(".prepare/partial/*/*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and output.decode().strip().endswith("interrupted")
    # multiprocessing's own resource tracker ends a moment after the process that started it.
    deadline = time.monotonic() + 20
    while any(map(alive, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert children and not [c for c in children if alive(c)]


def alive(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nowhere", "out"], "SOURCE nowhere: no such file or folder"),
        ([".", "out", "--short-side", "225"], "--short-side 225: must be an even number"),
        ([".", "out", "--chunk-length", "0"], "--chunk-length"),
        ([".", "out", "--crf", "60"], "--crf"),
        ([".", "out", "--gop", "0"], "--gop"),
        ([".", "out", "--shard", "4/4"], "--shard 4/4"),
        ([".", "out", "-j", "-1"], "--processes"),
        ([".", "."], "TARGET"),
        ([".", "out"], "SOURCE .: holds no videos"),
    ],
)
def test_mistakes_cost_one_line(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    try:
        assert tool.main(flags) == 2
    except SystemExit as exit:  # argparse's own
        assert exit.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_tool_says_what_it_did(raw, tmp_path, capsys):
    assert tool.main([str(raw), str(tmp_path / "out"), "-j", "1", "--threads", "1"]) == 1
    captured = capsys.readouterr()
    assert "3 videos, 7 s of 140 frames" in captured.out and "more/broken: " in captured.out
    assert f"train with --root {tmp_path / 'out'} --video-layout whole" in captured.out
    assert captured.err.startswith("failed: ")


def test_a_target_that_cannot_be_written(tmp_path, monkeypatch):
    write_video(tmp_path / "raw" / "a.mp4", 10)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="TARGET .*cannot be written"):
        run(tmp_path / "raw", tmp_path / "file")


def test_the_manifest_is_ordered_and_says_nothing_about_the_run(tmp_path):
    entry = {
        "video": "b",
        "frames": 1,
        "seconds": 1.0,
        "source_bytes": 10,
        "bytes": 5,
        "files": [["b.mp4", 1, 5]],
        "cpu_seconds": 0.5,
        "partial": "x",
        "state": "0-of-1",
        "at": 1.0,
    }
    totals = write_manifest(tmp_path, {"b": entry, "a": {**entry, "video": "a", "error": "cut"}})
    lines = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert [line["video"] for line in lines] == ["a", "b"] and not {"partial", "state", "at"} & set(lines[1])
    assert (totals.videos, totals.bytes, totals.failed) == (1, 5, {"a": "cut"})


def test_the_batch_file_gives_each_job_its_shard(raw, tmp_path):
    """srun is a stand-in that runs what it is given."""
    (tmp_path / "srun").write_text('#!/bin/bash\nexec "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    command = ["bash", str(ROOT / "slurm" / "prepare.sbatch"), str(raw), str(tmp_path / "out"), "-j", "1"]
    for task in ("4", "5"):
        environment = {
            **os.environ,
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "SLURM_ARRAY_TASK_ID": task,
            "SLURM_ARRAY_TASK_MIN": "4",
            "SLURM_ARRAY_TASK_COUNT": "2",
        }
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode in (0, 1), done.stderr
    assert visible_files(tmp_path / "out") == ["a.mp4", "manifest.jsonl", "more/b.mp4", "more/c.mp4", "packets.index"]
    journals = {p.name for p in (tmp_path / "out" / ".prepare").glob("journal-*")}
    assert journals == {"journal-0-of-2.jsonl", "journal-1-of-2.jsonl"}
    outside = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert outside.returncode == 2 and "submit this with sbatch" in outside.stderr
