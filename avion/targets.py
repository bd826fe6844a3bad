"""Files and folders that a flag names to be written are checked here, before work begins. A leaf.

Hours of work must not end with a name that cannot be written, nor replace a file that somebody still needs.
"""

import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path

from avion.errors import UserError
from avion.files import partial_name
from avion.json_lines import append_json, read_json_lines
from avion.remote import is_remote

_LONGEST_NAME = 255  # bytes; what file systems take
_MEMORY = "targets.jsonl"  # in the folder of a run: the files elsewhere that the run has written


def check_target(
    path: str | os.PathLike[str],
    flag: str,
    *,
    suffix: str = "",
    overwrite: bool = False,
    inputs: Iterable[str | os.PathLike[str]] = (),
    run_folder: str | os.PathLike[str] | None = None,
    replace_own: bool = False,
    make_folder: bool = False,
) -> None:
    """Refuse a file that could not be written as `path`, or that must not be replaced.

    Args:
        path: The file to be written.
        flag: The flag or argument that names the file, for messages.
        suffix: The required end of the name, such as ".zip".
        overwrite: Whether an existing file is replaced.
        inputs: Files that the work reads; they are never replaced.
        run_folder: The `--output-dir` of a run, whose own files are never replaced.
        replace_own: Whether a file that the run in `run_folder` has written before is replaced without being asked: a
            run that goes on writes its results again.
        make_folder: Whether the folder of the file is made; otherwise the folder must exist.

    Raises:
        UserError: The file cannot be written, or must not be replaced; the message says why.
    """
    check_here(path, flag)
    target = Path(path)
    where = f"{flag} {path}"
    if suffix and target.suffix != suffix:
        raise UserError(f"{where}: a {suffix} file is written; give a name that ends in {suffix}")
    found = _found(target, where)
    if found is not None:
        if stat.S_ISDIR(found.st_mode):
            raise UserError(f"{where}: is a folder; give the name of a file")
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"{where}: is a device or a pipe, no regular file; give another name")
    if run_folder is not None and _is_in(target, Path(run_folder)) and _is_of_run(target.name):
        raise UserError(f"{where}: is a file that the run itself writes into --output-dir; give another name")
    if found is not None:
        if any(_same(found, source) for source in inputs):
            raise UserError(f"{where}: is a file that is read; give another name")
        own = replace_own and run_folder is not None and _has_written(Path(run_folder), target)
        if not overwrite and not own:
            raise UserError(f"{where}: exists already; give another name, or --overwrite to replace it")
    _check_folder(target, where, make_folder)


def check_target_folder(path: str | os.PathLike[str], flag: str) -> None:
    """Make a folder, and refuse a name that is not a folder or cannot be written to.

    Args:
        path: The folder to be written to.
        flag: The flag or argument that names the folder, for messages.

    Raises:
        UserError: The folder cannot be made or written to.
    """
    check_here(path, flag)
    target, where = Path(path), f"{flag} {path}"
    found = _found(target, where)
    if found is not None and not stat.S_ISDIR(found.st_mode):
        raise UserError(f"{where}: is no folder; give another name")
    _check_folder(target / "file", where, True)


def check_here(path: str | os.PathLike[str], flag: str) -> None:
    """Raise UserError for an address such as s3://bucket/folder, of which a folder "s3:" would be made here."""
    text = os.fspath(path)
    if is_remote(text) or re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):  # as a Path holds an address
        raise UserError(f"{flag} {text}: is an address, and this is written to this machine only; give a path here")


def remember_target(run_folder: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Note in the folder of a run that the run has written `path`, so that the run may replace it when it goes on.

    Args:
        run_folder: The `--output-dir` of the run.
        path: The file that was written.

    Raises:
        OSError: The note cannot be written.
    """
    found = os.stat(path)
    row = {"path": os.path.realpath(path), "size": found.st_size, "mtime_ns": found.st_mtime_ns}
    append_json(Path(run_folder) / _MEMORY, row)


def _has_written(run_folder: Path, target: Path) -> bool:
    """Return whether `target` is as this run wrote it, and nobody has changed it since."""
    found = os.stat(target)
    wanted = {"path": os.path.realpath(target), "size": found.st_size, "mtime_ns": found.st_mtime_ns}
    return wanted in read_json_lines(run_folder / _MEMORY).objects


def _found(target: Path, where: str) -> os.stat_result | None:
    """Return what stands under this name, None where nothing does. A name that no file can have is a UserError."""
    if "\0" in str(target):
        raise UserError(f"{where}: holds a zero byte, which no name of a file has; give another name")
    if len(os.fsencode(target.name)) > _LONGEST_NAME:
        raise UserError(
            f"{where}: the name is longer than the {_LONGEST_NAME} bytes that file systems take; shorten it"
        )
    try:
        return os.stat(target)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{where}: cannot be written ({error.strerror}); give another name") from error


def _check_folder(target: Path, where: str, make: bool) -> None:
    """Check that a file can be made in the folder of `target`, which is made first where `make` is set."""
    try:
        if make:
            target.parent.mkdir(parents=True, exist_ok=True)
        elif not target.parent.is_dir():
            raise UserError(
                f"{where}: cannot be written (No such file or directory); folder {target.parent} does not exist"
            )
        probe = partial_name(target)  # permissions alone do not say it: a file system may be mounted for reading
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        os.unlink(probe)
    except OSError as error:
        raise UserError(
            f"{where}: {target.parent} cannot be made or written to ({error.strerror}); choose another"
        ) from error


def _is_in(target: Path, folder: Path) -> bool:
    return os.path.realpath(target.parent) == os.path.realpath(folder)


def _is_of_run(name: str) -> bool:
    """Whether a run writes a file of this name into its folder: checkpoints, logs, the lock."""
    return (
        (name.startswith("checkpoint") and name.endswith(".pt"))
        or name in ("log.txt", "eval_log.txt", "steps.txt", "train.log", "run.lock", "recipe.json", _MEMORY)
        or name.endswith(".partial")
    )


def _same(found: os.stat_result, source: str | os.PathLike[str]) -> bool:
    try:
        other = os.stat(source)
    except (OSError, ValueError):
        return False
    return (found.st_dev, found.st_ino) == (other.st_dev, other.st_ino)
