"""The flags of the entry points. Names and defaults are AVION's where AVION has the flag."""

from .egoschema import EgoSchemaOptions
from .finetune_classification import FinetuneClassificationOptions
from .finetune_retrieval import FinetuneRetrievalOptions
from .pretrain import PretrainOptions
from .shared import DeviceOptions, ModelOptions, OptimOptions, RunOptions, VideoOptions

__all__ = [
    "DeviceOptions",
    "EgoSchemaOptions",
    "FinetuneClassificationOptions",
    "FinetuneRetrievalOptions",
    "ModelOptions",
    "OptimOptions",
    "PretrainOptions",
    "RunOptions",
    "VideoOptions",
]
