"""Jobs through submitit: what is asked for, what is refused before it costs queue time, and a real run of it."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from avion.engine.submit import ENTRY_POINTS, EntryPointJob, SubmitOptions, submit
from avion.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = ROOT / "slurm/submit.py"


@pytest.fixture
def launch(capsys, monkeypatch):
    """slurm/submit.py from another folder: status, stdout, stderr."""
    monkeypatch.chdir(ROOT / "docs")
    main = runpy.run_path(str(LAUNCHER))["main"]

    def run(*words):
        status = main(list(map(str, words)))
        return status, *capsys.readouterr()

    return run


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def wait_for(condition, what, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.05)


def test_processes_of_a_job_are_stopped_and_go_on(tiny_flags, tmp_path):
    """submitit's local executor, two processes: SIGUSR1 stops both, they are started again and go on."""
    job_dir, output = tmp_path / "job", tmp_path / "out"
    words = [*tiny_flags, "--batch-size", "2", "--epochs", "8", "--eval-freq", "8"]
    job = ["--cluster", "local", "--ngpus", "0", "--tasks-per-node", "2", "--timeout", "10", "--job_dir", job_dir]
    # Into a file: the job inherits it, and nobody waits for the end of a pipe.
    with open(tmp_path / "stdout", "w") as stdout:
        command = [sys.executable, str(LAUNCHER), "main_pretrain.py", *map(str, job), "--", *words]
        subprocess.run([*command, "--output-dir", str(output)], stdout=stdout, stderr=stdout, check=True, timeout=120)
    controller = int((tmp_path / "stdout").read_text().split("submitted as job ")[1].split()[0])
    steps = output / "steps.txt"
    try:
        wait_for(steps.exists, "training")
        tasks = [int(p) for p in subprocess.check_output(["pgrep", "-P", str(controller)]).split()]
        assert len(tasks) == 2
        os.kill(tasks[1], signal.SIGUSR1)
        log = output / "train.log"
        wait_for(lambda: "going on from" in log.read_text(), "going on")
        where = log.read_text().split("SIGUSR1 at ")[1].split(" of ")[0]  # epoch 3, step 2
        assert f"going on from {output / 'checkpoint.pt'}: {where}" in log.read_text()
        wait_for(lambda: (output / "eval_log.txt").exists(), "the end of the training")
        wait_for(lambda: not os.path.exists(f"/proc/{controller}") or _zombie(controller), "the end of the job")
    finally:
        if os.path.exists(f"/proc/{controller}"):
            os.kill(controller, signal.SIGKILL)
    assert [row["epoch"] for row in lines(output / "log.txt")] == list(range(8))
    assert torch.load(output / "checkpoint.pt", weights_only=False)["epoch"] == 8
    assert "2 processes (torchrun, gloo)" in (output / "train.log").read_text()


def _zombie(pid):
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_what_is_asked_of_slurm(tmp_path, monkeypatch):
    """sbatch and srun are stand-ins that keep the batch script; the real ones are in tests/slurm."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, body in (("srun", "exit 0"), ("sbatch", f'cp "$1" {tmp_path}/batch.sh; echo Submitted batch job 17')):
        (tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)
    before = dict(os.environ)
    options = SubmitOptions(
        ngpus=4,
        nodes=2,
        timeout=90,
        partition="gpu",
        comment="soon; please",
        account="me",
        qos="low",
        mem="100G",
        constraint="ib",
        use_volta32=True,
        cpus_per_task=6,
        job_dir=str(tmp_path / "jobs"),
        max_requeues=3,
        dependency="afterok:16",
    )
    assert submit("main_finetune_retrieval.py", ["--pretrain-model", "x.pt"], options) == "17"
    assert dict(os.environ) == before
    batch = (tmp_path / "batch.sh").read_text()
    asked = {line.removeprefix("#SBATCH --") for line in batch.splitlines() if line.startswith("#SBATCH")}
    wanted = {
        "nodes=2",
        "ntasks-per-node=4",
        "gpus-per-node=4",
        "cpus-per-task=6",
        "time=90",
        "partition=gpu",
        "account=me",
        "qos=low",
        "mem=100G",
        "comment='soon; please'",
        "requeue",
        "signal=USR1@120",
        "open-mode=append",
        "job-name=finetune_retrieval",
        "dependency=afterok:16",
    }
    assert wanted <= asked and "constraint='ib&volta32gb'" in asked
    assert "MAX_REQUEUES=3" in batch and 'requeue_or_exit "$status"' in batch
    assert subprocess.run(["bash", "-n", str(tmp_path / "batch.sh")]).returncode == 0


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_dry_run_of_every_entry_point(entry_point, launch, tmp_path):
    status, out, _ = launch(entry_point, "--ngpus", "2", "--dry-run", "--", "--output-dir", tmp_path / "out")
    assert status == 0 and f"python ../{entry_point} --output-dir" in out
    assert str(tmp_path / "out/slurm") in out and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words, message",
    [
        (["main_pretrain.py", "--", "--modle", "X"], "main_pretrain.py: unknown flag --modle: did you mean --model"),
        (["main_pretrain.py", "--", "--config", "none.yaml"], "none.yaml: cannot be read"),
        (["main_pretrain.py", "--gpus", "8"], "unknown flag --gpus: did you mean --ngpus"),
        (["main_pretrain.py", "--ngpus", "0"], "--ngpus 0: at least 1 is required; without GPUs give --tasks-per-node"),
        (["main_pretrain.py", "--nodes", "0"], "--nodes: found '0', expected a whole number from 1"),
        (["main_pretrain.py", "--nodes", "2", "--cluster", "local"], "--cluster local has only one"),
        (["main.py"], "main.py: no such entry point; there are main_pretrain.py"),
        (["--ngpus", "8"], "the entry point comes first"),
        ([], "the entry point comes first"),
    ],
)
def test_mistakes_cost_one_line_and_no_queue_time(words, message, launch):
    status, out, err = launch(*words)
    assert status == 2 and out == ""
    assert message in err and len(err.splitlines()) == 1


def test_without_slurm_or_submitit(tmp_path, monkeypatch):
    options = SubmitOptions(job_dir=str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match='could not be submitted: .*"srun"'):
        submit("main_pretrain.py", [], options)
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match="submitit is not installed .* pip install submitit"):
        submit("main_pretrain.py", [], options)


def test_a_failed_entry_point_fails_the_job(capsys):
    with pytest.raises(SystemExit) as failed:
        EntryPointJob("main_pretrain.py", ["--nonsense"])()
    assert failed.value.code == 2 and "unknown flag --nonsense" in capsys.readouterr().err
