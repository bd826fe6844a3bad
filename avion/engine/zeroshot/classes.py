"""Classes as texts: the names of a class become one embedding of length 1, with which videos are compared."""

import os
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from avion.data.tokenizer import tokenize
from avion.engine.features import extract, load_clip
from avion.errors import UserError

SLOT = "{}"
PLAIN = (SLOT,)
# The marks with which Ego4D's narrations begin, as LaViLa uses them ("#C C": the camera wearer acts).
EGO4D = ("#C C {}", "#C {}")
_BATCH = 64  # texts

Names = str | Sequence[str]


def class_embeddings(model: nn.Module, names: Sequence[Names], templates: Sequence[str] = PLAIN) -> torch.Tensor:
    """Compute one embedding per class from its names.

    The embedding of a class is the mean over all its names in all templates of the text features, each brought to
    length 1 before, and the mean is brought to length 1 again (LaViLa, Zhao et al. 2023). This puts the model into
    evaluation mode.

    Args:
        model: A model with a text tower.
        names: One name per class, or a list of names that mean the same class.
        templates: Texts in which `{}` stands for the name, such as `#C C {}`; all other braces are plain text.

    Returns:
        (classes, E) float32, normalised: every row has length 1. On the device of the model.

    Raises:
        UserError: There is no class, a class has no name, or a template has not exactly one `{}`.
    """
    texts = class_texts(names, templates)
    distinct = list(dict.fromkeys(text for row in texts for text in row))
    model.eval()
    config, device = model.config, next(model.parameters()).device
    rows = []
    with torch.inference_mode():
        for first in range(0, len(distinct), _BATCH):
            tokens = tokenize(
                distinct[first : first + _BATCH], context_length=config.context_length, vocab_size=config.vocab_size
            )
            rows.append(model.encode_text(tokens.to(device)).float())
    return mean_of_units(torch.cat(rows), rows_of(texts, distinct))


def classify_video(
    model: nn.Module,
    path: str | os.PathLike,
    classes: torch.Tensor,
    *,
    frames: int | None = None,
    start: float = 0.0,
    end: float | None = None,
    norm_style: str = "openai",
    decoder: str = "auto",
) -> torch.Tensor:
    """Compare one video with classes. This puts the model into evaluation mode.

    The frames are the middles of equal segments, and the centre is cut out of each.

    Args:
        model: The model that the classes were embedded with.
        path: The video file.
        classes: (classes, E) from `class_embeddings`, every row of length 1.
        frames: The number of frames; None: as many as the model was trained with.
        start: Where the clip begins, in seconds.
        end: Where the clip ends, in seconds; None: at the end of the video.
        norm_style: A key of NORM_STYLES. Checkpoints of AVION and LaViLa need "openai_legacy".
        decoder: "auto", "pyav" or "decord".

    Returns:
        (classes,) float32 on the device of the model: the cosine similarities of the video with the classes, from -1 to
        1.

    Raises:
        UserError: The file cannot be read.
    """
    clip = load_clip(
        path,
        model.config.num_frames if frames is None else frames,
        model,
        start=start,
        end=end,
        norm_style=norm_style,
        decoder=decoder,
    )
    feature = F.normalize(extract(model, clip, ["clip"])["clip"][0].float(), dim=0)  # (E,)
    return classes.to(feature.device) @ feature


def class_texts(names: Sequence[Names], templates: Sequence[str]) -> list[list[str]]:
    """Put the names of each class into the templates.

    Args:
        names: One name per class, or a list of names that mean the same class.
        templates: Texts in which `{}` stands for the name.

    Returns:
        The texts of each class: all of its names in all templates.

    Raises:
        UserError: As in `class_embeddings`.
    """
    if not templates or not names:
        raise UserError(f"{'templates' if names else 'classes'}: none were given, at least one is required")
    for template in templates:
        if template.count(SLOT) != 1:
            raise UserError(f"template {template!r}: exactly one {{}} is required, which stands for the name")
    texts = []
    for number, own in enumerate(names):
        own = [own] if isinstance(own, str) else list(own)
        if not own or not all(name.strip() for name in own):
            raise UserError(f"class {number}: {'an empty name' if own else 'no name'}, a text is required")
        texts.append([template.replace(SLOT, name) for template in templates for name in own])
    return texts


def rows_of(texts: Sequence[Sequence[str]], distinct: Sequence[str]) -> list[list[int]]:
    """Return, for each class, the positions of its texts among the distinct texts."""
    place = {text: i for i, text in enumerate(distinct)}
    return [[place[text] for text in row] for row in texts]


def mean_of_units(features: torch.Tensor, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Compute means of unit vectors, brought to length 1.

    Args:
        features: (n, E) float, of any length.
        rows: For each mean, the rows of `features` that it is taken over.

    Returns:
        (means, E), of the dtype of `features`, every row of length 1.
    """
    unit = F.normalize(features, dim=1)
    return F.normalize(torch.stack([unit[list(own)].mean(dim=0) for own in rows]), dim=1)
