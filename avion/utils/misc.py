"""AVION's `avion.utils.misc`."""

import math
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from avion.data.ek100_actions import action_list, action_names, read_ek100_actions
from avion.errors import UserError

_EK100 = "datasets/EK100/epic-kitchens-100-annotations"


def check_loss_nan(loss: torch.Tensor) -> None:
    """End this process with exit status 1 and a line on stderr if the loss (one number) is infinite or NaN."""
    value = loss.item()
    if not math.isfinite(value):
        raise SystemExit(f"the loss is {value}: training stops; lower the learning rate or look at the data")


def interpolate_pos_embed(old_pos_embed: torch.Tensor, model: Any, num_frames: int) -> torch.Tensor:
    """Resize position embeddings of tubes in space and time to the grid of a model.

    Args:
        old_pos_embed: (1, E + S·n, D). S = num_frames / tubelet_size is the number of tubes in time, and n is the
            number of patches of a square grid, which is resized bicubically. The E tokens before them (a class token,
            for example) are kept.
        model: Has `pos_embed`, and in `patch_embed` `num_patches` (S·n') and `tubelet_size`, as VideoMAE's models do.
        num_frames: The number of frames.

    Returns:
        (1, E + S·n', D).

    Raises:
        UserError: A grid is not square.
    """
    steps = num_frames // model.patch_embed.tubelet_size
    extra = model.pos_embed.shape[-2] - model.patch_embed.num_patches
    old = _side(old_pos_embed.shape[-2] - extra, steps)
    new = _side(model.patch_embed.num_patches, steps)
    if old == new:
        return old_pos_embed
    grids = old_pos_embed[:, extra:].unflatten(1, (steps, old, old))  # (1, S, h, w, D)
    images = grids.flatten(0, 1).permute(0, 3, 1, 2)  # (S, D, h, w)
    resized = F.interpolate(images, size=(new, new), mode="bicubic", align_corners=False)
    tokens = resized.permute(0, 2, 3, 1).flatten(0, 2)[None]  # (1, S·n', D)
    return torch.cat([old_pos_embed[:, :extra], tokens], dim=1)


def _side(tokens: int, steps: int) -> int:
    side = math.isqrt(tokens // steps) if steps > 0 else 0
    if steps * side * side != tokens:
        raise UserError(f"position embeddings: {tokens} tokens are not {steps} square grids")
    return side


def generate_label_map(dataset: str, folder: str | os.PathLike = _EK100) -> tuple[list[list[str]], dict[str, int]]:
    """Return the actions of EPIC-KITCHENS-100's train and validation CSVs, numbered in the order of their names as
    texts.

    Args:
        dataset: "ek100_cls".
        folder: The folder of `EPIC_100_train.csv` and `EPIC_100_validation.csv`; by default the folder where AVION
            looks for them.

    Returns:
        The narrations of each action, sorted and without repetitions, and {"verb_class:noun_class": number}.

    Raises:
        UserError: The dataset is another one.
    """
    if dataset != "ek100_cls":
        raise UserError(f"generate_label_map: {dataset!r} has no list of actions here; 'ek100_cls' has")
    splits = ("train", "validation")
    tables = [read_ek100_actions(Path(folder) / f"EPIC_100_{split}.csv") for split in splits]
    for split, table in zip(splits, tables, strict=True):
        if table.verb_class is None:
            raise UserError(f"annotations {folder}/EPIC_100_{split}.csv: the column 'verb_class' is missing")
    actions = action_list(*tables)
    return action_names(actions, *tables), {action: i for i, action in enumerate(actions)}
