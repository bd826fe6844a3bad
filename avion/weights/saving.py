"""Writes models into files, with weights, configuration and normalisation, so that a file says which model it holds."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from avion.errors import UserError
from avion.models.clip import VideoClassifier

from .facts import parse_preprocess
from .files import write_pt, write_safetensors
from .loading import unwrap


def model_fields(model: nn.Module) -> dict[str, Any]:
    """Return what a checkpoint says about the model beside its weights.

    Args:
        model: The model.

    Returns:
        The field `model_config`, and the field `classifier` if the model is a classifier.
    """
    fields: dict[str, Any] = {"model_config": dataclasses.asdict(model.config)}
    if isinstance(model, VideoClassifier):
        fields["classifier"] = {
            "num_classes": model.fc_cls.out_features,
            "dropout": model.dropout.p,
            "actions": None if model.actions is None else list(model.actions),
        }
    return fields


def save_safetensors(model: nn.Module, path: str | os.PathLike, preprocess: Mapping[str, Any]) -> None:
    """Write the weights, the configuration and `preprocess` as one safetensors file, whole or not at all.

    `read_checkpoint`, `load_checkpoint` and `model_from_checkpoint` read it.

    Args:
        model: The model.
        path: The file; its folder must exist.
        preprocess: {"norm_style", "mean", "std"}, per RGB channel on the 0-255 scale.

    Raises:
        UserError: `preprocess` lacks a field, or the file cannot be written.
    """
    model = unwrap(model)
    fields = {**model_fields(model), "preprocess": plain_preprocess(preprocess, path)}
    write_safetensors(model.state_dict(), path, **fields)


def save_weights(model: nn.Module, path: str | os.PathLike, preprocess: Mapping[str, Any]) -> None:
    """Write a model as a safetensors file, or as a `.pt` file of the same contents; the suffix of the path decides.

    Args:
        model: The model.
        path: The file; its folder must exist.
        preprocess: {"norm_style", "mean", "std"}, per RGB channel on the 0-255 scale.

    Raises:
        UserError: The suffix is another one, `preprocess` lacks a field, or the file cannot be written.
    """
    suffix = os.path.splitext(os.fspath(path))[1]
    if suffix == ".safetensors":
        save_safetensors(model, path, preprocess)
    elif suffix in (".pt", ".pth"):
        model = unwrap(model)
        weights = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
        contents = {
            "state_dict": weights,
            **model_fields(model),
            "preprocess": plain_preprocess(preprocess, path),
        }
        write_pt(contents, path)
    else:
        raise UserError(f"{path}: suffix {suffix!r}, expected .pt, .pth or .safetensors")


def plain_preprocess(preprocess: Mapping[str, Any], path: str | os.PathLike) -> dict[str, Any]:
    """Return the field `preprocess` in the types of JSON.

    Args:
        preprocess: {"norm_style", "mean", "std"}.
        path: The path of the file that is to be written, for messages.

    Returns:
        The same values as texts and lists of floats.

    Raises:
        UserError: A field is missing; the message names `path`.
    """
    style, mean, std = parse_preprocess(preprocess, os.fspath(path))
    return {"norm_style": style, "mean": mean and list(mean), "std": std and list(std)}
