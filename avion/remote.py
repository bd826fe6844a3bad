"""Files in object stores and other remote places: `s3://bucket/folder/file` and whatever else fsspec knows. A leaf.

Credentials, regions and endpoints are those of the ecosystem (for S3: AWS_ACCESS_KEY_ID, ~/.aws, instance roles,
AWS_ENDPOINT_URL). Every request is tried a few times and ends in bounded time. Errors come out as OSErrors, whose texts
never hold credentials. A whole file is read through a local copy, which all processes of a machine share.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from avion.errors import UserError, printable
from avion.files import cache_folder, written_whole

R = TypeVar("R")

ATTEMPTS, FIRST_WAIT_S = 4, 0.2  # of a request; the wait doubles
CONNECT_S, ANSWER_S = 5, 15  # in which a server of S3 must take a connection, and answer
STALLED_S = 120.0  # a request without any progress for so long has failed, whatever the client still hopes for
RANGE_BYTES, FILE_BYTES = 4 * 2**30, 32 * 2**30  # of the local copies; the environment may say otherwise
IN_USE_S = 600.0  # a copy that was used so recently is not deleted: somebody may be about to open it
_KEPT_SHARE = 0.8  # of the copies that an eviction leaves
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://", re.ASCII)
_SECRET_QUERY = re.compile(r"[?&][^=&#]*(signature|token|sig|key|secret|password|credential)[^=&#]*=", re.IGNORECASE)
_SECRET_VARIABLES = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECURITY_TOKEN")


# --- addresses -------------------------------------------------------------------------------


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a URL of another place ("s3://...") rather than a file here."""
    return _ADDRESS.match(os.fspath(path)) is not None


def check_address(path: str) -> None:
    """Raise UserError for a URL that holds credentials: logs, checkpoints and error messages show addresses."""
    found = _ADDRESS.match(path)
    if found is None:
        return
    place = path[found.end() :].partition("/")[0]
    if "@" in place or _SECRET_QUERY.search(path):
        raise UserError(
            f"{without_secrets(path).partition('?')[0]}: the address holds credentials, which would stand in logs and "
            "checkpoints; leave them to the environment or to the client's own files (for S3: AWS_PROFILE, ~/.aws)"
        )


def without_secrets(text: str) -> str:
    """A text for logs: without `user:password@` in addresses, signatures in queries and this process's credentials."""
    for name in _SECRET_VARIABLES:
        value = os.environ.get(name, "")
        if len(value) >= 8:
            text = text.replace(value, "***")
    text = re.sub(r"://[^/@\s]+@", "://***@", text)
    return re.sub(r"(Signature|Token|Credential|AccessKeyId|AWSAccessKeyId)=[^&\s'\"]+", r"\1=***", text)


def joined(folder: str | os.PathLike[str], *parts: str) -> str:
    """The path of a file below a folder, here or in a remote place."""
    if not is_remote(folder):
        return os.path.join(folder, *parts)
    return "/".join([os.fspath(folder).rstrip("/"), *(part.strip("/") for part in parts)])


def neighbour(path: str | os.PathLike[str], name: str) -> str:
    """The path of a file of this name in the folder of another file, here or in a remote place."""
    return f"{os.fspath(path).rpartition('/')[0]}/{name}" if is_remote(path) else str(Path(path).with_name(name))


# --- requests --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """size: bytes, -1 where the place does not say. stamp: a number that changes when the file is written anew."""

    size: int
    stamp: int


