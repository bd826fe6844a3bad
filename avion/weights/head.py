"""The heads of fine-tuned classifiers in checkpoints: our own, and upstream's (`visual.*`, `fc_cls.*`).

Our own say in the field `classifier` what their classes are: {"num_classes", "dropout", "actions"}. Upstream's hold
no list and no model name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from avion.errors import UserError


@dataclass(frozen=True)
class Head:
    """What a checkpoint says about its classes. actions: "verb_class:noun_class" each; None where it has no list."""

    num_classes: int
    actions: tuple[str, ...] | None


def is_classifier(weights: Mapping[str, Tensor]) -> bool:
    """Whether canonical `weights` are a fine-tuned classifier's: a video tower and a head, no text tower."""
    return any(name.startswith("fc_cls.") for name in weights)


def read_head(checkpoint: Mapping[str, Any], weights: Mapping[str, Tensor], path: str) -> Head:
    """The head of a classifier's checkpoint.

    Args:
        checkpoint: The checkpoint's contents.
        weights: The weights in it under canonical names.
        path: The checkpoint's path, for messages.

    Raises:
        UserError: The checkpoint is another model's, or its list of actions does not fit its weights.
    """
    if not is_classifier(weights):
        raise UserError(
            f"{path}: has no classification head (fc_cls): a fine-tuned classifier is needed here; a pretrained dual "
            "encoder is given as --pretrain-model"
        )
    shapes = {name: tuple(weights[name].shape) for name in ("fc_cls.weight", "fc_cls.bias") if name in weights}
    rows = shapes.get("fc_cls.weight", ())
    if len(rows) != 2 or rows[0] < 1 or shapes.get("fc_cls.bias") != rows[:1]:
        raise UserError(f"{path}: its head has shapes {shapes}, expected fc_cls.weight (classes, width) and its bias")
    fields = checkpoint.get("classifier")
    if fields is None:
        return Head(rows[0], None)
    if not isinstance(fields, Mapping) or fields.get("num_classes") != rows[0]:
        raise UserError(f"{path}: field classifier does not fit its head of {rows[0]} classes")
    actions = fields.get("actions")
    if actions is None:
        return Head(rows[0], None)
    if not isinstance(actions, list) or len(actions) != rows[0] or not all(isinstance(a, str) for a in actions):
        raise UserError(f"{path}: field classifier: actions must be a list of {rows[0]} texts, one per class")
    return Head(rows[0], tuple(actions))
