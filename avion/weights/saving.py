"""Models into files: weights, configuration and normalisation, so that the file says what it is."""

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
    """What a checkpoint says about the model beside its weights: `model_config`, and `classifier` if it is one."""
    fields: dict[str, Any] = {"model_config": dataclasses.asdict(model.config)}
    if isinstance(model, VideoClassifier):
        fields["classifier"] = {
            "num_classes": model.fc_cls.out_features,
            "dropout": model.dropout.p,
            "actions": None if model.actions is None else list(model.actions),
        }
    return fields


def save_safetensors(model: nn.Module, path: str | os.PathLike, preprocess: Mapping[str, Any]) -> None:
    """Write the weights, the config and `preprocess` ({"norm_style", "mean", "std"}) as one safetensors file.

    Written beside and renamed; `read_checkpoint`, `load_checkpoint` and `model_from_checkpoint` read it.
    """
    model = unwrap(model)
    fields = {**model_fields(model), "preprocess": plain_preprocess(preprocess, path)}
    write_safetensors(model.state_dict(), path, **fields)


def save_weights(model: nn.Module, path: str | os.PathLike, preprocess: Mapping[str, Any]) -> None:
    """`save_safetensors`, or a `.pt` of the same contents, by the path's suffix."""
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
    """The field `preprocess` as JSON takes it. UserError, which names `path`, where it lacks something."""
    style, mean, std = parse_preprocess(preprocess, os.fspath(path))
    return {"norm_style": style, "mean": mean and list(mean), "std": std and list(std)}
