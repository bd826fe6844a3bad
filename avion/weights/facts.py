"""What a checkpoint says about itself: which model, which activation, which normalisation of its input.

Everything in a checkpoint comes from outside: each field is checked before it is believed.
"""

import argparse
import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from avion.constants import NORM_STYLES
from avion.errors import UserError
from avion.models.config import ModelConfig
from avion.models.registry import check_config, model_config
from avion.models.tower import Layout, find_tower

from .layouts import layout_of, sizes_of


def few(names: Iterable[str], count: int = 4) -> str:
    """Return the first few of many names as a text for a message."""
    names = [name if name.isprintable() else repr(name) for name in names]
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


@dataclass(frozen=True)
class CheckpointFacts:
    """What a checkpoint says about the model in it and about the input that the model was trained on.

    A field is None where the checkpoint does not say it.

    Attributes:
        path: The path of the checkpoint, for messages.
        model_name: The canonical name of the model.
        act_layer: The activation of the MLPs.
        norm_style: The style of the normalisation, a key of `avion.constants.NORM_STYLES`.
        mean: The mean that was subtracted, per RGB channel, on the 0-255 scale.
        std: The standard deviation that the input was divided by, per RGB channel, on the 0-255 scale.
        num_frames: The number of frames per clip.
        img_size: The side of the square input, in pixels.
        config: The full configuration; only checkpoints of this project have it.
        layout: The name of the layout of the weights (see `avion.weights.layouts`).
    """

    model_name: str | None = None
    act_layer: str | None = None
    norm_style: str | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    num_frames: int | None = None
    img_size: int | None = None
    config: ModelConfig | None = None
    layout: str | None = None
    path: str = "checkpoint"

    def preprocess(self) -> dict[str, Any] | None:
        """The normalisation as a model keeps it: {"norm_style", "mean", "std"}, or None where it is unknown."""
        if self.norm_style is None or self.mean is None or self.std is None:
            return None
        return {"norm_style": self.norm_style, "mean": self.mean, "std": self.std}


def facts_of(checkpoint: Mapping[str, Any], weights: Mapping[str, Tensor], path: str) -> CheckpointFacts:
    """Read what a checkpoint says about itself.

    Checkpoints of this project say it in the fields `model_config` and `preprocess`. In upstream's checkpoints, `args`
    tells the model and the number of frames. The layout tells the rest: the activation and the normalisation with which
    the program of this layout trains.

    Args:
        checkpoint: The contents of the checkpoint.
        weights: The weights in it under canonical names.
        path: The path of the checkpoint, for messages.

    Returns:
        The facts; a fact that the checkpoint does not say is None.

    Raises:
        UserError: A field of the checkpoint holds something impossible.
    """
    layout = layout_of(weights)
    sizes = sizes_of(weights, layout, path) if layout else {}
    layout_name = layout.name if layout else None
    if "model_config" in checkpoint:
        config = _config_of(checkpoint["model_config"], path)
        _check_sizes(config, sizes, path)
        return CheckpointFacts(
            config.name,
            config.act_layer,
            *parse_preprocess(checkpoint.get("preprocess"), path),
            config.num_frames,
            config.img_size,
            config,
            layout_name,
            path,
        )
    args = saved_args(checkpoint)
    act_layer = layout.act_layer if layout else None
    style = layout.norm_style if layout else None
    if layout and args.get("norm_style") == "timm":
        style = "timm"
    mean, std = NORM_STYLES[style] if style else (None, None)
    frames = sizes.get("num_frames", _positive(args.get("clip_length")))
    return CheckpointFacts(
        _believable_name(args.get("model"), layout, weights),
        act_layer,
        style,
        mean,
        std,
        frames,
        sizes.get("img_size"),
        None,
        layout_name,
        path,
    )


def _check_sizes(config: ModelConfig, sizes: Mapping[str, Any], path: str) -> None:
    """Refuse a configuration that contradicts the weights beside it: it would build another model, of any size."""
    for name, found in sizes.items():
        said = getattr(config, name)
        if name == "dt_rank":
            said, found = (rank or math.ceil(config.embed_dim / 16) for rank in (said, found))
        if said != found and name != "img_size":  # two image sizes can give one grid
            raise UserError(f"{path}: model_config says {name}={said}, the weights beside it have {found}")


