"""Checkpoints of a training: written whole or not at all, with everything that a run needs to resume.

The keys epoch, state_dict, optimizer, scaler, best_acc1 and args are those of AVION. This project adds `model_config`,
`classifier` (of a classifier), `preprocess`, `step` (optimizer steps done within `epoch`), `clips`, `due`
(`Position.pending`), `so_far` (`Position.sums`), `logs` (see `Position`), `began_from` (see `Training`) and `rng` (an
entry per process).
"""

import argparse
import functools
import logging
import os
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import nn

from avion.constants import NORM_STYLES
from avion.errors import UserError
from avion.files import written_whole
from avion.optim import is_sharded, load_optimizer_state
from avion.weights import Checkpoint
from avion.weights.saving import model_fields

from .distributed import World
from .options import TrainingOptions
from .resume import Start
from .run_files import BEST, LATEST, make_room

logger = logging.getLogger(__name__)

_UNKNOWN = float("-inf")


@dataclass
class Position:
    """Where a training stands.

    Attributes:
        epoch: The number of the current epoch, counted from 0.
        step: Optimizer steps done within the epoch.
        best: The best value so far of the metric that decides which model is best.
        pending: The line of log.txt of the epoch before, as long as the evaluation of that epoch is still to come.
        clips: Clips of the epoch that were trained on. They say where in the order of the epoch the training stands,
            whatever the batch size.
        sums: The sums from which the means of the epoch come (`Progress.sums`), empty at the beginning of an epoch.
        logs: How long the logs were when the checkpoint was written (`RunLog.lengths`): later lines are of this run.
    """

    epoch: int = 0
    step: int = 0
    best: float = float("-inf")
    pending: dict[str, Any] | None = None
    clips: int = 0
    sums: Mapping[str, Any] = field(default_factory=dict)
    logs: Mapping[str, Any] = field(default_factory=dict)

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
        began_from: The checkpoint that the run began from at first (`--resume`), empty where there was none.
        data: What identifies the clips that the run trains on and is evaluated on (`Task.data`).
        best: The best value so far of the metric that decides which model is best, as checkpoint_best.pt has it.
        evaluates_anew: Whether the clips to evaluate on have changed, so that earlier evaluations do not compare.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    position: Position
    began_from: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)
    best: float = _UNKNOWN
    evaluates_anew: bool = False


def _nothing() -> None:
    """Do nothing before a file takes its name."""


def save_atomically(content: Mapping[str, Any], path: Path, before: Callable[[], None] = _nothing) -> None:
    """Write a file with `torch.save`, whole or not at all.

    Args:
        content: The content of the file.
        path: The file.
        before: Is called once the file is complete, before it takes its name.

    Raises:
        UserError: The file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as file:
        torch.save(dict(content), file)
        _finish(file, before)


def copy_atomically(source: Path, target: Path, before: Callable[[], None] = _nothing) -> None:
    """Copy a file, whole or not at all.

    Args:
        source: The file to copy.
        target: The file to write.
        before: Is called once the copy is complete, before it takes its name.

    Raises:
        UserError: The file cannot be written.
    """
    with open(source, "rb") as complete, written_whole(target) as copy:
        shutil.copyfileobj(complete, copy, length=1 << 24)
        _finish(copy, before)


def _finish(file: BinaryIO, before: Callable[[], None]) -> None:
    """Flush a file to disk, and then do what has to be done before the file takes its name."""
    if before is not _nothing:
        file.flush()
        os.fsync(file.fileno())
        before()


def rng_state(device: torch.device) -> dict[str, Any]:
    """Return the states of this process's random generators, as values that `torch.load(weights_only=True)` reads."""
    numpy_name, keys, position, has_gauss, cached = np.random.get_state()
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": [numpy_name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "python": [version, list(internal), gauss],
    }


