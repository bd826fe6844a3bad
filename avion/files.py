"""Files that are written whole or not at all. A leaf: this module imports nothing of the project but its errors."""

import contextlib
import errno
import fcntl
import fnmatch
import io
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from avion.errors import UserError

# The name of a file that is being written ends so. A process that is killed leaves such a file behind; the process
# that holds the folder's lock may delete it.
PARTIAL = ".partial"
# File systems take 255 bytes. The name of the partial file holds the target's name as far as it fits.
_LONGEST_NAME, _KEPT_OF_NAME = 255, 200


def cache_folder() -> Path:
    """Return the folder of what this machine can make again: what was measured or compiled on it, copies of files.

    Raises:
        OSError: There is no home folder, and XDG_CACHE_HOME is not set.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "avion"
    except RuntimeError as e:
        raise FileNotFoundError(errno.ENOENT, "there is no home folder; set XDG_CACHE_HOME") from e


@contextlib.contextmanager
def written_whole(
    path: str | os.PathLike[str], *, flag: str = "", cure: str = "change --output-dir"
) -> Iterator[BinaryIO]:
    """Open a file for writing that appears under its name only once it is complete.

    The file is written beside `path` under a name that no other process uses. When the block is left, the file is
    flushed to disk and renamed to `path`: a reader sees the old file or the new one, never a part of it. When the block
    ends with an exception, `path` is as it was and the partial file is deleted.

    Args:
        path: The target. Its folder must exist.
        flag: The command-line flag that gave the path; error messages begin with it.
        cure: What the user can do beside freeing space; error messages end with it.

    Yields:
        A binary file, open for writing and seekable.

    Raises:
        UserError: The file cannot be written. A failed write (a full disk) is recognised also where a library replaces
            it by an exception of its own, as PyTorch's zip writer does.
    """
    with partial_file(path, flag=flag, cure=cure) as partial:
        raw = _WatchedFile(partial, "wb")
        try:
            with io.BufferedWriter(raw) as file:
                yield cast(BinaryIO, file)
        except Exception:
            if raw.failure is not None:
                raise raw.failure from None
            raise


@contextlib.contextmanager
def partial_file(path: str | os.PathLike[str], *, flag: str = "", cure: str = "change --output-dir") -> Iterator[Path]:
    """Open the path of a file for writing, as `written_whole` does, for libraries that take a path and not an open
    file.

    Args:
        path: The target. Its folder must exist.
        flag: The command-line flag that gave the path; error messages begin with it.
        cure: What the user can do beside freeing space; error messages end with it.

    Yields:
        The path to write to. The file does not exist yet; it must exist when the block is left.

    Raises:
        UserError: The file cannot be written, or the target is a folder.
    """
    target = Path(path)
    partial = partial_name(target)
    try:
        if target.is_dir():  # a rename would say so only after all the work
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        if len(os.fsencode(target.name)) > _LONGEST_NAME:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, target)
        _sync_folder(target.parent)
    except Exception as e:
        reason = _why_not_written(e)
        if reason is None:
            raise
        raise UserError(f"{f'{flag} {path}'.strip()}: cannot be written ({reason}); free space or {cure}") from e
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _why_not_written(error: Exception) -> str | None:
    """Return the operating system's words for a failed write; None for an error of another kind."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    # safetensors is written in Rust and tells an error of the operating system as text: "Os { code: 28, ...".
    number = re.search(r"\bOs \{ code: (\d+)|\bos error (\d+)", str(error))
    return os.strerror(int(number.group(1) or number.group(2))) if number else None


def partial_name(target: Path) -> Path:
    """Return a new name beside `target` for a file that is being written."""
    kept = os.fsdecode(os.fsencode(target.name)[:_KEPT_OF_NAME])
    return target.with_name(f"{kept}.{os.getpid()}-{secrets.token_hex(4)}{PARTIAL}")


def remove_partial_files(folder: str | os.PathLike[str], *names: str) -> None:
    """Delete what killed processes left of files that they were writing.

    Args:
        folder: The folder. No other process writes files of these names there, because the caller holds the folder's
            lock.
        names: The names of the files that were being written, as patterns such as "checkpoint*.pt".
    """
    left = re.compile(rf"(.+?)(?:\.\d+-[0-9a-f]{{8}})?{re.escape(PARTIAL)}", re.DOTALL)
    for entry in os.scandir(folder):
        of = left.fullmatch(entry.name)
        if of is not None and any(fnmatch.fnmatchcase(of.group(1), name) for name in names):
            with contextlib.suppress(OSError):
                os.unlink(entry.path)


def write_text(path: str | os.PathLike[str], text: str, *, flag: str = "", cure: str = "change --output-dir") -> None:
    """Write a text in UTF-8, whole or not at all.

    Args:
        path: The target. Its folder must exist.
        text: The whole content.
        flag: The command-line flag that gave the path; error messages begin with it.
        cure: What the user can do beside freeing space; error messages end with it.

    Raises:
        UserError: The file cannot be written.
    """
    with written_whole(path, flag=flag, cure=cure) as file:
        file.write(text.encode("utf-8"))


def append_lines(path: str | os.PathLike[str], lines: list[str]) -> None:
    """Append lines to a log file and flush them to disk.

    The lines are written in one call. Where the file's last line lacks its end (the process that wrote it was
    killed), the line is ended first, so that new text is never glued onto it.

    Args:
        path: The file; it is created where it does not exist.
        lines: Lines without their line ends.

    Raises:
        OSError: The file cannot be written.
    """
    text = "".join(line + "\n" for line in lines).encode("utf-8")
    with open(path, "ab+") as file:
        with contextlib.suppress(OSError):  # some network file systems know no locks
            fcntl.flock(file, fcntl.LOCK_EX)  # another process may be in the middle of its line
        file.seek(0, os.SEEK_END)
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                text = b"\n" + text
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


class _WatchedFile(io.FileIO):
    """A file that remembers the OSError of a write, because a library may replace the error by another exception."""

    failure: OSError | None = None

    def write(self, data: object, /) -> int:
        try:
            return super().write(data)
        except OSError as e:
            self.failure = e
            raise


def _sync_folder(folder: Path) -> None:
    """Flush the new name to disk, where the file system allows folders to be flushed."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
