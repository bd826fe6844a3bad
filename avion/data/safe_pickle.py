"""Pickles from outside, read without running what is in them.

Only containers, numbers, texts and plain numpy arrays are rebuilt, the arrays by code of this module. Everything
else a pickle can name (functions, classes, object arrays) is refused before anything is called.
"""

from __future__ import annotations

import codecs
import gc
import math
import os
import pickle
import re
from collections import OrderedDict

import numpy as np

from avion.errors import UserError

_PLAIN_DTYPE = re.compile(r"[|<>=]?[biufSU]\d{1,6}")


class _Refused(Exception):
    """Something in the pickle is not plain data; the text says what."""


class _Dtype:
    """Stands for a numpy dtype while a pickle is read: its state is taken from the pickle, never given to numpy."""

    def __init__(self, spec: object, *_flags: object):
        if not isinstance(spec, str) or not _PLAIN_DTYPE.fullmatch(spec):
            raise _Refused(f"a numpy array of dtype {str(spec)[:40]!r}")
        self.dtype = np.dtype(spec)

    def __setstate__(self, state: object) -> None:
        # (version, byte order, subarray, names, fields, item size, alignment, flags)
        if not isinstance(state, tuple) or len(state) < 6 or any(part is not None for part in state[2:5]):
            raise _Refused("a structured numpy dtype")
        if state[1] not in ("<", ">", "=", "|"):
            raise _Refused("a numpy dtype of unknown byte order")
        if state[1] != "|":
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    """A numpy array whose state (version, shape, dtype, Fortran order, bytes) is checked before it is taken."""

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise _Refused("a numpy array of unknown state")
        _, shape, dtype, fortran, raw = state
        _check_array(shape, dtype, raw)
        super().__setstate__((1, shape, dtype.dtype, bool(fortran), bytes(raw)))


def _check_array(shape: object, dtype: object, raw: object) -> None:
    if not isinstance(dtype, _Dtype):
        raise _Refused("a numpy array without a plain dtype")
    if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape) or len(shape) > 32:
        raise _Refused("a numpy array of impossible shape")
    if not isinstance(raw, (bytes, bytearray)):
        raise _Refused("a numpy array of Python objects")
    if len(raw) != math.prod(shape) * dtype.dtype.itemsize:
        raise _Refused("a numpy array whose bytes do not fit its shape")


class _ArrayType:
    """Stands for the name numpy.ndarray, which pickles pass to `_reconstruct`."""


def _reconstruct(kind: object, _shape: object, _typecode: object) -> _Array:
    if kind is not _ArrayType:
        raise _Refused("a subclass of the numpy array")
    return np.ndarray.__new__(_Array, (0,), np.uint8)


def _frombuffer(raw: object, dtype: object, shape: object, order: object) -> np.ndarray:
    shape = (shape,) if type(shape) is int else shape
    _check_array(shape, dtype, raw)
    if order not in ("C", "F"):
        raise _Refused("a numpy array of unknown order")
    return np.frombuffer(raw, dtype=dtype.dtype).reshape(shape, order=order)


def _scalar(dtype: object, raw: object) -> np.generic:
    if isinstance(raw, str):  # bytes, as Python 2 wrote them
        raw = raw.encode("latin1")
    _check_array((1,), dtype, raw)
    return np.frombuffer(raw, dtype=dtype.dtype)[0]


def _latin1(text: object, encoding: object) -> bytes:
    """`bytes` as pickle protocols 0 to 2 spell them: a text to encode as latin1."""
    if not isinstance(text, str) or encoding != "latin1":
        raise _Refused("an encoded text")
    return codecs.encode(text, "latin1")


def _empty_bytes(*args: object) -> bytes:
    if args:
        raise _Refused("a call of bytes")
    return b""


_NAMES = {
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "bytes"): _empty_bytes,
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _latin1,
    ("numpy", "ndarray"): _ArrayType,
    ("numpy", "dtype"): _Dtype,
}
for _core in ("numpy.core", "numpy._core"):  # numpy 1.x and 2.x
    _NAMES[(f"{_core}.multiarray", "_reconstruct")] = _reconstruct
    _NAMES[(f"{_core}.multiarray", "scalar")] = _scalar
    _NAMES[(f"{_core}.numeric", "_frombuffer")] = _frombuffer


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        module = {"__builtin__": "builtins"}.get(module, module)
        try:
            return _NAMES[(module, name)]
        except KeyError:
            raise _Refused(f"{module}.{name}") from None

    def persistent_load(self, pid: object) -> object:
        raise _Refused("a reference to outside data")


def load_pickle(path: str | os.PathLike, what: str) -> object:
    """Read a pickle of plain data without running anything in it.

    Args:
        path: The file.
        what: What the file should hold, for messages ("the relevancy matrix").

    Returns:
        Builtin containers, numbers, texts, numpy arrays and scalars.

    Raises:
        UserError: The file is missing, is not a pickle, is cut short, or names anything but plain data.
    """
    name = f"{what} {path}"
    was_enabled = gc.isenabled()
    gc.disable()  # millions of new tuples would make it search for cycles over and over
    try:
        with open(path, "rb") as file:
            value = _PlainUnpickler(file, encoding="latin1").load()
    except FileNotFoundError:
        raise UserError(f"{name}: no such file") from None
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror})") from None
    except _Refused as error:
        raise UserError(f"{name}: holds {error}, which is not plain data; it was not loaded") from None
    except EOFError:
        raise UserError(f"{name}: the pickle is cut short or empty; fetch the file again") from None
    except MemoryError:
        raise UserError(f"{name}: the pickle states a size that does not fit in memory") from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        cause = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(f"{name}: not a pickle, or a damaged or cut-short one ({cause})") from error
    finally:
        if was_enabled:
            gc.enable()
    return value.view(np.ndarray) if isinstance(value, _Array) else value
