"""Columns of integers that lie in a file: few bytes each, and any stretch of them can be read without the rest.

A column stores, of each value, what is left after the straight line base + i · slope is taken away, in as few bytes as
the largest rest takes: none where the line says it all (times of a constant rate, offsets of packets of equal size).

    byte 0       bytes per rest: 0, 1, 2, 4 or 8
    bytes 1-16   base, slope: int64, little-endian
    then         the rests: unsigned, little-endian
"""

from __future__ import annotations

import struct

import numpy as np

_HEAD = struct.Struct("<Bqq")
_WIDTHS = {0: None, 1: np.dtype("<u1"), 2: np.dtype("<u2"), 4: np.dtype("<u4"), 8: np.dtype("<u8")}
_FARTHEST = 2**62  # of a value: sums of three cannot overflow


class Column:
    """A column in a buffer. It is indexed as an array is: by a number, a slice or an array of numbers."""

    def __init__(self, buffer: memoryview, begin: int, count: int):
        """ValueError where there is no such column at `begin`."""
        if begin < 0 or begin + _HEAD.size > len(buffer):
            raise ValueError("a column lies outside the index")
        width, self._base, self._slope = _HEAD.unpack_from(buffer, begin)
        if width not in _WIDTHS or abs(self._base) > _FARTHEST or abs(self._slope) * max(count, 1) > _FARTHEST:
            raise ValueError("a column is of no known form")
        self._count = count
        self.end = begin + _HEAD.size + width * count
        if self.end > len(buffer):
            raise ValueError("a column ends outside the index")
        self._rest = None
        if width:
            self._rest = np.frombuffer(buffer, _WIDTHS[width], count, begin + _HEAD.size)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, key):
        if isinstance(key, slice):
            places = np.arange(self._count)[key] if key.step not in (None, 1) else np.arange(*key.indices(self._count))
        elif isinstance(key, np.ndarray):
            places = key
        else:
            place = int(key)
            if not 0 <= place < self._count:
                raise IndexError(f"place {place} of {self._count}")
            return self._base + self._slope * place + (0 if self._rest is None else int(self._rest[place]))
        values = self._base + self._slope * places
        return values if self._rest is None else values + self._rest[key].astype(np.int64)


def pack(values: np.ndarray) -> bytes:
    """values: (n,) integers -> the column's bytes."""
    values = np.asarray(values, dtype=np.int64)
    count = len(values)
    best = None
    for slope in _slopes(values):
        rest = values - slope * np.arange(count, dtype=np.int64)
        base = int(rest.min()) if count else 0
        rest = (rest - base).astype(np.uint64)
        width = _width(int(rest.max()) if count else 0)
        if best is None or width < best[0]:
            best = width, base, slope, rest
    width, base, slope, rest = best
    body = rest.astype(_WIDTHS[width]).tobytes() if width else b""
    return _HEAD.pack(width, base, slope) + body


def _slopes(values: np.ndarray) -> list[int]:
    if len(values) < 2:
        return [0]
    steps = np.diff(values)
    mean = int(round((int(values[-1]) - int(values[0])) / (len(values) - 1)))
    return [0, int(np.median(steps)), mean]


def _width(largest: int) -> int:
    return next(w for w, bound in ((0, 1), (1, 2**8), (2, 2**16), (4, 2**32), (8, 2**64)) if largest < bound)
