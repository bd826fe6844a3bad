"""Tells which project a state dict comes from, and maps its names and shapes to those of this project.

These are pure functions on dicts of tensors. The names alone tell the layouts apart:

    divided  Video Mamba Suite and this project: `visual.blocks.i.{attn,timeattn}.Wqkv` or `.time_mamba`, `textual.`
    joint    AVION's ViT: `visual.transformer.resblocks.i`, `visual.temporal_embedding`, `textual.`
    lavila   LaViLa-CLIP: `visual.blocks.i.attn.qkv`, the text tower at the top
    clip     image CLIP (OpenAI, open_clip): `visual.transformer.resblocks.i`, `visual.proj`, text at the top

In shapes, D is the width, N patches, T frames, P the patch size, C channels, and E the size of the embedding.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from avion.errors import UserError
from avion.models.names import CONV1, canonical_name, square_conv1
from avion.models.registry import list_models, model_config
from avion.models.tower import Layout, find_tower, towers
from avion.models.utils import resize_position_embed, resize_temporal_embed

TEMPORAL = ("visual.temporal_embed", "visual.temporal_embedding")  # (1, T, D), (T, D)
POSITION = ("visual.pos_embed", "visual.positional_embedding")  # (1, 1 + N, D), (1 + N, D)


# Image CLIPs (OpenAI's, open_clip's), which are initial weights and no video models.
IMAGE_CLIP = Layout(
    name="clip",
    requires=("visual.transformer.resblocks.", "visual.proj"),
    excludes=(),
    position="visual.positional_embedding",
    patches="visual.conv1.weight",
    blocks="visual.transformer.resblocks.",
    text="",
    projection="visual.proj",
    temporal=None,
    act_layer=None,
    norm_style="openai",
)


def layouts() -> list[Layout]:
    """Return the layouts of all registered towers, and the layout of image CLIPs."""
    return [*(tower.layout for tower in towers() if tower.layout is not None), IMAGE_CLIP]


# --- names -----------------------------------------------------------------------------------


def canonical(state_dict: Mapping[str, Tensor], path: str = "checkpoint") -> dict[str, Tensor]:
    """Return the same tensors under canonical names: one name per parameter, and conv1 as (D, C, P, P).

    The prefixes of DistributedDataParallel (`module.`) and torch.compile (`_orig_mod.`) are stripped.

    Args:
        state_dict: The tensors under the names of any known layout.
        path: Where the tensors come from, for messages.

    Returns:
        The tensors under canonical names.

    Raises:
        UserError: Two entries would have the same name.
    """
    weights: dict[str, Tensor] = {}
    for saved, value in state_dict.items():
        name = canonical_name(saved)
        if name in weights:
            raise UserError(f"{path}: holds {name} twice (under another prefix or layout): {saved}")
        weights[name] = value
    if CONV1 in weights:
        weights[CONV1] = square_conv1(weights[CONV1])
    return weights


def layout_of(weights: Mapping[str, Tensor]) -> Layout | None:
    """Return the layout of canonical `weights`; None where no known layout fits."""
    return next((layout for layout in layouts() if layout.fits(weights)), None)


def likely_models(weights: Mapping[str, Tensor], layout: Layout) -> list[str]:
    """Return the registered models that these weights can belong to, only those of the same sizes if there are any.

    Some models have the same parameters, such as those with vanilla and with Frozen residuals.

    Args:
        weights: The weights under canonical names.
        layout: The layout of the weights.

    Returns:
        The registered names.
    """
    tower = find_tower(layout.name)
    configs = [model_config(name) for name in list_models()]
    configs = [c for c in configs if tower is not None and c.tower == tower.name and tower.could_be(c, weights)]
    sizes = sizes_of(weights, layout, "checkpoint")
    for fields in (("embed_dim", "depth", "patch_size", "img_size"), ("embed_dim", "depth", "patch_size")):
        same = [c.name for c in configs if all(getattr(c, f) == sizes.get(f) for f in fields)]
        if same:
            return same
    return [c.name for c in configs if c.name.endswith("B16")]


# --- shapes ----------------------------------------------------------------------------------


def sizes_of(weights: Mapping[str, Tensor], layout: Layout, path: str) -> dict[str, Any]:
    """Read the fields of `ModelConfig` that the shapes of canonical weights tell.

    No shape tells a number of heads. Fields whose parameters are absent (a video tower without a text tower) are left
    out.

    Args:
        weights: The weights under canonical names.
        layout: The layout of the weights.
        path: The path of the checkpoint, for messages.

    Returns:
        Values by the name of the field.

    Raises:
        UserError: A weight has a shape that no model has.
    """

    def shape(name: str, ndim: int) -> tuple[int, ...] | None:
        if name not in weights:
            return None
        found = tuple(weights[name].shape)
        if len(found) != ndim or 0 in found:
            raise UserError(f"{path}: {name} has shape {found}, expected {ndim} dimensions above 0")
        return found

    sizes: dict[str, Any] = {}
    if depth := _count_blocks(weights, layout.blocks):
        sizes["depth"] = depth
    if found := shape(layout.patches, 4):
        sizes |= {"embed_dim": found[0], "in_chans": found[1], "patch_size": found[2]}
        if layout.position in weights:
            sizes["img_size"] = found[2] * _grid_side(weights, layout.position, path)
        if hidden := shape(f"{layout.blocks}0.mlp.fc1.weight", 2):
            sizes["mlp_ratio"] = hidden[0] / found[0]
    if layout.temporal in weights:
        sizes["num_frames"] = weights[layout.temporal].shape[-2]
    if found := shape(layout.projection, 2):
        sizes["project_embed_dim"] = found[1]
    if found := shape(f"{layout.text}positional_embedding", 2):
        sizes["context_length"], sizes["text_width"] = found
        sizes["text_layers"] = _count_blocks(weights, f"{layout.text}transformer.resblocks.")
    if found := shape(f"{layout.text}token_embedding.weight", 2):
        sizes["vocab_size"] = found[0]
    tower = find_tower(layout.name)
    if tower is not None and "embed_dim" in sizes:
        sizes |= tower.further_sizes(weights, shape, sizes["embed_dim"])
    return sizes


def _grid_side(weights: Mapping[str, Tensor], name: str, path: str) -> int:
    """Return the number of patches along one side of the image, from a position embedding (…, 1 + N, D)."""
    found = tuple(weights[name].shape)
    side = math.isqrt(max(found[-2] - 1, 0)) if len(found) > 1 else 0
    if side < 1 or side * side != found[-2] - 1:
        raise UserError(f"{path}: {name} has shape {found}, expected positions of a CLS and a square grid")
    return side


def _count_blocks(weights: Mapping[str, Tensor], prefix: str) -> int:
    numbers = (name.removeprefix(prefix).split(".")[0] for name in weights if name.startswith(prefix))
    return len(set(numbers))


@dataclass
class Fit:
    """What of a state dict can be loaded into a model, and what cannot."""

    values: dict[str, Tensor] = field(default_factory=dict)
    resized: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)


def fit(weights: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> Fit:
    """Match canonical weights with the state dict of a model, which stays unchanged.

    Temporal embeddings are resized linearly to the model's number of frames, and position embeddings bicubically to the
    model's grid. A tensor of one element takes the shape of another tensor of one element. All other tensors must have
    the shape that the model's tensor has.

    Args:
        weights: The weights under canonical names.
        target: The state dict of the model.

    Returns:
        The tensors to load, and the names that are missing, unexpected or of another shape.
    """
    result = Fit(unexpected=[name for name in weights if name not in target])
    for name, wanted in target.items():
        if name not in weights:
            result.missing.append(name)
            continue
        value = weights[name]
        found = tuple(value.shape)
        if value.is_floating_point() != wanted.is_floating_point() or value.is_complex():
            result.misshapen.append(f"{name} {value.dtype} for {wanted.dtype}")
        elif value.shape == wanted.shape:
            result.values[name] = value
        elif value.numel() == wanted.numel() == 1:
            result.values[name] = value.reshape(wanted.shape)
        elif (resized := _resize(name, value, wanted)) is not None:
            result.values[name] = resized
            result.resized.append(f"{name} {found} -> {tuple(wanted.shape)}")
        else:
            result.misshapen.append(f"{name} {found} for {tuple(wanted.shape)}")
    return result


def _resize(name: str, value: Tensor, wanted: Tensor) -> Tensor | None:
    """Return `value` in the shape of `wanted` if it is an embedding that differs in its number of positions only."""
    same_width = value.ndim == wanted.ndim and value.shape[-1:] == wanted.shape[-1:]
    if name not in TEMPORAL + POSITION or not same_width or value.ndim < 2 or value.shape[:-2] != wanted.shape[:-2]:
        return None
    if 0 in value.shape:
        return None
    if name in TEMPORAL:
        return resize_temporal_embed(value.float(), wanted.shape[-2])
    found, side = (math.isqrt(max(tensor.shape[-2] - 1, 0)) for tensor in (value, wanted))
    if found < 1 or found**2 + 1 != value.shape[-2] or side**2 + 1 != wanted.shape[-2]:
        return None
    return resize_position_embed(value.float(), (side, side))
