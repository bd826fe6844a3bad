"""The restricted unpickler: pickles from outside, read without running what is in them and in bounded time and memory.

`Unpickler` is the one reader of the project. It knows a list of opcodes, looks names up in a table that its subclass
gives, and bounds everything that a small file could blow up:

memo        a dict in this reader. The reader in C makes a table as long as the largest index, up to 64 GB.
keys        of dicts and sets: texts, bytes, None, bools, floats, integers below 2^61, and up to 1000 tuples of these.
            Other keys can be made to share one hash value by the thousands, or take 2^n steps to hash as tuples of
            tuples do.
integers    at most 16 bytes long.
copies      what calls make out of shared parts may not hold more bytes than the file has.
opcodes     of a checkpoint, at most as many as checkpoints of its size have (`checkpoint_opcodes`).
nesting     at most 100 deep.

`load_pickle` reads plain data with it (containers, numbers, texts, numpy arrays). Files of nothing but rows, such as
the four million narrations of Ego4D, are looked through first and then read by the reader in C, ten times as fast.
`avion.weights` reads the pickles inside of checkpoints with it.
"""

from __future__ import annotations

import argparse
import codecs
import gc
import math
import mmap
import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Iterable
from typing import IO, Any

import numpy as np

from avion.errors import UserError
from avion.pickle_scan import LONGEST_INTEGER, holds_rows_only
from avion.reading import check_nesting, open_file

_PLAIN_DTYPE = re.compile(r"[|<>=]?[biufSU]([1-9]\d{0,5})")
_LONGEST_NUMBER = 60  # characters of a number that is written out
_LARGEST_KEY = 2**61 - 1  # the hash of a larger integer is its remainder
_MOST_TUPLE_KEYS, _LONGEST_TUPLE_KEY = 1000, 20
_MORE_COPIED = 1 << 20  # bytes that calls may make beyond three times those of the file
_LARGEST_EMPTY = 2**31  # elements, by the other sides of an array with a side of 0


class Refused(pickle.UnpicklingError):
    """Something in the pickle is not plain data, or is larger than the file can hold; the text says what."""


class Budget:
    """Counts the bytes that calls make of what a file of `size` bytes holds."""

    def __init__(self, size: int):
        self.left = 3 * size + _MORE_COPIED  # an array of an old protocol is a text, bytes, and an array

    def charge(self, count: int) -> None:
        """Raise Refused where calls have made more than the file holds."""
        self.left -= count
        if self.left < 0:
            raise Refused("more data than the file is long")


# --- the reader ------------------------------------------------------------------------------

_OPCODES = (
    pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.POP, pickle.POP_MARK, pickle.DUP,
    pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE,
    pickle.INT, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG, pickle.LONG1, pickle.LONG4,
    pickle.FLOAT, pickle.BINFLOAT,
    pickle.STRING, pickle.BINSTRING, pickle.SHORT_BINSTRING, pickle.UNICODE, pickle.BINUNICODE,
    pickle.SHORT_BINUNICODE, pickle.BINUNICODE8, pickle.BINBYTES, pickle.SHORT_BINBYTES, pickle.BINBYTES8,
    pickle.BYTEARRAY8,
    pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3,
    pickle.EMPTY_LIST, pickle.LIST, pickle.APPEND, pickle.APPENDS,
    pickle.EMPTY_DICT, pickle.DICT, pickle.SETITEM, pickle.SETITEMS,
    pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET,
    pickle.PUT, pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.GET, pickle.BINGET, pickle.LONG_BINGET,
    pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.REDUCE, pickle.NEWOBJ, pickle.BUILD, pickle.PERSID, pickle.BINPERSID,
)  # fmt: skip


def checkpoint_opcodes(size: int) -> int:
    """Return how many opcodes the pickle of a checkpoint may have.

    There are a few for each weight and each flag. The states of the random generators of a thousand processes have a
    million opcodes, in a file of at least a hundred megabytes.

    Args:
        size: The size of the file in bytes.

    Returns:
        The number.
    """
    return 500_000 + size // 32


