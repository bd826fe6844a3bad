"""Keeps the features of finished batches, so that a run that was stopped continues from there.

{folder}/{name}.{process}.f32      float32 values, one batch after the other
{folder}/{name}.{process}.jsonl    a JSON line per batch, written after its values:
                                   {mark, batch, rows, shape, offset, crc}
"""

import logging
import math
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from avion.errors import UserError
from avion.json_lines import append_json, read_json_lines
from avion.reading import open_file

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """The features of a batch of clips.

    Attributes:
        rows: The numbers of the clips, each once.
        values: (clips, V, E) float32.
    """

    rows: list[int]
    values: np.ndarray


class FeatureLog:
    """The two files to which one process appends the batches that it has finished.

    Args:
        folder: The folder; it must exist.
        name: The name of the benchmark.
        rank: The number of the process.
        mark: A text that changes with everything that the features depend on. Batches of another mark are not taken.
    """

    def __init__(self, folder: Path, name: str, rank: int, mark: str):
        self.values_path, self.index_path = folder / f"{name}.{rank}.f32", folder / f"{name}.{rank}.jsonl"
        self.mark = mark

    def append(self, number: int, batch: Batch) -> None:
        """Write a batch and flush it to disk.

        Args:
            number: The number of the batch.
            batch: The features.

        Raises:
            UserError: The files cannot be written.
        """
        content = np.ascontiguousarray(batch.values, dtype="<f4").tobytes()
        try:
            with open(self.values_path, "ab") as file:
                offset = file.tell()
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            append_json(
                self.index_path,
                {
                    "mark": self.mark,
                    "batch": number,
                    "rows": batch.rows,
                    "shape": list(batch.values.shape),
                    "offset": offset,
                    "crc": zlib.crc32(content),
                },
            )
        except OSError as e:
            raise UserError(
                f"{self.values_path}: cannot be written ({e.strerror}); free space or change --output-dir"
            ) from e


def read_batches(folder: Path, name: str, mark: str, batches: Sequence[Sequence[int]]) -> dict[int, Batch]:
    """Read the batches that runs of the same mark, of any number of processes, have left in a folder.

    Args:
        folder: The folder.
        name: The name of the benchmark.
        mark: The mark of the run.
        batches: The clips that each batch must have.

    Returns:
        The batches by number.

    Raises:
        UserError: A file cannot be read.
    """
    found: dict[int, Batch] = {}
    damaged = 0
    for index in sorted(folder.glob(f"{name}.*.jsonl")):
        lines = read_json_lines(index, cure="remove it or change --output-dir")
        damaged += len(lines.damaged)
        own = [row for row in lines.objects if row.get("mark") == mark]
        if not own:
            continue
        path = index.with_suffix(".f32")
        try:
            with open_file(path) as file:
                for row in own:
                    batch = _read(file, row, batches)
                    damaged += batch is None
                    if batch is not None:
                        found.setdefault(row["batch"], batch)
        except FileNotFoundError:
            damaged += len(own)
        except OSError as e:
            raise UserError(f"{path}: cannot be read ({e.strerror}); remove it or change --output-dir") from e
    if damaged:
        logger.warning("%s: %d damaged entries (of processes that were killed) are passed over", folder / name, damaged)
    return found


def _read(file: Any, row: dict[str, Any], batches: Sequence[Sequence[int]]) -> Batch | None:
    """Return the batch of a line of the index; None where the line or its values are damaged."""
    number, rows, shape, offset = (row.get(field) for field in ("batch", "rows", "shape", "offset"))
    if type(number) is not int or not 0 <= number < len(batches) or rows != list(batches[number]):
        return None
    if not isinstance(shape, list) or len(shape) != 3 or any(type(n) is not int or not 0 < n < 2**24 for n in shape):
        return None
    size = 4 * math.prod(shape)
    if shape[0] != len(rows) or type(offset) is not int or offset < 0 or size > 2**32:
        return None
    file.seek(offset)
    content = file.read(size)
    if len(content) != size or zlib.crc32(content) != row.get("crc"):
        return None
    return Batch(rows, np.frombuffer(content, dtype="<f4").astype(np.float32).reshape(shape))
