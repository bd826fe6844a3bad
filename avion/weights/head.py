"""The heads of fine-tuned classifiers in checkpoints: those of this project, and upstream's (`visual.*`, `fc_cls.*`).

Checkpoints of this project say in the field `classifier` what their classes are: {"num_classes", "dropout", "actions"}.
Upstream's checkpoints say it in `args.mapping_act2v` and `args.mapping_act2n`, and once more in the table
`args.actions`; they hold no name of a model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from avion.errors import UserError

from .facts import saved_args
from .foreign import table_columns


@dataclass(frozen=True)
class Head:
    """What a checkpoint says about the classes of its classifier.

    Attributes:
        num_classes: The number of classes.
        actions: "verb_class:noun_class" for each class; None where the checkpoint has no list of actions.
    """

    num_classes: int
    actions: tuple[str, ...] | None


def is_classifier(weights: Mapping[str, Tensor]) -> bool:
    """Return whether canonical `weights` are of a fine-tuned classifier: a video tower and a head, no text tower."""
    return any(name.startswith("fc_cls.") for name in weights)


def read_head(checkpoint: Mapping[str, Any], weights: Mapping[str, Tensor], path: str) -> Head:
    """Read the head of a classifier's checkpoint.

    Args:
        checkpoint: The contents of the checkpoint.
        weights: The weights in it under canonical names.
        path: The path of the checkpoint, for messages.

    Returns:
        What the checkpoint says about its classes.

    Raises:
        UserError: The checkpoint is not of a classifier, or the list of actions in it does not fit the weights in it.
    """
    if not is_classifier(weights):
        raise UserError(
            f"{path}: has no classification head (fc_cls): a fine-tuned classifier is needed here; a pretrained dual "
            "encoder is given as --pretrain-model"
        )
    several = sorted(
        {name.rpartition(".")[0] for name in weights if name.startswith("fc_cls.") and name.count(".") > 1}
    )
    if several:
        raise UserError(
            f"{path}: has {len(several)} heads ({', '.join(several)}); only classifiers with one head, fc_cls, can be "
            "read: rename the entries of the head that you want to fc_cls.weight and fc_cls.bias, and remove the others"
        )
    shapes = {name: tuple(weights[name].shape) for name in ("fc_cls.weight", "fc_cls.bias") if name in weights}
    rows = shapes.get("fc_cls.weight", ())
    if len(rows) != 2 or rows[0] < 1 or shapes.get("fc_cls.bias") != rows[:1]:
        raise UserError(f"{path}: its head has shapes {shapes}, expected fc_cls.weight (classes, width) and its bias")
    fields = checkpoint.get("classifier")
    if fields is None:
        return Head(rows[0], _upstream_actions(saved_args(checkpoint), rows[0], path))
    if not isinstance(fields, Mapping) or fields.get("num_classes") != rows[0]:
        raise UserError(f"{path}: field classifier does not fit its head of {rows[0]} classes")
    actions = fields.get("actions")
    if actions is None:
        return Head(rows[0], None)
    if not isinstance(actions, list) or len(actions) != rows[0] or not all(isinstance(a, str) for a in actions):
        raise UserError(f"{path}: field classifier: actions must be a list of {rows[0]} texts, one per class")
    return Head(rows[0], tuple(actions))


def _upstream_actions(args: Mapping[str, Any], count: int, path: str) -> tuple[str, ...] | None:
    """Read the actions in upstream's `args`: the two mappings, or the table `actions` where the mappings are absent.

    A table that can be read must agree with the mappings. The result is None where there is neither.
    """
    mappings = {name: args[name] for name in ("mapping_act2v", "mapping_act2n") if args.get(name) is not None}
    table = table_columns(args.get("actions")) or {}
    lists = {f"args.{name}": _numbers_of(mapping, count, f"{path}: args.{name}") for name, mapping in mappings.items()}
    if len(lists) == 1:
        raise UserError(
            f"{path}: holds {next(iter(lists))} without the other of mapping_act2v and mapping_act2n: {_CURE}"
        )
    if "verb" in table and "noun" in table:
        columns = [
            _numbers_of(dict(enumerate(table[name])), count, f"{path}: column {name} of args.actions")
            for name in ("verb", "noun")
        ]
        if lists and columns != [*lists.values()]:
            pairs = zip(zip(*columns, strict=True), zip(*lists.values(), strict=True), strict=True)
            action, (said, mapped) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
            raise UserError(
                f"{path}: action {action} is verb and noun {said} in args.actions, {mapped} in args.mapping_act2v and "
                f"mapping_act2n: {_CURE}"
            )
        lists = lists or dict(zip(("verb", "noun"), columns, strict=True))
    if not lists:
        return None
    verbs, nouns = lists.values()
    return tuple(f"{verb}:{noun}" for verb, noun in zip(verbs, nouns, strict=True))


_CURE = "the file was changed, fetch it again"


def _numbers_of(mapping: Any, count: int, what: str) -> list[int]:
    """Return the values of {0: class, 1: class, ...} for `count` actions."""
    if not isinstance(mapping, Mapping) or len(mapping) != count or any(i not in mapping for i in range(count)):
        found = f"{len(mapping)} entries" if isinstance(mapping, Mapping) else f"a {type(mapping).__name__}"
        raise UserError(f"{what} must give a class for each of the head's {count} actions, found {found}: {_CURE}")
    numbers = [mapping[i] for i in range(count)]
    wrong = [n for n in numbers if not isinstance(n, int) or isinstance(n, bool) or n < 0]
    if wrong:
        raise UserError(f"{what} must hold class numbers, found {str(wrong[0])[:40]!r}: {_CURE}")
    return numbers