class Remote:
    """The file system that an address lies in, and requests to it. Objects may be handed to other processes.

    Every method raises OSError, of these kinds: FileNotFoundError (no such file), PermissionError (no credentials, or
    not the right ones), and any other for what remained after the attempts.

    Args:
        root: An address in that file system.

    Raises:
        UserError: A package is missing, fsspec does not know this kind of address, or the address holds credentials.
    """

    def __init__(self, root: str):
        check_address(root)
        self.root = root
        self._fs: Any = None
        self._fs_pid = -1
        self.fs  # noqa: B018  a missing package is told here, not in a worker

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_fs": None, "_fs_pid": -1}

    @property
    def fs(self) -> Any:
        """The file system, one per process: connections do not survive a fork."""
        if self._fs_pid != os.getpid():
            self._fs, self._fs_pid = _file_system(self.root), os.getpid()
        return self._fs

    def info(self, path: str) -> dict[str, Any]:
        """What the place says about a file or a folder: `type` ("file" or "directory"), `size` and more."""
        return self.asked(path, lambda: self.fs.info(path))

    def facts(self, path: str) -> Facts:
        """Size and stamp of a file. FileNotFoundError for a folder too."""
        found = self.info(path)
        if found["type"] == "directory":
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return Facts(-1 if found.get("size") is None else int(found["size"]), _stamp(found))

    def entries(self, folder: str) -> list[tuple[str, bool]]:
        """(name, is it a folder) of everything in a folder but hidden names, sorted."""
        found = self.asked(folder, lambda: self.fs.ls(folder, detail=True))
        names = ((entry["name"].rstrip("/").rpartition("/")[2], entry["type"] == "directory") for entry in found)
        return sorted((name, is_folder) for name, is_folder in names if name and not name.startswith("."))

    def get(self, path: str, target: str) -> None:
        """Bring a whole file here."""
        self.asked(path, lambda tell: self.fs.get_file(path, target, callback=_progress(tell)), transfer=True)

    def put(self, source: str, path: str) -> None:
        """Write a file from here there. Object stores show it whole or not at all; elsewhere it is renamed."""
        self.asked(
            path,
            lambda tell: self._whole(path, lambda name: self.fs.put_file(source, name, callback=_progress(tell))),
            transfer=True,
        )

    def write(self, path: str, data: bytes) -> None:
        """Write a small file, whole or not at all."""
        self.asked(path, lambda: self._whole(path, lambda name: self.fs.pipe_file(name, data)))

    def _whole(self, path: str, write: Callable[[str], None]) -> None:
        protocols = {self.fs.protocol} if isinstance(self.fs.protocol, str) else set(self.fs.protocol)
        if protocols & _WHOLE_OR_NOT:
            write(path)
            return
        partial = f"{path}.{secrets.token_hex(4)}.partial"
        try:
            self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            write(partial)
            self.fs.mv(partial, path)
        except BaseException:
            with contextlib.suppress(Exception):
                self.fs.rm_file(partial)
            raise

    def read(self, path: str) -> bytes:
        """The content of a small file."""
        return self.asked(path, lambda: self.fs.cat_file(path))

    def copy(self, source: str, target: str) -> None:
        """Copy a file within the place, without bringing it here."""
        self.asked(source, lambda: self.fs.cp_file(source, target))

    def remove(self, path: str) -> None:
        """Delete a file; nothing where there is none."""
        with contextlib.suppress(FileNotFoundError):
            self.asked(path, lambda: self.fs.rm_file(path))

    def forget(self) -> None:
        """See the place as it is now, not as it was when it was listed last."""
        self.fs.invalidate_cache()

    def asked(self, path: str, request: Callable[..., R], *, transfer: bool = False) -> R:
        """What `request()` returns. It is tried again where that may help.

        Args:
            path: What the request is about, for errors.
            request: The request; with `transfer` it takes a function that it calls at every progress.
            transfer: Whether the request moves a whole file.
        """
        for attempt in range(ATTEMPTS):
            try:
                return _bounded(request, transfer)
            except UserError:
                raise
            except Exception as error:  # botocore's, aiohttp's and others' errors have no common class
                told = _as_os_error(error, path)
                final = isinstance(told, FileNotFoundError | NotADirectoryError | PermissionError | FileExistsError)
                if final or attempt == ATTEMPTS - 1:
                    raise told from error
                time.sleep(FIRST_WAIT_S * 2**attempt)
        raise AssertionError("every attempt returns or raises")


# File systems in which a file that is being written does not have its name yet.
_WHOLE_OR_NOT = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "memory"}


def _file_system(root: str) -> Any:
    try:
        import fsspec

        for name in ("botocore", "aiobotocore", "s3fs"):  # they tell where credentials were found
            logging.getLogger(name).setLevel(logging.WARNING)
        options: dict[str, Any] = {}
        if root.startswith(("s3://", "s3a://")):  # one who tries again is enough
            known = dict(fsspec.config.conf.get("s3", {}).get("config_kwargs", {}))
            bounds = {"connect_timeout": CONNECT_S, "read_timeout": ANSWER_S, "retries": {"total_max_attempts": 1}}
            options["config_kwargs"] = {**bounds, **known}
        fs, _ = fsspec.core.url_to_fs(root, skip_instance_cache=True, **options)
        if options:
            fs.retries = 1
            fs.max_concurrency = 4  # parts of 50 MB that are in memory at a time
        return fs
    except ImportError as error:
        raise UserError(
            f"{root}: remote places need more packages ({error}); `pip install avion-timemamba[remote]`"
        ) from None
    except ValueError as error:
        raise UserError(f"{root}: is of no kind that fsspec knows ({error})") from None


