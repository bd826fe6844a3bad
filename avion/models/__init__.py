"""Models: created, listed and registered by name; weights in."""

from . import lavila, model_clip, timemamba  # noqa: F401  (importing registers their models)
from .checkpoint import load_checkpoint, model_from_checkpoint
from .registry import create_model, list_models, register_mixer, register_model

__all__ = [
    "create_model",
    "list_models",
    "load_checkpoint",
    "model_from_checkpoint",
    "register_mixer",
    "register_model",
]
