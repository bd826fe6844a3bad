"""Videos on object stores and other remote places: `s3://bucket/folder` and whatever else fsspec knows.

Credentials, regions and endpoints are those of the ecosystem (for S3: AWS_ACCESS_KEY_ID, ~/.aws, instance roles,
AWS_ENDPOINT_URL). Reads are ranges, several at a time. What was read is kept in a folder of bounded size that all
processes of a machine share.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import tempfile
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from avion.errors import UserError
from avion.files import written_whole

from .storage import FileFacts, Storage

ATTEMPTS, FIRST_WAIT_S = 4, 0.2  # of a request; the wait doubles
CACHE_BYTES = 4 * 2**30  # of the local copies; AVION_CACHE_BYTES says otherwise
_KNOWN_FACTS = 2**16  # files whose size is remembered
_KEPT_SHARE = 0.8  # of the cache that an eviction leaves


def cache_folder() -> Path:
    """Where local copies lie: AVION_CACHE, else ~/.cache/avion."""
    return Path(os.environ.get("AVION_CACHE") or Path.home() / ".cache" / "avion") / "ranges"


class RemoteStorage(Storage):
    """The folder `root`, a URL, on a file system of fsspec's. Errors come out as OSErrors."""

    remote = True

    def __init__(self, root: str):
        super().__init__(root.rstrip("/"))
        self._fs: Any = None
        self._fs_pid = -1
        self._facts: OrderedDict[str, FileFacts] = OrderedDict()
        self.cache = RangeCache(cache_folder(), int(os.environ.get("AVION_CACHE_BYTES", CACHE_BYTES)))
        self.fs  # noqa: B018  a missing package is told here, not in a worker

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_fs": None, "_fs_pid": -1}

    @property
    def fs(self) -> Any:
        """The file system, one per process: connections do not survive a fork."""
        if self._fs_pid != os.getpid():
            try:
                import fsspec

                self._fs, _ = fsspec.core.url_to_fs(self.root, skip_instance_cache=True)
            except ImportError as error:
                raise UserError(
                    f"{self.root}: remote folders need more packages ({error}); `pip install avion-timemamba[remote]`"
                ) from None
            except ValueError as error:
                raise UserError(f"{self.root}: is of no kind that fsspec knows ({error})") from None
            self._fs_pid = os.getpid()
        return self._fs

    def join(self, *parts: str) -> str:
        return "/".join([parts[0].rstrip("/"), *(part.strip("/") for part in parts[1:])])

    def exists(self, path: str) -> bool:
        try:
            self.facts(path)
        except FileNotFoundError:
            return self.is_dir(path)
        return True

    def is_dir(self, path: str) -> bool:
        return bool(self._asked(path, lambda: self.fs.isdir(path)))

    def entries(self, folder: str) -> list[tuple[str, bool]]:
        found = self._asked(folder, lambda: self.fs.ls(folder, detail=True))
        names = ((entry["name"].rstrip("/").rpartition("/")[2], entry["type"] == "directory") for entry in found)
        return sorted((name, is_folder) for name, is_folder in names if name and not name.startswith("."))

    def facts(self, path: str) -> FileFacts:
        known = self._facts.get(path)
        if known is None:
            found = self._asked(path, lambda: self.fs.info(path))
            if found["type"] == "directory":
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            known = self._facts[path] = FileFacts(int(found["size"]), _stamp(found))
            if len(self._facts) > _KNOWN_FACTS:
                self._facts.popitem(last=False)
        return known

    def open_ranges(self, path: str) -> RemoteRangeFile:
        return RemoteRangeFile(self, path)

    def open_file(self, path: str):
        """A file object for readers that need one."""
        return self._asked(path, lambda: self.fs.open(path, "rb", block_size=4 * 2**20))

    def local_copy(self, path: str) -> str:
        """The whole file, brought here once for as long as it does not change."""
        facts = self.facts(path)
        target = cache_folder().parent / "files" / f"{_key(path, facts)}-{os.path.basename(path)}"
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(target, cure="point AVION_CACHE at another place") as file:
                self._asked(path, lambda: self.fs.get_file(path, file.name))
        return str(target)

    @contextlib.contextmanager
    def temporary_copy(self, path: str) -> Iterator[Any]:
        """The whole file, in a file here that is gone after the block."""
        with tempfile.NamedTemporaryFile(suffix=os.path.splitext(path)[1]) as copy:
            self._asked(path, lambda: self.fs.get_file(path, copy.name))
            yield copy

    def put(self, source: str, path: str) -> None:
        """Write a file from here there. Object stores show it whole or not at all."""
        self._asked(path, lambda: self.fs.put_file(source, path))
        self._facts.pop(path, None)

    def _asked(self, path: str, request):
        """What `request()` returns. It is tried again where that may help; what remains is an OSError."""
        for attempt in range(ATTEMPTS):
            try:
                return request()
            except (FileNotFoundError, NotADirectoryError, PermissionError):
                raise
            except UserError:
                raise
            except Exception as error:  # botocore's, aiohttp's and others' errors have no common class
                if attempt == ATTEMPTS - 1:
                    reason = " ".join(str(error).split())[:160] or type(error).__name__
                    raise OSError(errno.EIO, reason, path) from error
                time.sleep(FIRST_WAIT_S * 2**attempt)
        raise AssertionError("every attempt returns or raises")


class RemoteRangeFile:
    """A remote file, read in ranges. `bytes_read` counts what came over the network."""

    def __init__(self, storage: RemoteStorage, path: str):
        self._storage, self._path = storage, path
        self._facts = storage.facts(path)
        self.bytes_read = 0

    def facts(self) -> FileFacts:
        return self._facts

    def read_ranges(self, ranges: list[tuple[int, int]]) -> list[bytes]:
        key = _key(self._path, self._facts)
        cache = self._storage.cache
        found = [cache.get(key, *span) for span in ranges]
        due = [span for span, data in zip(ranges, found, strict=True) if data is None]
        if due:
            fetched = self._storage._asked(
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
            self.evict()

    def evict(self) -> None:
        """Delete the copies used longest ago, until what is left fits."""
        found = []
        for path in self.folder.glob("*/*"):
            with contextlib.suppress(OSError):
                facts = path.stat()
                found.append((facts.st_mtime_ns, facts.st_size, path))
        total = sum(size for _, size, _ in found)
        if total <= self.limit * _KEPT_SHARE:
            return
        for _, size, path in sorted(found, key=lambda entry: entry[0]):
            with contextlib.suppress(OSError):
                path.unlink()
                total -= size
            if total <= self.limit * _KEPT_SHARE:
                return


def _stamp(info: dict) -> int:
    """A number that changes when the file is written anew, of what a store says about it."""
    for name in ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "mtime", "created"):
        if info.get(name) is not None:
            return int.from_bytes(hashlib.blake2b(str(info[name]).encode(), digest_size=7).digest(), "little")
    return 0


def _key(path: str, facts: FileFacts) -> str:
    return hashlib.blake2b(f"{path}\0{facts.size}\0{facts.stamp}".encode(), digest_size=16).hexdigest()
