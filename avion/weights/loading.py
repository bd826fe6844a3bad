"""Loads weights into a model, and says what was resized and why the rest does not fit."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from avion.errors import UserError, printable
from avion.models.clip import VideoClassifier
from avion.models.config import ModelConfig
from avion.models.registry import model_config, resolve_name
from avion.models.tower import find_tower

from .facts import CheckpointFacts, few
from .head import is_classifier
from .layouts import IMAGE_CLIP, fit, layout_of, likely_models, sizes_of

# How a model is run, not what it is: a checkpoint from a GPU run must open anywhere.
RUN_FIELDS = (
    "drop_path_rate",
    "patch_dropout",
    "grad_checkpointing",
    "use_fast_conv1",
    "use_flash_attn",
    "scan_backend",
)
# What the shapes do not show, and a model that differs in it would silently compute something else.
_UNSEEN_FIELDS = ("act_layer", "num_heads", "text_heads")


@dataclass(frozen=True)
class LoadReport:
    """What happened to the weights of one file.

    Attributes:
        path: The file.
        loaded: The number of tensors that were loaded.
        resized: Embeddings that were resized, as "name (found) -> (wanted)".
        missing: Parameters of the model that the file does not have; they stay as they were.
        unexpected: Entries of the file that the model has no place for.
        notes: Further sentences.
    """

    path: str
    loaded: int = 0
    resized: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line for a log."""
        parts = [f"{self.path}: {self.loaded} tensors loaded"]
        for what in ("resized", "missing", "unexpected"):
            if names := getattr(self, what):
                parts.append(f"{len(names)} {what} ({few(names)})")
        return printable("; ".join([*parts, *self.notes]))


def load_weights(
    model: nn.Module, weights: Mapping[str, Tensor], facts: CheckpointFacts, path: str, *, strict: bool = True
) -> LoadReport:
    """Load canonical weights into a model, in place; `Checkpoint.load` describes the rules.

    Args:
        model: The model, also inside the wrappers of torch.compile and DistributedDataParallel.
        weights: Tensors under canonical names.
        facts: What the checkpoint of these weights says about itself.
        path: The path of the checkpoint, for messages.
        strict: Whether entries that only one side has, and other values of what no shape shows, are refused.

    Returns:
        The report of what was loaded, resized and left out.

    Raises:
        UserError: The weights do not fit. The model is then unchanged.
    """
    model = unwrap(model)
    config = getattr(model, "config", None)
    contradictions = _contradictions(facts, config) if isinstance(config, ModelConfig) else []
    found = fit(weights, model.state_dict())
    wrong = [("of another shape", found.misshapen)]
    if strict:
        wrong += [
            ("unexpected", found.unexpected),
            ("missing", found.missing),
            ("contradicting", contradictions),
        ]
    problems = [f"{len(names)} {what} ({few(names)})" for what, names in wrong if names]
    if problems or not found.values:
        where = f"does not fit {config.name}" if isinstance(config, ModelConfig) else "does not fit the model"
        cure = _head_cure(weights, model) or _cure(weights, facts, config)
        raise UserError(f"{path}: {where}: {'; '.join(problems) or 'no weight in common'}: {cure}")
    # Names, shapes and types were all checked, so that the next line loads everything and cannot fail half-way.
    model.load_state_dict(found.values, strict=False)
    notes = [] if strict else [f"differs in {text}" for text in contradictions]
    if isinstance(config, ModelConfig) and facts.num_frames not in (None, config.num_frames):
        notes.append(f"trained with {facts.num_frames} frames, the model is built for {config.num_frames}")
    if isinstance(config, ModelConfig) and facts.num_frames is None:
        notes.append(
            f"the file does not say with how many frames it was trained, the model is built for {config.num_frames}"
        )
    return LoadReport(
        path,
        len(found.values),
        tuple(found.resized),
        tuple(found.missing),
        tuple(found.unexpected),
        tuple(notes),
    )


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside the wrappers of torch.compile and DistributedDataParallel."""
    while True:
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _contradictions(facts: CheckpointFacts, config: ModelConfig) -> list[str]:
    """List the differences between a checkpoint and a model that no shape shows."""
    says: dict[str, Any] = {}
    if facts.config is not None:
        says = {field: getattr(facts.config, field) for field in (*_UNSEEN_FIELDS, *_choices(facts.config))}
    else:
        if is_registered(facts.model_name):
            named = model_config(facts.model_name)
            says = {field: getattr(named, field) for field in _choices(named)}
        if facts.act_layer is not None:
            says["act_layer"] = facts.act_layer
    return [
        f"{field}: {value} in the checkpoint, {getattr(config, field)} in the model"
        for field, value in says.items()
        if value != getattr(config, field)
    ]


def _choices(config: ModelConfig) -> tuple[str, ...]:
    tower = find_tower(config.tower)
    return () if tower is None else tower.choices


def is_registered(name: str | None) -> bool:
    """Return whether a model of this name is registered."""
    try:
        return name is not None and bool(resolve_name(name))
    except UserError:
        return False


def _head_cure(weights: Mapping[str, Tensor], model: nn.Module) -> str:
    if is_classifier(weights) and not isinstance(model, VideoClassifier):
        return "it is a fine-tuned classifier, which has no text tower: give a pretrained dual encoder"
    if isinstance(model, VideoClassifier) and not is_classifier(weights):
        return "it has no classification head, is it a dual encoder? give a fine-tuned classifier"
    return ""


def _cure(weights: Mapping[str, Tensor], facts: CheckpointFacts, config: Any) -> str:
    """Say the likely reason why a checkpoint does not fit, and what to do."""
    layout = layout_of(weights)
    if layout is None:
        return "its names are of no layout this project knows, is it a checkpoint of another program?"
    if layout is IMAGE_CLIP:
        return "it is an image CLIP, use it as initial weights: --pretrain-zoo open_clip --pretrain-path FILE"
    names = [facts.model_name] if facts.model_name else likely_models(weights, layout)
    if not isinstance(config, ModelConfig):
        return f"this looks like a {' or '.join(names)} checkpoint"
    if config.name not in names:
        return (
            f"this looks like a {' or '.join(names)} checkpoint, the model is {config.name}: "
            f"build the model as {names[0]} (--model {names[0]})"
        )
    if facts.act_layer not in (None, config.act_layer):
        act = f"act_layer={facts.act_layer}"
        return f"build the model with {act} (--model-args {act}), which the weights were trained with"
    saved = dataclasses.asdict(facts.config) if facts.config else sizes_of(weights, layout, facts.path)
    other = [f"{k}={v}" for k, v in saved.items() if k not in RUN_FIELDS and getattr(config, k) != v]
    if other:
        return f"same model, other sizes: build it with {few(other, 6)}, or with model_from_checkpoint"
    return "the file is incomplete or was changed, fetch or write it again"
