"""Compares the flags of a run with those of the checkpoint that it goes on from: some changes are listed, others
refused.

docs/checkpoints.md has the table of all flags.
"""

import dataclasses
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from torch import nn

from avion.constants import OTHER_RUN
from avion.errors import UserError
from avion.weights import Checkpoint

from .options import TrainingOptions
from .options.model_args import BEHAVIOUR

logger = logging.getLogger(__name__)

# Flags that change nothing in what is trained: they say where the run writes, what it logs and how it is spread over
# machines, or the checkpoint decides in their place (`--resume` and the sizes of the model, which `_model` compares).
FREE = frozenset(
    """
    output_dir evaluate eval_batch_size eval_freq save_steps keep_checkpoints allow_changes print_freq workers debug
    tensorboard wandb wandb_project wandb_name wandb_mode device gpu world_size rank local_rank dist_url dist_backend
    dist_timeout data_timeout use_zero decode_threads video_index resume start_epoch grad_checkpointing compile
    overwrite similarity_filename pickle_filename submission sls_pt sls_tl sls_td use_multi_epochs_loader evaluate_task
    dataset_val model model_args clip_length context_length vocab_size project_embed_dim num_classes batch_size
    update_freq plugins
    """.split()
)
# A file of the same name is taken for the same file in another place.
_FILES = ("pretrain_model", "pretrain_path")
# Flags that say which parameters are trained, with the values that they have in checkpoints from before the flags.
_TRAINED = {"lock_video": None, "lock_text": None, "lock_except": [], "freeze_temperature": False}
_SCHEDULE = ("epochs", "warmup_epochs", "lr", "lr_start", "lr_end", "fix_lr", "batch_size")


@dataclass(frozen=True)
class Change:
    """A flag whose value differs from the value in the checkpoint.

    Attributes:
        flag: The name of the flag, without dashes in front.
        text: What differs, for messages.
        other_run: Whether the change makes the run another run.
    """

    flag: str
    text: str
    other_run: bool


def find_changes(
    checkpoint: Checkpoint,
    options: TrainingOptions,
    model: nn.Module,
    data: Mapping[str, str],
    batches: tuple[int, int],
) -> list[Change]:
    """Find what differs between a run and the checkpoint that it goes on from.

    Args:
        checkpoint: A checkpoint of this project with a training state. For other files nothing is compared: their flags
            are of other programs.
        options: The options of the run.
        model: The model of the run.
        data: What identifies the clips of the run, by flag (`Task.data`); empty on all processes but one.
        batches: The clips of an optimizer step, before and now; 0 where it is not known.

    Returns:
        The changes.
    """
    saved = checkpoint.training
    if saved is None or "model_config" not in checkpoint.contents or "step" not in checkpoint.contents:
        return []
    before, now = {**_TRAINED, **checkpoint.args}, options.values()
    found = [
        Change(name.replace("_", "-"), f"--{name.replace('_', '-')} {_shown(before[name])} -> {_shown(value)}", other)
        for name, value in now.items()
        if name in before and name not in FREE and _differs(name, before, now)
        for other in [_makes_another_run(name, before, now)]
    ]
    found += _model(checkpoint.contents["model_config"], model)
    found += [
        Change(flag, f"--{flag} has other clips", True)
        for flag, mark in data.items()
        if saved.data.get(flag, mark) != mark
    ]
    if 0 not in batches and batches[0] != batches[1]:
        within = bool(saved.clips if saved.clips is not None else saved.step)
        where = " within an epoch" if within else ""
        found.append(Change("batch-size", f"global batch {batches[0]} -> {batches[1]} clips{where}", within))
    return found


def settle(changes: list[Change], path: str, allowed: list[str], *, tell: bool = True) -> None:
    """List changes as a warning, unless `tell` is false: one process of a run tells them.

    Args:
        changes: What `find_changes` returned.
        path: The checkpoint.
        allowed: The values of `--allow-changes`.

    Raises:
        UserError: A change makes the run another run, and is not allowed.
    """
    refused = [change for change in changes if change.other_run and change.flag not in allowed]
    if refused:
        flags = " ".join(dict.fromkeys(change.flag for change in refused))
        raise UserError(
            f"{path}: {_listed(refused)}: that would be another run; give what the checkpoint was trained with, "
            f"another --output-dir, or --allow-changes {flags}"
        )
    if changes and tell:
        logger.warning("going on from %s with other flags: %s", path, _listed(changes))


def trains_others(changes: list[Change]) -> bool:
    """Whether other parameters are trained than before, so that the state of the optimizer is of no use."""
    return any(change.flag.replace("-", "_") in _TRAINED for change in changes)


def tell_schedule(changes: list[Change], before: float, after: float) -> None:
    """Report what the learning rate does where a flag of its schedule has changed.

    Args:
        changes: What `find_changes` returned.
        before: The learning rate of the last optimizer step.
        after: The learning rate of the next optimizer step.
    """
    names = [change.flag for change in changes if change.flag.replace("-", "_") in _SCHEDULE]
    if not names:
        return
    flags = ", --".join(names)
    if math.isclose(before, after, rel_tol=1e-3):
        logger.info("--%s changes the schedule: the learning rate of the next step is still %.3g", flags, after)
        return
    ratio = f", {after / before:.3g} times as much" if before > 0 else ""
    logger.warning(
        "--%s changes the schedule: the learning rate of the last step was %.3g, that of the next step is %.3g%s",
        flags,
        before,
        after,
        ratio,
    )


def _listed(changes: list[Change]) -> str:
    return ", ".join(change.text for change in changes)


def _differs(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    one, other = before[name], now[name]
    if name in _FILES and isinstance(one, str) and isinstance(other, str):
        return PurePath(one).name != PurePath(other).name
    return _plain(one) != _plain(other)


def _makes_another_run(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Return whether a changed flag is one that is refused. Files of clips are compared by what is in them."""
    if name == "clip_stride" and "strided" not in (before.get("frame_sampling"), now["frame_sampling"]):
        return False
    return name.replace("_", "-") in OTHER_RUN and name not in ("train_metadata", "val_metadata")


def _model(before: Any, model: nn.Module) -> list[Change]:
    """List the fields of the model's configuration that have changed, without those that only say how the model
    computes or is regularised.
    """
    if not isinstance(before, Mapping):
        return []
    now = dataclasses.asdict(model.config)
    names = [n for n in now if n in before and n not in BEHAVIOUR and _plain(before[n]) != _plain(now[n])]
    return [
        Change(
            "clip-length" if n == "num_frames" else "model-args",
            f"model {n} {_shown(before[n])} -> {_shown(now[n])}",
            True,
        )
        for n in names
    ]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _shown(value: Any) -> str:
    """Return a value as a message shows it: short, and on one line."""
    text = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    text = "".join(c if c.isprintable() else "?" for c in text)
    return (text if len(text) <= 60 else f"...{text[-57:]}") or "nothing"
