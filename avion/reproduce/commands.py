"""From a recipe to the command that runs it, with another number of processes, released weights or more flags."""

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from avion.engine.options import OptimOptions
from avion.engine.submit import program_words
from avion.errors import UserError

from .recipe import Recipe, parser_of

EGOSCHEMA = "main_egoschema.py"
ZERO_SHOT = "main_zeroshot.py"
_CLASSIFICATION = "main_finetune_classification.py"
# Flags that evaluation does not read, beside those of OptimOptions.
_TRAINING = (
    "train-metadata-aux", "scale-range", "pretrain-zoo", "pretrain-path", "pretrain-model", "freeze-temperature",
    "gather-with-grad", "grad-checkpointing", "margin", "relevancy-threshold", "mixup", "cutmix", "smoothing",
    "drop-path-rate", "dropout-rate", "eval-freq", "lock-video", "lock-text", "lock-except",
)  # fmt: skip
# This program decides where the files of a run lie and which run it is.
_RESERVED = ("output_dir", "seed", "evaluate", "resume", "device")


def with_processes(recipe: Recipe, count: int) -> Recipe:
    """Return the recipe for `count` processes with the same global batch: smaller batches, or several micro-batches.

    A micro-batch is never larger than the recipe's, whose memory is known to suffice.

    Raises:
        UserError: The batch does not divide among the processes.
    """
    if count < 1:
        raise UserError(f"--gpus {count}: at least 1 is required")
    if count == recipe.gpus or recipe.global_batch is None or recipe.flags.get("evaluate"):
        return dataclasses.replace(recipe, gpus=count)
    total, largest = recipe.global_batch, recipe.flags["batch-size"]
    pairs = recipe.entry_point == _CLASSIFICATION and (recipe.flags.get("mixup") or recipe.flags.get("cutmix"))
    each = total // count if total % count == 0 else 0
    for update_freq in range(1, each + 1):
        batch = each // update_freq
        if each % update_freq == 0 and batch <= largest and not (pairs and batch % 2):
            changes = {"batch-size": batch, "update-freq": None if update_freq == 1 else update_freq}
            return dataclasses.replace(recipe.with_flags(changes), gpus=count)
    possible = [n for n in range(1, 33) if total % n == 0 and not (pairs and (total // n) % 2)]
    even = " in even parts, which mixup needs" if pairs else ""
    raise UserError(
        f"--gpus {count}: the batch of {total} clips of {recipe.key} does not divide among {count} processes{even}; "
        f"give one of {', '.join(map(str, possible))}"
    )


def from_released(recipe: Recipe, checkpoint: str | None) -> Recipe:
    """Return the evaluation of released weights, in one process; the metrics are those of any number of processes.

    Args:
        recipe: The recipe whose row is evaluated.
        checkpoint: A path or an hf: address; None stands for the recipe's own released checkpoint.
    """
    source = checkpoint or recipe.checkpoint
    if source is None:
        raise UserError(
            f"--from-released: no checkpoint of {recipe.key} was released; give a file of your own with --checkpoint"
        )
    changes: dict[str, object] = {"output-dir": str(recipe.output_dir / "released"), "seed": None}
    if recipe.entry_point in (EGOSCHEMA, ZERO_SHOT):
        changes["pretrain-model"] = source
    else:
        optimisation = {f.name.replace("_", "-") for f in dataclasses.fields(OptimOptions)} - {"batch-size"}
        changes |= dict.fromkeys((*_TRAINING, *optimisation))
        changes |= {"evaluate": True, "resume": source}
    return dataclasses.replace(recipe.with_flags(changes), starts_from=None, gpus=1)


def with_words(recipe: Recipe, words: Sequence[str]) -> Recipe:
    """Return the recipe with more flags of the entry point, which override the recipe's."""
    if not words:
        return recipe
    values = vars(parser_of(recipe.entry_point).parse_args(list(words)))
    for name in (*_RESERVED, "config"):
        if name in values:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} after `--`: is set by this program; --runs, --seed, --device, --checkpoint say it")
    recipe = dataclasses.replace(recipe, flags={**recipe.flags, **{k.replace("_", "-"): v for k, v in values.items()}})
    return dataclasses.replace(recipe, starts_from=None) if "pretrain_model" in values else recipe


def command(recipe: Recipe, nodes: int = 1) -> list[str]:
    """Return the words of the command that runs a recipe, as a user types them in an activated environment."""
    return program_words(recipe.entry_point, recipe.words(), recipe.gpus, nodes)


def executable(words: Sequence[str]) -> list[str]:
    """Return the same command for this Python, in any environment, with the exit status of the processes."""
    module = {"python": [], "avion": ["-m", "avion"], "torchrun": ["-m", "avion.engine.torchrun"]}
    return [sys.executable, *module[words[0]], *words[1:]]


def shell_text(words: Sequence[str], width: int = 110) -> str:
    """Quote a command for a shell, in lines that end in a backslash; a flag and its values stay on one line."""
    groups: list[str] = []
    for word in words:
        starts = not groups or word.startswith("--") or Path(word).suffix == ".py"
        text = shlex.quote(word)
        if starts:
            groups.append(text)
        else:
            groups[-1] += f" {text}"
    lines = [""]
    for group in groups:
        if lines[-1] and len(lines[-1]) + len(group) > width:
            lines.append(f"    {group}")
        else:
            lines[-1] = f"{lines[-1]} {group}".strip() if len(lines) == 1 else f"{lines[-1]} {group}"
    return " \\\n".join(lines)
