"""The flags of the entry points. A flag that AVION has too has AVION's name and default."""

from .egoschema import EgoSchemaOptions
from .finetune_classification import FinetuneClassificationOptions
from .finetune_retrieval import FinetuneRetrievalOptions
from .pretrain import PretrainOptions
from .shared import (
    DeviceOptions,
    ModelOptions,
    OptimOptions,
    RunOptions,
    SavedModelOptions,
    TrainingOptions,
    VideoOptions,
)
from .zeroshot import ZeroShotOptions

__all__ = [
    "DeviceOptions",
    "EgoSchemaOptions",
    "FinetuneClassificationOptions",
    "FinetuneRetrievalOptions",
    "ModelOptions",
    "OptimOptions",
    "PretrainOptions",
    "RunOptions",
    "SavedModelOptions",
    "TrainingOptions",
    "VideoOptions",
    "ZeroShotOptions",
]
