"""From a decoded picture to pixels: upright RGB, or one pass to the crop that a model takes.

An *orientation* is how a stored picture is turned and mirrored until it stands upright: k + 4 m, mirrored left to right
first if m is 1, then turned by k quarters counter-clockwise. The display matrix says it (ISO/IEC 14496-12, 8.3.2).
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import numpy as np

from .scaler import SUBSAMPLING, Kind, scaler

_GREEN_BLUE_RED = (2, 0, 1)  # planes of FFmpeg's gbrp, in the order red, green, blue


@dataclass(frozen=True)
class Scaling:
    """What is cut out of an upright picture and the size that it is brought to.

    box: top, left, height, width in pixels. size: height, width.
    """

    box: tuple[int, int, int, int]
    size: tuple[int, int]


def orientation_of(picture) -> int:
    """How this av.VideoFrame is to be turned and mirrored; angles are rounded to quarters."""
    try:
        found = picture.side_data
    except ValueError:
        _name_new_kinds()
        found = picture.side_data
    for data in found:
        if data.type.name == "DISPLAYMATRIX":
            return orientation_from_matrix(bytes(data))
    return 0


def _name_new_kinds() -> None:
    """Let PyAV list a picture's data where some is of a kind that FFmpeg has and PyAV does not know (EXIF, views)."""
    from av.sidedata.sidedata import Type

    def named(cls, value: int):
        kind = object.__new__(cls)
        kind._name_, kind._value_ = f"KIND_{value}", value
        return kind

    Type._missing_ = classmethod(named)


def orientation_from_matrix(matrix: bytes) -> int:
    """matrix: nine 32-bit numbers, a b u c d v x y w; a point (x, y) is shown at (a x + c y, b x + d y)."""
    a, b, _, c, d = struct.unpack("=5i", matrix[:20])
    mirrored = a * d - b * c < 0
    if mirrored:
        a, b = -a, -b
    return round(-math.degrees(math.atan2(b, a)) / 90) % 4 + 4 * mirrored


def upright(pixels: np.ndarray, orientation: int, axes: tuple[int, int] = (0, 1)) -> np.ndarray:
    """A view of stored pixels as they are to be seen. axes: of rows and columns."""
    if orientation >= 4:
        pixels = np.flip(pixels, axes[1])
    return np.rot90(pixels, orientation % 4, axes)


