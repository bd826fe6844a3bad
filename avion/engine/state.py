"""Training checkpoints: written whole or not at all, with everything a run needs to go on.

Keys are AVION's (epoch, state_dict, optimizer, scaler, best_acc1, args) and ours: `model_config` (and
`classifier`, if it is one), `preprocess`, `step` (optimizer steps done within `epoch`), `due` (see `Position`), `rng`
(one entry per process).
"""

import logging
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.optim import ZeroRedundancyOptimizer

from avion.constants import NORM_STYLES
from avion.errors import UserError
from avion.files import written_whole
from avion.optim import load_optimizer_state
from avion.weights import Checkpoint
from avion.weights.saving import model_fields

from .args import as_namespace
from .distributed import World

logger = logging.getLogger(__name__)

LATEST, BEST = "checkpoint.pt", "checkpoint_best.pt"


@dataclass
class Position:
    """Where a run stands: `step` optimizer steps into `epoch`; the best figure so far.

    `due`: the line of log.txt of the epoch before, while its evaluation is still to come.
    """

    epoch: int = 0
    step: int = 0
    best: float = float("-inf")
    due: dict[str, Any] | None = None


def save_atomically(content: Mapping[str, Any], path: Path) -> None:
    """`torch.save` as `written_whole` does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as file:
        torch.save(dict(content), file)


def copy_atomically(source: Path, target: Path) -> None:
    """The same for a file that is already complete on this disk."""
    with open(source, "rb") as complete, written_whole(target) as copy:
        shutil.copyfileobj(complete, copy, length=1 << 24)


def rng_state(device: torch.device) -> dict[str, Any]:
    """The generators of this process, as values that load under `weights_only`."""
    numpy_name, keys, position, has_gauss, cached = np.random.get_state()
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": [numpy_name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "python": [version, list(internal), gauss],
    }


def set_rng_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Put back what `rng_state` returned."""
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def save_checkpoint(
    args: Any, world: World, model, optimizer, scaler, position: Position, *, is_best: bool = False
) -> None:
    """All processes call it; rank 0 writes `checkpoint.pt`, and `checkpoint_best.pt` where it is the best."""
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
                "scaler": scaler.state_dict(),
                "best_acc1": position.best,
                "args": as_namespace(args),
                **model_fields(model),
                "preprocess": {"norm_style": args.norm_style, **NORM_STYLES[args.norm_style]._asdict()},
                "rng": rng,
            }
            folder = Path(args.output_dir)
            save_atomically(content, folder / LATEST)
            if is_best:
                copy_atomically(folder / LATEST, folder / BEST)


def find_resume(args: Any) -> str | None:
    """What to go on from: `--resume`, else the checkpoint of an earlier run in `--output-dir`."""
    if args.resume:
        return args.resume
    latest = Path(args.output_dir) / LATEST
    return str(latest) if latest.exists() else None


def _restore_optimizer(optimizer, saved: Mapping[str, Any], source: str, args: Any) -> None:
    try:
        groups = saved["param_groups"]
        # PyTorch would take AdamW's state for SGD's and fail in the first step. What else a group may lack, of an
        # older PyTorch, it fills in.
        own = [name for name in ("betas", "momentum") if name in optimizer.defaults]
        unknown = [name for name in own if any(name not in group for group in groups)]
        if unknown:
            raise ValueError(f"it has no {unknown[0]}")
        load_optimizer_state(optimizer, saved)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as e:
        raise UserError(
            f"{source}: its optimizer state does not fit --optimizer {args.optimizer} ({e}); resume with the "
            "flags it was trained with"
        ) from e


def restore(checkpoint: Checkpoint, args: Any, world: World, optimizer, scaler) -> Position:
    """Optimizer, scaler, generators and position from a checkpoint whose weights are already loaded.

    A checkpoint of weights alone (a released one) starts a new run from them.
    """
    saved, source = checkpoint.training, checkpoint.path
    if saved is None:
        logger.info("%s holds weights only: a new run starts from them", source)
        return Position(epoch=args.start_epoch)
    _restore_optimizer(optimizer, saved.optimizer, source, args)
    if saved.scaler:
        scaler.load_state_dict(saved.scaler)
    if len(saved.rng) == world.size:
        set_rng_state(saved.rng[world.rank], world.device)
    elif saved.rng:
        logger.warning(
            "%s was written by %d processes and goes on with %d: same data order, other dropout draws",
            source, len(saved.rng), world.size,
        )  # fmt: skip
    # Another run's evaluation is not ours to make up for.
    here = Path(source).resolve() == (Path(args.output_dir) / LATEST).resolve()
    return Position(
        saved.epoch, saved.step, float("-inf") if saved.best is None else saved.best, saved.due if here else None
    )
