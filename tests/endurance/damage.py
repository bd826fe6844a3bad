"""Small damage to the checkpoints of a run: it is noticed, and the run goes on from the checkpoint before."""

import contextlib
import functools
import io
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch

from avion.errors import UserError
from avion.weights import Checkpoint
from tests.endurance import frame
from tests.engine import quick

_KEPT: list[tempfile.TemporaryDirectory] = []


@functools.cache
def whole() -> Path:
    """The folder of an undisturbed run of three epochs; it goes with this process."""
    _KEPT.append(tempfile.TemporaryDirectory(prefix="endurance-whole-", dir=frame.memory()))
    folder = Path(_KEPT[0].name) / "run"
    train(folder)
    return folder


def train(folder: Path, *words: str) -> str:
    """Train in this process; what the run said."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        quick.run(folder, "--fix-lr", *words)  # a schedule that does not depend on --epochs
    return said.getvalue()


def hurt(path: Path, rng: np.random.Generator) -> str:
    """Damage a file in a small way; says how."""
    content = bytearray(path.read_bytes())
    offset, kind = int(rng.integers(len(content))), int(rng.integers(4))
    length = int(rng.integers(1, 4096))
    if kind == 0:
        content[offset] ^= 1 << int(rng.integers(8))
    elif kind == 3:
        del content[offset:]
    else:
        length = min(length, len(content) - offset)
        content[offset : offset + length] = bytes(length) if kind == 1 else rng.bytes(length)
    path.write_bytes(content)
    return f"{('a flipped bit', 'zeros', 'noise', 'cut short')[kind]} at {offset} of {path.stat().st_size}"


def same(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether two checkpoints hold the same weights and stand at the same place."""
    where = all(one.contents[key] == other.contents[key] for key in ("epoch", "step", "clips", "best_acc1"))
    return where and all(torch.equal(value, other.weights[name]) for name, value in one.weights.items())


def opened(trial: frame.Trial) -> None:
    """A damaged file is refused, or holds exactly what was written."""
    original = whole() / "checkpoint.pt"
    copy = trial.folder / "checkpoint.pt"
    shutil.copy(original, copy)
    how = hurt(copy, trial.rng)
    try:
        found = Checkpoint.open(copy)
    except UserError as e:
        assert str(copy) in str(e) and "\n" not in str(e), how
        return
    assert same(found, Checkpoint.open(original)), how


def gone_on(trial: frame.Trial) -> None:
    """A run whose latest checkpoint is damaged ends as one that nothing disturbed."""
    folder = trial.folder / "run"
    train(folder, "--epochs", str(1 + trial.number % 2))
    how = hurt(folder / "checkpoint.pt", trial.rng)
    said = train(folder)
    assert ("which is older" in said) == (folder / "checkpoint_damaged.pt").exists(), f"{how}: {said}"
    for name in ("checkpoint.pt", "checkpoint_best.pt"):
        found = Checkpoint.open(folder / name)
        assert same(found, Checkpoint.open(whole() / name)), f"{how}: {name}"
    assert not [name for name in os.listdir(folder) if name.endswith(".partial")], how


if __name__ == "__main__":
    frame.main(__doc__, {"damage when opened": (opened, 2000, 60), "a run goes on": (gone_on, 60, 4)})