def _bounded(request: Callable[..., R], transfer: bool) -> R:
    """What the request returns. TimeoutError where it makes no progress: clients may wait for a dead server for ever.

    The thread of such a request is left behind; it does not keep the process from ending.
    """
    outcome: list[Any] = []
    done, moved = threading.Event(), [time.monotonic()]

    def tell() -> None:
        moved[0] = time.monotonic()

    def work() -> None:
        try:
            outcome.extend((request(tell) if transfer else request(), None))
        except BaseException as error:  # handed on to the thread that waits
            outcome.extend((None, error))
        done.set()

    threading.Thread(target=work, name="remote request", daemon=True).start()
    while not done.wait(max(moved[0] + STALLED_S - time.monotonic(), 0.01)):
        if time.monotonic() - moved[0] >= STALLED_S:
            raise TimeoutError(f"nothing moved for {STALLED_S:g} s")
    value, error = outcome
    if error is not None:
        raise error
    return value


def _progress(tell: Callable[[], None]) -> Any:
    """fsspec's callback that calls `tell` whenever a part of a file has come or gone."""
    from fsspec.callbacks import Callback

    class Progress(Callback):
        def call(self, *args: Any, **keywords: Any) -> None:
            tell()

        def branch_coro(self, fn: Any) -> Any:
            return fn

    return Progress()


_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "TokenRetrievalError")


def _as_os_error(error: BaseException, path: str) -> OSError:
    """The error as people are told it: a kind that programs can tell apart, a reason in one line, no credentials."""
    reason = printable(without_secrets(" ".join(str(error).split())[:240])) or type(error).__name__
    chain = [error]
    while (before := chain[-1].__cause__ or chain[-1].__context__) is not None and len(chain) < 8:
        chain.append(before)
    kinds = {type(one).__name__ for one in chain}
    codes = {_code(one) for one in chain}
    if kinds & set(_NO_CREDENTIALS):
        return PermissionError(
            errno.EACCES,
            f"no credentials that can be used ({reason}); for S3 set AWS_PROFILE, or AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY",
            path,
        )
    if "NoSuchBucket" in codes:
        return OSError(errno.ENXIO, f"there is no such bucket ({reason})", path)
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    if isinstance(error, PermissionError):
        return PermissionError(errno.EACCES, f"access is denied ({reason}); check the credentials", path)
    if isinstance(error, NotADirectoryError | FileExistsError):
        return type(error)(error.errno or errno.EEXIST, reason, path)
    if kinds & {"EndpointConnectionError", "ConnectTimeoutError", "ClientConnectorError", "ConnectionRefusedError"}:
        return OSError(errno.EHOSTUNREACH, f"the server cannot be reached ({reason})", path)
    if isinstance(error, TimeoutError) or kinds & {"ReadTimeoutError", "FSTimeoutError", "ServerTimeoutError"}:
        return OSError(errno.EIO, f"the server does not answer ({reason})", path)
    own = error.strerror if isinstance(error, OSError) and error.strerror else None
    return OSError(errno.EIO, printable(without_secrets(" ".join(own.split()))) if own else reason, path)


def _code(error: BaseException) -> str:
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def _stamp(info: dict[str, Any]) -> int:
    """A number that changes when the file is written anew, of what a store says about it."""
    for name in ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "mtime", "created"):
        if info.get(name) is not None:
            return int.from_bytes(hashlib.blake2b(str(info[name]).encode(), digest_size=7).digest(), "little")
    return 0


# --- local copies ----------------------------------------------------------------------------


def cache_root() -> Path:
    """Where local copies lie: AVION_CACHE, else $XDG_CACHE_HOME/avion, else ~/.cache/avion.

    Raises:
        UserError: There is no home folder, and neither variable is set.
    """
    try:
        return Path(os.environ.get("AVION_CACHE") or cache_folder())
    except FileNotFoundError as e:
        raise UserError("there is no home folder for copies of remote files; set AVION_CACHE") from e


