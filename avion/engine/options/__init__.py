"""The flags of the entry points. Names and defaults are AVION's where AVION has the flag."""

from .pretrain import PretrainOptions
from .shared import DeviceOptions, ModelOptions, OptimOptions, RunOptions, VideoOptions

__all__ = ["DeviceOptions", "ModelOptions", "OptimOptions", "PretrainOptions", "RunOptions", "VideoOptions"]
