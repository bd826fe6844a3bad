"""From a decoded picture to a crop in RGB in one pass of `scale.c`: cut, scaled and converted, without a copy between.

libswscale does the same where the C code cannot be compiled (`avion/c_code.py`), for colour spaces that are not listed
here, and where more than 64 samples make one; `picture.py` calls it then. The C code takes about a third of the time,
because nothing is cut out into a frame first, and its values lie nearer to those of the plain path.
"""

from __future__ import annotations

import ctypes
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from avion import c_code

# (horizontal, vertical) subsampling of the chroma planes as powers of 2, of the formats that C code and `picture.py`
# cut directly; None: there are none. All have a byte per sample.
SUBSAMPLING = {
    "yuv420p": (1, 1),
    "yuvj420p": (1, 1),
    "yuv422p": (1, 0),
    "yuvj422p": (1, 0),
    "yuv444p": (0, 0),
    "yuvj444p": (0, 0),
    "gray": None,
}
_601 = (0.299, 0.114)
# The shares of red and blue in Y, by FFmpeg's number of the colour space (ITU-T H.273, table 4). What is not known is
# taken as BT.601, as libswscale takes it.
_SHARES = {
    0: _601,
    1: (0.2126, 0.0722),
    2: _601,
    4: (0.30, 0.11),
    5: _601,
    6: _601,
    7: (0.212, 0.087),
    9: (0.2627, 0.0593),
}
SPACES = frozenset(_SHARES)  # libswscale converts no others either
UNKNOWN_SPACE, RESERVED_SPACE = 2, 3
_FULL_RANGE = 2  # FFmpeg's number
_MOST_TAPS = 64  # each rounds down by up to 1/256 of a level
_PLANES = 3
_POINTER, _LONG = ctypes.c_void_p, ctypes.c_long


class _Axis(ctypes.Structure):
    _fields_ = [("begin", _POINTER), ("weights", _POINTER), ("taps", _LONG), ("count", _LONG)]


class _Colours(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_uint16) for name in ("y", "red_v", "green_u", "green_v", "blue_u", "red", "green", "blue")
    ]


class _Plan(ctypes.Structure):
    _fields_ = [
        ("across", _Axis * _PLANES),
        ("down", _Axis * _PLANES),
        ("colours", _Colours),
        ("planes", _LONG),
    ]


SCALE = c_code.CCode(
    name="scale",
    title="the C code that scales pictures",
    instead="libswscale",
    source=Path(__file__).with_name("scale.c"),
    functions={
        "weigh": (
            [ctypes.c_double, ctypes.c_double, _LONG, _LONG, _LONG, _LONG, _POINTER, _POINTER],
            None,
        ),
        "scale": (
            [ctypes.POINTER(_Plan), _POINTER * _PLANES, _LONG * _PLANES, _POINTER, _LONG, _LONG],
            ctypes.c_int,
        ),
    },
)


class Kind(NamedTuple):
    """What decides how a picture is cut and scaled.

    Attributes:
        box: What is cut out of the stored picture: top, left, height, width in pixels.
        size: The height and width that the box is brought to.
        format: FFmpeg's name of the pixel format.
        space: FFmpeg's number of the colour space.
        range: FFmpeg's number of the colour range.
    """

    box: tuple[int, int, int, int]
    size: tuple[int, int]
    format: str
    space: int
    range: int


