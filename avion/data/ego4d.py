"""Ego4D narrations in LaViLa's pickles.

Each row is of one of three kinds: (video, start, end, text); (video, start, end, [texts]) of the rephraser; (video,
start, end, [texts], [negative log-likelihoods]) of the narrator. Times are in seconds.
"""

from __future__ import annotations

import logging
import os

from avion.data.narrations import NarrationTable, TableBuilder, checked_not_empty
from avion.errors import UserError
from avion.reading import file_size
from avion.safe_pickle import load_pickle

logger = logging.getLogger(__name__)


def read_ego4d(path: str | os.PathLike, *aux: str | os.PathLike) -> NarrationTable:
    """Read the narrations of one or several pickles, in order, `aux` after `path`.

    What real files are known to contain (ends before starts, for example) is mended, and the log reports it.

    Raises:
        UserError: A file is not as described above. The message is one line with file, row and field.
    """
    builder = TableBuilder()
    for file in (path, *aux):
        before = len(builder)
        add_ego4d(builder, file)
        logger.info("%s: %d narrations", file, len(builder) - before)
    if builder.report():
        logger.warning("Ego4D narrations, mended of %d: %s", len(builder), builder.report())
    return checked_not_empty(builder.build(), str(path))


def add_ego4d(builder: TableBuilder, path: str | os.PathLike) -> None:
    """Append the rows of one pickle.

    Raises:
        UserError: As in `read_ego4d`.
    """
    rows = load_pickle(path, "narrations")
    if not isinstance(rows, (list, tuple)):
        raise UserError(f"narrations {path}: a list of rows is required, the pickle holds a {type(rows).__name__}")
    builder.begin_file(file_size(path))
    for i, row in enumerate(rows):
        if not isinstance(row, (list, tuple)) or len(row) not in (4, 5):
            found = f"{len(row)} fields" if isinstance(row, (list, tuple)) else type(row).__name__
            raise UserError(f"narrations {path}: row {i}: (video, start, end, narration) is required, found {found}")
        try:
            builder.add(row[0], row[1], row[2], row[3])
        except ValueError as error:
            raise UserError(f"narrations {path}: row {i}: {error}") from None
