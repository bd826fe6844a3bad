"""Which model a checkpoint is: the registered name, and the fields of its configuration."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from avion.errors import UserError, printable
from avion.models.config import ModelConfig
from avion.models.registry import resolve_name
from avion.models.tower import Layout, find_tower

from .facts import CheckpointFacts, few, saved_args
from .layouts import layout_of, layouts, likely_models, sizes_of
from .loading import RUN_FIELDS, is_registered


def described_model(
    checkpoint: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    facts: CheckpointFacts,
    name: str | None,
    overrides: Mapping[str, Any],
) -> tuple[str, dict[str, Any]]:
    """Find the name and the fields of the model that a checkpoint describes, as `Checkpoint.build` explains.

    Args:
        checkpoint: The contents of the checkpoint.
        weights: The weights in it under canonical names.
        facts: What the checkpoint says about itself.
        name: The name of the model, where the user gave one.
        overrides: Fields that the user gave; they are among the fields that are returned.

    Returns:
        The registered name, and the fields of `ModelConfig`.

    Raises:
        UserError: The checkpoint does not say enough, or contradicts `name`; the message says what to give.
    """
    path = facts.path
    if facts.config is not None:
        chosen, fields = facts.config.name, _own_fields(facts.config)
        if name is not None and resolve_name(name) != chosen:
            raise UserError(f"{path}: says that it is a {chosen}, which name={name} contradicts: leave name out")
    else:
        layout = _video_layout(weights, path)
        chosen = name or _name_of(facts, weights, layout)
        fields = _upstream_fields(checkpoint, weights, facts, layout, overrides)
    if facts.num_frames is None and "num_frames" not in overrides:
        raise UserError(
            f"{path}: does not say with how many frames it was trained, and another number gives worse results: give "
            "num_frames= (--clip-length, --frames, or --model-args num_frames=, whichever the program has)"
        )
    if not is_registered(chosen):
        raise UserError(f"{path}: its model {chosen!r} is not registered here: give name=, one of list_models()")
    return chosen, fields | overrides


def described_checkpoint(
    contents: Mapping[str, Any], weights: Mapping[str, Tensor], facts: CheckpointFacts, extra: Mapping[str, str]
) -> str:
    """Describe a checkpoint in lines for the screen.

    Args:
        contents: The contents of the checkpoint.
        weights: The weights in it under canonical names.
        facts: What the checkpoint says about itself.
        extra: Further lines: the name of a fact, and the fact.

    Returns:
        One line per fact, joined by newlines.
    """
    try:
        model, _ = described_model(contents, weights, facts, None, {})
    except UserError as e:
        model = str(e).removeprefix(f"{facts.path}: ")
    norm = facts.norm_style
    if norm is None and facts.mean is not None and facts.std is not None:
        norm = f"mean {' '.join(map(str, facts.mean))}, std {' '.join(map(str, facts.std))}"
    unknown = "the file does not say"
    lines = {
        "model": model,
        "layout": facts.layout or unknown,
        "parameters": f"{sum(weight.numel() for weight in weights.values()):,}",
        "frames": unknown if facts.num_frames is None else str(facts.num_frames),
        "image size": unknown if facts.img_size is None else f"{facts.img_size} px",
        "activation": facts.act_layer or unknown,
        "normalisation": norm or unknown,
        **extra,
    }
    width = max(map(len, lines))
    return "\n".join(map(printable, [facts.path, *(f"  {name:<{width}}  {fact}" for name, fact in lines.items())]))


def _own_fields(config: ModelConfig) -> dict[str, Any]:
    fields = dataclasses.asdict(config)
    return {k: v for k, v in fields.items() if k not in ("name", "tower", *RUN_FIELDS)}


def _video_layout(weights: Mapping[str, Tensor], path: str) -> Layout:
    layout = layout_of(weights)
    if layout is None or find_tower(layout.name) is None:
        expected = f"expected one of {', '.join(known.name for known in layouts() if find_tower(known.name))}"
        kind = "an image CLIP" if layout else f"of no known layout (first names {few(weights)})"
        raise UserError(f"{path}: is {kind}, no video model can be built from it alone: {expected}")
    return layout


def _name_of(facts: CheckpointFacts, weights: Mapping[str, Tensor], layout: Layout) -> str:
    if facts.model_name is not None:
        return facts.model_name
    names = likely_models(weights, layout)
    if len(names) != 1:
        raise UserError(
            f"{facts.path}: does not say which model it is, and these have the same parameters: "
            f"{', '.join(names)}: give name= (--model)"
        )
    return names[0]


def _upstream_fields(
    checkpoint: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    facts: CheckpointFacts,
    layout: Layout,
    overrides: Mapping[str, Any],
) -> dict[str, Any]:
    fields = sizes_of(weights, layout, facts.path)
    for heads, width in (("num_heads", "embed_dim"), ("text_heads", "text_width")):
        if heads in overrides or width not in fields:
            continue
        if fields[width] % 64:
            raise UserError(
                f"{facts.path}: {width}={fields[width]} is no multiple of 64, and the shapes do not show the "
                f"number of heads: give {heads}= (--model-args {heads}=...)"
            )
        fields[heads] = fields[width] // 64
    if facts.num_frames is not None:
        fields["num_frames"] = facts.num_frames
    args = saved_args(checkpoint)
    if isinstance(args.get("freeze_temperature"), bool):
        fields["freeze_temperature"] = args["freeze_temperature"]
    return fields
