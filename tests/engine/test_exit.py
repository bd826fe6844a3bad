"""What is left of the processes of a run when Python exits: no thread that could crash them."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.processes import agent
from tests.threads_at_exit import SAID

ROOT = Path(__file__).resolve().parents[2]

# Process 1 fails in the second step, as the environment says.
BROKEN = """
import os
from avion.engine.steps import Contrastive
from avion.errors import UserError

right = Contrastive.step
steps = []

def step(self, *args, **named):
    steps.append(1)
    if len(steps) == 2 and os.environ["RANK"] == "1":
        raise {"user": UserError, "other": RuntimeError}[os.environ["FAILS"]]("odd")
    return right(self, *args, **named)

Contrastive.step = step
"""

# A script as people wrote them for AVION, which leaves without a word.
AVIONS = """
import argparse
import torch
import avion.utils.distributed as utils

args = argparse.Namespace(world_size=1, rank=0, dist_url="env://", dist_backend="nccl")
utils.init_distributed_mode(args)
import torch.distributed.nn.functional as nn
print(nn.all_reduce(torch.ones(1)))
"""


def end(words, **environment):
    """Two processes of torchrun; the exit status, and what each of them left, after their output."""
    done = subprocess.run(
        [*agent(), "tests/threads_at_exit.py", *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    left = [line for line in done.stdout.splitlines() if SAID in line]
    return done.returncode, left, done.stdout


def test_training_with_everything_that_keeps_the_group(tiny_flags, tmp_path):
    words = ["main_pretrain.py", *tiny_flags, "--epochs", "1", "--batch-size", "2", "--use-zero", "--workers", "1"]
    status, left, output = end([*words, "--output-dir", tmp_path / "run"])
    assert (status, left) == (0, [f"{SAID}[]"] * 2), output


@pytest.mark.parametrize("fails, debug, status", [("user", False, 2), ("other", False, 1), ("user", True, 1)])
def test_an_error_of_one_process(fails, debug, status, tiny_flags, tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN)
    words = ["main_pretrain.py", *tiny_flags, "--epochs", "1", "--batch-size", "2", "--workers", "0"]
    words += ["--output-dir", tmp_path / "run", "--plugins", tmp_path / "broken.py", *["--debug"] * debug]
    found, left, output = end(words, FAILS=fails)
    assert "odd" in output and (found, left) == (status, [f"{SAID}[]"] * 2), output


def test_a_script_written_for_avion(tmp_path):
    (tmp_path / "script.py").write_text(AVIONS)
    status, left, output = end([tmp_path / "script.py"])
    assert (status, left) == (0, [f"{SAID}[]"] * 2) and output.count("2.") >= 2, output