class _CountedDispatch(dict[int, Any]):
    """What opcodes do, for a limited number of them."""

    def __init__(self, dispatch: dict[int, Any], most: int):
        super().__init__(dispatch)
        self.left = most

    def __getitem__(self, opcode: int) -> Any:
        self.left -= 1
        if self.left < 0:
            raise Refused("more opcodes than a checkpoint of its size")
        return super().__getitem__(opcode)


class Unpickler(pickle._Unpickler):
    """Reads one pickle. A subclass says in `find_class` what names stand for, and must not hand out what can act.

    Args:
        file: An open file, or what reads as one.
        size: The number of bytes of the file, by which the bytes are bounded that calls make.
        most_opcodes: The largest number of opcodes; None: there is no bound. Each takes a microsecond.

    Raises:
        Refused: From `load`, for what is not plain data. Hostile bytes can raise nearly any other exception.
    """

    def __init__(self, file: IO[bytes], size: int, most_opcodes: int | None = None):
        super().__init__(file, encoding="latin1")
        if most_opcodes is not None:
            self.dispatch = _CountedDispatch(self.dispatch, most_opcodes)
        self.budget = Budget(size)
        self._tuple_keys = 0

    def load(self) -> Any:
        try:
            return super().load()
        except KeyError as error:
            if isinstance(error.args[0], int) and error.args[0] not in self.dispatch:
                raise Refused(f"an opcode {bytes([error.args[0]])!r}") from None
            raise

    def find_class(self, module: str, name: str) -> Any:
        raise Refused(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise Refused("a reference to outside data")

    def check_keys(self, keys: Iterable[Any]) -> None:
        """Raise Refused where a key of a dict or a set can be made to collide with thousands of others."""
        for key in keys:
            if type(key) is tuple:
                self._tuple_keys += 1
                if self._tuple_keys > _MOST_TUPLE_KEYS or len(key) > _LONGEST_TUPLE_KEY:
                    raise Refused("dicts or sets with many or long tuples as keys")
                check_keys(key)
            else:
                check_keys((key,))

    # What the opcodes do that put something into a dict or a set.

    def _checked_setitems(self, items: list[Any], into: Any) -> None:
        if len(items) % 2:
            raise Refused("a dict with a key but no value")
        self.check_keys(items[::2])
        for key, value in zip(items[::2], items[1::2], strict=True):
            into[key] = value

    def load_dict(self) -> None:
        made: dict[Any, Any] = {}
        self._checked_setitems(self.pop_mark(), made)
        self.append(made)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._checked_setitems([key, value], self.stack[-1])

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self._checked_setitems(items, self.stack[-1])

    def load_additems(self) -> None:
        items = self.pop_mark()
        if not isinstance(self.stack[-1], set):
            raise Refused("additions to what is no set")
        self.check_keys(items)
        self.stack[-1].update(items)

    def load_frozenset(self) -> None:
        items = self.pop_mark()
        self.check_keys(items)
        self.append(frozenset(items))

    # What the opcodes do that read numbers.

    def load_long1(self) -> None:
        self._append_long(self.read(1)[0])

    def load_long4(self) -> None:
        self._append_long(int.from_bytes(self.read(4), "little", signed=True))

    def _append_long(self, length: int) -> None:
        if not 0 <= length <= LONGEST_INTEGER:
            raise Refused(f"an integer of {length} bytes")
        self.append(pickle.decode_long(self.read(length)))

    def _number_line(self) -> bytes:
        line = self.readline()[:-1]
        if len(line) > _LONGEST_NUMBER:
            raise Refused(f"a number of {len(line)} characters")
        return line

    def load_int(self) -> None:
        line = self._number_line()
        self.append({b"00": False, b"01": True}[line] if line in (b"00", b"01") else int(line))

    def load_long(self) -> None:
        self.append(int(self._number_line().removesuffix(b"L")))

    def load_float(self) -> None:
        self.append(float(self._number_line()))

    def load_build(self) -> None:
        """Only an object that takes its state itself gets one: nobody's attributes are set."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, argparse.Namespace) and isinstance(state, dict):
            check_keys(state, texts_only=True)
            target.__dict__.update(state)
        elif isinstance(target, type) or not hasattr(target, "__setstate__"):
            raise Refused(f"a state for a {type(target).__name__}")
        else:
            target.__setstate__(state)

    # `dispatch` of the base class maps the number of an opcode to a function: here, those of the list alone.
    dispatch: dict[int, Any] = {opcode[0]: pickle._Unpickler.dispatch[opcode[0]] for opcode in _OPCODES} | {
        pickle.DICT[0]: load_dict,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.ADDITEMS[0]: load_additems,
        pickle.FROZENSET[0]: load_frozenset,
        pickle.LONG1[0]: load_long1,
        pickle.LONG4[0]: load_long4,
        pickle.INT[0]: load_int,
        pickle.LONG[0]: load_long,
        pickle.FLOAT[0]: load_float,
        pickle.BUILD[0]: load_build,
    }


def check_keys(keys: Iterable[Any], *, texts_only: bool = False) -> None:
    """Raise Refused where a key is not one of the simple kinds, whose hash values cannot be chosen freely."""
    for key in keys:
        kind = type(key)
        if kind is str or (not texts_only and kind in (bytes, float, bool, type(None))):
            continue
        if texts_only or kind is not int:
            raise Refused(f"a dict or a set with a key of type {kind.__name__}")
        if not -_LARGEST_KEY < key < _LARGEST_KEY:
            raise Refused("a dict or a set with an integer of more than 61 bits as a key")


# --- plain data ------------------------------------------------------------------------------


class _Dtype:
    """Stands for a numpy dtype while a pickle is read: its state is taken from the pickle, never given to numpy."""

    def __init__(self, spec: object, *_flags: object):
        if not isinstance(spec, str) or not _PLAIN_DTYPE.fullmatch(spec):
            raise Refused(f"a numpy array of dtype {str(spec)[:40]!r}")
        self.dtype = np.dtype(spec)

    def __setstate__(self, state: object) -> None:
        # (version, byte order, subarray, names, fields, item size, alignment, flags)
        if not isinstance(state, tuple) or len(state) < 6 or any(part is not None for part in state[2:5]):
            raise Refused("a structured numpy dtype")
        if state[1] not in ("<", ">", "=", "|"):
            raise Refused("a numpy dtype of unknown byte order")
        if state[1] != "|":
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    """A numpy array whose state (version, shape, dtype, Fortran order, bytes) is checked before it is taken."""

    budget: Budget

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise Refused("a numpy array of unknown state")
        _, shape, dtype, fortran, raw = state
        _check_array(shape, dtype, raw)
        self.__dict__.pop("budget").charge(len(raw))
        super().__setstate__((1, shape, dtype.dtype, bool(fortran), bytes(raw)))


def _check_array(shape: object, dtype: object, raw: object) -> None:
    if not isinstance(dtype, _Dtype):
        raise Refused("a numpy array without a plain dtype")
    if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape) or len(shape) > 32:
        raise Refused("a numpy array of impossible shape")
    if not isinstance(raw, (bytes, bytearray)):
        raise Refused("a numpy array of Python objects")
    if len(raw) != math.prod(shape) * dtype.dtype.itemsize or math.prod(n for n in shape if n) > max(
        len(raw), _LARGEST_EMPTY
    ):
        raise Refused("a numpy array whose bytes do not fit its shape")


class _ArrayType:
    """Stands for the name numpy.ndarray, which pickles pass to `_reconstruct`."""


def _frombuffer(raw: object, dtype: object, shape: object, order: object) -> np.ndarray:
    shape = (shape,) if type(shape) is int else shape
    _check_array(shape, dtype, raw)
    if order not in ("C", "F"):
        raise Refused("a numpy array of unknown order")
    return np.frombuffer(raw, dtype=dtype.dtype).reshape(shape, order=order)


def _scalar(dtype: object, raw: object) -> np.generic:
    if isinstance(raw, str):  # bytes, as Python 2 wrote them
        raw = raw.encode("latin1")
    _check_array((1,), dtype, raw)
    return np.frombuffer(raw, dtype=dtype.dtype)[0]


class _Calls:
    """What the names in a pickle of plain data stand for."""

    def __init__(self, budget: Budget):
        self.budget = budget
        self.names: dict[tuple[str, str], Any] = {
            ("builtins", "set"): lambda items=(): set(self._items(items)),
            ("builtins", "frozenset"): lambda items=(): frozenset(self._items(items)),
            ("builtins", "bytes"): self._empty_bytes,
            ("collections", "OrderedDict"): self._ordered_dict,
            ("_codecs", "encode"): self.latin1,
            ("numpy", "ndarray"): _ArrayType,
            ("numpy", "dtype"): _Dtype,
        }
        for core in ("numpy.core", "numpy._core"):  # numpy 1.x and 2.x
            self.names[f"{core}.multiarray", "_reconstruct"] = self._reconstruct
            self.names[f"{core}.multiarray", "scalar"] = _scalar
            self.names[f"{core}.numeric", "_frombuffer"] = _frombuffer

    def find(self, module: str, name: str) -> Any:
        module = {"__builtin__": "builtins"}.get(module, module)
        try:
            return self.names[module, name]
        except KeyError:
            raise Refused(f"{module}.{name}") from None

    def latin1(self, text: object, encoding: object) -> bytes:
        """`bytes` as pickle protocols 0 to 2 spell them: a text to encode as latin1."""
        if not isinstance(text, str) or encoding != "latin1":
            raise Refused("an encoded text")
        self.budget.charge(len(text))
        return codecs.encode(text, "latin1")

    def _items(self, items: object) -> list[Any]:
        if not isinstance(items, (list, tuple)):
            raise Refused("a set of something else than a list")
        self.budget.charge(8 * len(items))
        check_keys(items)
        return list(items)

    def _ordered_dict(self, pairs: object = ()) -> OrderedDict[Any, Any]:
        if not isinstance(pairs, (list, tuple)) or any(
            not isinstance(pair, (list, tuple)) or len(pair) != 2 for pair in pairs
        ):
            raise Refused("an OrderedDict of something else than pairs")
        self.budget.charge(16 * len(pairs))
        check_keys(pair[0] for pair in pairs)
        return OrderedDict((key, value) for key, value in pairs)

    def _empty_bytes(self, *args: object) -> bytes:
        if args:
            raise Refused("a call of bytes")
        return b""

    def _reconstruct(self, kind: object, _shape: object, _typecode: object) -> _Array:
        if kind is not _ArrayType:
            raise Refused("a subclass of the numpy array")
        made = np.ndarray.__new__(_Array, (0,), np.uint8)
        made.budget = self.budget
        return made


class _PlainUnpickler(Unpickler):
    def __init__(self, file: IO[bytes], size: int):
        super().__init__(file, size)
        self.find_class = _Calls(self.budget).find


class _NeedsSlowReader(Exception):
    """The pickle holds more than rows."""


class _FastUnpickler(pickle.Unpickler):
    """The reader in C, for files that `holds_rows_only` has looked through."""

    def __init__(self, file: IO[bytes], size: int):
        super().__init__(file, encoding="latin1")
        self._calls = _Calls(Budget(size))

    def find_class(self, module: str, name: str) -> Any:
        if name == "OrderedDict":  # a dict, by which this reader would set attributes of whatever it is told to
            raise _NeedsSlowReader
        return self._calls.find(module, name)

    def persistent_load(self, pid: object) -> object:
        raise Refused("a reference to outside data")


def load_pickle(path: str | os.PathLike, what: str) -> object:
    """Read a pickle of plain data without running anything in it.

    Args:
        path: The file.
        what: What the file should hold, for messages ("the relevancy matrix").

    Returns:
        Builtin containers, numbers, texts, numpy arrays and scalars.

    Raises:
        UserError: The file is missing, is not a pickle, is cut short, names anything but plain data, or says more than
            a file of its size can hold.
    """
    name = f"{what} {path}"
    was_enabled = gc.isenabled()
    gc.disable()  # millions of new tuples would make it search for cycles over and over
    try:
        with open_file(path) as file:
            value = _load(file)
        check_nesting(value)
    except FileNotFoundError:
        raise UserError(f"{name}: no such file") from None
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror})") from None
    except Refused as error:
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


def _load(file: IO[bytes]) -> object:
    size = os.fstat(file.fileno()).st_size
    if size == 0:
        raise EOFError
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        fast = holds_rows_only(data)
    if fast:
        try:
            return _FastUnpickler(file, size).load()
        except _NeedsSlowReader:
            file.seek(0)
    return _PlainUnpickler(file, size).load()
