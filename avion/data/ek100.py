"""EPIC-KITCHENS-100 annotations for multi-instance retrieval: clips, sentences, relevancy."""

from __future__ import annotations

import csv
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from avion.data.narrations import NarrationTable, TableBuilder, checked_not_empty
from avion.errors import UserError
from avion.reading import open_file
from avion.remote import neighbour
from avion.safe_pickle import load_pickle

logger = logging.getLogger(__name__)

_CLIP_COLUMNS = ("narration_id", "participant_id", "video_id", "start_timestamp", "stop_timestamp", "narration")
_CLASS_COLUMNS = ("verb_class", "noun_class", "all_noun_classes")
_CLASS = re.compile(r"[0-9]{1,6}")
_TIMESTAMP = re.compile(r"(\d{1,3}):([0-5]?\d):([0-5]?\d(?:\.\d+)?)")


class EK100Table(NarrationTable):
    """Clips of EPIC-KITCHENS-100.

    Attributes:
        verb_class: (n,) int64; None where the CSV has no such column.
        noun_class: (n,) int64; None where the CSV has no such column.
        all_noun_classes: A tuple of ints per clip, or None.
    """

    verb_class: np.ndarray | None = None
    noun_class: np.ndarray | None = None
    all_noun_classes: list[tuple[int, ...]] | None = None


def parse_timestamp(text: str) -> float:
    """Convert "HH:MM:SS.ss" to seconds.

    Raises:
        ValueError: The text has another form.
    """
    match = _TIMESTAMP.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text[:40]!r} is not a timestamp of the form HH:MM:SS.ss")
    hours, minutes, seconds = match.groups()
    return 3600 * int(hours) + 60 * int(minutes) + float(seconds)


def read_ek100_retrieval(path: str | os.PathLike) -> EK100Table:
    """Read the clips of a retrieval, train or validation CSV.

    Args:
        path: The CSV file.

    Returns:
        The clips in the order of the CSV. The video of a clip is "{participant_id}/{video_id}".

    Raises:
        UserError: The file or a column is missing, the file is empty, or a field is malformed. The message has one line
            with file, line and column.
    """
    builder, classes = TableBuilder(), {name: [] for name in _CLASS_COLUMNS}
    present: list[str] = []
    for line, row in csv_rows(path, _CLIP_COLUMNS):
        present = present or [name for name in _CLASS_COLUMNS if name in row]
        column = ""
        try:
            column = "start_timestamp"
            start = parse_timestamp(row[column])
            column = "stop_timestamp"
            stop = parse_timestamp(row[column])
            for column in present:
                parse = _classes if column == "all_noun_classes" else class_number
                classes[column].append(parse(row[column]))
            column = "clip"
            video = f"{row['participant_id']}/{row['video_id']}"
            builder.add(video, start, stop, row["narration"], narration_id=row["narration_id"])
        except ValueError as error:
            raise UserError(f"annotations {path}: line {line}: {column}: {error}") from None
    if builder.report():
        logger.warning("annotations %s, mended of %d: %s", path, len(builder), builder.report())
    return _with_classes(builder.build(), classes, present, path)


def _with_classes(table: NarrationTable, classes: dict[str, list], present: list[str], path) -> EK100Table:
    checked_not_empty(table, f"annotations {path}")
    result = EK100Table(**vars(table))
    for name in present:
        column = classes[name]
        setattr(result, name, column if name == "all_noun_classes" else np.array(column, dtype=np.int64))
    return result


def read_sentences(path: str | os.PathLike) -> tuple[list[str], list[str]]:
    """Read the sentences of a retrieval split.

    Returns:
        Narration ids and texts, in the order of the columns of the relevancy matrix.

    Raises:
        UserError: The file is malformed or empty, or two rows have the same id.
    """
    ids, texts = [], []
    for line, row in csv_rows(path, ("narration_id", "narration")):
        if not row["narration"].strip():
            raise UserError(f"sentences {path}: line {line}: narration: is empty, a text is required")
        ids.append(row["narration_id"])
        texts.append(row["narration"].strip())
    if not ids:
        raise UserError(f"sentences {path}: holds no sentences")
    check_ids_differ(ids, f"sentences {path}")
    return ids, texts


def sentence_texts(clips: EK100Table, path: str | os.PathLike) -> list[str]:
    """Return the sentences as the published metrics use them: each one is the narration of the clip of the same id.

    These are the texts of the list, except in six rows of the released test list, which hold another clip's narration.
    A sentence whose clip is not among `clips` keeps the text of the list.
    """
    ids, texts = read_sentences(path)
    rows = {} if clips.narration_ids is None else {name: i for i, name in enumerate(clips.narration_ids)}
    spoken = [clips[rows[name]].texts[0] if name in rows else text for name, text in zip(ids, texts, strict=True)]
    if different := sum(a != b for a, b in zip(texts, spoken, strict=True)):
        logger.info(
            "sentences %s: %d of %d read otherwise than the clip of their id, whose narration is used",
            path,
            different,
            len(texts),
        )
    return spoken


