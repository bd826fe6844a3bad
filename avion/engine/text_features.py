"""Features of sentences, for `tools/extract_features.py --texts`.

{folder}/texts.npz          the features (n, E), as `text` in .npz and .safetensors, alone in .npy and .pt
{folder}/texts.json         the sentences in the same order, and what the features depend on
"""

import functools
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from avion.data.ek100 import csv_rows
from avion.data.tokenizer import tokenize
from avion.errors import UserError
from avion.features import read_settings
from avion.files import write_text
from avion.reading import read_text

from .distributed import World
from .encode import encode_texts
from .feature_folder import TEXTS
from .feature_shards import STORED
from .feature_videos import save_file_of
from .options.features import FeatureOptions
from .precision import Precision

logger = logging.getLogger(__name__)

_COLUMNS = ("sentence", "narration", "caption", "text")


def read_sentences(path: str | Path) -> list[str]:
    """Read a text file with a sentence per line, or a CSV with one of the columns of `_COLUMNS`.

    Args:
        path: The file.

    Returns:
        The sentences.

    Raises:
        UserError: The file cannot be read, or holds no sentences.
    """
    path = os.fspath(path)
    if Path(path).suffix.lower() == ".csv":
        rows = list(csv_rows(path, ()))
        column = next((name for name in _COLUMNS if rows and name in rows[0][1]), None)
        if rows and column is None:
            found = ", ".join(rows[0][1])[:200]
            raise UserError(f"--texts {path}: a column {' or '.join(_COLUMNS)} is required, found {found}")
        lines = [(line, row[column]) for line, row in rows if column is not None]
        empty = next((line for line, text in lines if not text.strip()), None)
        if empty is not None:
            raise UserError(f"--texts {path}: line {empty}: the column {column!r} is empty")
        sentences = [text.strip() for _, text in lines]
    else:
        try:
            sentences = [line.strip() for line in read_text(path, encoding="utf-8-sig").splitlines() if line.strip()]
        except FileNotFoundError:
            raise UserError(f"--texts {path}: no such file") from None
        except OSError as error:
            raise UserError(f"--texts {path}: cannot be read ({error.strerror})") from None
        except UnicodeDecodeError as error:
            raise UserError(f"--texts {path}: is not text in UTF-8 ({error})") from None
    if not sentences:
        raise UserError(f"--texts {path}: holds no sentences")
    return sentences


def write_texts(
    model: nn.Module,
    sentences: Sequence[str],
    settings: dict[str, Any],
    world: World,
    precision: Precision,
    options: FeatureOptions,
) -> None:
    """Write the features of sentences, as `model.encode_text` gives them (not normalised), unless they exist already.

    Args:
        model: The model on the device.
        sentences: The sentences.
        settings: What the features depend on, as JSON values.
        world: The processes, which share the sentences.
        precision: The settings of autocast.
        options: The flags of the extraction.

    Raises:
        UserError: The model has no text tower, or the folder has features of other sentences or weights.
    """
    path = Path(options.output_dir) / f"{TEXTS}.{options.format}"
    about = path.with_suffix(".json")
    wanted = {**settings, "sentences": list(sentences)}
    with world.together("looking for features of sentences"):
        if not hasattr(model, "encode_text") or not hasattr(model, "textual"):
            raise UserError(f"--texts: {options.checkpoint} is a classifier and has no text tower; give a dual encoder")
        before = read_settings(about) if about.exists() else None
        if before is not None and before != wanted:
            raise UserError(f"{about}: is of other sentences or settings; give another --output-dir")
        done = before is not None and path.is_file()
    if world.any(not done):
        config = model.config
        tokenizer = functools.partial(tokenize, context_length=config.context_length, vocab_size=config.vocab_size)
        found = encode_texts(model, sentences, tokenizer, world, precision, batch_size=options.batch_size)
        with world.together("writing the features of the sentences"):
            if world.is_main:
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                except OSError as error:
                    raise UserError(f"--output-dir {options.output_dir}: cannot be made ({error.strerror})") from error
                values = torch.from_numpy(found.values).to(STORED[options.dtype])
                save_file_of(path, {"text": values}, options.format)
                write_text(about, json.dumps(wanted, indent=1) + "\n")
    logger.info("%s: features of %d sentences", path, len(sentences))
