"""torchrun with the exit status of its processes, and what a signal to each of its parts does."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from tests.processes import agent

ROOT = Path(__file__).resolve().parents[2]
LEAVE = "import os, sys, time; time.sleep(float(sys.argv[1 + int(os.environ['RANK'])])); sys.exit(int(sys.argv[3]))"


def start(script, *words):
    command = [*agent(), script, *words]
    return subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.parametrize("late, status", [("0", 75), ("20", 75), ("0", 2), ("0", 0)])
def test_the_status_is_that_of_the_processes(late, status, tmp_path):
    """One that is 20 s late is ended by the agent's SIGTERM, which is no status of its own."""
    script = tmp_path / "leave.py"
    script.write_text(LEAVE)
    job = start(script, "0", late, status)
    output, _ = job.communicate(timeout=120)
    assert job.returncode == status, output


@pytest.mark.parametrize(
    "number, to_agent, status",
    [(signal.SIGUSR1, False, 75), (signal.SIGTERM, True, 143)],
    ids=["time limit", "SIGTERM to the agent"],
)
def test_the_checkpoint_is_written(number, to_agent, status, tiny_flags, tmp_path):
    """SLURM's signals go to the agent as well as to the processes."""
    words = [*tiny_flags, "--batch-size", "2", "--epochs", "500", "--eval-freq", "500", "--output-dir", tmp_path]
    job = start(ROOT / "main_pretrain.py", *words)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "steps.txt").exists() and time.monotonic() < deadline and job.poll() is None:
            time.sleep(0.05)
        if not to_agent:
            for child in subprocess.check_output(["pgrep", "-P", str(job.pid)], text=True).split():
                os.kill(int(child), number)
        job.send_signal(number)
        output, _ = job.communicate(timeout=120)
    finally:
        job.kill()
    assert job.returncode == status, output
    log = (tmp_path / "train.log").read_text()
    epoch, step = log.split(f"{number.name} at epoch ")[1].split(" of ")[0].split(", step ")
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=False)
    assert (checkpoint["epoch"], checkpoint["step"]) == (int(epoch), int(step))
