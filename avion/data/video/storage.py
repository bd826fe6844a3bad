"""Where a dataset's files lie: a folder, asked through this one interface so that other places can stand in for it."""

from __future__ import annotations

import os
from dataclasses import dataclass

from avion.remote import is_remote


@dataclass(frozen=True)
class FileFacts:
    """size: bytes. stamp: what changes when the file is written anew: its modification time in ns."""

    size: int
    stamp: int


class Storage:
    """The folder `root` of the local file system, and what is below it. Paths are strings. Every method may raise
    OSError."""

    remote = False

    def __init__(self, root: str):
        self.root = root

    def join(self, *parts: str) -> str:
        return os.path.join(*parts)

    def exists(self, path: str) -> bool:
        """Whether there is such a file. OSError where that cannot be told."""
        try:
            os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def is_dir(self, path: str) -> bool:
        return os.path.isdir(path)

    def entries(self, folder: str) -> list[tuple[str, bool]]:
        """(name, is it a folder) of everything in a folder but hidden names, sorted."""
        with os.scandir(folder) as found:
            return sorted((entry.name, entry.is_dir()) for entry in found if not entry.name.startswith("."))

    def facts(self, path: str) -> FileFacts:
        found = os.stat(path)
        return FileFacts(found.st_size, found.st_mtime_ns)

    def open_ranges(self, path: str) -> RangeFile:
        """The file, for positioned reads."""
        return RangeFile(path)

    def open_file(self, path: str):
        """The file, for readers that need a file object."""
        return open(path, "rb")

    def local_copy(self, path: str) -> str:
        """A path at which the whole file can be mapped into memory."""
        return path


class RangeFile:
    """A file open for positioned reads. `bytes_read` counts what was read."""

    def __init__(self, path: str):
        self._handle = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        self.bytes_read = 0

    def facts(self) -> FileFacts:
        found = os.fstat(self._handle)
        return FileFacts(found.st_size, found.st_mtime_ns)

    def read_ranges(self, ranges: list[tuple[int, int]]) -> list[bytes]:
        """The bytes of each (offset, length); fewer where the file ends before."""
        return [self._read(offset, length) for offset, length in ranges]

    def _read(self, offset: int, length: int) -> bytes:
        data = os.pread(self._handle, length, offset)
        while 0 < len(data) < length:  # a signal, or a network file system that gives less at a time
            more = os.pread(self._handle, length - len(data), offset + len(data))
            if not more:
                break
            data += more
        self.bytes_read += len(data)
        return data

    def close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def storage_of(root: str | os.PathLike) -> Storage:
    """The storage that a root lies in. UserError where it needs a package that is not installed."""
    if is_remote(root):
        from .remote import RemoteStorage

        return RemoteStorage(os.fspath(root))
    return Storage(os.fspath(root))
