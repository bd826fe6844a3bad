"""The mixer's C functions: how `native.c` is called."""

import ctypes
from pathlib import Path

import torch

from avion import c_code


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
MIXER = c_code.CCode(
    name="mixer",
    title="the mixer's C code",
    instead="PyTorch's operators",
    source=Path(__file__).with_name("native.c"),
    functions={
        "convolve": ([Shape, Direction, _P, _L, _P], None),
        "convolve_backward": ([Shape, Direction, _P, _L, _P, _P, _L, _L, _P, _P], None),
        "scan": ([Shape, Direction, _P, _P, _P, _L, _P, _L], None),
        "scan_backward": ([Shape, Direction, _P, _P, _P, _L, _P, Gradients], ctypes.c_int),
        "gate": ([Shape, _P, _L, _P, _P], None),
        "gate_backward": ([Shape, _P, _L, _P, _P, _P, _P, _L], None),
    },
    openmp=True,
)


def native() -> c_code.Native:
    """Return the compiled functions; see `avion.c_code.native`."""
    return c_code.native(MIXER)


def call(name: str, *arguments: object) -> int:
    """Call a C function. Of a tensor it takes the address of the first number; the caller knows the layout."""
    library = native().library
    assert library is not None
    return getattr(library, name)(*(a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments))
