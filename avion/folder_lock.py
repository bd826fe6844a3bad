"""One run per folder: a lock that ends with its process, and a line that says who holds it.

The lock is a byte-range lock of POSIX (`fcntl.lockf`) on a file in the folder. The operating system gives it up when
the process ends in any way, and NFS servers keep such locks for their clients. Two properties of these locks shape this
module: a process gives up its lock when it closes any open file of the same inode, and it never collides with itself.
A process therefore opens the lock file only here, and `_HELD` knows what it holds itself.

A leaf: this module imports nothing of the project but its errors.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from avion.errors import UserError

logger = logging.getLogger(__name__)

LOCK_FILE = "run.lock"
# A run that was killed, or asked to stop, may need some seconds to end while its successor starts already: SLURM may
# requeue a job onto the same machine.
PATIENCE_S = 15.0
_POLL_S = 0.5
# What operating systems say where a file system knows no locks, as Lustre without its option `flock`.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
_LONGEST_LINE = 4096

_HELD: set[tuple[int, int]] = set()  # (device, inode) of the lock files that this process holds


@dataclass(frozen=True)
class Holder:
    """Who holds a folder, as the lock file says it in a JSON line.

    Attributes:
        host: The name of the machine.
        pid: The number of the process there.
        job: The number of the SLURM job, empty outside SLURM.
        since: When the process took the folder, in local time.
        started: When the process started, in the ticks of its machine, which tell a process from a later one of the
            same number; None where the operating system does not say it.
    """

    host: str
    pid: int
    job: str
    since: str
    started: int | None = None

    @classmethod
    def this_process(cls) -> "Holder":
        """This process, which takes a folder now."""
        job, now = os.environ.get("SLURM_JOB_ID", ""), time.strftime("%Y-%m-%d %H:%M:%S")
        return cls(socket.gethostname(), os.getpid(), job, now, _start_of(os.getpid()))

    @classmethod
    def read(cls, line: bytes) -> "Holder | None":
        """The holder that a lock file names; None where it names none."""
        try:
            fields = json.loads(line)
            return cls(
                _plain(fields["host"]),
                int(fields["pid"]),
                _plain(fields["job"]),
                _plain(fields["since"]),
                None if fields.get("started") is None else int(fields["started"]),
            )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
            return None

    def is_alive(self) -> bool:
        """Whether this machine runs the process. False where it is another machine's, of which nothing is known."""
        return self.host == socket.gethostname() and self.started is not None and _start_of(self.pid) == self.started

    def __str__(self) -> str:
        job = f", SLURM job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"


def _plain(text: Any) -> str:
    """A text from a file for a message: short, and without control characters."""
    return "".join(c for c in str(text)[:100] if c.isprintable())


def _start_of(pid: int) -> int | None:
    """The start of a process of this machine; None where it does not run or where there is no /proc."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    # The second field is the name in parentheses, which may hold anything; the start is field number 22.
    fields = stat[stat.rindex(b")") + 1 :].split()
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


@contextlib.contextmanager
def held(
    folder: str | os.PathLike[str],
    *,
    flag: str = "--output-dir",
    patience_s: float | None = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """Hold a folder until the block is left; the folder is made where it does not exist.

    Args:
        folder: The folder.
        flag: The flag that named the folder, for messages.
        patience_s: How long to wait for a process that still holds the folder [15 s].
        meanwhile: Is called twice a second during the wait; what it raises ends the wait.

    Raises:
        UserError: Another process holds the folder, or this process does already; or no file can be written there.
    """
    path, patience = Path(folder) / LOCK_FILE, PATIENCE_S if patience_s is None else patience_s
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        handle = _taken(path, flag, patience, meanwhile)
    except OSError as e:
        raise UserError(f"{flag} {folder}: cannot be written ({e.strerror}); choose another") from e
    inode = _inode(os.fstat(handle))
    _HELD.add(inode)
    try:
        with contextlib.suppress(OSError):  # a full disk: the lock holds, and the first log line says what is wrong
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps(asdict(Holder.this_process())).encode() + b"\n", 0)
            os.fsync(handle)
        yield
    finally:
        with contextlib.suppress(OSError):
            if _inode(os.stat(path)) == inode:
                path.unlink()
        _HELD.discard(inode)
        os.close(handle)


def _taken(path: Path, flag: str, patience: float, meanwhile: Callable[[], None]) -> int:
    """The open lock file, once this process has its lock."""
    deadline, told = time.monotonic() + patience, False
    while True:
        handle, holder = _try(path, flag)
        if handle is not None:
            return handle
        name = "another run" if holder is None else f"another run ({holder})"
        if time.monotonic() >= deadline:
            raise UserError(
                f"{flag} {path.parent}: {name} writes there; wait for it or stop it, or give another {flag}"
            )
        if not told:
            logger.info("%s %s: %s writes there; waiting %.0f s for its end", flag, path.parent, name, patience)
            told = True
        meanwhile()
        time.sleep(min(_POLL_S, max(deadline - time.monotonic(), 0)))


def _try(path: Path, flag: str) -> tuple[int | None, Holder | None]:
    """The open file where the lock was free, or else who holds it as far as the file says it."""
    with contextlib.suppress(FileNotFoundError):
        if _inode(os.stat(path)) in _HELD:
            raise UserError(f"{flag} {path.parent}: this process has a run there already; give another {flag}")
    # Neither a link nor a FIFO in the place of the file: the one would be written through, the other would wait.
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    kept = False
    try:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            holder = Holder.read(os.pread(handle, _LONGEST_LINE, 0))
            if e.errno in (errno.EACCES, errno.EAGAIN):
                return None, holder
            if e.errno not in _NO_LOCKS:
                raise
            if holder is not None and holder != Holder.this_process() and holder.is_alive():
                return None, holder
            logger.warning(
                "%s %s: its file system knows no locks (%s); a second run on another machine would not be noticed",
                flag,
                path.parent,
                e.strerror,
            )
        # The holder before may have removed the file between `open` and `lockf`: then the name is free again.
        with contextlib.suppress(FileNotFoundError):
            kept = _inode(os.stat(path)) == _inode(os.fstat(handle))
        return (handle, None) if kept else _try(path, flag)
    finally:
        if not kept:
            os.close(handle)


def _inode(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_dev, stat.st_ino
