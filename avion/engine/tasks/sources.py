"""The sources of training clips: files of narrations and captions, each with a weight and a folder of videos."""

import hashlib
import logging
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from avion.data.captions import Columns, read_narrations
from avion.data.narrations import NarrationTable
from avion.engine.options import PretrainOptions
from avion.errors import UserError
from avion.numbers import Number
from avion.remote import is_remote

logger = logging.getLogger(__name__)

_WEIGHT = Number(float, 0, 1000, above=True)


@dataclass(frozen=True)
class Source:
    """Clips of one folder of videos that are drawn with one weight.

    Attributes:
        table: The clips.
        root: The folder of the videos.
        flag: The flag that names the folder, for messages.
        weight: How often an epoch takes each clip.
    """

    table: NarrationTable
    root: str
    flag: str
    weight: float


def read_sources(options: PretrainOptions) -> list[Source]:
    """Read the sources that the flags name.

    Files of one folder and one weight that follow each other become one source.

    Args:
        options: The flags.

    Returns:
        The sources, the one of --train-metadata first.

    Raises:
        UserError: A file cannot be read, or there are more folders than files.
    """
    if len(options.root_aux) > len(options.train_metadata_aux):
        raise UserError(
            f"--root-aux: {len(options.root_aux)} folders for {len(options.train_metadata_aux)} files of "
            "--train-metadata-aux; give at most one each, - where it is that of --root"
        )
    columns = Columns.parse(options.caption_columns)
    groups: list[tuple[list[str], str, str, float]] = [([options.train_metadata], options.root, "--root", 1.0)]
    roots = [*options.root_aux, *["-"] * (len(options.train_metadata_aux) - len(options.root_aux))]
    for word, root in zip(options.train_metadata_aux, roots, strict=True):
        path, weight = parse_weighted(word)
        root, flag = (options.root, "--root") if root == "-" else (root, "--root-aux")
        paths, last_root, _, last_weight = groups[-1]
        if (root, weight) == (last_root, last_weight):
            paths.append(path)
        else:
            groups.append(([path], root, flag, weight))
    return [Source(read_narrations(paths, columns), root, flag, weight) for paths, root, flag, weight in groups]


def parse_weighted(word: str) -> tuple[str, float]:
    """Split "FILE:0.5" into a file and a weight; without a weight the weight is 1.

    Args:
        word: A value of --train-metadata-aux.

    Returns:
        The file and the weight.

    Raises:
        UserError: The weight is not a number above 0.
    """
    path, colon, weight = word.rpartition(":")
    if not colon or "/" in weight or (not is_remote(word) and Path(word).exists()):
        return word, 1.0
    try:
        return path, float(_WEIGHT.read(weight))
    except ValueError as error:
        raise UserError(f"--train-metadata-aux {word}: the weight behind the colon: {error}") from None


def hold_out(sources: list[Source], fraction: float) -> tuple[list[Source], NarrationTable]:
    """Hold out some videos of the first source, with all their clips.

    The names of the videos alone decide which videos these are: neither the order nor further rows nor seeds change it.
    Other sources of the same folder lose the clips of these videos too.

    Args:
        sources: The sources.
        fraction: The share of the videos.

    Returns:
        The sources that are left to train on, and the clips that are held out.

    Raises:
        UserError: There are too few videos, or a source has no clip left.
    """
    first = sources[0]
    names = sorted(first.table.videos, key=lambda name: hashlib.sha256(name.encode()).digest())
    count = max(round(fraction * len(names)), 1)
    if count >= len(names):
        raise UserError(f"--val-fraction {fraction:g}: {len(names)} videos cannot be shared out; give more, or a file")
    held_out = set(names[:count])
    left = []
    for source in sources:
        if source.root == first.root:
            stays = np.array([name not in held_out for name in source.table.videos])[source.table.video]
            if not stays.any():
                raise UserError(f"--val-fraction {fraction:g}: leaves no clip of a source to train on; lower it")
            source = replace(source, table=source.table.where(stays)) if not stays.all() else source
        left.append(source)
    held = np.array([name in held_out for name in first.table.videos])[first.table.video]
    table = first.table.where(held)
    logger.info("%d clips of %d videos are held out for validation", len(table), count)
    return left, table
