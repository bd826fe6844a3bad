"""A folder of features that several processes fill, each with a part of the work: settings, locks and the index.

`settings.json` says what the features depend on, and a run with other settings is refused. `index.jsonl` gets a line
for each piece of work that is finished.
"""

import fcntl
import json
import logging
import os
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError, safe_open

from avion.errors import UserError
from avion.features import read_settings
from avion.files import PARTIAL, write_text
from avion.json_lines import JsonLines, read_json_lines
from avion.reading import check_npy, open_file, read_npy

logger = logging.getLogger(__name__)

TEXTS = "texts"  # the file of the features of sentences, which may lie in the same folder, without its extension
# How long a process waits while another one of the same job opens the folder.
_OPENING_S = 60.0


@dataclass(frozen=True)
class Part:
    """A part of the work that a process does: part `index` of `count` has the units u with u mod count = index."""

    index: int = 0
    count: int = 1

    def has(self, unit: int) -> bool:
        """Return whether the unit is in this part."""
        return unit % self.count == self.index


WHOLE = Part()


class FeatureFolder:
    """A folder that features are written to. It is open until `close`, or until its `with` block is left.

    The only process of a run keeps others out. The processes of a job that has several parts share the folder, and
    none of them does the same part. The first one that opens the folder clears away what killed processes left.

    Args:
        folder: The folder.
        settings: What the features depend on, as JSON values.
        part: Which part of the work this process does.

    Raises:
        UserError: The folder has other settings, another process does the same work, or it cannot be written.
    """

    extensions: tuple[str, ...] = ()  # of files that only a folder with settings may hold

    def __init__(self, folder: str | os.PathLike, settings: Mapping[str, Any], part: Part = WHOLE):
        self.folder, self.part = Path(folder), part
        self._locks: list[IO] = []
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                self._open(dict(settings))
            except BaseException:
                self.close()
                raise
        except OSError as e:
            raise UserError(f"--output-dir {folder}: cannot be written ({e.strerror}); choose another") from e

    def __enter__(self):
        return self

    def __exit__(self, *_exc_info) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes write to the folder."""
        for lock in self._locks:
            lock.close()
        self._locks = []

    @property
    def index(self) -> Path:
        """The path of the index."""
        return self.folder / "index.jsonl"

    def _open(self, settings: dict[str, Any]) -> None:
        common = open(self.folder / ".lock", "a+")  # noqa: SIM115  (open until `close`; "a" waits at a named pipe)
        self._locks.append(common)
        first = _locked(common, fcntl.LOCK_EX)
        if not first:
            self._share(common)
        if self.part.count > 1:
            own = open(self.folder / f".lock-{self.part.index}-of-{self.part.count}", "a+")  # noqa: SIM115
            self._locks.append(own)
            if not _locked(own, fcntl.LOCK_EX):
                raise UserError(
                    f"--output-dir {self.folder}: another process does part {self.part.index}/{self.part.count}; "
                    "give each process another --shard"
                )
        if first:
            for partial in self.folder.rglob(f"*{PARTIAL}"):
                partial.unlink(missing_ok=True)
        self._check(settings)
        lines = read_json_lines(self.index)
        kept = self._read_index(lines)
        dropped = len(lines.rows) + len(lines.damaged) - len(kept)
        if first and dropped:
            logger.info("%s: %d lines of unfinished work are dropped", self.index, dropped)
            write_text(self.index, "".join(json.dumps(entry) + "\n" for entry in kept))
        if first and self.part.count > 1:
            fcntl.flock(common, fcntl.LOCK_SH)

    def _share(self, common: IO) -> None:
        """Join the other processes of a job.

        A run that is alone is refused with a UserError, and so is a process where the others do not open the folder in
        time.
        """
        give_up = time.monotonic() + _OPENING_S
        while self.part.count == 1 or not _locked(common, fcntl.LOCK_SH):
            if self.part.count == 1 or time.monotonic() > give_up:
                raise UserError(f"--output-dir {self.folder}: another run writes here; wait for it or stop it")
            time.sleep(0.05)

    def _read_index(self, lines: JsonLines) -> list[dict[str, Any]]:
        """Find out what is finished. Returns the entries that count."""
        raise NotImplementedError

    def _check(self, settings: dict[str, Any]) -> None:
        path = self.folder / "settings.json"
        if not path.exists():
            found = [path for ending in self.extensions for path in self.folder.glob(f"*{ending}")]
            if any(path.stem != TEXTS for path in found):
                raise UserError(f"--output-dir {self.folder}: holds files of something else; choose another")
            write_text(path, json.dumps(settings, indent=1) + "\n")
            return
        before = read_settings(path, "choose another --output-dir")
        for name in sorted({*settings, *before}):
            if settings.get(name) != before.get(name):
                raise UserError(
                    f"--output-dir {self.folder}: was begun with {name} {_short(before.get(name))}, this run has "
                    f"{_short(settings.get(name))}; give what it was begun with, or another --output-dir"
                )


def is_whole(path: Path, rows: list[int] | None = None) -> bool:
    """Return whether a file of features exists with all of its bytes.

    Args:
        path: The file: .npz, .npy, .safetensors or .pt.
        rows: What the array `row` in the file must hold; None: the file need not have this array.

    Returns:
        False where the file is missing, damaged, or holds other rows.
    """
    if not path.is_file():
        return False
    try:
        found = _checked_rows(path)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, SafetensorError) as e:
        logger.warning("%s: is damaged or cut short (%s) and is made again", path, e)
        return False
    return rows is None or found == rows


def _checked_rows(path: Path) -> list[int] | None:
    """Return the array `row` of a file, if it has one, after a check that all bytes of the file exist.

    A damaged file raises whatever the readers raise.
    """
    if path.suffix == ".safetensors":  # opening it compares the sizes in its header with that of the file
        with safe_open(str(path), framework="numpy") as file:
            return file.get_tensor("row").tolist() if "row" in file.keys() else None  # noqa: SIM118
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if path.suffix == ".npy":
            check_npy(file, size)
            return None
        with zipfile.ZipFile(file) as archive:  # its directory stands at the end
            for entry in archive.infolist():
                if entry.compress_type != zipfile.ZIP_STORED or entry.header_offset + entry.file_size > size:
                    raise ValueError(f"{entry.filename} is not all there")
            if "row.npy" not in archive.namelist():
                return None
            with archive.open("row.npy") as rows:
                return read_npy(rows, archive.getinfo("row.npy").file_size).tolist()


def _locked(file: IO, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
