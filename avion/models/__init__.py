"""Models: created, listed and registered by name.

The functions that load weights are defined in `avion.weights`, which is above this package. They can be imported from
here as well, because people's scripts do so. All names are imported when they are asked for, because the towers need
PyTorch, and `python -m avion.models` does not.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from avion.weights import (
        Checkpoint,
        classifier_from_checkpoint,
        load_checkpoint,
        load_pretrained,
        model_from_checkpoint,
    )

    from .registry import create_model, list_models, register_mixer, register_model

__all__ = [
    "Checkpoint",
    "classifier_from_checkpoint",
    "create_model",
    "list_models",
    "load_checkpoint",
    "load_pretrained",
    "model_from_checkpoint",
    "register_mixer",
    "register_model",
]

_OF_WEIGHTS = (
    "Checkpoint",
    "classifier_from_checkpoint",
    "load_checkpoint",
    "load_pretrained",
    "model_from_checkpoint",
)


def __getattr__(name: str) -> Any:
    if name in _OF_WEIGHTS:
        import avion.weights

        return getattr(avion.weights, name)
    if name in __all__:
        from . import registry

        return getattr(registry, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