def set_rng_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Set the random generators of this process to the states that `rng_state` returned."""
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
    """Write `checkpoint.pt`, and with `is_best` first `checkpoint_best.pt`. All processes call this; rank 0 writes.

    The best one comes first, so that `best_acc1` in `checkpoint.pt` is never the value of a model that was not saved.

    Args:
        training: What the checkpoint holds.
        options: `--output-dir`, `--keep-checkpoints` and `--norm-style`.
        flags: All flags as the checkpoint stores them.
        world: The processes of the run.
        is_best: Whether the model is the best so far.

    Raises:
        UserError: The file cannot be written.
    """
    model, optimizer, position = training.model, training.optimizer, training.position
    if is_sharded(optimizer):
        optimizer.consolidate_state_dict(to=0)
    rng = world.gather(rng_state(world.device))
    with world.together("writing the checkpoint"):
        if world.is_main:
            content = {
                "epoch": position.epoch,
                "step": position.step,
                "clips": position.clips,
                "due": position.pending,
                "so_far": dict(position.sums),
                "logs": dict(position.logs),
                "began_from": training.began_from,
                "data": dict(training.data),
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
            room = functools.partial(make_room, folder, options.keep_checkpoints)
            if is_best:
                save_atomically(content, folder / BEST)
                copy_atomically(folder / BEST, folder / LATEST, before=room)
            else:
                save_atomically(content, folder / LATEST, before=room)


_OF_THE_COMMAND = ("weight_decay", "betas", "momentum", "eps")


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], source: str, name: str) -> None:
    """Load the state of an optimizer. Weight decay, betas, momentum and epsilon stay those that it was built with.

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
        # PyTorch would accept the state of AdamW for SGD and fail in the first step. Other values that the groups of an
        # older PyTorch lack are filled in by PyTorch.
        own = [name for name in ("betas", "momentum") if name in optimizer.defaults]
        unknown = [name for name in own if any(name not in group for group in groups)]
        if unknown:
            raise ValueError(f"it has no {unknown[0]}")
        built = [{k: group[k] for k in _OF_THE_COMMAND if k in group} for group in optimizer.param_groups]
        load_optimizer_state(optimizer, saved)
        for group, settings in zip(optimizer.param_groups, built, strict=True):
            group.update(settings)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as e:
        raise UserError(
            f"{source}: its optimizer state does not fit --optimizer {name} ({e}); resume with the "
            "flags it was trained with"
        ) from e


def restore(
    checkpoint: Checkpoint,
    start: Start,
    options: TrainingOptions,
    world: World,
    optimizer: torch.optim.Optimizer | None,
    scaler: torch.amp.GradScaler,
) -> Position:
    """Restore optimizer, scaler and random generators from a checkpoint whose weights are already loaded.

    Args:
        checkpoint: The checkpoint.
        start: How the run came by the checkpoint.
        options: The options of the run.
        world: The processes of the run.
        optimizer: The optimizer to restore; None where other parameters are trained than before.
        scaler: The loss scaler to restore.

    Returns:
        Where the training stands. A checkpoint that holds weights alone (a released one) starts a new training.

    Raises:
        UserError: The state of the optimizer does not fit.
    """
    saved, source = checkpoint.training, checkpoint.path
    if saved is None:
        logger.info("%s holds weights only: a new run starts from them", source)
        return Position(epoch=options.start_epoch)
    if optimizer is not None:
        restore_optimizer(optimizer, saved.optimizer, source, options.optimizer)
    elif world.is_main:
        logger.warning("%s: other parameters are trained than before: the state of the optimizer starts anew", source)
    if saved.scaler:
        scaler.load_state_dict(saved.scaler)
    if len(saved.rng) == world.size:
        set_rng_state(saved.rng[world.rank], world.device)
    elif saved.rng and world.is_main:
        logger.warning(
            "%s was written by %d processes and goes on with %d: same data order, other dropout draws",
            source,
            len(saved.rng),
            world.size,
        )
    clips = saved.step * global_batch(checkpoint) if saved.clips is None else saved.clips
    position = Position(
        saved.epoch, saved.step, _UNKNOWN if saved.best is None else saved.best, None, clips, saved.sums
    )
    # Where another run wrote the checkpoint before its evaluation, this run does not do that evaluation.
    return replace(position, pending=saved.pending, logs=saved.logs) if start.own else position


def global_batch(checkpoint: Checkpoint) -> int:
    """Return the clips of an optimizer step of the run that wrote a checkpoint; 0 where the checkpoint does not say."""
    if checkpoint.training is None:  # weights alone
        return 0
    args, processes = checkpoint.args, len(checkpoint.training.rng)
    try:
        return int(args["batch_size"]) * int(args.get("update_freq", 1)) * max(processes, 1)
    except (KeyError, TypeError, ValueError):
        return 0
