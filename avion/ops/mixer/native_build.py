"""Compiles `native.c` with the machine's C compiler, once, and loads it.

The library is kept in `$XDG_CACHE_HOME/avion/` (`~/.cache/avion/`), under a name that depends on the source, the
compiler and the CPU. Where there is no compiler, or the compiler fails, PyTorch's operators do the work.
`AVION_NATIVE=0` asks for them.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from avion.ops.tuning import cache_folder

_log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("native.c")
# Neither contracts a NaN away nor changes the order of a sum, as -ffast-math would. Contraction to fused multiply-adds
# is on by default.
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")
_COMPILE_S = 120


class Shape(ctypes.Structure):
    """The C structure of this name: (rows, steps, channels) and the number of threads."""

    _fields_ = [(name, ctypes.c_long) for name in ("rows", "steps", "channels", "threads")]


class Direction(ctypes.Structure):
    """The C structure of this name: the parameters of one direction of time."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("taps", "conv_bias", "A_log2", "D")),
        *((name, ctypes.c_long) for name in ("width", "states", "reverse")),
    ]


class Gradients(ctypes.Structure):
    """The C structure of this name: where the gradients of a scan go."""

    _fields_ = [*((name, ctypes.c_void_p) for name in ("raw", "u", "bc", "A", "D", "bias")), ("ld_bc", ctypes.c_long)]


_P, _L = ctypes.c_void_p, ctypes.c_long
_FUNCTIONS = {
    "convolve": [Shape, Direction, _P, _L, _P],
    "convolve_backward": [Shape, Direction, _P, _L, _P, _P, _L, _L, _P, _P],
    "scan": [Shape, Direction, _P, _P, _P, _L, _P, _L],
    "scan_backward": [Shape, Direction, _P, _P, _P, _L, _P, Gradients],
    "gate": [Shape, _P, _L, _P, _P],
    "gate_backward": [Shape, _P, _L, _P, _P, _P, _P, _L],
}


@dataclass(frozen=True)
class Native:
    """What became of the compilation.

    Attributes:
        library: The functions; None where the PyTorch operators do the work.
        reason: Why they do; empty where the functions are there.
    """

    library: ctypes.CDLL | None
    reason: str = ""


@functools.cache
def native() -> Native:
    """Return the compiled functions, which the first call compiles and checks where they are not there yet."""
    if os.environ.get("AVION_NATIVE") == "0":
        return Native(None, "AVION_NATIVE=0 asks for PyTorch's operators")
    if platform.system() != "Linux":
        return Native(None, f"it is compiled on Linux only, this is {platform.system()}")
    compiler = _compiler()
    if not compiler:
        return Native(None, "there is no C compiler (CC, or cc, gcc or clang on the PATH)")
    try:
        return Native(_loaded(_compiled(compiler)))
    except (OSError, subprocess.SubprocessError, AttributeError) as e:
        reason = " ".join(str(getattr(e, "stderr", "") or e).split())[:300]
        _log.warning("the mixer's C code cannot be used, and PyTorch's operators take its place: %s", reason)
        return Native(None, reason)


def _compiler() -> list[str]:
    """The words that call the C compiler; empty where there is none."""
    asked = shlex.split(os.environ.get("CC", ""))
    if asked and shutil.which(asked[0]):
        return asked
    return next(([name] for name in ("cc", "gcc", "clang") if shutil.which(name)), [])


def _compiled(compiler: list[str]) -> Path:
    """The path of the library, which is compiled where it is not in the cache."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True, timeout=_COMPILE_S)
    facts = [SOURCE.read_bytes(), *(text.encode() for text in (*_FLAGS, *compiler, version.stdout, _cpu()))]
    folder = cache_folder()
    target = folder / f"mixer-{hashlib.sha256(b'|'.join(facts)).hexdigest()[:16]}.so"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not target.exists():
        _log.info("compiling the mixer's C code, once on this machine (%s)", " ".join(compiler))
        with tempfile.TemporaryDirectory(dir=folder, prefix="compiling-") as place:
            made = Path(place) / target.name
            words = [*compiler, *_FLAGS, "-o", str(made), str(SOURCE)]
            subprocess.run(words, capture_output=True, text=True, check=True, timeout=_COMPILE_S)
            os.replace(made, target)  # processes that compile at the same time write the same
    found = target.stat()
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise OSError(f"{target}: belongs to another user, or others may write to it; remove it")
    return target


def _cpu() -> str:
    """What tells CPUs apart between which -march=native differs."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines: list[str] = []
    known = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU implementer", "CPU part")
    return platform.machine() + "".join(sorted({line for line in lines if line.split("\t")[0].strip() in known}))


def _loaded(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for name, arguments in _FUNCTIONS.items():
        function = getattr(library, name)
        function.argtypes = arguments
        function.restype = ctypes.c_int if name == "scan_backward" else None
    return library


def call(name: str, *arguments: object) -> int:
    """Call a C function. Of a tensor it takes the address of the first number; the caller knows the layout."""
    library = native().library
    assert library is not None
    return getattr(library, name)(*(a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments))
