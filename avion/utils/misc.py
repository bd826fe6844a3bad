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
    """End this process with exit status 1 and a line on stderr if the loss (one number) is infinite or none."""
    value = loss.item()
    if not math.isfinite(value):
        raise SystemExit(f"the loss is {value}: training stops; lower the learning rate or look at the data")


def interpolate_pos_embed(old_pos_embed: torch.Tensor, model: Any, num_frames: int) -> torch.Tensor:
    """Position embeddings (1, E + S·n, D) of tubes in space and time for the grid of `model`, (1, E + S·n', D).

    S = num_frames / tubelet_size tubes in time; n and n' patches of a square grid, resized bicubically; the E tokens
    before them (a class token, say) are kept. `model` has `pos_embed`, and in `patch_embed` `num_patches` (S·n') and
    `tubelet_size`, as VideoMAE's. Raises UserError where a grid is not square.
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
    """The actions of EPIC-KITCHENS-100's train and validation CSVs, numbered in the order of their names as texts.

    dataset: "ek100_cls"; UserError for another. folder: of `EPIC_100_train.csv` and `EPIC_100_validation.csv`;
    AVION's place for them unless it is given.

    Returns the narrations of each action, sorted and each once, and {"verb_class:noun_class": number}.
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
