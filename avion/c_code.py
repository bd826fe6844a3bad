"""C code of this project that is compiled on the machine where it runs, once, and loaded.

A library is kept in `$XDG_CACHE_HOME/avion/native/` (`~/.cache/avion/native/`), under a name that depends on the
source, the compiler and what the compiler makes of the CPU. Where this folder cannot be used, a process compiles for
itself. Where there is no compiler, or every compiler fails, the callers do the work in another way. `AVION_NATIVE=0`
asks for that.
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avion.errors import UserError
from avion.files import cache_folder

_log = logging.getLogger(__name__)

# Neither contracts a NaN away nor changes the order of a sum, as -ffast-math would. Contraction to fused multiply-adds
# is on by default.
_FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")
_FOR_THIS_CPU = ("-march=native", "-mcpu=native")  # the second one where a compiler does not know the first one
COMPILE_S = 60
_FAILURES = (OSError, subprocess.SubprocessError, AttributeError)
_one_thread = threading.Lock()
_LEFT_BEHIND_S = 10 * COMPILE_S  # a folder of a compilation that is older belongs to a process that was killed


@dataclass(frozen=True, eq=False)
class CCode:
    """A C file and how it is called.

    Attributes:
        name: The first part of the library's file name.
        title: What it is called in messages.
        instead: Who does the work where it cannot be compiled, for messages.
        source: The C file.
        functions: For each name the types of the arguments, and the type of the result (None: void).
        openmp: Whether it shares its work among threads.
    """

    name: str
    title: str
    instead: str
    source: Path
    functions: Mapping[str, tuple[Sequence[Any], Any]]
    openmp: bool = False


@dataclass(frozen=True)
class Native:
    """What became of the compilation.

    Attributes:
        library: The functions; None where the work is done in another way.
        reason: Why it is; empty where the functions are there.
        problem: Why the library could not be kept, so that every process compiles it; empty where it is kept.
    """

    library: ctypes.CDLL | None
    reason: str = ""
    problem: str = ""


def native(code: CCode) -> Native:
    """Return the compiled functions, which the first call compiles where they are not there yet.

    Raises:
        UserError: AVION_NATIVE is neither a yes nor a no.
    """
    with _one_thread:
        return _looked_for(code)


def _after_fork() -> None:
    """A thread that held the lock is not there in the new process to release it."""
    global _one_thread
    _one_thread = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


def forget() -> None:
    """Look for the libraries anew at the next call."""
    _looked_for.cache_clear()


@functools.cache
def _looked_for(code: CCode) -> Native:
    """Look for the library; kept for the process."""
    if not _wanted():
        return Native(None, f"AVION_NATIVE={os.environ['AVION_NATIVE']} asks for {code.instead}")
    if platform.system() != "Linux":
        return Native(None, f"it is compiled on Linux only, this is {platform.system()}")
    reasons: list[str] = []
    for compiler in compilers():
        try:
            found = _library(code, compiler)
        except _FAILURES as e:
            reasons.append(f"{shlex.join(compiler)}: {_in_one_line(e)}")
            continue
        for reason in reasons:
            _log.info("%s: %s; %s compiled it", code.title, reason, shlex.join(compiler))
        return found
    if not reasons:
        return Native(None, "there is no C compiler (CC, or cc, gcc or clang on the PATH)")
    reason = "; ".join(reasons)
    _log.warning("%s cannot be used, and its work is done by %s: %s", code.title, code.instead, reason)
    return Native(None, reason)


def _wanted() -> bool:
    text = os.environ.get("AVION_NATIVE", "").strip()
    if text.lower() in ("0", "no", "off", "false"):
        return False
    if text.lower() in ("", "1", "yes", "on", "true"):
        return True
    raise UserError(f"AVION_NATIVE {text}: give 0 to compile no C code, or 1 to compile it")


def _in_one_line(error: Exception) -> str:
    return " ".join(str(getattr(error, "stderr", "") or error).split())[:300]


# ---- compilers -------------------------------------------------------------------------------------------


def compilers() -> Iterator[list[str]]:
    """Yield the words that call each C compiler, the one to try first at the head."""
    try:
        asked = shlex.split(os.environ.get("CC", ""))
    except ValueError:  # a quotation mark is missing
        asked: list[str] = []
    if asked and shutil.which(asked[0]):
        yield asked
    seen: set[str] = {os.path.realpath(shutil.which(asked[0]) or "")} if len(asked) == 1 else set()
    for name in ("cc", "gcc", "clang"):
        path = shutil.which(name)
        if path and os.path.realpath(path) not in seen:
            seen.add(os.path.realpath(path))
            yield [name]


def _said(words: list[str], place: str | None = None) -> str:
    """Run a compiler, and return its output. `place` is the folder of its temporary files.

    Raises:
        subprocess.SubprocessError: The compiler failed, or was not done in time. No process of it is left.
        OSError: The compiler cannot be started.
    """
    there = {**os.environ, "LC_ALL": "C", **({"TMPDIR": place} if place else {})}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, env=there, start_new_session=True
    ) as process:
        try:
            out, err = (text.decode(errors="replace") for text in process.communicate(timeout=COMPILE_S))
        except BaseException:  # also Ctrl-C
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # a compiler is several processes
            raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, words, out, err)
    return out


def _words(code: CCode, compiler: list[str]) -> tuple[list[str], str]:
    """The words that compile, without the output, and the compiler's macros: its version and the CPU's features."""
    flags = [*_FLAGS, "-fopenmp"] if code.openmp else _FLAGS
    asked = ["-dM", "-E", "-x", "c", os.devnull]
    for flag in _FOR_THIS_CPU:
        try:
            return [*compiler, *flags, flag], _said([*compiler, flag, *asked])
        except subprocess.CalledProcessError:
            continue
    return [*compiler, *flags], _said([*compiler, *asked])


# ---- the library -----------------------------------------------------------------------------------------


def _library(code: CCode, compiler: list[str]) -> Native:
    """Load the library, which is compiled where it is not in the cache."""
    words, macros = _words(code, compiler)
    if code.openmp and "__clang__" in macros and has_llvm_openmp():
        raise OSError(
            "its OpenMP would be loaded beside PyTorch's, which is of the same kind and ends the process then"
        )
    facts = b"|".join([code.source.read_bytes(), *(text.encode("utf-8", "replace") for text in (*words, macros))])
    name = f"{code.name}-{hashlib.sha256(facts).hexdigest()[:16]}.so"
    try:
        return Native(_kept(code, words, name))
    except subprocess.TimeoutExpired:
        raise
    except _FAILURES as e:  # the folder is full, read-only, another user's, or code may not run there
        problem = _in_one_line(e)
    with tempfile.TemporaryDirectory(prefix="avion-") as place:
        library = _loaded(code, _compiled(code, words, Path(place) / name))  # which stays when its file is deleted
    _log.info("%s was compiled for this process only: %s", code.title, problem)
    return Native(library, problem=problem)


def _kept(code: CCode, words: list[str], name: str) -> ctypes.CDLL:
    """Load the library of this name in the cache, where it is put first if it is not there in one piece."""
    folder = cache_folder() / "native"
    for made in (folder.parent, folder):
        made.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not _only_ours(folder):
        raise OSError(f"{folder}: belongs to another user, or others may write to it")
    target = folder / name
    if not (target.is_file() and _only_ours(target) and _is_whole(target)):
        _log.info("compiling %s, once on this machine (%s)", code.title, words[0])
        _tidy(folder)
        with tempfile.TemporaryDirectory(dir=folder, prefix="compiling-") as place:
            made = _compiled(code, words, Path(place) / name)
            _seal(made)
            os.replace(made, target)  # processes that compile at the same time write the same
    return _loaded(code, target)


def _tidy(folder: Path) -> None:
    """Delete what compilations that were killed have left."""
    for left in folder.glob("compiling-*"):
        with contextlib.suppress(OSError):  # another process does the same
            if time.time() - left.stat().st_mtime > _LEFT_BEHIND_S:
                shutil.rmtree(left)


def _compiled(code: CCode, words: list[str], target: Path) -> Path:
    _said([*words, "-o", str(target), str(code.source)], str(target.parent))
    return target


def _only_ours(path: Path) -> bool:
    """Return whether nobody else could have written this: it will be run."""
    found = path.stat()
    return found.st_uid == os.geteuid() and not found.st_mode & 0o022


def _seal(path: Path) -> None:
    """Append a file's checksum, which the loader does not read. A library that was cut short kills who loads it."""
    content = path.read_bytes()
    path.write_bytes(content + hashlib.sha256(content).digest())
    path.chmod(0o700)  # for any umask


def _is_whole(path: Path) -> bool:
    content = path.read_bytes()
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def has_llvm_openmp() -> bool:
    """Return whether LLVM's or Intel's OpenMP is loaded. It ends a process that loads a second copy of it."""
    try:
        loaded = Path("/proc/self/maps").read_text(errors="replace")
    except OSError:
        return True
    return "libomp" in loaded or "libiomp" in loaded


def _loaded(code: CCode, path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for name, (arguments, result) in code.functions.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, result
    return library