def upright_size(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """The (height, width) at which a stored (height, width) is seen."""
    return (size[1], size[0]) if orientation % 2 else size


def stored_box(box: tuple[int, int, int, int], size: tuple[int, int], orientation: int) -> tuple[int, int, int, int]:
    """Where a box of the upright picture lies in the stored one. size: (height, width) of the upright picture."""
    (top, left, height, width), (full_height, full_width) = box, size
    for _ in range(orientation % 4):  # take back one quarter after the other
        top, left, height, width = left, full_height - top - height, width, height
        full_height, full_width = full_width, full_height
    if orientation >= 4:
        left = full_width - left - width
    return top, left, height, width


class Converter:
    """Turns the av.VideoFrames of one file into arrays.

    coded_size: (height, width) that every picture is brought to first, which is the size that the file states.
    orientation: of all pictures; None: each picture says its own.
    """

    def __init__(self, coded_size: tuple[int, int], orientation: int | None = None):
        from av.video.reformatter import Interpolation, VideoReformatter

        self.coded_size, self.orientation = coded_size, orientation
        self._plain, self._scale = VideoReformatter(), VideoReformatter()
        self._bilinear = int(Interpolation.BILINEAR)
        self._cut_shape: tuple | None = None
        self._kind, self._scaler = None, None

    def orientation_of(self, picture) -> int:
        return orientation_of(picture) if self.orientation is None else self.orientation

    def upright_size(self, picture) -> tuple[int, int]:
        """The (height, width) at which this picture is seen."""
        return upright_size(self.coded_size, self.orientation_of(picture))

    def rgb(self, picture) -> np.ndarray:
        """-> (height, width, 3) uint8, upright"""
        # One thread: left to itself, libswscale starts one per core for every small picture.
        height, width = self.coded_size
        rgb = self._plain.reformat(picture, format="rgb24", width=width, height=height, threads=1).to_ndarray()
        return upright(rgb, self.orientation_of(picture))

    def scaled(self, picture, scaling: Scaling, out: np.ndarray) -> None:
        """Cut, scale and convert to RGB in one pass. out: (3, *scaling.size) uint8, is written to."""
        orientation, name = self.orientation_of(picture), picture.format.name
        if (picture.height, picture.width) != self.coded_size or name not in SUBSAMPLING:
            out[:] = scale_rgb(self.rgb(picture)[None], scaling)[0]
            return
        box = stored_box(scaling.box, upright_size(self.coded_size, orientation), orientation)
        size = upright_size(scaling.size, orientation)
        kind = Kind(box, size, name, int(picture.colorspace), int(picture.color_range))
        if kind != self._kind:
            self._kind, self._scaler = kind, scaler(kind)
        if self._scaler is None:
            self._scale_with_ffmpeg(picture, box, size, orientation, out)
        elif orientation:
            stored = np.empty((3, *size), np.uint8)
            self._scaler(picture, stored)
            out[:] = upright(stored, orientation, (1, 2))
        else:
            self._scaler(picture, out)

    def _scale_with_ffmpeg(self, picture, box, size: tuple[int, int], orientation: int, out: np.ndarray) -> None:
        height, width = size
        # The planes of gbrp: half the time of packed RGB, and chroma is interpolated in both directions.
        scaled = self._scale.reformat(
            self._cut(picture, box), width=width, height=height, format="gbrp", interpolation=self._bilinear, threads=1
        )
        for colour, k in enumerate(_GREEN_BLUE_RED):
            out[colour] = upright(_plane(scaled, k)[:height, :width], orientation)

    def _cut(self, picture, box: tuple[int, int, int, int]):
        """A frame that holds this box of a planar picture. The next call writes over it."""
        import av

        top, left, height, width = box
        if (height, width) == (picture.height, picture.width):
            return picture
        name = picture.format.name
        if self._cut_shape != (width, height, name):
            self._cut_frame, self._cut_shape = av.VideoFrame(width, height, name), (width, height, name)
            self._cut_planes = [_plane(self._cut_frame, k) for k in range(len(self._cut_frame.planes))]
        self._cut_frame.colorspace, self._cut_frame.color_range = picture.colorspace, picture.color_range
        self._cut_planes[0][:height, :width] = _plane(picture, 0)[top : top + height, left : left + width]
        if SUBSAMPLING[name] is not None:
            across, down = SUBSAMPLING[name]
            for k in (1, 2):
                part = _chroma(_plane(picture, k)[:, : -(-picture.width >> across)], left, width, across, axis=1)
                part = _chroma(part[: -(-picture.height >> down)], top, height, down, axis=0)
                self._cut_planes[k][: part.shape[0], : part.shape[1]] = part
        return self._cut_frame


def _plane(picture, k: int) -> np.ndarray:
    plane = picture.planes[k]
    return np.frombuffer(plane, dtype=np.uint8).reshape(-1, plane.line_size)


def _chroma(plane: np.ndarray, first: int, length: int, shift: int, axis: int) -> np.ndarray:
    """The chroma samples of the luma samples [first, first + length) along one axis.

    A chroma sample stands for two luma samples. Where the cut goes through the middle of one, each new sample lies
    between two old ones, and is their mean.
    """
    count, begin = -(-length >> shift), first >> shift
    if shift and first % 2:
        end = min(begin + 1 + count, plane.shape[axis])
        both = plane[:, begin:end] if axis else plane[begin:end]
        a, b = (both[:, :-1], both[:, 1:]) if axis else (both[:-1], both[1:])
        mean = (a | b) - ((a ^ b) >> 1)  # of bytes, rounded up, without wider numbers
        if mean.shape[axis] == count:
            return mean
        return np.concatenate([mean, both[:, -1:] if axis else both[-1:]], axis)  # the last sample is repeated
    return plane[:, begin : begin + count] if axis else plane[begin : begin + count]


def scale_rgb(frames: np.ndarray, scaling: Scaling) -> np.ndarray:
    """The same of RGB pictures: frames (n, H, W, 3) uint8 -> (n, 3, *scaling.size) uint8. Bilinear, antialiased."""
    import torch
    import torch.nn.functional as F

    top, left, height, width = scaling.box
    cut = torch.from_numpy(np.ascontiguousarray(frames[:, top : top + height, left : left + width])).permute(0, 3, 1, 2)
    return F.interpolate(cut, size=scaling.size, mode="bilinear", antialias=True, align_corners=False).numpy()
