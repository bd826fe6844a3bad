"""Position and temporal embeddings for another grid or another number of frames, and the time gates of a model."""

import torch
import torch.nn.functional as F
from torch import nn

from avion.errors import UserError
from avion.ops.exporting import exporting


def resize_temporal_embed(embed: torch.Tensor, num_frames: int) -> torch.Tensor:
    """Resize (…, T, D) linearly over T to (…, num_frames, D).

    Frames are seen as equal segments of the clip (half-pixel centres) with clamped ends, so that the embedding keeps
    its meaning "share of the clip" at any frame rate.
    """
    if not exporting() and embed.shape[-2] == num_frames:  # an exported model takes any number, its own too
        return embed
    *lead, frames, width = embed.shape
    channels_first = embed.reshape(-1, frames, width).transpose(1, 2)  # (1, D, T)
    resized = F.interpolate(channels_first, size=num_frames, mode="linear", align_corners=False)
    return resized.transpose(1, 2).reshape(*lead, num_frames, width)


def resize_position_embed(embed: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Resize a position embedding bicubically to another grid.

    Args:
        embed: (…, 1 + N, D): the CLS first, then a square grid row by row.
        grid: The numbers of rows and columns of patches.

    Returns:
        (…, 1 + rows · columns, D).
    """
    side = round((embed.shape[-2] - 1) ** 0.5)
    assert side * side == embed.shape[-2] - 1, f"not a CLS and a square grid: {tuple(embed.shape)}"
    if grid == (side, side):
        return embed
    *lead, _, width = embed.shape
    flat = embed.reshape(-1, 1 + side * side, width)
    image = flat[:, 1:].transpose(1, 2).reshape(-1, width, side, side)  # (1, D, h, w)
    resized = F.interpolate(image, size=grid, mode="bicubic", align_corners=False)
    patches = resized.flatten(2).transpose(1, 2)  # (1, N', D)
    return torch.cat([flat[:, :1], patches], dim=1).reshape(*lead, -1, width)


_TEMPORAL_NAMES = ("visual.temporal_embedding", "visual.temporal_embed")


def inflate_positional_embeds(
    current_model_state_dict: dict[str, torch.Tensor],
    new_state_dict: dict[str, torch.Tensor],
    num_frames: int = 4,
    load_temporal_fix: str = "bilinear",
) -> dict[str, torch.Tensor]:
    """Fit a checkpoint's temporal embedding to `num_frames`. (AVION's function, for people's own scripts.)

    Args:
        current_model_state_dict: The model's weights, with names without `module.`.
        new_state_dict: The checkpoint's weights, with names without `module.`; they are changed in place.
        num_frames: The number of frames of the model.
        load_temporal_fix: If the model has more frames than the checkpoint, "zeros" keeps the checkpoint's frames and
            appends zeros, "interp" repeats the nearest frame, and "bilinear" interpolates linearly over time. If the
            model has fewer frames, "zeros" keeps the first ones, and the other two resize in the same way.

    Returns:
        `new_state_dict`.

    Raises:
        UserError: load_temporal_fix has another value, or the number of patches differs, which `load_checkpoint`
            resizes.
    """
    if load_temporal_fix not in ("zeros", "interp", "bilinear"):
        raise UserError(f"load_temporal_fix must be zeros, interp or bilinear, found {load_temporal_fix!r}")
    for name in _TEMPORAL_NAMES:
        if name in new_state_dict and name in current_model_state_dict:
            new_state_dict[name] = _fit_frames(new_state_dict[name], num_frames, load_temporal_fix)
    for name in ("visual.positional_embedding", "visual.pos_embed"):
        if name in new_state_dict and name in current_model_state_dict:
            found, wanted = new_state_dict[name].shape, current_model_state_dict[name].shape
            if found != wanted:
                raise UserError(
                    f"{name}: the checkpoint has {tuple(found)}, the model {tuple(wanted)}; "
                    "use avion.models.load_checkpoint, which resizes it"
                )
    return new_state_dict


def _fit_frames(embed: torch.Tensor, num_frames: int, how: str) -> torch.Tensor:
    """(…, T, D) → (…, num_frames, D)."""
    missing = num_frames - embed.shape[-2]
    if how == "bilinear":
        return resize_temporal_embed(embed, num_frames)
    if how == "zeros":
        return F.pad(embed, (0, 0, 0, missing))  # a negative pad keeps the first frames
    nearest = torch.arange(num_frames, device=embed.device) * embed.shape[-2] // num_frames
    return embed.index_select(-2, nearest)


def is_time_gate(name: str) -> bool:
    """Return whether a parameter of this name is the gate α of a block."""
    return name.endswith("alpha_timeattn")


def time_gates(model: nn.Module) -> list[torch.Tensor]:
    """Return α of every block, 0-d, in the order of the blocks; time mixing is multiplied by tanh(α). Empty without
    gates.
    """
    return [p.detach().float() for name, p in model.named_parameters() if is_time_gate(name)]
