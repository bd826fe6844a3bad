"""main_zeroshot.py by several processes, interrupted, with other settings, and on data that cannot be read."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import main_zeroshot
from avion.data.egtea import TrimmedClips
from avion.engine import signals
from avion.engine.zeroshot.feature_log import Batch, FeatureLog, read_batches
from avion.json_lines import read_json_lines
from tests.engine.zeroshot.case import ALL
from tests.processes import run_processes

ROOT = Path(__file__).resolve().parents[3]
PREDICTIONS = ("ek100_mir.npy", "ek100_cls.npz", "egtea.npz", "charades_ego.npz", "egomcq.json", "retrieval.npy")


def predictions(folder):
    """Contents, not bytes: an .npz holds the time at which it was written."""
    found = {}
    for name in PREDICTIONS:
        path = folder / name
        if path.suffix == ".npz" and path.exists():
            with np.load(path) as arrays:
                found[name] = {key: (str(arrays[key].dtype), arrays[key].tolist()) for key in arrays}
        elif path.exists():
            found[name] = path.read_bytes()
    return found, read_json_lines(folder / "eval_log.txt").objects


def _run(rank, size, words):
    assert main_zeroshot.main([*words, "--dist-timeout", "1"]) == 0


def test_the_same_predictions_for_any_number_of_processes(data, runs, tmp_path):
    assert runs("--batch-size", 3, datasets=ALL, output=tmp_path / "alone")[0] == 0
    alone = predictions(tmp_path / "alone")
    assert len(alone[0]) == 6 and len(alone[1]) == 6
    for size in (2, 3):
        folder = tmp_path / f"of{size}"
        words = [*data.flags, "--dataset", *ALL, "--batch-size", "3", "--output-dir", str(folder)]
        run_processes(_run, size, tmp_path / f"log{size}", words)
        assert predictions(folder) == alone
        rows = [row for p in (folder / "features").glob("ek100_mir.*.jsonl") for row in read_json_lines(p).objects]
        assert sorted(i for row in rows for i in row["rows"]) == list(range(7))  # each clip once, without padding


@pytest.fixture
def asked(monkeypatch):
    """The clips of EGTEA that are read."""
    found = []
    real = TrimmedClips.__getitem__
    monkeypatch.setattr(TrimmedClips, "__getitem__", lambda self, i: found.append(i) or real(self, i))
    return found


def test_a_killed_run_goes_on_with_the_batches_that_are_left(data, runs, asked, tmp_path):
    slow = ["--num-clips", "300", "--batch-size", "64"]  # 900 views of each clip: long enough to be caught at it
    output, index = tmp_path / "out", tmp_path / "out/features/egtea.0.jsonl"
    command = [sys.executable, str(ROOT / "main_zeroshot.py"), *data.flags, *slow, "--dataset", "egtea"]
    job = subprocess.Popen(
        [*command, "--output-dir", str(output)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT
    )
    deadline = time.monotonic() + 120
    while (not index.exists() or index.read_bytes().count(b"\n") < 2) and time.monotonic() < deadline:
        assert job.poll() is None, job.stdout.read().decode()
        time.sleep(0.002)
    job.send_signal(signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL
    job.stdout.close()
    finished = [row["batch"] for row in read_json_lines(index).objects]
    assert 2 <= len(finished) < 5 and not (output / "eval_log.txt").exists()

    assert runs(*slow)[0] == 0
    assert sorted(asked) == [i for i in range(5) if i not in finished]
    whole = tmp_path / "whole"
    assert runs(*slow, output=whole)[0] == 0
    assert predictions(output) == predictions(whole)


def test_a_run_that_is_asked_to_stop_keeps_its_batches(data, runs, asked, tmp_path, monkeypatch, capsys):
    whole = tmp_path / "whole"
    assert runs(output=whole)[0] == 0
    asked.clear()
    monkeypatch.setattr(signals, "asked", lambda: signal.SIGTERM if len(asked) >= 2 else 0)
    status, _, log = runs()
    assert status == 75 and "with 3 batches of egtea left" in log
    monkeypatch.undo()
    assert runs()[0] == 0
    assert predictions(tmp_path / "out") == predictions(whole)


def test_a_finished_run_reads_no_video_again_and_other_texts_need_none(runs, asked, tmp_path):
    assert runs()[0] == 0
    asked.clear()
    assert runs()[0] == 0 and runs("--templates", "#C C {}")[0] == 0
    assert asked == []
    rows = read_json_lines(tmp_path / "out/eval_log.txt").objects
    assert rows[0] == rows[1] and len(rows) == 3


@pytest.mark.parametrize(
    "change", [["--clip-stride", 3], ["--num-crops", 1], ["--precision", "bf16"], ["other weights"]]
)
def test_features_of_other_settings_or_weights_are_not_taken(data, runs, asked, tmp_path, change):
    assert runs()[0] == 0
    asked.clear()
    if change == ["other weights"]:
        content = torch.load(data.checkpoint, weights_only=True)
        content["state_dict"]["visual.image_projection"][0, 0] += 1e-3
        torch.save(content, tmp_path / "other.pt")
        change = ["--pretrain-model", tmp_path / "other.pt"]
    assert runs(*change)[0] == 0
    assert sorted(asked) == list(range(5))


# ---- what a run prints and what it refuses -----------------------------------------------------


def test_the_table_has_a_line_per_metric(runs):
    status, out, _ = runs(datasets=["egtea", "egomcq"])
    assert status == 0
    lines = out.splitlines()
    assert lines[0].split() == ["zero-shot", "metric", "%", "clips"]
    assert re.fullmatch(r"egtea +mean class accuracy +\d+\.\d\d +5", lines[2])
    assert re.fullmatch(r" +top-1 +\d+\.\d\d", lines[3])
    assert [line.split()[-2] if "egomcq" in line else line.split()[-1] for line in lines[4:]]


@pytest.mark.parametrize(
    "words, what",
    [
        (["--dataset"], "--dataset: not given"), (["--pretrain-model", ""], "--pretrain-model: not given"),
        (["--dataset", "egomcq", "--clip-stride", "2"], "--clip-stride: only egtea reads it"),
        (["--dataset", "egomcq", "--templates", "{}"], "--templates: only ek100_cls, egtea and charades_ego read it"),
        (["--egomcq-cosine"], "--egomcq-cosine: only egomcq reads it"),
        (["--caption-columns", "video=v"], "--caption-columns: only retrieval reads it"),
        (["--templates", "no slot"], "exactly one"),
        (["--egtea-root", "/nowhere"], "--egtea-root /nowhere: no such folder"),
        (["--dataset", "retrieval", "--retrieval-captions", ""], "--retrieval-captions: not given"),
        (["--egtea-split", "/nowhere.txt"], "split /nowhere.txt: no such file"),
        (["--dataset", "mars"], "invalid choice"),
    ],
)  # fmt: skip
def test_mistakes_cost_a_line(runs, words, what):
    status, _, log = runs(*words)
    errors = [line for line in log.splitlines() if not line[:1].isdigit()]
    assert status == 2 and len(errors) == 1 and errors[0].startswith("main_zeroshot.py: ") and what in errors[0]


def test_clips_that_cannot_be_read_are_left_out_and_read_again(data, runs, asked, tmp_path):
    root = tmp_path / "egtea"
    shutil.copytree(data.root / "egtea", root)
    broken = sorted(root.rglob("*.mp4"))[1]
    intact = broken.read_bytes()
    broken.write_bytes(intact[:200])
    words = ["--egtea-root", root]
    status, out, log = runs(*words)
    assert status == 0 and "1 of 5 clips cannot be read" in log and "4  1 unreadable" in out
    found = np.load(tmp_path / "out/egtea.npz")
    assert found["readable"].tolist() == [0, 2, 3, 4] and len(found["scores"]) == 4
    status, _, log = runs(*words, "--strict-data")
    assert status == 2 and "--strict-data:" in log
    broken.write_bytes(intact)
    asked.clear()
    assert runs(*words)[0] == 0 and asked == [1]
    assert [row["unreadable"] for row in read_json_lines(tmp_path / "out/eval_log.txt").objects] == [1, 0]
    for path in root.rglob("*.mp4"):
        path.write_bytes(b"")
    status, _, log = runs(*words, output=tmp_path / "none")
    assert status == 2 and f"--egtea-root {root}: no clip can be read" in log


def test_a_question_with_a_clip_that_cannot_be_read_is_in_no_accuracy(data, runs, tmp_path):
    root = tmp_path / "ego4d"
    shutil.copytree(data.root / "ego4d", root)
    (root / "uid1.mp4/0.mp4").unlink()  # which the inter-video questions 1 and 3 need
    assert runs("--egomcq-root", root, datasets=["egomcq"])[0] == 0
    assert set(json.loads((tmp_path / "out/egomcq.json").read_text())) == {"0", "2"}
    (row,) = read_json_lines(tmp_path / "out/eval_log.txt").objects
    assert row["intra_questions"] == 2 and row["inter_questions"] == 0 and row["unreadable"] > 0 and "inter" not in row


# ---- the log of features -----------------------------------------------------------------------


def test_damaged_entries_are_passed_over(tmp_path, caplog):
    plan = [[0, 1], [2, 3], [4]]
    values = {
        k: np.random.default_rng().normal(size=(len(rows), 2, 3)).astype(np.float32) for k, rows in enumerate(plan)
    }
    log = FeatureLog(tmp_path, "egtea", 0, "mark")
    log.append(0, Batch(plan[0], values[0]))
    FeatureLog(tmp_path, "egtea", 3, "mark").append(2, Batch(plan[2], values[2]))
    with open(log.values_path, "ab") as file:
        file.write(b"half a batch")  # of a process that was killed before it wrote the line
    log.append(1, Batch(plan[1], values[1]))
    found = read_batches(tmp_path, "egtea", "mark", plan)
    assert sorted(found) == [0, 1, 2] and all(np.array_equal(found[k].values, values[k]) for k in found)
    assert (
        read_batches(tmp_path, "egtea", "other", plan) == {} and read_batches(tmp_path, "ek100_mir", "mark", plan) == {}
    )
    assert "damaged" not in caplog.text

    line = json.loads(log.index_path.read_text().splitlines()[0])
    changes = (
        {"rows": [0]},
        {"batch": 7},
        {"shape": [2, 2]},
        {"shape": [2, 2, 10**7]},
        {"offset": -1},
        {"crc": 1},
        {"offset": 9},
    )
    log.index_path.write_text("".join(json.dumps(line | change) + "\n" for change in changes) + "[]\n{")
    assert sorted(read_batches(tmp_path, "egtea", "mark", plan)) == [2]
    assert "8 damaged entries" in caplog.text
    log.values_path.unlink()
    assert sorted(read_batches(tmp_path, "egtea", "mark", plan)) == [2]
