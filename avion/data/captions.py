"""Captions of one's own: a CSV, JSON Lines, JSON or Parquet file of clips and what is seen in them.

Columns `video`, `start`, `end`, `caption`, or other names that are given. `video` is the path below the video root,
with or without extension. Times are seconds or H:MM:SS; without a start a clip begins with its video, without an end it
goes on to the end. Several captions of one clip are several rows, or a list.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avion.data.ego4d import add_ego4d
from avion.data.ek100 import csv_rows
from avion.data.narrations import TEXTS_TOO_LONG, NarrationTable, TableBuilder, checked_not_empty, texts_allowed
from avion.data.video import VIDEO_EXTENSIONS
from avion.errors import UserError
from avion.reading import file_size, open_file, parse_json, read_text

logger = logging.getLogger(__name__)

TO_THE_END = math.inf  # the end of a clip that goes on as long as its video
_EXTENSIONS = (".csv", ".jsonl", ".ndjson", ".json", ".parquet")
_SECONDS = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_CLOCK = re.compile(r"(?:(\d{1,3}):)?(\d{1,2}):(\d{1,2}(?:\.\d+)?)")
_PARQUET_ROWS = 65536  # read at a time
_AT_ONCE_BYTES = 16_000_000  # of texts that are Python objects at a time
_UNPACKED_BYTES, _UNPACKED_TIMES = 64_000_000, 100  # of a Parquet file, whose texts compress some ten times


@dataclass(frozen=True)
class Columns:
    """The names of a file's columns. start and end may be absent from a file, unless they were given."""

    video: str = "video"
    start: str = "start"
    end: str = "end"
    caption: str = "caption"
    given: frozenset[str] = frozenset()

    @classmethod
    def parse(cls, words: Sequence[str]) -> Columns:
        """["caption=sentence", "start=from"] -> the other names are the usual ones. UserError for another form."""
        known = [f.name for f in dataclasses.fields(cls) if f.name != "given"]
        names: dict[str, str] = {}
        for word in words:
            field, equals, name = word.partition("=")
            if field not in known or not equals or not name or field in names:
                raise UserError(
                    f"--caption-columns {word}: FIELD=COLUMN is required, FIELD once and one of {', '.join(known)}"
                )
            names[field] = name
        return cls(**names, given=frozenset(names))


def is_caption_file(path: str | os.PathLike) -> bool:
    """Whether a file of this name is read as captions; anything else is a pickle of Ego4D narrations."""
    return Path(path).suffix.lower() in _EXTENSIONS


def read_narrations(paths: Sequence[str | os.PathLike], columns: Columns = Columns()) -> NarrationTable:
    """The clips of caption files and of Ego4D's pickles, in order.

    Args:
        paths: At least one file; each may be of another kind.
        columns: Of the caption files.

    Returns:
        A table. `end` is infinite where a clip goes on to the end of its video.

    Raises:
        UserError: One line with file, line and column, for anything that is not as the module says.
    """
    builder = TableBuilder()
    for path in paths:
        before = len(builder)
        if is_caption_file(path):
            _add_captions(builder, path, columns)
        else:
            add_ego4d(builder, path)
        logger.info("%s: %d clips", path, len(builder) - before)
    if builder.report():
        logger.warning("narrations, mended of %d: %s", len(builder), builder.report())
    return checked_not_empty(builder.build(), str(paths[0]))


def _add_captions(builder: TableBuilder, path: str | os.PathLike, columns: Columns) -> None:
    clips: dict[tuple, list[str]] = {}
    places: dict[tuple, str] = {}
    left = texts_allowed(_size(path))
    for place, row in _rows(path, columns):
        column = columns.video
        try:
            video = _video(row[columns.video])
            column = columns.start
            start = read_seconds(row.get(columns.start), 0.0)
            column = columns.end
            end = read_seconds(row.get(columns.end), TO_THE_END)
            column = columns.caption
            captions = _captions(row[columns.caption])
            left -= sum(map(len, captions))
            if left < 0:
                raise ValueError(TEXTS_TOO_LONG)
        except ValueError as error:
            raise UserError(f"captions {path}: {place}: {column}: {error}") from None
        clips.setdefault((video, start, end), []).extend(captions)
        places.setdefault((video, start, end), place)
    for (video, start, end), captions in clips.items():
        try:
            builder.add(video, start, None if end == TO_THE_END else end, captions)
        except ValueError as error:
            raise UserError(f"captions {path}: {places[video, start, end]}: {error}") from None


def _size(path: str | os.PathLike) -> int:
    try:
        return file_size(path)
    except OSError:  # its reader says what is wrong with it
        return 0


