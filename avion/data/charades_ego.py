"""Charades-Ego: 157 classes, several of which can occur in a video.

Charades_v1_classes.txt              a class per line, `c000 Holding some clothes`
CharadesEgo_v1_test_only1st.csv      columns id, actions (`c092 11.90 21.20;c147 0.00 12.60`, in seconds) and length
{root}/{id}.mp4                      the videos, whole
"""

from __future__ import annotations

import csv
import math
import os
import re
from dataclasses import dataclass

import numpy as np

from avion.data.narrations import NarrationTable, TableBuilder
from avion.data.text_lines import text_lines
from avion.errors import UserError
from avion.reading import open_file

# Where the columns are in the released files, if the header has other names.
_PLACES = {"id": 0, "actions": 9, "length": 10}
_CLASS = re.compile(r"(c[0-9]{3})\s+(\S.*)")
_ID = re.compile(r"[A-Za-z0-9_-]{1,100}")


@dataclass(frozen=True)
class CharadesEgo:
    """The videos of a split and their classes.

    Attributes:
        videos: A row per video, from its beginning to its end.
        labels: (n, classes) bool.
    """

    videos: NarrationTable
    labels: np.ndarray


def read_charades_classes(path: str | os.PathLike) -> dict[str, str]:
    """Read {"c000": "Holding some clothes", …} in the order of the file.

    Raises:
        UserError: A line is not a class, or a class occurs twice. The message names file and line.
    """
    classes: dict[str, str] = {}
    for number, line in text_lines(path, "classes"):
        match = _CLASS.fullmatch(line)
        if match is None or match[1] in classes:
            why = "a class such as `c000 Holding some clothes`" if match is None else "each class only once"
            raise UserError(f"classes {path}: line {number}: {why} is required, found {line[:60]!r}")
        classes[match[1]] = match[2]
    return classes


def read_charades_ego(path: str | os.PathLike, classes: dict[str, str]) -> CharadesEgo:
    """Read the videos of a split.

    Args:
        path: The CSV.
        classes: The known classes, as `read_charades_classes` returns them.

    Raises:
        UserError: A row is malformed, names an unknown class, or a video occurs twice. The message names file, line and
            column.
    """
    number_of = {code: i for i, code in enumerate(classes)}
    builder, rows, seen = TableBuilder(), [], set()
    for line, row in _rows(path):
        where = f"annotations {path}: line {line}"
        if not _ID.fullmatch(row["id"]) or row["id"] in seen:
            why = "each video only once" if row["id"] in seen else "a name of letters and digits"
            raise UserError(f"{where}: id: {why} is required, found {row['id'][:60]!r}")
        seen.add(row["id"])
        try:
            _check_length(row["length"])
            rows.append([number_of[code] for code in _codes(row["actions"], number_of)])
        except ValueError as error:
            raise UserError(f"{where}: {error}") from None
        builder.add(row["id"], 0.0, None, row["id"], narration_id=row["id"])
    if not rows:
        raise UserError(f"annotations {path}: holds no videos")
    labels = np.zeros((len(rows), len(classes)), dtype=bool)
    for i, numbers in enumerate(rows):
        labels[i, numbers] = True
    return CharadesEgo(builder.build(), labels)


def _rows(path: str | os.PathLike):
    """(line, {"id", "actions", "length"}) of every row."""
    try:
        with open_file(path, "r", newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, None)
            if header is None:
                raise UserError(f"annotations {path}: the file is empty")
            places = {name: header.index(name) if name in header else place for name, place in _PLACES.items()}
            if max(places.values()) >= len(header):
                found = ", ".join(header)[:200]
                raise UserError(f"annotations {path}: the columns id, actions and length are required; found {found}")
            for row in reader:
                if not row:
                    continue
                if len(row) != len(header):
                    raise UserError(
                        f"annotations {path}: line {reader.line_num}: {len(row)} fields, the header has {len(header)}"
                    )
                yield reader.line_num, {name: row[place].strip() for name, place in places.items()}
    except FileNotFoundError:
        raise UserError(f"annotations {path}: no such file") from None
    except OSError as error:
        raise UserError(f"annotations {path}: cannot be read ({error.strerror or error})") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"annotations {path}: is not a CSV in UTF-8 ({error})") from None


def _codes(text: str, known: dict[str, int]) -> list[str]:
    """ "c092 11.90 21.20;c147 0.00 12.60" -> ["c092", "c147"]. Raises ValueError for anything else."""
    codes = []
    for part in filter(str.strip, text.split(";")):
        words = part.split()
        if len(words) != 3 or words[0] not in known:
            raise ValueError(
                f"actions: a class and two times such as `c092 11.90 21.20` are required, found {part[:40]!r}"
            )
        for word in words[1:]:
            _check_length(word, "actions")
        codes.append(words[0])
    return codes


def _check_length(text: str, column: str = "length") -> None:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:  # NaN fails too
        raise ValueError(f"{column}: a number of seconds is required, found {text[:40]!r}")