def sentence_path(clips_path: str | os.PathLike) -> str:
    """Return the path of a split's sentences: `..._test.csv` → `..._test_sentence.csv`, in the same folder."""
    name = Path(clips_path)
    return neighbour(clips_path, f"{name.stem}_sentence{name.suffix}")


def load_relevancy(path: str | os.PathLike, num_clips: int, num_sentences: int) -> np.ndarray:
    """Load the relevancy matrix of a retrieval split.

    If the matrix has one sentence too many, as in LaViLa's copy of the train split, the last column is cut off with a
    warning.

    Returns:
        (num_clips, num_sentences) float32, values in [0, 1].

    Raises:
        UserError: The matrix has another shape or a value outside [0, 1].
    """
    matrix = load_pickle(path, "relevancy")
    if not isinstance(matrix, np.ndarray) or matrix.ndim != 2 or matrix.dtype.kind not in "biuf":
        found = f"shape {matrix.shape}" if isinstance(matrix, np.ndarray) else type(matrix).__name__
        raise UserError(f"relevancy {path}: a numeric matrix of clips x sentences is required, found {found}")
    if matrix.shape == (num_clips, num_sentences + 1):
        logger.warning("relevancy %s: has one sentence more than the sentence list, the last is left out", path)
        matrix = matrix[:, :num_sentences]
    if matrix.shape != (num_clips, num_sentences):
        raise UserError(
            f"relevancy {path}: its shape is {matrix.shape[0]} x {matrix.shape[1]}, "
            f"the annotations have {num_clips} clips and {num_sentences} sentences; give the file of the same split"
        )
    if matrix.size and not (matrix.min() >= 0 and matrix.max() <= 1):  # NaN fails both
        raise UserError(f"relevancy {path}: has values outside 0 to 1 (or not numbers)")
    return np.ascontiguousarray(matrix, dtype=np.float32)


def csv_rows(path: str | os.PathLike, required: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the rows of a CSV with their line numbers.

    Raises:
        UserError: The file is missing or empty, lacks one of the columns `required`, or has a row of another length
            than its header.
    """
    name = f"annotations {path}"
    try:
        with open_file(path, "r", newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            if not reader.fieldnames:
                raise UserError(f"{name}: the file is empty")
            missing = [column for column in required if column not in reader.fieldnames]
            if missing:
                found = ", ".join(map(str, reader.fieldnames))[:200]
                raise UserError(f"{name}: the column {missing[0]!r} is missing; found {found}")
            repeated = [column for column in reader.fieldnames if reader.fieldnames.count(column) > 1]
            if repeated:
                raise UserError(f"{name}: the column {str(repeated[0])[:40]!r} is there twice; remove one of the two")
            for row in reader:
                if None in row or None in row.values():
                    raise UserError(
                        f"{name}: line {reader.line_num}: does not have the header's {len(reader.fieldnames)} fields"
                    )
                yield reader.line_num, row
    except FileNotFoundError:
        raise UserError(f"{name}: no such file") from None
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{name}: is not a CSV in UTF-8 ({error})") from None


def is_ek100_file(path: str | os.PathLike) -> bool:
    """Return whether a file is a CSV of EPIC-KITCHENS-100, which its header tells.

    A file that cannot be read counts as one, unless its name says otherwise, so that its reader reports the error.
    """
    if Path(path).suffix.lower() != ".csv":
        return False
    try:
        with open_file(path, "r", newline="", encoding="utf-8-sig") as file:
            return _CLIP_COLUMNS[0] in next(csv.reader(file), [])
    except (OSError, UnicodeDecodeError, csv.Error):
        return True


def check_ids_differ(ids: Sequence[str], name: str) -> None:
    """Check that all narration ids differ, because sentences and relevancies are found by them.

    Raises:
        UserError: Two rows have the same narration_id. The message names the file `name`.
    """
    if len(set(ids)) != len(ids):
        repeated = next(found for found, count in Counter(ids).items() if count > 1)
        raise UserError(f"{name}: narration_id {repeated[:40]!r} is there twice; each row needs an id of its own")


def class_number(text: str) -> int:
    """Convert "17" to 17.

    Raises:
        ValueError: The text is no such number.
    """
    if not _CLASS.fullmatch(text.strip()):
        raise ValueError(f"{text[:40]!r} is not a class number")
    return int(text)


def _classes(text: str) -> tuple[int, ...]:
    inside = re.fullmatch(r"\s*\[\s*([0-9]{1,6}(?:\s*,\s*[0-9]{1,6})*)?\s*,?\s*\]\s*", text)
    if inside is None:
        raise ValueError(f"{text[:40]!r} is not a list of class numbers")
    return tuple(int(number) for number in (inside[1] or "").split(",") if number.strip())
