"""One interface over the video decoders: exactly the frames that were asked for, or a `VideoError`.

Frames are numbered in display order over the frames that the file shows (what an edit list hides has no
number). Two decoders stand behind `open_video`: PyAV, which names every decoded frame by its packet and
so can prove that it returns the right one, and stock decord, which counts frames. `auto` takes PyAV where it
is installed, else decord; docs/data.md has the measurements behind that.
"""

from __future__ import annotations

import importlib.util
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from avion.errors import UserError
from avion.reading import open_file

from .errors import VideoError, refused
from .packets import PacketTable
from .picture import Scaling, scale_rgb
from .scaler import RESERVED_SPACE, SPACES, UNKNOWN_SPACE
from .storage import Storage, is_remote, storage_of

DECODERS = ("pyav", "decord")  # in the order in which `auto` tries them
_SCALED_AT_ONCE = 32  # frames


class VideoReader:
    """An open video: `path`, `num_frames`, `fps` (average frames per second), `height` and `width` (pixels, upright),
    `constant_rate` (frame i is shown from i / fps on), `begin` (the time in seconds that the container gives the first
    frame; everywhere else times are counted from there)."""

    path: str
    num_frames: int
    fps: float
    constant_rate: bool = True
    begin: float = 0.0
    _size: tuple[int, int] | None = None  # known from the first frame on: only there a rotation is stated

    @property
    def height(self) -> int:
        return self._frame_size()[0]

    @property
    def width(self) -> int:
        return self._frame_size()[1]

    def _frame_size(self) -> tuple[int, int]:
        if self._size is None:
            self._size = self._decode_sorted(np.zeros(1, dtype=np.int64)).shape[1:3]
        return self._size

    def frame_at(self, seconds: float) -> int:
        """The number of the frame that is shown at this time, counted from when the first frame begins.

        After the last frame's end: `num_frames` or more, by as many frames as the time lies after it.
        """
        return max(int(seconds * self.fps + 1e-6), 0)

    def seconds_of(self, frame: int) -> float:
        """When this frame begins, in seconds from the first one on; it may be a number after the last frame's."""
        return frame / self.fps

    def get_frames(self, indices: Sequence[int]) -> np.ndarray:
        """Decode the frames of these numbers, in the order given, repeats included.

        indices: n integers in [0, num_frames). Returns (n, height, width, 3) uint8, RGB.
        Raises VideoError if one of them does not exist or cannot be decoded intact.
        """
        wanted = np.asarray(indices, dtype=np.int64).reshape(-1)
        if wanted.size == 0:
            return np.empty((0, self.height, self.width, 3), dtype=np.uint8)
        self._check_range(wanted)
        unique, inverse = np.unique(wanted, return_inverse=True)
        frames = self._decode_sorted(unique)  # (k, H, W, 3)
        return frames if unique.size == wanted.size and np.array_equal(unique, wanted) else frames[inverse]

    def get_scaled(self, indices: Sequence[int], scaling: Callable[[int, int], Scaling]) -> np.ndarray:
        """The same frames, cut and scaled. scaling: (height, width) of the upright picture -> what to cut out, and the
        size to bring it to. It is called once.

        Returns (n, 3, height, width) uint8, planes of red, green and blue.
        """
        wanted = np.asarray(indices, dtype=np.int64).reshape(-1)
        self._check_range(wanted)
        unique, inverse = np.unique(wanted, return_inverse=True)
        scaled = self._scale_sorted(unique, scaling)  # (k, 3, h, w)
        return scaled if unique.size == wanted.size and np.array_equal(unique, wanted) else scaled[inverse]

    def stream_frames(self, indices: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Decode the frames of these numbers in one pass, one at a time: (number, frame (height, width, 3) uint8).

        Each distinct number comes once, mostly in ascending order (where a frame needed a second try, it comes
        late). Only a few frames are in memory at once. Raises VideoError as `get_frames` does, at the latest when all
        others have come.
        """
        wanted = np.unique(np.asarray(indices, dtype=np.int64))
        self._check_range(wanted)
        yield from self._stream_sorted(wanted)

    def _check_range(self, wanted: np.ndarray) -> None:
        if wanted.size and (wanted.min() < 0 or wanted.max() >= self.num_frames):
            worst = int(wanted.max() if wanted.max() >= self.num_frames else wanted.min())
            raise VideoError(self.path, f"frame {worst} was asked for, the file has {self.num_frames}")

    def _stream_sorted(self, indices: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """indices: (k,) strictly increasing and in range -> k pairs (index, (H, W, 3) uint8)."""
        raise NotImplementedError

    def _decode_sorted(self, indices: np.ndarray) -> np.ndarray:
        """indices: (k,) strictly increasing and in range -> (k, H, W, 3) uint8."""
        raise NotImplementedError

    def _scale_sorted(self, indices: np.ndarray, scaling: Callable[[int, int], Scaling]) -> np.ndarray:
        """indices: (k,) strictly increasing and in range -> (k, 3, h, w) uint8."""
        plan, parts = None, []
        for first in range(0, len(indices), _SCALED_AT_ONCE):
            frames = self._decode_sorted(indices[first : first + _SCALED_AT_ONCE])
            plan = scaling(*frames.shape[1:3]) if plan is None else plan
            parts.append(scale_rgb(frames, plan))
        return np.concatenate(parts)

    def close(self) -> None:
        """Release the file. Closing twice is fine."""

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *_exc_info) -> None:
        self.close()


class TableReader(VideoReader):
    """A reader whose frames come from a packet table by way of PyAV: with the file's container, or with an index."""

    table: PacketTable

    def _use_table(self, table: PacketTable) -> None:
        from .picture import Converter

        self.table, self.path = table, table.path
        self.num_frames, self.fps, self.constant_rate = table.num_frames, table.fps, table.constant_rate
        self.begin = int(table.pts[table.display[0]]) * table.tick
        self._converter = Converter(table.coded_size, table.orientation)

    def frame_at(self, seconds: float) -> int:
        return self.table.frame_at(seconds)

    def seconds_of(self, frame: int) -> float:
        return self.table.seconds_of(frame)

    def _pictures(self, indices: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """indices: strictly increasing and in range -> (index, av.VideoFrame)"""
        raise NotImplementedError

    def _convertible(self, indices: np.ndarray) -> Iterator[tuple[int, Any]]:
        """The same pictures, of which each has a colour space that is converted to RGB, and all are turned alike."""
        turned: int | None = None
        for i, picture in self._pictures(indices.tolist()):
            before, turned = turned, self._converter.orientation_of(picture)
            if before not in (None, turned):
                raise VideoError(self.path, "turns its pictures in different ways; encode it again")
            space = int(picture.colorspace)
            if space == RESERVED_SPACE:
                picture.colorspace = UNKNOWN_SPACE
            elif space not in SPACES:
                reason = f"has the colour space {space} of ITU-T H.273, which cannot be converted to RGB"
                raise VideoError(self.path, f"{reason}; encode it with another one")
            yield i, picture

    def _stream_sorted(self, indices: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        for i, picture in self._convertible(indices):
            yield i, self._converter.rgb(picture)

    def _decode_sorted(self, indices: np.ndarray) -> np.ndarray:
        found = dict(self._stream_sorted(indices))
        return np.stack([found[int(i)] for i in indices])

    def _scale_sorted(self, indices: np.ndarray, scaling: Callable[[int, int], Scaling]) -> np.ndarray:
        plan, scaled, converter = None, None, self._converter
        for i, picture in self._convertible(indices):
            if plan is None:
                plan = scaling(*converter.upright_size(picture))
                # Planes of a colour lie together, as models take them: (3, k, h, w).
                scaled = np.empty((3, len(indices), *plan.size), dtype=np.uint8)
            converter.scaled(picture, plan, scaled[:, np.searchsorted(indices, i)])
        return scaled.transpose(1, 0, 2, 3)


def resolve_decoder(name: str) -> str:
    """The decoder that `name` ("auto", "pyav" or "decord") stands for on this machine. UserError if none."""
    if name not in ("auto", *DECODERS):
        raise UserError(f"decoder: {name!r} is not one of auto, {', '.join(DECODERS)}")
    installed = [d for d in DECODERS if importlib.util.find_spec({"pyav": "av"}.get(d, d))]
    if name == "auto":
        if not installed:
            raise UserError("decoder: neither PyAV nor decord is installed; `pip install av` mends it")
        return installed[0]
    if name not in installed:
        package = {"pyav": "av"}.get(name, name)
        raise UserError(f"decoder: {name!r} needs the package {package!r}; `pip install {package}` mends it")
    return name


def open_video(path: str | os.PathLike, decoder: str = "auto", threads: int = 1) -> VideoReader:
    """Open a video file. decoder: "auto", "pyav" or "decord"; threads: decoding threads, at least 1.

    Raises VideoError for a file that is missing, empty, no video or damaged, UserError for the other two.
    """
    if threads < 1:
        raise UserError(f"decode threads: {threads} is fewer than 1")
    if resolve_decoder(decoder) == "pyav":
        from .pyav_reader import PyAVReader as Reader
    else:
        from .decord_reader import DecordReader as Reader
    if is_remote(path):
        return _open_remote(os.fspath(path), Reader, threads)
    path = os.path.abspath(path)  # never a URL or a "concat:" list
    check_file(path)
    try:
        return Reader(path, threads)
    except OSError as error:
        raise refused(path, error) from error


def _open_remote(path: str, reader_class: type, threads: int, storage: Storage | None = None) -> VideoReader:
    """A video elsewhere, read with its container through a file object: many requests, where an index needs few."""
    from .pyav_reader import PyAVReader

    if reader_class is not PyAVReader:
        raise UserError(f"{path}: files elsewhere are read by the decoder pyav only")
    try:
        storage = storage or storage_of(os.path.dirname(path))
        if storage.facts(path).size == 0:
            raise VideoError(path, "is empty (0 bytes)")
        return PyAVReader(path, threads, storage.open_file(path))
    except OSError as error:
        raise refused(path, error) from error


def check_file(path: str) -> os.stat_result:
    """What the file system says about a video file; VideoError if there is no such file, or nothing in it."""
    try:
        found = os.stat(path)
        if stat.S_ISREG(found.st_mode):  # a file that must not be opened has a size too
            open_file(path).close()
    except OSError as error:
        raise refused(path, error) from None
    if not stat.S_ISREG(found.st_mode):
        raise VideoError(path, "is not a file")
    if found.st_size == 0:
        raise VideoError(path, "is empty (0 bytes)")
    return found
