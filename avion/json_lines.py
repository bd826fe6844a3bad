"""Logs of one JSON object per line (`log.txt`, `eval_log.txt`, `steps.txt`, indexes) are appended to and read here.

A leaf: this module imports nothing of the project but its errors and its files.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avion.errors import UserError
from avion.files import append_lines
from avion.reading import open_file, parse_json

# A log of a run has some thousands of lines of less than 2 kB; an index of a million rows has 200 MB.
LARGEST_BYTES = 1 << 30


@dataclass(frozen=True)
class JsonLines:
    """The lines that were found in a file.

    Attributes:
        rows: The objects in the order of their lines, each with its line number, counted from 1.
        damaged: The numbers of the lines that hold something else, such as half an object of a process that was killed.
            Empty lines are neither objects nor damaged.
    """

    rows: list[tuple[int, dict[str, Any]]]
    damaged: list[int]

    @property
    def objects(self) -> list[dict[str, Any]]:
        """The objects without their line numbers."""
        return [row for _, row in self.rows]


def append_json(path: Path, row: Mapping[str, Any]) -> None:
    """Append one object as a line, and flush the line to disk.

    Args:
        path: The file; it is created where it does not exist.
        row: The object.

    Raises:
        OSError: The file cannot be written.
    """
    append_lines(path, [json.dumps(row)])


def read_json_lines(path: str | Path, *, cure: str = "remove the file", after: int = 0) -> JsonLines:
    """Read a file that `append_json` wrote.

    A last line without a line end is left out: it is being written, or the process that wrote it was killed.

    Args:
        path: The file, here or in a remote place. A file that does not exist has no lines.
        cure: What the user can do about a file that cannot be read; the error message ends with it.
        after: The number of bytes at the beginning of the file to pass over; lines are counted from there.

    Returns:
        The objects, and the numbers of the damaged lines.

    Raises:
        UserError: The file cannot be read, or is too large to be a log.
    """
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > LARGEST_BYTES:
                raise UserError(f"{path}: {size / 1e6:.0f} MB is too large for a log; {cure}")
            *lines, _ = file.read()[after:].split(b"\n")
    except FileNotFoundError:
        return JsonLines([], [])
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); {cure}") from e
    rows, damaged = [], []
    for number, line in enumerate(lines, 1):
        try:
            row = parse_json(line, nan=True)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append((number, row))
        elif line.strip():
            damaged.append(number)
    return JsonLines(rows, damaged)
