"""What a preparation remembers from run to run, and what it tells at the end.

Everything lies in `{target}/.prepare`: `settings.json`, and a journal per shard to which one line per video is appended
when it is complete or has failed. From the journals `{target}/manifest.jsonl` is made, a line per video.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from avion.errors import UserError
from avion.files import append_lines, write_text
from avion.reading import parse_json, read_text

from .prepare_plan import Raw, Settings

STATE = ".prepare"
MANIFEST = "manifest.jsonl"
_KEPT_OUT = ("partial", "at", "state")  # fields of a journal that mean nothing to others


@dataclass(frozen=True)
class Totals:
    """Of all prepared videos: their number, frames, seconds, the bytes of the raw and of the written files, the number
    of those, CPU seconds; and why videos failed, by their name."""

    videos: int
    frames: int
    seconds: float
    source_bytes: int
    bytes: int
    files: int
    cpu_seconds: float
    failed: dict[str, str]


class State:
    """The folder `.prepare` of one target, seen by one shard, (number, of how many). Locked until `close`."""

    def __init__(self, target: Path, settings: Settings, shard: tuple[int, int]):
        self.target, self.folder = target, target / STATE
        self._name = f"{shard[0]}-of-{shard[1]}"
        self.partial = self.folder / "partial" / self._name
        self._journal = self.folder / f"journal-{self._name}.jsonl"
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self.folder / f"lock-{self._name}")
        except OSError as error:
            raise UserError(f"TARGET {target}: cannot be written ({error.strerror}); give another folder") from error
        if self._lock is None:
            raise UserError(
                f"TARGET {target}: another process is preparing this part of it; wait for it, or use --shard"
            )
        try:
            _check_settings(self.folder / "settings.json", settings)
        except BaseException:
            self.close()
            raise

    def entries(self) -> dict[str, dict]:
        """The last line about every video, of all shards."""
        lines = []
        for journal in sorted(self.folder.glob("journal-*.jsonl")):
            for line in read_text(journal, errors="replace").split("\n"):
                with contextlib.suppress(ValueError):  # a run was killed while it wrote this line
                    entry = parse_json(line)
                    if isinstance(entry, dict) and isinstance(entry.get("video"), str):
                        lines.append(entry)
        return {entry["video"]: entry for entry in sorted(lines, key=lambda e: e["at"])}

    def add(self, entry: dict) -> None:
        """Remember an entry, on disk."""
        append_lines(self._journal, [json.dumps({**entry, "at": time.time()}, ensure_ascii=False)])

    def partial_of(self, entry: dict) -> Path:
        return self.folder / "partial" / entry["state"] / entry["partial"]

    def done(self, result: dict) -> dict:
        """The entry of a video that is complete, in a partial place."""
        return {**result, "state": self._name}

    @staticmethod
    def failed(raw: Raw, reason: str) -> dict:
        return {
            "video": raw.name,
            "source": raw.path,
            "source_bytes": raw.size,
            "source_stamp": raw.stamp,
            "error": reason,
        }

    @contextlib.contextmanager
    def finishing(self):
        """Whoever writes what all shards have in common is alone."""
        handle = os.open(self.folder / "lock-finish", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            with contextlib.suppress(OSError):  # some network file systems know no locks
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def close(self) -> None:
        os.close(self._lock)


def _locked(path: Path) -> int | None:
    """An open handle that holds the lock of this file; None if another process holds it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    except OSError:  # a network file system without locks
        return handle
    return handle


def _check_settings(path: Path, settings: Settings) -> None:
    """One target, one way of preparing: what was begun with others is not gone on with."""
    mine = json.loads(json.dumps(settings.as_dict()))
    if not path.exists():
        temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
        temporary.write_text(json.dumps(mine, indent=1) + "\n")
        try:
            os.link(temporary, path)  # unlike a rename, this fails where another shard was first
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            os.replace(temporary, path)
        temporary.unlink(missing_ok=True)
    try:
        theirs = parse_json(read_text(path))
        flat_mine, flat_theirs = ({**d, **d["encoding"]} for d in (mine, theirs))
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path}: is damaged; give another TARGET, or delete it if its settings were these") from None
    flags = [k for k in flat_mine if k not in ("encoding", "chunked") and flat_mine[k] != flat_theirs.get(k)]
    if not settings.chunked and flags == ["chunk_length"]:
        return
    if flags:
        listed = ", ".join(f"{k.replace('_', '-')} {flat_theirs.get(k)} (not {flat_mine[k]})" for k in flags)
        raise UserError(f"TARGET {path.parent.parent}: was begun with {listed}; give the same, or another TARGET")


def write_manifest(target: Path, entries: dict[str, dict]) -> Totals:
    """A line per video, ordered by name -> the sums."""
    lines = [{k: v for k, v in entries[name].items() if k not in _KEPT_OUT} for name in sorted(entries)]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_text(target / MANIFEST, text, flag="TARGET", cure="run it again")
    return totals(entries)


def totals(entries: dict[str, dict]) -> Totals:
    """The sums over journal entries."""
    done = [e for e in entries.values() if "error" not in e]
    return Totals(
        len(done),
        sum(e["frames"] for e in done),
        sum(e["seconds"] for e in done),
        sum(e["source_bytes"] for e in done),
        sum(e["bytes"] for e in done),
        sum(len(e["files"]) for e in done),
        sum(e["cpu_seconds"] for e in done),
        {name: e["error"] for name, e in sorted(entries.items()) if "error" in e},
    )