def saved_args(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags that upstream's program saved in a checkpoint; empty where there are none."""
    args = checkpoint.get("args")
    return dict(vars(args)) if isinstance(args, argparse.Namespace) else {}


def _positive(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _believable_name(name: Any, layout: Layout | None, weights: Mapping[str, Tensor]) -> str | None:
    """Return `args.model` in canonical form; a name that is not registered is returned as it is.

    The result is None where the weights are plainly of another model: upstream's fine-tuning scripts build the model
    that the pretrained file names, and save an `args.model` that they never used.
    """
    if not isinstance(name, str) or not name.isprintable():
        return None
    try:
        config = model_config(name)
    except UserError:
        return name
    if layout is None or config.tower != layout.name:
        return None
    tower = find_tower(layout.name)
    return config.name if tower is not None and tower.could_be(config, weights) else None


def _config_of(fields: Any, path: str) -> ModelConfig:
    if not isinstance(fields, Mapping):
        raise UserError(f"{path}: field model_config is a {type(fields).__name__}, expected a dict")
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    if foreign := sorted(str(name) for name in fields if name not in known):
        raise UserError(f"{path}: model_config has unknown fields {few(foreign)}: was it written by a newer version?")
    for name in ("name", "tower"):
        if not isinstance(fields.get(name), str):
            raise UserError(f"{path}: model_config has no {name}")
    try:
        config = ModelConfig(**fields)
        check_config(config)
        return config
    except (UserError, TypeError) as error:
        raise UserError(f"{path}: model_config: {error}") from error


def parse_preprocess(fields: Any, path: str) -> tuple[str | None, Any, Any]:
    """Read the field `preprocess` of a checkpoint.

    Args:
        fields: The content of the field, None where the checkpoint has no such field.
        path: The path of the checkpoint, for messages.

    Returns:
        The norm style, and the three means and three standard deviations per RGB channel on the 0-255 scale; three
        times None where there is no such field.

    Raises:
        UserError: The field holds something else.
    """
    if fields is None:
        return None, None, None
    try:
        style = fields["norm_style"]
        mean, std = (tuple(float(v) for v in fields[name]) for name in ("mean", "std"))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: field preprocess must hold norm_style, mean and std, found {fields!r}") from error
    if len(mean) != 3 or len(std) != 3 or not isinstance(style, str):
        raise UserError(f"{path}: field preprocess must hold three means and stds, found {fields!r}")
    return style, mean, std


def check_preprocess(facts: CheckpointFacts, norm_style: str) -> None:
    """Refuse another normalisation of the input than the one that the weights were trained with.

    A checkpoint that does not say how its input was normalised is not refused.

    Args:
        facts: What the checkpoint says about itself.
        norm_style: The normalisation of this run.

    Raises:
        UserError: The checkpoint says another normalisation. The message names both red means and the flag to give.
    """
    if facts.mean is None or facts.std is None:
        return
    run = NORM_STYLES[norm_style]
    trained = [*facts.mean, *facts.std]
    if all(abs(a - b) < 1e-3 for a, b in zip(trained, [*run.mean, *run.std], strict=True)):
        return
    why = ""
    if facts.norm_style == "openai_legacy":
        why = " (the mistyped red mean of AVION and LaViLa, whose checkpoints need it)"
    elif facts.norm_style == "openai":
        why = " (CLIP's own mean, with which Video Mamba Suite trains)"
    known = facts.norm_style in NORM_STYLES
    cure = f"give --norm-style {facts.norm_style}" if known else "no --norm-style has this mean and deviation"
    raise UserError(
        f"{facts.path}: trained with norm style {facts.norm_style}{why}, red mean {facts.mean[0]:.4f}, "
        f"this run normalises with {norm_style}, red mean {run.mean[0]:.4f}: {cure}"
    )
