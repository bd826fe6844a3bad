"""Training with a sharded optimizer, interrupted and gone on with: as if nothing had happened, to the bit."""

import json

import pytest
import torch

from avion.engine.args import parse
from avion.engine.options import PretrainOptions
from avion.engine.peers import LostPeer
from avion.engine.run import train_or_evaluate
from avion.engine.tasks.pretrain import Pretrain
from avion.engine.trainer import Trainer
from tests.processes import run_processes


class Interrupted(Exception):
    pass


def _train(rank, size, words, output, stop_after):
    """The run, on this process of several; left in the middle of its work after so many steps."""
    original, done = Trainer.optimizer_step, []

    def step(self, *args):
        if len(done) == stop_after:
            raise Interrupted
        done.append(1)
        return original(self, *args)

    Trainer.optimizer_step = step
    try:
        train_or_evaluate(
            Pretrain, parse(PretrainOptions, [*words, "--output-dir", str(output)], "main_pretrain.py", "")
        )
    except (Interrupted, LostPeer):  # whichever a process learns of first: its own end, or that of the other
        return "interrupted"
    return len(done)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_an_interrupted_run_with_zero_ends_as_an_uninterrupted_one(optimizer, tiny_flags, tmp_path):
    """12 steps of two processes, stopped in the second epoch after a checkpoint and a lost step: losses, weights and
    the state of the optimizer."""
    words = [*tiny_flags, "--use-zero", "--optimizer", optimizer, "--batch-size", "2", "--save-steps", "2"]
    words += ["--print-freq", "1", "--drop-path-rate", "0.3"]
    assert run_processes(_train, 2, tmp_path / "a", words, tmp_path / "whole", None) == [12, 12]
    assert run_processes(_train, 2, tmp_path / "b", words, tmp_path / "cut", 9) == ["interrupted"] * 2
    saved = torch.load(tmp_path / "cut/checkpoint.pt", weights_only=False)
    assert (saved["epoch"], saved["step"]) == (1, 2)
    assert run_processes(_train, 2, tmp_path / "c", words, tmp_path / "cut", None) == [4, 4]

    whole, cut = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=False) for name in ("whole", "cut"))
    assert all(torch.equal(value, cut["state_dict"][name]) for name, value in whole["state_dict"].items())
    a, b = whole["optimizer"]["state"], cut["optimizer"]["state"]
    assert a.keys() == b.keys() and len(a) > 20
    assert all(torch.equal(value, b[i][name]) for i, state in a.items() for name, value in state.items())
    assert not torch.equal(saved["state_dict"]["visual.cls_token"], whole["state_dict"]["visual.cls_token"])

    losses = []
    for name in ("whole", "cut"):
        rows = [json.loads(line) for line in (tmp_path / name / "steps.txt").read_text().splitlines()]
        losses.append({(row["epoch"], row["step"]): row["loss"] for row in rows})
    assert losses[0] == losses[1] and len(losses[0]) == 12 and len(set(losses[0].values())) == 12
