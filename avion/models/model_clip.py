"""AVION's import path of the two-tower model, the classifier and the factory functions, for people's own scripts.

The classes are defined in clip.py. The factory functions load weights, so they are defined above, in
`avion.weights.factories`; this file imports them when they are asked for.
"""

from typing import TYPE_CHECKING, Any

from .clip import CLIP, VideoClassifier

if TYPE_CHECKING:
    from avion.weights.factories import (
        CLIP_VITB16,
        CLIP_VITB32,
        CLIP_VITL14,
        CLIP_VITL14_336PX,
        CLIP_FrozenInTime_TimeSformerB16,
        CLIP_TimeMamba_like_frozen,
        CLIP_TimeMamba_like_frozen_joint,
        CLIP_TimeMamba_like_timesformer,
        CLIP_TimeSformerB16,
    )

__all__ = [
    "CLIP",
    "CLIP_VITB32",
    "CLIP_VITB16",
    "CLIP_VITL14",
    "CLIP_VITL14_336PX",
    "CLIP_TimeSformerB16",
    "CLIP_FrozenInTime_TimeSformerB16",
    "CLIP_TimeMamba_like_timesformer",
    "CLIP_TimeMamba_like_frozen",
    "CLIP_TimeMamba_like_frozen_joint",
    "VideoClassifier",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from avion.weights import factories

        return getattr(factories, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
