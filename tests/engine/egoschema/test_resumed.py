"""EgoSchema by several processes, interrupted, and once more with other flags."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import main_egoschema
from avion.engine.egoschema import evaluate
from avion.engine.egoschema.results import ResultLog, read_results
from avion.models import model_from_checkpoint
from tests.engine.egoschema.case import UIDS, read_outputs
from tests.processes import run_processes

ROOT = Path(__file__).resolve().parents[3]


def _run(rank, size, flags, output):
    assert main_egoschema.main([*flags, "--output-dir", str(output), "--frames", "4", "16", "--dist-timeout", "1"]) == 0


def test_the_same_answers_for_any_number_of_processes(data, runs, tmp_path):
    alone = tmp_path / "alone"
    assert runs("--frames", 4, 16, output=alone)[0] == 0
    for size in (2, 3):
        output = tmp_path / f"of{size}"
        run_processes(_run, size, tmp_path / f"log{size}", data.flags, output)
        assert read_outputs(output, (4, 16)) == read_outputs(alone, (4, 16))
        logs = [len(p.read_text().splitlines()) for p in sorted(output.glob("egoschema_results.*.jsonl"))]
        assert len(logs) == size and sum(logs) == 7  # each video once


def test_workers_change_nothing(runs, tmp_path):
    assert runs("--frames", 4, 16, output=tmp_path / "alone")[0] == 0
    assert runs("--frames", 4, 16, "--workers", 2)[0] == 0
    assert read_outputs(tmp_path / "out", (4, 16)) == read_outputs(tmp_path / "alone", (4, 16))


def test_a_killed_run_goes_on_with_other_processes(data, runs, tmp_path):
    """SIGKILL in the middle; the videos that were done are not computed again, and the outcome is the same."""
    frames = ["--frames", "4", "2048"]  # long enough to be caught at it
    output, log = tmp_path / "out", tmp_path / "out/egoschema_results.0.jsonl"
    command = [sys.executable, str(ROOT / "main_egoschema.py"), *data.flags, *frames, "--output-dir", str(output)]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 120
    while (not log.exists() or log.read_bytes().count(b"\n") < 2) and time.monotonic() < deadline:
        assert job.poll() is None, job.stdout.read().decode()
        time.sleep(0.005)
    job.send_signal(signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL
    job.stdout.close()
    before = log.read_text().splitlines()
    assert 2 <= len(before) < 7
    assert not list(output.glob("egoschema_*.json"))  # nothing half-done to be mistaken for answers

    run_processes(_go_on, 2, tmp_path / "log", [*data.flags, *frames], output)
    assert log.read_text().splitlines()[: len(before)] == before
    rows = [json.loads(line) for path in output.glob("egoschema_results.*.jsonl") for line in path.open()]
    assert sorted(row["q_uid"] for row in rows) == sorted(UIDS)  # the done ones were not computed again
    assert runs(*frames, output=tmp_path / "whole")[0] == 0
    assert read_outputs(output, (4, 2048)) == read_outputs(tmp_path / "whole", (4, 2048))


def _go_on(rank, size, flags, output):
    assert main_egoschema.main([*flags, "--output-dir", str(output), "--dist-timeout", "1"]) == 0


def forbid_videos(monkeypatch):
    monkeypatch.setattr(evaluate.LongVideos, "__getitem__", lambda *_: pytest.fail("a video is read again"))


def test_a_finished_run_reads_no_video_again(runs, monkeypatch, tmp_path):
    assert runs("--frames", 4, 16)[0] == 0
    first = read_outputs(tmp_path / "out", (4, 16))
    forbid_videos(monkeypatch)
    status, _, _, log = runs("--frames", 4, 16)
    assert status == 0 and "7 of them answered before" in log
    assert read_outputs(tmp_path / "out", (4, 16)) == first


def test_a_new_count_is_all_that_is_computed(runs, monkeypatch, tmp_path):
    assert runs("--frames", 4)[0] == 0
    asked = []
    real = evaluate.LongVideos.__getitem__
    monkeypatch.setattr(evaluate.LongVideos, "__getitem__", lambda self, key: asked.append(key) or real(self, key))
    assert runs("--frames", 4, 16)[0] == 0
    assert asked == [(i, (16,)) for i in range(7)]
    together = tmp_path / "together"
    assert runs("--frames", 4, 16, output=together)[0] == 0
    assert read_outputs(tmp_path / "out", (4, 16)) == read_outputs(together, (4, 16))


@pytest.mark.parametrize(
    "change", [["--sampling", "prefix"], ["--prompt", "{option}"], ["--precision", "bf16"], ["other weights"]]
)
def test_results_of_other_settings_or_weights_are_not_taken(data, runs, tmp_path, change):
    assert runs("--frames", 4)[0] == 0
    if change == ["other weights"]:
        content = torch.load(data.checkpoint, weights_only=True)
        content["state_dict"]["visual.image_projection"][0, 0] += 1e-3
        torch.save(content, tmp_path / "other.pt")
        change = ["--pretrain-model", tmp_path / "other.pt"]
    _, _, _, log = runs("--frames", 4, *change)
    assert "7 questions, 0 of them answered before" in log


def test_what_earlier_versions_called_prefix_is_prefix_hold_now(data, runs, tmp_path):
    """Their scores of clips longer than the video are of other frames: not those of `prefix`."""
    assert runs("--frames", 90, "--sampling", "prefix-hold")[0] == 0
    (line, *_) = (tmp_path / "out/egoschema_results.0.jsonl").read_text().splitlines()
    settings = json.loads((tmp_path / "out/egoschema_scores.json").read_text())["settings"]
    model = model_from_checkpoint(data.checkpoint)
    old = evaluate.fingerprint(model, settings | {"sampling": "prefix"})
    assert json.loads(line)["fingerprint"] == old
    for sampling, answered in (("prefix-hold", 7), ("prefix", 0), ("uniform", 0), ("prefix", 7)):
        _, _, _, log = runs("--frames", 90, "--sampling", sampling)
        assert f"7 questions, {answered} of them answered before" in log


def test_a_changed_question_is_answered_anew(data, runs, tmp_path):
    assert runs("--frames", 4)[0] == 0
    questions = [dict(q) for q in data.questions]
    questions[3]["option 2"] = "C sits down"
    (tmp_path / "q.json").write_text(json.dumps(questions))
    _, _, _, log = runs("--frames", 4, "--questions", tmp_path / "q.json")
    assert "6 of them answered before" in log


def test_damaged_lines_are_passed_over(tmp_path, caplog):
    questions = [evaluate.Question(uid, "?", tuple("abcde")) for uid in UIDS[:3]]
    scores = {4: [0.1, 0.2, 0.3, 0.4, 0.5]}
    log = ResultLog(tmp_path, 0, "mark")
    log.append(questions[0], scores)
    path = tmp_path / "egoschema_results.0.jsonl"
    line = path.read_bytes()
    others = [b"[]", b'{"fingerprint": "mark"}', b"\xff", line.strip().replace(b"0.5]", b"NaN]"), b"nonsense"]
    path.write_bytes(b"\n".join([line.strip(), *others]) + b"\n" + line[:40])  # cut off in the middle
    log = ResultLog(tmp_path, 0, "mark")
    log.append(questions[1], {8: [1.0, 0.0, 0.0, 0.0, 0.0]})
    (tmp_path / "egoschema_results.1.jsonl").write_bytes(line.replace(b'"4"', b'"16"'))
    found = read_results(tmp_path, "mark", questions)
    assert found == {UIDS[0]: {4: scores[4], 16: scores[4]}, UIDS[1]: {8: [1.0, 0.0, 0.0, 0.0, 0.0]}}
    assert "6 damaged lines" in caplog.text
    assert read_results(tmp_path, "another", questions) == {}
