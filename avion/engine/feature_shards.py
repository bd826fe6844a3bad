"""Features on disk, in shards with an index.

A shard is written whole or not at all, and a run that was stopped goes on after the finished shards.

{folder}/settings.json      what the features depend on; a run with other settings is refused
{folder}/00000.npz, …       a shard (.npz or .safetensors): the array `row` (n,) int64 and an array (n, …) per kind
{folder}/index.jsonl        a JSON line per row of the list: row, video, start, end, id, shard, and the `position`
                            in the shard or the `error` that keeps the row out of it
"""

import fcntl
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from avion.constants import SHARD_DTYPES
from avion.errors import UserError
from avion.files import PARTIAL, append_lines, partial_file, write_text
from avion.json_lines import read_json_lines

logger = logging.getLogger(__name__)

STORED = dict(zip(SHARD_DTYPES, (torch.float32, torch.float16, torch.bfloat16), strict=True))


class Shards:
    """The shards of a list. They are open until `close`, or until their `with` block is left.

    Args:
        folder: The folder of the shards.
        count: The number of rows of the list.
        settings: What the features depend on, as JSON values; `shard_size` is the number of rows in each shard.

    Raises:
        UserError: The folder has other settings, another process writes to it, or it cannot be written.
    """

    def __init__(self, folder: str | os.PathLike, count: int, settings: Mapping[str, Any]):
        self.folder, self.count = Path(folder), count
        self.size, self.format = settings["shard_size"], settings["format"]
        self.errors: dict[int, str] = {}
        self._finished: set[int] = set()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.folder / ".lock", "a")  # noqa: SIM115  (open until `close`)
            try:
                self._open(dict(settings))
            except BaseException:
                self.close()
                raise
        except OSError as e:
            raise UserError(f"--output-dir {folder}: cannot be written ({e.strerror}); choose another") from e

    def __enter__(self) -> "Shards":
        return self

    def __exit__(self, *_exc_info) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes write to the folder."""
        self._lock.close()

    @property
    def index(self) -> Path:
        """The path of the index."""
        return self.folder / "index.jsonl"

    def path(self, shard: int) -> Path:
        """The path of a shard."""
        return self.folder / f"{shard:05d}.{self.format}"

    def rows(self, shard: int) -> range:
        """The rows of the list that are in a shard."""
        return range(shard * self.size, min((shard + 1) * self.size, self.count))

    def todo(self) -> list[int]:
        """The numbers of the shards that are not finished."""
        return [s for s in range(-(-self.count // self.size)) if s not in self._finished]

    def write(self, shard: int, features: Mapping[str, torch.Tensor], entries: Sequence[Mapping[str, Any]]) -> None:
        """Write a shard and its part of the index.

        Args:
            shard: The number of the shard.
            features: By kind, the features (n, …) of the rows that are not left out.
            entries: One per row, {"row", …} and "error" where the row is left out.

        Raises:
            UserError: The files cannot be written.
        """
        kept = [e["row"] for e in entries if "error" not in e]
        assert [e["row"] for e in entries] == list(self.rows(shard)), "an entry per row, in order"
        assert all(len(values) == len(kept) for values in features.values()), "a feature per readable row"
        position, lines = 0, []
        for entry in entries:
            place = {} if "error" in entry else {"position": position}
            position += "error" not in entry
            lines.append(json.dumps({**entry, "shard": self.path(shard).name, **place}))
        arrays = {"row": torch.tensor(kept, dtype=torch.int64), **features}
        try:
            with partial_file(self.path(shard)) as partial:
                _save(partial, arrays, self.format)
            append_lines(self.index, lines)
        except OSError as e:
            raise UserError(f"{self.path(shard)}: cannot be written ({e.strerror}); free space, then go on") from e
        self._finished.add(shard)
        self.errors.update({e["row"]: e["error"] for e in entries if "error" in e})

    def _open(self, settings: dict[str, Any]) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--output-dir {self.folder}: another run writes here; wait for it or stop it") from None
        for partial in self.folder.glob(f"*{PARTIAL}"):
            partial.unlink()
        self._check(settings)
        self._read_index()

    def _check(self, settings: dict[str, Any]) -> None:
        path = self.folder / "settings.json"
        if not path.exists():
            if any(self.folder.glob(f"*.{self.format}")):
                raise UserError(f"--output-dir {self.folder}: holds files of something else; choose another")
            write_text(path, json.dumps(settings, indent=1) + "\n")
            return
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            before = None
        if not isinstance(before, dict):
            raise UserError(f"{path}: is not the settings of an extraction; choose another --output-dir")
        for name in sorted({*settings, *before}):
            if settings.get(name) != before.get(name):
                raise UserError(
                    f"--output-dir {self.folder}: was begun with {name} {_short(before.get(name))}, this run has "
                    f"{_short(settings.get(name))}; give what it was begun with, or another --output-dir"
                )

    def _read_index(self) -> None:
        """Find the finished shards: their file is there, and the index has all of their rows. Drop all other lines."""
        entries: dict[int, list[dict]] = {}
        lines = read_json_lines(self.index)
        for entry in lines.objects:
            row = entry.get("row")
            if type(row) is int and row >= 0:
                entries.setdefault(row // self.size, []).append(entry)
        kept = []
        for shard, found in sorted(entries.items()):
            if [e["row"] for e in found] == list(self.rows(shard)) and self.path(shard).is_file():
                self._finished.add(shard)
                self.errors.update({e["row"]: str(e["error"]) for e in found if "error" in e})
                kept += [json.dumps(e) + "\n" for e in found]
        dropped = len(lines.rows) + len(lines.damaged) - len(kept)
        if dropped:
            logger.info("%s: %d lines of unfinished shards are dropped", self.index, dropped)
            write_text(self.index, "".join(kept))


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _save(path: Path, arrays: Mapping[str, torch.Tensor], format: str) -> None:
    if format == "safetensors":
        save_file({name: values.contiguous() for name, values in arrays.items()}, path)
        return
    with open(path, "wb") as file:
        np.savez(file, **{name: values.numpy() for name, values in arrays.items()})
