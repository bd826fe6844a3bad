"""Models as folders and as repositories of the Hugging Face hub: config.json, model.safetensors and a model card."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from torch import nn

from avion.constants import NORM_STYLES
from avion.errors import UserError
from avion.files import write_text
from avion.models.clip import VideoClassifier

from .checkpoint import Checkpoint
from .files import hub_file
from .saving import model_fields, plain_preprocess, save_safetensors

WEIGHTS, CONFIG = "model.safetensors", "config.json"
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def preprocess_of(norm_style: str) -> dict[str, Any]:
    """Return the field `preprocess` of a checkpoint for a style of normalisation.

    Args:
        norm_style: A key of `avion.constants.NORM_STYLES`.

    Returns:
        The style with its mean and standard deviation per RGB channel on the 0-255 scale.

    Raises:
        UserError: There is no such style.
    """
    if norm_style not in NORM_STYLES:
        raise UserError(f"norm_style {norm_style!r}: expected one of {', '.join(sorted(NORM_STYLES))}")
    return {"norm_style": norm_style, **NORM_STYLES[norm_style]._asdict()}


def write_folder(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write config.json and model.safetensors.

    The file of weights holds the whole description of the model; config.json repeats it for other readers.

    Args:
        model: A CLIP or a VideoClassifier with its `preprocess`.
        folder: An existing folder.

    Raises:
        UserError: The model does not know how its input is normalised, or a file cannot be written.
    """
    preprocess = getattr(model, "preprocess", None)
    if preprocess is None:
        raise UserError(
            "save_pretrained: the model does not know how its input is normalised; give norm_style= "
            f"({', '.join(sorted(NORM_STYLES))})"
        )
    save_safetensors(model, Path(folder) / WEIGHTS, preprocess)
    config = {**model_fields(model), "preprocess": plain_preprocess(preprocess, folder)}
    write_text(Path(folder) / CONFIG, json.dumps(config, indent=2) + "\n")


def open_pretrained(where: str | os.PathLike[str], download: Mapping[str, Any]) -> Checkpoint:
    """Open what `write_folder` wrote.

    Args:
        where: A folder, or owner/repo on the hub.
        download: The arguments of `huggingface_hub.hf_hub_download` that the user gave, for a repository.

    Returns:
        The checkpoint.

    Raises:
        UserError: There is no such folder or repository, or no such file in it.
    """
    text = os.fspath(where)
    folder = Path(text).expanduser()
    if folder.is_dir():
        if not (folder / WEIGHTS).is_file():
            raise UserError(f"{text}: has no {WEIGHTS}; save_pretrained writes it")
        return Checkpoint.open(folder / WEIGHTS)
    if not _REPOSITORY.fullmatch(text):
        raise UserError(f"{text}: no such folder, and not of the form owner/repo")
    if not download:
        return Checkpoint.open(hub_file(text, [WEIGHTS]))
    import huggingface_hub

    try:
        return Checkpoint.open(huggingface_hub.hf_hub_download(text, WEIGHTS, **download))
    except (HfHubHTTPError, HFValidationError, OSError) as e:
        raise UserError(f"{text}: {WEIGHTS} cannot be had ({' '.join(str(e).split())[:300]})") from e


def card(
    model: nn.Module,
    *,
    recipe: str = "",
    metrics: Mapping[str, float] | None = None,
    licence: str = "",
    title: str = "",
) -> ModelCard:
    """Write the model card: what the model is, how it was trained and measured, and how to load it.

    Args:
        model: A CLIP or a VideoClassifier with its `preprocess`.
        recipe: The recipe that trained the model, such as table8_row6.
        metrics: Measured metrics by their names, in percent.
        licence: The licence of the weights, as the hub names licences ("mit"). The data may restrict it.
        title: The heading [the name of the model].

    Returns:
        The card, which `push_to_hub` uploads as README.md.
    """
    config, preprocess = model.config, plain_preprocess(model.preprocess or {}, "model")
    classifier = isinstance(model, VideoClassifier)
    facts = {
        "model": config.name,
        "kind": f"classifier of {model.fc_cls.out_features} classes" if classifier else "video and text towers",
        "recipe": recipe or "not stated",
        "frames": config.num_frames,
        "image size": f"{config.img_size} px",
        "activation": config.act_layer,
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "normalisation (0-255)": f"{preprocess['norm_style']}: mean {preprocess['mean']}, std {preprocess['std']}",
        "licence of the weights": licence or "not stated; the licences of the training data apply",
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    measured = "".join(f"| {name} | {value:.2f} |\n" for name, value in (metrics or {}).items())
    table = f"\n## Metrics, in percent\n\n| metric | value |\n|-|-|\n{measured}" if measured else ""
    kind = type(model).__name__
    return ModelCard(
        f"---\nlicense: {licence or 'other'}\nlibrary_name: avion\n"
        f"pipeline_tag: {'video-classification' if classifier else 'zero-shot-classification'}\n"
        "tags:\n- video\n- egocentric\n---\n\n"
        f"# {title or config.name}\n\n| | |\n|-|-|\n{rows}\n{table}\n## Loading\n\n"
        f'```python\nfrom avion.models.clip import {kind}\n\nmodel = {kind}.from_pretrained("owner/repo")\n```\n\n'
        f"The input is a tensor (B, 3, {config.num_frames}, {config.img_size}, {config.img_size}) of pixels from 0 to "
        "255 that are normalised as above.\n"
    )