class Scaler:
    """Cuts and scales pictures of one kind, in C."""

    def __init__(self, library: ctypes.CDLL, kind: Kind):
        self._scale = library.scale
        self._tables: list[np.ndarray] = []  # which the plan points to
        top, left, height, width = kind.box
        subsampling = SUBSAMPLING[kind.format]
        plan = _Plan(colours=_colours(kind), planes=1 if subsampling is None else _PLANES)
        for p in range(plan.planes):
            across, down = subsampling if subsampling is not None and p else (0, 0)
            plan.across[p] = self._axis(library, left, width, kind.size[1], across)
            plan.down[p] = self._axis(library, top, height, kind.size[0], down)
        self._plan = plan

    def _axis(self, library: ctypes.CDLL, begin: int, length: int, count: int, shift: int) -> _Axis:
        """The table of a direction: samples [begin, begin + length) of luma, to `count`.

        A sample of chroma lies in the middle of the 2 ** shift samples of luma that it stands for.
        """
        parts = 1 << shift
        step = length / count / parts
        first, end = begin >> shift, -(-(begin + length) >> shift)
        place = (begin + length / count / 2) / parts - 0.5
        taps = min(_taps(length, count, shift), end - first)
        begins, weights = np.empty(count, np.int32), np.empty((count, taps), np.uint16)
        library.weigh(place, step, first, end, count, taps, begins.ctypes.data, weights.ctypes.data)
        self._tables += (begins, weights)
        return _Axis(begins.ctypes.data, weights.ctypes.data, taps, count)

    def __call__(self, picture: Any, out: np.ndarray) -> None:
        """Write the crop of an av.VideoFrame.

        Args:
            picture: Of the kind that the scaler was made for. The box lies within it.
            out: (3, *size) uint8, whose rows lie in one piece.
        """
        planes = picture.planes[: self._plan.planes]
        samples = (_POINTER * _PLANES)(*(plane.buffer_ptr for plane in planes))
        strides = (_LONG * _PLANES)(*(plane.line_size for plane in planes))
        if self._scale(self._plan, samples, strides, out.ctypes.data, *out.strides[:2]):
            raise MemoryError


def compile_scaler() -> None:
    """Compile the C code if it is not there yet: in the process that starts workers, so that not each of them does.

    Raises:
        UserError: AVION_NATIVE is neither a yes nor a no.
    """
    c_code.native(SCALE)


def scaler(kind: Kind) -> Scaler | None:
    """Return what cuts and scales pictures of this kind; None where libswscale has to do it.

    Raises:
        UserError: AVION_NATIVE is neither a yes nor a no.
    """
    subsampling = SUBSAMPLING.get(kind.format, (0, 0))
    if kind.format not in SUBSAMPLING or (subsampling is not None and kind.space not in _SHARES):
        return None
    if max(_taps(kind.box[2 + k], kind.size[k], 0) for k in (0, 1)) > _MOST_TAPS:
        return None
    library = c_code.native(SCALE).library
    return None if library is None else Scaler(library, kind)


def _taps(length: int, count: int, shift: int) -> int:
    """The largest number of samples that make one where `length` samples of luma become `count`."""
    return math.ceil(2 * max(length / count / (1 << shift), 1))


def _colours(kind: Kind) -> _Colours:
    """The matrix of ITU-R BT.601 and others from Y, U and V to RGB, in the units of `scale.c`."""
    if SUBSAMPLING[kind.format] is None:
        return _Colours(y=1 << 13, red=16, green=16, blue=16)
    red, blue = _SHARES[kind.space]
    green = 1 - red - blue
    full = kind.format.startswith("yuvj") or kind.range == _FULL_RANGE
    light, chroma, black = (1.0, 1.0, 0) if full else (255 / 219, 255 / 224, 16)
    red_v, blue_u = 2 * (1 - red) * chroma, 2 * (1 - blue) * chroma
    green_u, green_v = blue_u * blue / green, red_v * red / green

    def coefficient(value: float) -> int:
        return round(value * 2**13)

    def offset(value: float, products: int) -> int:
        """Of 16 units, half a level, and half a unit for each product that is rounded down."""
        return round(value * 2**5 + 16 + products / 2) % 2**16

    return _Colours(
        y=coefficient(light),
        red_v=coefficient(red_v),
        green_u=coefficient(green_u),
        green_v=coefficient(green_v),
        blue_u=coefficient(blue_u),
        red=offset(-light * black - 128 * red_v, 2),
        green=offset(-light * black + 128 * (green_u + green_v), -1),
        blue=offset(-light * black - 128 * blue_u, 2),
    )