def _rows(path: str | os.PathLike, columns: Columns) -> Iterator[tuple[str, dict]]:
    """(place in words, row) of each row, as the file has it."""
    reader = {".csv": _csv, ".json": _json, ".parquet": _parquet}.get(Path(path).suffix.lower(), _json_lines)
    required = {columns.video, columns.caption} | {getattr(columns, name) for name in columns.given}
    try:
        for place, row in reader(path, columns):
            if not isinstance(row, dict):
                raise UserError(f"captions {path}: {place}: an object is required, found a {type(row).__name__}")
            missing = sorted(required - row.keys())
            if missing:
                found = ", ".join(map(str, row))[:200]
                raise UserError(
                    f"captions {path}: {place}: the column {missing[0]!r} is missing; found {found}; "
                    "--caption-columns says what columns are called"
                )
            yield place, row
    except FileNotFoundError:
        raise UserError(f"captions {path}: no such file") from None
    except OSError as error:
        raise UserError(f"captions {path}: cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"captions {path}: is not in UTF-8 ({error})") from None


def _csv(path: str | os.PathLike, columns: Columns) -> Iterator[tuple[str, dict]]:
    for line, row in csv_rows(path, ()):
        yield f"line {line}", row


def _json_lines(path: str | os.PathLike, columns: Columns) -> Iterator[tuple[str, object]]:
    with open_file(path, "r", encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"line {number}", _parsed(line, f"captions {path}: line {number}")


def _json(path: str | os.PathLike, columns: Columns) -> Iterator[tuple[str, object]]:
    rows = _parsed(read_text(path, encoding="utf-8-sig"), f"captions {path}")
    if not isinstance(rows, list):
        raise UserError(f"captions {path}: a list of objects is required, found a {type(rows).__name__}")
    for number, row in enumerate(rows):
        yield f"item {number}", row


def _parsed(text: str, name: str) -> object:
    try:
        return parse_json(text, nan=True)  # the checks of the fields name the field
    except ValueError as error:
        raise UserError(f"{name}: is not JSON ({str(error)[:80]})") from None


def _parquet(path: str | os.PathLike, columns: Columns) -> Iterator[tuple[str, dict]]:
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError(f"captions {path}: Parquet needs the package pyarrow; `pip install pyarrow` mends it")
    import pyarrow
    import pyarrow.parquet

    try:
        with open_file(path) as opened, pyarrow.parquet.ParquetFile(opened, read_dictionary=_texts_of(path)) as file:
            names = file.schema_arrow.names
            there = [c for c in (columns.video, columns.start, columns.end, columns.caption) if c in names]
            there = there or names[:10]  # for the message
            number = 0
            for batch in file.iter_batches(_PARQUET_ROWS, columns=there):
                step = _rows_at_once(batch)
                for first in range(0, len(batch), step):
                    for row in batch.slice(first, step).to_pylist():
                        yield f"row {number}", row
                        number += 1
    except pyarrow.ArrowException as error:
        raise UserError(f"captions {path}: is not a Parquet file that can be read ({str(error)[:100]})") from None


def _texts_of(path: str | os.PathLike) -> list[str]:
    """The columns of texts of a Parquet file. They are read as a list of different texts and numbers into it, as they
    are in the file: a million rows may share one text of a megabyte.

    ValueError where the file says more than a file of its size can hold.
    """
    import pyarrow.parquet

    with open_file(path) as opened, pyarrow.parquet.ParquetFile(opened) as file:
        size = os.fstat(opened.fileno()).st_size
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        unpacked = sum(g.column(i).total_uncompressed_size for g in groups for i in range(g.num_columns))
        if unpacked > _UNPACKED_BYTES + _UNPACKED_TIMES * size:
            raise UserError(f"captions {path}: {size} bytes that unpack to {unpacked / 1e6:.0f} MB are not read")
        columns = [file.schema.column(i) for i in range(len(file.schema))]
        return [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]


def _rows_at_once(batch: Any) -> int:
    """How many rows of a batch are turned into Python objects together, by their longest text."""
    import pyarrow
    import pyarrow.compute

    longest = 1
    for column in batch.columns:
        while pyarrow.types.is_list(column.type) or pyarrow.types.is_large_list(column.type):
            longest = max(longest, len(column.values) // max(len(column), 1))
            column = column.values
        if pyarrow.types.is_dictionary(column.type) and len(column.dictionary):
            lengths = pyarrow.compute.binary_length(column.dictionary)
            longest = max(longest, pyarrow.compute.max(lengths).as_py() or 1)
    return max(1, min(_PARQUET_ROWS, _AT_ONCE_BYTES // longest))


def _video(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):  # an id that is a number
        value = str(value)
    if not isinstance(value, str):
        raise ValueError(f"a text is required, found a {type(value).__name__}")
    stem, extension = os.path.splitext(value.strip())
    return (stem if extension.lower() in VIDEO_EXTENSIONS else value.strip()).removeprefix("./")


def read_seconds(value: object, absent: float) -> float:
    """A number, or a text that says one, in seconds; H:MM:SS and MM:SS too. `absent` for nothing."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return absent
    if isinstance(value, str):
        text = value.strip()
        clock = _CLOCK.fullmatch(text)
        if clock is not None:
            return 3600 * int(clock[1] or 0) + 60 * int(clock[2]) + float(clock[3])
        if not text.isascii() or _SECONDS.fullmatch(text) is None:
            raise ValueError(f"{text[:40]!r} is no number of seconds, and not of the form H:MM:SS")
        value = float(text)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"a finite number of seconds is required, found {str(value)[:40]}")
    return float(value)


def _captions(value: object) -> list[str]:
    """One caption or a list of them. In a CSV, a list is written as JSON writes it."""
    if isinstance(value, str):
        if value.lstrip().startswith('["') and value.rstrip().endswith("]"):
            try:
                value = parse_json(value)
            except ValueError:
                return [value]
            return _captions(value)
        if value.lstrip().startswith("['") and value.rstrip().endswith("']"):
            raise ValueError("is a list as Python prints it; write it as JSON does, or one row per caption")
        return [value]
    if isinstance(value, list | tuple) and value and all(isinstance(text, str) for text in value):
        return list(value)
    raise ValueError(f"a text or a list of texts is required, found {str(value)[:40]!r} ({type(value).__name__})")
