"""Fine-tuned classifiers from checkpoints: our own, and upstream's (`visual.*`, `fc_cls.*`).

Our own say in the field `classifier` what their classes are: {"num_classes", "dropout", "actions"}. Upstream's hold
no list and no model name.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from avion.errors import UserError

from .checkpoint import described_model, is_classifier, load_contents
from .layouts import canonical
from .model_clip import VideoClassifier
from .registry import create_model
from .weight_files import checkpoint_state_dict, read_checkpoint


@dataclass(frozen=True)
class Head:
    """What a checkpoint says about its classes. actions: "verb_class:noun_class" each; None where it has no list."""

    num_classes: int
    actions: tuple[str, ...] | None


def classifier_head(checkpoint: Mapping[str, Any], path: str | os.PathLike = "checkpoint") -> Head:
    """The head of a classifier's checkpoint (from `read_checkpoint`).

    Raises UserError for another model's, and where its list does not fit its weights.
    """
    path = os.fspath(path)
    return _head(checkpoint, canonical(checkpoint_state_dict(checkpoint, path), path), path)


def _head(checkpoint: Mapping[str, Any], weights: Mapping[str, Tensor], path: str) -> Head:
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


def classifier_from_checkpoint(
    path: str | os.PathLike, *, name: str | None = None, dropout: float = 0.0, **overrides: Any
) -> VideoClassifier:
    """Build the classifier that a checkpoint holds and load it; the report is `model.load_report`.

    name, overrides: as in `model_from_checkpoint`. Vanilla and Frozen, and space-time towers, have the same
    parameters, so upstream's files of divided towers need `name`.
    """
    path = os.fspath(path)
    checkpoint = read_checkpoint(path)
    weights = canonical(checkpoint_state_dict(checkpoint, path), path)
    head = _head(checkpoint, weights, path)
    chosen, fields = described_model(checkpoint, weights, path, name, overrides)
    towers = create_model(chosen, **fields)
    model = VideoClassifier(towers.visual, dropout, head.num_classes, config=towers.config, actions=head.actions)
    model.load_report = load_contents(model, checkpoint, path)
    return model
