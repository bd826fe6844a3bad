"""Checkpoints of a training: written whole or not at all, with everything that a run needs to resume.

The keys epoch, state_dict, optimizer, scaler, best_acc1 and args are those of AVION. This project adds `model_config`,
`classifier` (of a classifier), `preprocess`, `step` (optimizer steps done within `epoch`), `due` (see `Position`) and
`rng` (an entry per process).
"""

import argparse
import logging
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from avion.constants import NORM_STYLES
from avion.errors import UserError
from avion.files import written_whole
from avion.optim import load_optimizer_state
from avion.weights import Checkpoint
from avion.weights.saving import model_fields

from .distributed import World
from .options import TrainingOptions

logger = logging.getLogger(__name__)

LATEST, BEST = "checkpoint.pt", "checkpoint_best.pt"


@dataclass
class Position:
    """Where a training stands.

    Attributes:
        epoch: The number of the current epoch, counted from 0.
        step: Optimizer steps done within the epoch.
        best: The best value so far of the metric that decides which model is best.
        due: The line of log.txt of the epoch before, as long as the evaluation of that epoch is still to come.
    """

    epoch: int = 0
    step: int = 0
    best: float = float("-inf")
    due: dict[str, Any] | None = None

    def steps_done(self, steps: int) -> int:
        """Optimizer steps since the beginning of the training; `steps` is the number of steps of an epoch."""
        return self.epoch * steps + self.step


@dataclass
class Training:
    """What changes in the course of a training, and what its checkpoints hold.

    Attributes:
        model: The model on the device, neither compiled nor wrapped in DDP.
        optimizer: The optimizer of its parameters.
        scaler: The scaler of the loss; it does nothing unless the precision is fp16.
        position: Where the training stands.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    position: Position


def save_atomically(content: Mapping[str, Any], path: Path) -> None:
    """Write a file with `torch.save`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as file:
        torch.save(dict(content), file)


def copy_atomically(source: Path, target: Path) -> None:
    """Copy a file, whole or not at all."""
    with open(source, "rb") as complete, written_whole(target) as copy:
        shutil.copyfileobj(complete, copy, length=1 << 24)


def rng_state(device: torch.device) -> dict[str, Any]:
    """The states of the generators of this process, as values that `torch.load(weights_only=True)` reads."""
    numpy_name, keys, position, has_gauss, cached = np.random.get_state()
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": [numpy_name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "python": [version, list(internal), gauss],
    }


def set_rng_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Set the generators of this process to what `rng_state` returned."""
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def save_checkpoint(
    training: Training, options: TrainingOptions, flags: Mapping[str, Any], world: World, *, is_best: bool = False
) -> None:
    """Write `checkpoint.pt`, and with `is_best` also `checkpoint_best.pt`. All processes call this; rank 0 writes.

    Args:
        training: What the checkpoint holds.
        options: `--output-dir` and `--norm-style`.
        flags: All flags as the checkpoint stores them.
        world: The processes of the run.
        is_best: Whether the model is the best so far.

    Raises:
        UserError: The file cannot be written.
    """
    model, optimizer, position = training.model, training.optimizer, training.position
    if isinstance(optimizer, ZeroRedundancyOptimizer):
        optimizer.consolidate_state_dict(to=0)
    rng = world.gather(rng_state(world.device))
    with world.together("writing the checkpoint"):
        if world.is_main:
            content = {
                "epoch": position.epoch,
                "step": position.step,
                "due": position.due,
                "state_dict": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scaler": training.scaler.state_dict(),
                "best_acc1": position.best,
                "args": argparse.Namespace(**flags),
                **model_fields(model),
                "preprocess": {"norm_style": options.norm_style, **NORM_STYLES[options.norm_style]._asdict()},
                "rng": rng,
            }
            folder = Path(options.output_dir)
            save_atomically(content, folder / LATEST)
            if is_best:
                copy_atomically(folder / LATEST, folder / BEST)


def find_resume(options: TrainingOptions) -> str | None:
    """The checkpoint to resume: `--resume`, or the checkpoint that an earlier run left in `--output-dir`."""
    if options.resume:
        return options.resume
    latest = Path(options.output_dir) / LATEST
    return str(latest) if latest.exists() else None


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], source: str, name: str) -> None:
    """Load the state of an optimizer.

    Args:
        optimizer: The optimizer.
        saved: The state, as a checkpoint holds it.
        source: The checkpoint, for errors.
        name: The value of `--optimizer`, for errors.

    Raises:
        UserError: The state does not fit the optimizer.
    """
    try:
        groups = saved["param_groups"]
        # PyTorch would take the state of AdamW for that of SGD and fail in the first step. Whatever else the groups of
        # an older PyTorch lack, PyTorch fills in.
        own = [name for name in ("betas", "momentum") if name in optimizer.defaults]
        unknown = [name for name in own if any(name not in group for group in groups)]
        if unknown:
            raise ValueError(f"it has no {unknown[0]}")
        load_optimizer_state(optimizer, saved)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as e:
        raise UserError(
            f"{source}: its optimizer state does not fit --optimizer {name} ({e}); resume with the "
            "flags it was trained with"
        ) from e


def restore(
    checkpoint: Checkpoint,
    options: TrainingOptions,
    world: World,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> Position:
    """Restore optimizer, scaler and generators from a checkpoint whose weights are already loaded.

    Returns:
        Where the training stands. A checkpoint that holds weights alone (a released one) starts a new training.

    Raises:
        UserError: The state of the optimizer does not fit.
    """
    saved, source = checkpoint.training, checkpoint.path
    if saved is None:
        logger.info("%s holds weights only: a new run starts from them", source)
        return Position(epoch=options.start_epoch)
    restore_optimizer(optimizer, saved.optimizer, source, options.optimizer)
    if saved.scaler:
        scaler.load_state_dict(saved.scaler)
    if len(saved.rng) == world.size:
        set_rng_state(saved.rng[world.rank], world.device)
    elif saved.rng:
        logger.warning(
            "%s was written by %d processes and goes on with %d: same data order, other dropout draws",
            source, len(saved.rng), world.size,
        )  # fmt: skip
    # An evaluation that another run did not come to is not made up for here.
    here = Path(source).resolve() == (Path(options.output_dir) / LATEST).resolve()
    return Position(
        saved.epoch, saved.step, float("-inf") if saved.best is None else saved.best, saved.due if here else None
    )
