"""Features of the rows of a list on disk, in shards with an index.

A shard is written whole or not at all, and a run that was stopped goes on after the finished shards.

{folder}/settings.json      what the features depend on; a run with other settings is refused
{folder}/00000.npz, …       a shard (.npz or .safetensors): `row` (n,) int64 and an array (n, …) per kind; the rows that
                            cannot be read are NaN, and False in `valid` (n,) bool
{folder}/index.jsonl        a JSON line per row of the list: row, video, start, end, id, shard, the `position` in the
                            shard, and the `error` of a row that cannot be read
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from avion.constants import SHARD_DTYPES
from avion.errors import UserError
from avion.files import append_lines, partial_file
from avion.json_lines import JsonLines

from .feature_folder import WHOLE, FeatureFolder, Part, is_whole

STORED = dict(zip(SHARD_DTYPES, (torch.float32, torch.float16, torch.bfloat16), strict=True))


class Shards(FeatureFolder):
    """The shards of a list.

    Args:
        folder: The folder of the shards.
        count: The number of rows of the list.
        settings: As in `FeatureFolder`; `shard_size` is the number of rows in each shard.
        part: As in `FeatureFolder`; the units are shards.
        retry: Whether shards with rows that could not be read count as unfinished.

    Attributes:
        errors: For each row of this part that cannot be read, what is wrong, by the number of the row.
    """

    extensions = (".npz", ".safetensors")

    def __init__(
        self,
        folder: str | os.PathLike,
        count: int,
        settings: Mapping[str, Any],
        part: Part = WHOLE,
        retry: bool = False,
    ):
        self.count, self.retry = count, retry
        self.size, self.format = settings["shard_size"], settings["format"]
        self.errors: dict[int, str] = {}
        self._finished: set[int] = set()
        super().__init__(folder, settings, part)

    def path(self, shard: int) -> Path:
        """Return the path of a shard."""
        return self.folder / f"{shard:05d}.{self.format}"

    def rows(self, shard: int) -> range:
        """Return the numbers of the rows of the list that are in a shard."""
        return range(shard * self.size, min((shard + 1) * self.size, self.count))

    def shards(self) -> list[int]:
        """Return the numbers of the shards of this part."""
        return [s for s in range(-(-self.count // self.size)) if self.part.has(s)]

    def todo(self) -> list[int]:
        """Return the numbers of the shards of this part that are not finished."""
        return [s for s in self.shards() if s not in self._finished]

    def write(self, shard: int, features: Mapping[str, torch.Tensor], entries: Sequence[Mapping[str, Any]]) -> None:
        """Write a shard and its part of the index.

        Args:
            shard: The number of the shard.
            features: By kind, the features (n, …) of all rows of the shard. Those of unreadable rows do not count.
            entries: One per row, {"row", …} and "error" where the row cannot be read.

        Raises:
            UserError: The files cannot be written.
        """
        rows = self.rows(shard)
        assert [e["row"] for e in entries] == list(rows), "an entry per row, in order"
        valid = torch.tensor(["error" not in e for e in entries])
        blanked = {kind: blank_rows(values, valid) for kind, values in features.items()}
        name = self.path(shard).name
        lines = [json.dumps({**e, "shard": name, "position": i}) for i, e in enumerate(entries)]
        arrays = {"row": torch.tensor(list(rows), dtype=torch.int64), "valid": valid, **blanked}
        try:
            with partial_file(self.path(shard)) as partial:
                save_tensors(partial, arrays, self.format)
            append_lines(self.index, lines)
        except OSError as e:
            raise UserError(f"{self.path(shard)}: cannot be written ({e.strerror}); free space, then go on") from e
        self._finished.add(shard)
        self.errors.update({e["row"]: e["error"] for e in entries if "error" in e})

    def _read_index(self, lines: JsonLines) -> list[dict[str, Any]]:
        """Find the finished shards: a shard is finished if its file exists and the index has all of its rows."""
        entries: dict[int, dict[int, dict]] = {}
        for entry in lines.objects:
            row = entry.get("row")
            if type(row) is int and row >= 0:  # of lines for the same row, the last one counts
                entries.setdefault(row // self.size, {})[row] = entry
        kept = []
        for shard, found in sorted(entries.items()):
            if sorted(found) != list(self.rows(shard)) or not is_whole(self.path(shard), sorted(found)):
                continue
            errors = {row: str(entry["error"]) for row, entry in found.items() if "error" in entry}
            if errors and self.retry and self.part.has(shard):
                continue
            self._finished.add(shard)
            kept += [found[row] for row in self.rows(shard)]
            if self.part.has(shard):
                self.errors.update(errors)
        return kept


def blank_rows(values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Set the rows that are not valid to NaN, so that nobody takes them for features by mistake.

    Args:
        values: (n, …).
        valid: (n,) bool.

    Returns:
        (n, …), of the dtype of `values`.
    """
    if bool(valid.all()):
        return values
    values = values.clone()
    values[~valid] = float("nan")
    return values


def save_tensors(path: Path, arrays: Mapping[str, torch.Tensor], format: str) -> None:
    """Write arrays to an .npz or a .safetensors file.

    Args:
        path: The file.
        arrays: The arrays by name.
        format: "npz" or "safetensors".
    """
    if format == "safetensors":
        save_file({name: values.contiguous() for name, values in arrays.items()}, path)
        return
    with open(path, "wb") as file:
        np.savez(file, **{name: values.numpy() for name, values in arrays.items()})