def cache_limit(variable: str, default: int) -> int:
    """The bytes that a kind of local copies may take, which an environment variable may say.

    Raises:
        UserError: The variable holds no number of bytes.
    """
    text = os.environ.get(variable, "")
    if text and not text.isdecimal():
        raise UserError(f"{variable} {text}: a number of bytes is required")
    return int(text or default)


_places: dict[tuple[int, str], Remote] = {}


def place_of(path: str) -> Remote:
    """The file system of an address, one per process and bucket."""
    check_address(path)
    found = _ADDRESS.match(path)
    assert found is not None, path
    root = path[: found.end()] + path[found.end() :].partition("/")[0]
    known = _places.get((os.getpid(), root))
    if known is None:
        known = _places[os.getpid(), root] = Remote(root)
    return known


def forget_places() -> None:
    """Open connections anew from now on, with the credentials and servers that the environment says by then."""
    _places.clear()


def fetch(path: str) -> str:
    """A local file with the content of a remote one.

    It is brought here once per machine for as long as the remote file does not change, however many processes ask. The
    copies that were used longest ago go where they take more than AVION_CACHE_FILES_BYTES [32 GiB].

    Raises:
        OSError: As `Remote` says, with the reason in `strerror`; or the copy cannot be written.
        UserError: A package is missing, or the address holds credentials.
    """
    place = place_of(path)
    place.forget()
    return copy_here(place, path, place.facts(path))


def copy_here(place: Remote, path: str, facts: Facts) -> str:
    """As `fetch` does, of a file whose facts are known."""
    folder = cache_root() / "files"
    name = os.fsdecode(os.fsencode(path.rstrip("/").rpartition("/")[2].partition("?")[0])[-150:])
    for _ in range(ATTEMPTS):
        key = key_of(path, facts)
        target = folder / f"{key}-{name}"
        if _is_there(target):
            return str(target)
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f".{key[:2]}.lock"):
            if _is_there(target):  # another process brought it meanwhile
                return str(target)
            with written_whole(target, cure="point AVION_CACHE at another place") as file:
                place.get(path, file.name)
                size = os.stat(file.name).st_size
                place.forget()
                now = place.facts(path)
                if now == facts and facts.size not in (-1, size):
                    raise OSError(errno.EIO, f"{size} bytes came of {facts.size}", path)
                changed, facts = now != facts, now
            if changed:
                target.unlink(missing_ok=True)
                continue
            evict(folder, cache_limit("AVION_CACHE_FILES_BYTES", FILE_BYTES))
        return str(target)
    raise OSError(errno.EBUSY, "it changes while it is read", path)


def _is_there(target: Path) -> bool:
    try:
        os.utime(target)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock among the processes that share the local copies. It ends with its process."""
    with open(path, "a+") as file:
        with contextlib.suppress(OSError):  # a file system without locks: the file is then brought twice
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def key_of(path: str, facts: Any) -> str:
    """A name for the content of a remote file; `facts` has its `size` and `stamp`."""
    return hashlib.blake2b(f"{path}\0{facts.size}\0{facts.stamp}".encode(), digest_size=16).hexdigest()


def evict(folder: Path, limit: int, pattern: str = "*", spared_s: float = IN_USE_S) -> None:
    """Delete the files used longest ago, until what is left takes less than `limit` bytes.

    Args:
        folder: The folder of copies.
        limit: In bytes.
        pattern: Which files below the folder are copies.
        spared_s: Files used within so many seconds stay.
    """
    found = []
    for path in folder.glob(pattern):
        with contextlib.suppress(OSError):
            facts = path.stat()
            if not path.name.endswith(".lock"):
                found.append((facts.st_mtime_ns, facts.st_size, path))
    total = sum(size for _, size, _ in found)
    if total <= limit * _KEPT_SHARE:
        return
    spared = time.time_ns() - int(spared_s * 1e9)
    for used, size, path in sorted(found, key=lambda entry: entry[0]):
        if total <= limit * _KEPT_SHARE or (spared_s and used > spared):
            return
        with contextlib.suppress(OSError):
            path.unlink()
            total -= size
