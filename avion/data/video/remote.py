"""Videos on object stores and other remote places: a dataset's folder is a URL (`avion.remote`).

Reads are ranges, several at a time. What was read is kept in a folder of bounded size that all processes of a machine
share.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from avion.remote import RANGE_BYTES, Facts, Remote, cache_limit, cache_root, copy_here, evict, joined, key_of

from .storage import FileFacts, Storage

_KNOWN_FACTS = 2**16  # files whose size is remembered


class RemoteStorage(Storage):
    """The folder `root`, a URL, on a file system of fsspec's. Errors come out as OSErrors."""

    remote = True

    def __init__(self, root: str):
        super().__init__(root.rstrip("/"))
        self.place = Remote(self.root)
        self._facts: OrderedDict[str, FileFacts] = OrderedDict()
        self.cache = RangeCache(cache_root() / "ranges", cache_limit("AVION_CACHE_BYTES", RANGE_BYTES))

    @property
    def fs(self) -> Any:
        """The file system, one per process."""
        return self.place.fs

    def join(self, *parts: str) -> str:
        return joined(*parts)

    def exists(self, path: str) -> bool:
        try:
            self.facts(path)
        except FileNotFoundError:
            return self.is_dir(path)
        return True

    def is_dir(self, path: str) -> bool:
        return bool(self.place.asked(path, lambda: self.fs.isdir(path)))

    def entries(self, folder: str) -> list[tuple[str, bool]]:
        return self.place.entries(folder)

    def facts(self, path: str) -> FileFacts:
        known = self._facts.get(path)
        if known is None:
            found = self.place.facts(path)
            known = self._facts[path] = FileFacts(found.size, found.stamp)
            if len(self._facts) > _KNOWN_FACTS:
                self._facts.popitem(last=False)
        return known

    def open_ranges(self, path: str) -> RemoteRangeFile:
        return RemoteRangeFile(self, path)

    def open_file(self, path: str):
        """A file object for readers that need one."""
        return self.place.asked(path, lambda: self.fs.open(path, "rb", block_size=4 * 2**20))

    def local_copy(self, path: str) -> str:
        """The whole file, brought here once for as long as it does not change."""
        facts = self.facts(path)
        return copy_here(self.place, path, Facts(facts.size, facts.stamp))

    @contextlib.contextmanager
    def temporary_copy(self, path: str) -> Iterator[Any]:
        """The whole file, in a file here that is gone after the block."""
        with tempfile.NamedTemporaryFile(suffix=os.path.splitext(path)[1]) as copy:
            self.place.get(path, copy.name)
            yield copy

    def put(self, source: str, path: str) -> None:
        """Write a file from here there. A reader sees it whole or not at all."""
        self.place.put(source, path)
        self._facts.pop(path, None)


class RemoteRangeFile:
    """A remote file, read in ranges. `bytes_read` counts what came over the network."""

    def __init__(self, storage: RemoteStorage, path: str):
        self._storage, self._path = storage, path
        self._facts = storage.facts(path)
        self.bytes_read = 0

    def facts(self) -> FileFacts:
        return self._facts

    def read_ranges(self, ranges: list[tuple[int, int]]) -> list[bytes]:
        key = key_of(self._path, self._facts)
        cache = self._storage.cache
        found = [cache.get(key, *span) for span in ranges]
        due = [span for span, data in zip(ranges, found, strict=True) if data is None]
        if due:
            fetched = self._storage.place.asked(
                self._path,
                lambda: self._storage.fs.cat_ranges(
                    [self._path] * len(due), [o for o, _ in due], [o + n for o, n in due], on_error="raise"
                ),
            )
            new = dict(zip(due, fetched, strict=True))
            for span, data in new.items():
                self.bytes_read += len(data)
                cache.put(key, *span, data)
            found = [new[span] if data is None else data for span, data in zip(ranges, found, strict=True)]
        return found

    def close(self) -> None:
        """There is nothing to release."""


class RangeCache:
    """Local copies of ranges, a file each, in a folder that processes share. The ones used longest ago go first."""

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit
        self._since_eviction = 0

    def _path(self, key: str, offset: int, length: int) -> Path:
        return self.folder / key[:2] / f"{key}-{offset}-{length}"

    def get(self, key: str, offset: int, length: int) -> bytes | None:
        path = self._path(key, offset, length)
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        return data if len(data) == length else None

    def put(self, key: str, offset: int, length: int, data: bytes) -> None:
        """Keep it. A full disk is no error: it is then read anew next time."""
        if len(data) != length or length > self.limit // 8:
            return
        path = self._path(key, offset, length)
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(data)
            os.replace(partial, path)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            return
        self._since_eviction += length
        if self._since_eviction > self.limit // 8:
            self._since_eviction = 0
            evict(self.folder, self.limit, "*/*", 0)
