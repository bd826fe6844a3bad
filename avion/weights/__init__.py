"""Checkpoints and weights: files are opened without running them, models are built from them, loaded and saved."""

from .checkpoint import (
    Checkpoint,
    TrainingState,
    classifier_from_checkpoint,
    load_checkpoint,
    model_from_checkpoint,
)
from .exporting import export_tower
from .loading import LoadReport
from .saving import save_safetensors, save_weights
from .zoo import load_pretrained

__all__ = [
    "Checkpoint",
    "LoadReport",
    "TrainingState",
    "classifier_from_checkpoint",
    "export_tower",
    "load_checkpoint",
    "load_pretrained",
    "model_from_checkpoint",
    "save_safetensors",
    "save_weights",
]
