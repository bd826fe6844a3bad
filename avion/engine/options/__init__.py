"""The flags of the entry points. Names and defaults are AVION's where AVION has the flag."""

from .finetune_retrieval import FinetuneRetrievalOptions
from .pretrain import PretrainOptions
from .shared import DeviceOptions, ModelOptions, OptimOptions, RunOptions, VideoOptions

__all__ = [
    "DeviceOptions",
    "FinetuneRetrievalOptions",
    "ModelOptions",
    "OptimOptions",
    "PretrainOptions",
    "RunOptions",
    "VideoOptions",
]
