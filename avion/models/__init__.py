"""Models: created, listed and registered by name.

The functions that load weights live above, in `avion.weights`. They are handed on here when they are asked for, since
people's scripts import them from `avion.models`.
"""

from typing import TYPE_CHECKING, Any

from . import joint, lavila, timemamba  # noqa: F401  (importing registers their towers and models)
from .registry import create_model, list_models, register_mixer, register_model

if TYPE_CHECKING:
    from avion.weights import Checkpoint, load_checkpoint, load_pretrained, model_from_checkpoint

__all__ = [
    "Checkpoint",
    "create_model",
    "list_models",
    "load_checkpoint",
    "load_pretrained",
    "model_from_checkpoint",
    "register_mixer",
    "register_model",
]

_OF_WEIGHTS = ("Checkpoint", "load_checkpoint", "load_pretrained", "model_from_checkpoint")


def __getattr__(name: str) -> Any:
    if name in _OF_WEIGHTS:
        import avion.weights

        return getattr(avion.weights, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
