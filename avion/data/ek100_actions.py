"""EPIC-KITCHENS-100 annotations for action recognition: clips with classes, the list of actions, official subsets."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence

import numpy as np

from avion.constants import EK100_NOUNS, EK100_VERBS
from avion.data.ek100 import EK100Table, class_number, csv_rows, parse_timestamp
from avion.data.narrations import TableBuilder, checked_not_empty
from avion.errors import UserError

logger = logging.getLogger(__name__)

_COLUMNS = ("narration_id", "participant_id", "video_id", "start_timestamp", "stop_timestamp")
_LIMITS = {"verb_class": EK100_VERBS, "noun_class": EK100_NOUNS}
_ACTION = re.compile(r"(0|[1-9][0-9]{0,2}):(0|[1-9][0-9]{0,2})")


def read_ek100_actions(path: str | os.PathLike) -> EK100Table:
    """Read the clips of a train, validation or test CSV.

    Returns:
        The clips in the order of the CSV. `verb_class` and `noun_class` are None where the CSV has neither column, as
            in the test split. The text of a clip is its narration, or its narration id where there is no narration.

    Raises:
        UserError: `read_ek100_retrieval` would refuse the file, a class does not exist, or an id occurs twice. The
            message has one line with file, line and column.
    """
    builder, lines = TableBuilder(), {}
    classes: dict[str, list[int]] = {name: [] for name in _LIMITS}
    labelled = False
    for line, row in csv_rows(path, _COLUMNS):
        found = [name for name in _LIMITS if name in row]
        if len(found) == 1:
            missing = next(name for name in _LIMITS if name not in row)
            raise UserError(f"annotations {path}: the column {missing!r} is missing, though {found[0]!r} is there")
        labelled = bool(found)
        column = ""
        try:
            column = "start_timestamp"
            start = parse_timestamp(row[column])
            column = "stop_timestamp"
            stop = parse_timestamp(row[column])
            for column in found:
                classes[column].append(_existing_class(row[column], _LIMITS[column]))
            column = "narration_id"
            name = _new_id(row[column], line, lines)
            column = "clip"
            video = f"{row['participant_id']}/{row['video_id']}"
            builder.add(video, start, stop, row.get("narration", "").strip() or name, narration_id=name)
        except ValueError as error:
            raise UserError(f"annotations {path}: line {line}: {column}: {error}") from None
    if builder.report():
        logger.warning("annotations %s, mended of %d: %s", path, len(builder), builder.report())
    table = EK100Table(**vars(checked_not_empty(builder.build(), f"annotations {path}")))
    if labelled:
        table.verb_class, table.noun_class = (np.array(classes[name], dtype=np.int64) for name in _LIMITS)
    return table


def _existing_class(text: str, count: int) -> int:
    number = class_number(text)
    if number >= count:
        raise ValueError(f"class {number} does not exist, they run from 0 to {count - 1}")
    return number


def _new_id(text: str, line: int, lines: dict[str, int]) -> str:
    name = text.strip()
    if not name:
        raise ValueError("is empty, an id is required")
    if lines.setdefault(name, line) != line:
        raise ValueError(f"{name[:40]!r} stands in line {lines[name]} already; every clip needs its own")
    return name


# ---- the list of actions -------------------------------------------------------------------------


def action_list(*tables: EK100Table) -> tuple[str, ...]:
    """Return the actions "{verb_class}:{noun_class}" of labelled tables, sorted as strings (AVION's order)."""
    pairs = {(int(v), int(n)) for t in tables for v, n in zip(t.verb_class, t.noun_class, strict=True)}
    return tuple(sorted(f"{verb}:{noun}" for verb, noun in pairs))


def action_names(actions: Sequence[str], *tables: EK100Table) -> list[list[str]]:
    """Return the distinct narrations of each action in labelled tables, sorted (LaViLa's names of a class)."""
    names: list[set[str]] = [set() for _ in actions]
    for table in tables:
        for row, number in zip(table, action_numbers(actions, table), strict=True):
            if number >= 0:
                names[number].update(row.texts)
    return [sorted(own) for own in names]


def split_actions(actions: Sequence[str], source: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the verb class and the noun class of each action, (n,) int64 each.

    Raises:
        UserError: The list is empty, holds anything but distinct "verb:noun", or names unknown classes. The message
            names `source`.
    """
    pairs = []
    for action in actions:
        match = _ACTION.fullmatch(action) if isinstance(action, str) else None
        if match is None or int(match[1]) >= EK100_VERBS or int(match[2]) >= EK100_NOUNS:
            raise UserError(f"{source}: {str(action)[:40]!r} is not an action of the form verb_class:noun_class")
        pairs.append((int(match[1]), int(match[2])))
    if not pairs or len(set(pairs)) != len(pairs):
        raise UserError(f"{source}: the list of actions is empty or names one twice")
    verbs, nouns = np.array(pairs, dtype=np.int64).T
    return verbs, nouns


def action_numbers(actions: Sequence[str], table: EK100Table) -> np.ndarray:
    """Return the place of each clip's action in `actions`, (n,) int64; -1 where the list does not hold the action."""
    place = {action: i for i, action in enumerate(actions)}
    names = (f"{v}:{n}" for v, n in zip(table.verb_class, table.noun_class, strict=True))
    return np.array([place.get(name, -1) for name in names], dtype=np.int64)


# ---- official subsets ----------------------------------------------------------------------------


def read_tail_classes(path: str | os.PathLike, kind: str) -> np.ndarray:
    """Read the class numbers of a list of tail classes (`EPIC_100_tail_verbs.csv`, `..._nouns.csv`).

    Args:
        path: The CSV file.
        kind: "verb" or "noun". The numbers stand in the column of that name (or `{kind}_class`, `id`), or in the only
            column.

    Returns:
        int64, ascending.
    """
    limit = _LIMITS[f"{kind}_class"]
    numbers = set()
    for line, column, text in _list_rows(path, (kind, f"{kind}_class", "id")):
        try:
            number = _existing_class(text, limit)
        except ValueError as error:
            raise UserError(f"annotations {path}: line {line}: {column}: {error}") from None
        if number in numbers:
            raise UserError(f"annotations {path}: line {line}: {column}: class {number} stands there twice")
        numbers.add(number)
    return np.array(sorted(numbers), dtype=np.int64)


def read_participants(path: str | os.PathLike, table: EK100Table) -> np.ndarray:
    """Return which clips of `table` show a participant of a CSV (`..._unseen_participant_ids_...`), (n,) bool.

    Raises:
        UserError: A participant has no clip in `table`, so the list belongs to another split.
    """
    of_clip = np.array(participants(table))
    listed = {text.strip() for _, _, text in _list_rows(path, ("participant_id", "participant"))}
    if unknown := sorted(listed - set(of_clip.tolist())):
        raise UserError(
            f"annotations {path}: participant_id {unknown[0]!r} has no clip in the evaluation data; give the list of "
            "the same split"
        )
    return np.isin(of_clip, sorted(listed))


def participants(table: EK100Table) -> list[str]:
    """Return the participant of each clip."""
    return [table.videos[number].split("/")[0] for number in table.video]


def _list_rows(path: str | os.PathLike, names: tuple[str, ...]) -> list[tuple[int, str, str]]:
    """Return (line, column, text) of the first column of `names` that a CSV has, or of the CSV's only column."""
    rows = list(csv_rows(path, ()))
    if not rows:
        raise UserError(f"annotations {path}: holds no rows")
    header = list(rows[0][1])
    column = next((name for name in names if name in header), header[0] if len(header) == 1 else None)
    if column is None:
        raise UserError(f"annotations {path}: the column {names[0]!r} is missing; found {', '.join(header)[:200]}")
    return [(line, column, row[column]) for line, row in rows]
