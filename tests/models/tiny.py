"""Registered models at a size that runs in milliseconds, for tests parametrised over all of them."""

import dataclasses

import torch
from torch import nn

from avion.models import create_model, list_models
from avion.models.registry import model_config

TINY = {
    "img_size": 32,
    "patch_size": 16,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 4,
    "num_frames": 4,
    "project_embed_dim": 16,
    "context_length": 16,
    "vocab_size": 512,
    "text_width": 32,
    "text_heads": 4,
    "text_layers": 2,
}


def tiny_model(name: str, **overrides) -> nn.Module:
    """The model at TINY's sizes, every parameter moved off its initial value: gates open, nothing zero."""
    model = create_model(name, **{**TINY, **overrides})
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("alpha_timeattn"):
                parameter.fill_(0.7)
            elif key != "logit_scale":
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def at_tiny_size(name: str):
    """The config that `tiny_model(name)` is built from, without its name."""
    return dataclasses.replace(model_config(name), **{**TINY, "name": "tiny"})


# One name of each group that is the same model at this size (T/16 to L/14 of one row are).
DISTINCT_MODELS = sorted({at_tiny_size(name): name for name in reversed(list_models())}.values())
DIVIDED_MODELS = [name for name in DISTINCT_MODELS if model_config(name).tower == "divided"]


def tiny_inputs(clips: int = 2, frames: int = 4, side: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """video (B, 3, T, side, side) and tokens (B, 16) of TINY's vocabulary."""
    return torch.randn(clips, 3, frames, side, side), torch.randint(1, 512, (clips, 16))
