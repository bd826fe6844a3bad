"""One interface over the video decoders: exactly the frames that were asked for, or a `VideoError`.

Frames are numbered in display order over the frames that the file shows (what an edit list hides has no
number). Two decoders stand behind `open_video`: PyAV, which names every decoded frame by its timestamp and
so can prove that it returns the right one, and stock decord, which counts frames. `auto` takes PyAV where it
is installed, else decord; docs/data.md has the measurements behind that.
"""

from __future__ import annotations

import importlib.util
import os
import re
import threading
from collections.abc import Iterator, Sequence

import numpy as np

from avion.errors import UserError

DECODERS = ("pyav", "decord")  # in the order in which `auto` tries them
MAX_FPS = 1000.0
MAX_PIXELS = 2**26  # of a frame; 8K video has half of it
HELD_BYTES = 64 * 2**20  # packets of a file up to this size stay in memory: it is then read once
_DECORD_BATCH = 32  # frames of a stream that decord holds at once
DECORD_TIMEOUT_S = 60.0  # decord has native loops that never end on some damaged files

# What PyAV may open. Other demuxers (playlists, concat scripts) follow names written inside the file.
_OPEN_OPTIONS = {
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg",
    "protocol_whitelist": "file",
}


class VideoError(UserError):
    """A video file, or a part of it, cannot be read. `path` and `reason` say which and why."""

    def __init__(self, path: str | os.PathLike, reason: str | None = None):
        if reason is None:
            # A DataLoader rebuilds an exception of its worker by calling the class with the worker's whole
            # traceback as the only argument; its last line is our message.
            lines = [line for line in str(path).splitlines() if line.strip()] or [""]
            path, reason = "", lines[-1].split("VideoError: ", 1)[-1]
        self.path, self.reason = str(path), reason
        super().__init__(f"{self.path}: {reason}" if self.path else reason)

    def __reduce__(self):
        return type(self), (self.path, self.reason)


class VideoReader:
    """An open video: `path`, `num_frames`, `fps` (frames per second), `height` and `width` (pixels, upright)."""

    path: str
    num_frames: int
    fps: float
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

    def close(self) -> None:
        """Release the file. Closing twice is fine."""

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *_exc_info) -> None:
        self.close()


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
    reader = {"pyav": _PyAVReader, "decord": _DecordReader}[resolve_decoder(decoder)]
    path = os.path.abspath(path)  # never a URL or a "concat:" list
    try:
        size = os.stat(path).st_size
    except FileNotFoundError:
        raise VideoError(path, "no such file") from None
    except OSError as error:
        raise VideoError(path, f"cannot be opened ({error.strerror})") from None
    if not os.path.isfile(path):
        raise VideoError(path, "is not a file")
    if size == 0:
        raise VideoError(path, "is empty (0 bytes)")
    return reader(path, threads)


def _one_line(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    text = " ".join(re.sub(r"\[[\d:]+\] \S+\.(cc|h):\d+: ", "", text).split())  # decord's time and source line
    return text if len(text) <= 160 else text[:157] + "..."


class _PyAVReader(VideoReader):
    """PyAV: one pass over the packets gives the numbering, then only the runs that are needed are decoded.

    A run goes from the keyframe before a wanted frame to that frame. In H.264, frames that no other frame
    refers to and nobody wants (about half of x264's default output) are skipped by the decoder unread.
    """

    def __init__(self, path: str, threads: int):
        import av

        self._av = av
        self.path = path
        try:
            self._container = av.open(path, options=dict(_OPEN_OPTIONS))
        except (av.error.FFmpegError, OSError, ValueError) as error:
            raise VideoError(path, f"is not a readable video ({_one_line(error)})") from error
        try:
            self._read_header(threads)
            self._index_packets()
        except BaseException:
            self.close()
            raise

    def _read_header(self, threads: int) -> None:
        if not self._container.streams.video:
            raise VideoError(self.path, "holds no video stream")
        self._stream = self._container.streams.video[0]
        context = self._stream.codec_context
        if context is None:
            raise VideoError(self.path, "is of a codec that this PyAV cannot decode")
        context.thread_count = threads
        context.thread_type = "FRAME" if threads > 1 else "NONE"
        self._stored_size = {"width": context.width, "height": context.height}
        if context.width < 1 or context.height < 1 or context.width * context.height > MAX_PIXELS:
            raise VideoError(self.path, f"states a picture of {context.width} x {context.height} pixels")
        self._skip_unreferenced = context.name == "h264"

    def _index_packets(self) -> None:
        """Number the frames: display order is the order of the packets' timestamps."""
        pts, dts, key, shown, held, held_bytes = [], [], [], [], [], 0
        try:
            for packet in self._container.demux(self._stream):
                if packet.size == 0:  # the end-of-file marker
                    continue
                if packet.pts is None:
                    raise VideoError(self.path, f"has no timestamp on its packet {len(pts)}")
                if packet.is_corrupt:
                    raise VideoError(self.path, f"is cut short or damaged at packet {len(pts)}")
                pts.append(packet.pts)
                dts.append(packet.pts if packet.dts is None else packet.dts)
                key.append(packet.is_keyframe)
                shown.append(not packet.is_discard)
                held_bytes += packet.size
                if held_bytes <= HELD_BYTES:
                    held.append(packet)
        except self._av.error.FFmpegError as error:
            raise VideoError(self.path, f"is damaged after packet {len(pts)} ({_one_line(error)})") from error
        if len(pts) < self._stream.frames:
            raise VideoError(self.path, f"is cut short: {len(pts)} of {self._stream.frames} packets are there")
        self._held = held if held_bytes <= HELD_BYTES else None
        self._pts, self._dts = np.array(pts, dtype=np.int64), np.array(dts, dtype=np.int64)  # decode order
        (self._keys,) = np.nonzero(np.array(key, dtype=bool))
        (positions,) = np.nonzero(np.array(shown, dtype=bool))
        self._display = positions[np.argsort(self._pts[positions], kind="stable")]  # display -> decode order
        self.num_frames = len(self._display)
        self.hides_frames = self.num_frames < len(pts)
        if self.num_frames == 0:
            raise VideoError(self.path, "holds no frames")
        if len(np.unique(self._pts[self._display])) != self.num_frames:
            raise VideoError(self.path, "has two frames with one timestamp")
        rate = self._stream.average_rate or self._stream.guessed_rate
        self.fps = float(rate) if rate else 0.0
        if not 0.0 < self.fps <= MAX_FPS:
            raise VideoError(self.path, f"states {self.fps:g} frames per second")

    def _decode_sorted(self, indices: np.ndarray) -> np.ndarray:
        found = dict(self._stream_sorted(indices))
        return np.stack([found[int(i)] for i in indices])

    def _stream_sorted(self, indices: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        stamps = [int(self._pts[self._display[i]]) for i in indices]
        index_of = {stamp: int(i) for stamp, i in zip(stamps, indices, strict=True)}
        missing = set(stamps)
        # Twice more for what is then still missing: a stream may rely on the skipped frames for its output order,
        # and one without true keyframes (intra refresh) needs what lies before the last of them.
        for skip_unreferenced, keys_back in ((self._skip_unreferenced, 0), (False, 0), (False, 2)):
            left = [i for i, stamp in zip(indices, stamps, strict=True) if stamp in missing]
            for start, stop in self._runs(left, keys_back):
                for stamp, picture in self._decode_run(start, stop, missing, skip_unreferenced):
                    yield index_of[stamp], picture
        if missing:
            raise VideoError(self.path, f"frame {min(index_of[stamp] for stamp in missing)} cannot be decoded")

    def _runs(self, indices: Sequence[int], keys_back: int) -> list[tuple[int, int]]:
        """The stretches [start, stop) of packets, in decode order, that decode these frames: from the keyframe
        before each of them, or from `keys_back` keyframes earlier."""
        runs: list[tuple[int, int]] = []
        for i in indices:
            position = self._display[i]
            keys = self._keys[(self._keys <= position) & (self._pts[self._keys] <= self._pts[position])]
            if keys.size == 0:
                raise VideoError(self.path, f"frame {i} comes before the first keyframe")
            start, stop = int(keys[max(len(keys) - 1 - keys_back, 0)]), int(position) + 1
            if runs and start <= runs[-1][1]:
                runs[-1] = (runs[-1][0], max(runs[-1][1], stop))
            else:
                runs.append((start, stop))
        return runs

    def _decode_run(
        self, start: int, stop: int, missing: set[int], skip_unreferenced: bool
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Decode packets [start, stop): (timestamp, picture) of those in `missing`, which are then taken out of it."""
        context = self._stream.codec_context
        reformatter = self._av.video.reformatter.VideoReformatter()
        first_pts = self._pts[start]
        try:
            for packet in self._packets(start, stop):
                if packet is not None:
                    skip = skip_unreferenced and packet.pts not in missing
                    context.skip_frame = "NONREF" if skip else "DEFAULT"
                for picture in context.decode(packet):
                    if picture.pts is None or picture.pts < first_pts:
                        continue  # shown before the keyframe, refers to frames that were not decoded
                    if picture.is_corrupt:
                        raise VideoError(self.path, f"is damaged at {self._where(picture.pts)}")
                    if picture.pts in missing:
                        missing.remove(picture.pts)
                        yield picture.pts, self._upright_rgb(picture, reformatter)
        except self._av.error.FFmpegError as error:
            where = self._where(self._pts[start])
            raise VideoError(self.path, f"cannot be decoded after {where} ({_one_line(error)})") from error
        finally:
            context.flush_buffers()

    def _packets(self, start: int, stop: int) -> Iterator:
        """Packets [start, stop) in decode order, then None (drain the decoder)."""
        if self._held is not None:
            yield from self._held[start:stop]
            yield None
            return
        self._container.seek(int(self._dts[start]), stream=self._stream, backward=True)
        position = None
        for packet in self._container.demux(self._stream):
            if packet.size == 0:
                break
            if position is None:
                if packet.pts != self._pts[start]:
                    continue  # the seek may land on an earlier keyframe
                position = start
            yield packet
            position += 1
            if position == stop:
                break
        if position is None:
            raise VideoError(self.path, f"cannot be searched: {self._where(self._pts[start])} was not found")
        yield None

    def _upright_rgb(self, picture, reformatter) -> np.ndarray:
        # One thread: left to itself, libswscale starts one per core for every small picture.
        rgb = reformatter.reformat(picture, format="rgb24", threads=1, **self._stored_size).to_ndarray()
        turns = round(getattr(picture, "rotation", 0) / 90) % 4  # older PyAV does not tell
        return np.rot90(rgb, turns)

    def _where(self, pts: int) -> str:
        found = np.nonzero(self._pts[self._display] == pts)[0]
        return f"frame {found[0]}" if found.size else f"timestamp {pts}"

    def close(self) -> None:
        self._held = None
        self._container.close()


_hung_in_decord: set[str] = set()
_abandoned: list = []  # readers whose native call never returned; freeing them would wait for it


class _DecordReader(VideoReader):
    """Stock decord. It counts frames rather than naming them, so three things are refused or bounded here:
    files with an edit list that hides frames (it miscounts them or never returns), a frame that it repeats in
    place of one that it could not get, and native calls that do not return. Damage inside a frame it conceals.
    Where PyAV is installed as well, its index of the packets is what decides about the first."""

    def __init__(self, path: str, threads: int):
        import decord

        self.path = path
        num_frames = self._count_with_pyav() if importlib.util.find_spec("av") else None
        decord.logging.set_level(decord.logging.QUIET)
        # fault_tol between 0 and 1 is a share of the frames: any repeated frame is an error.
        self._reader = self._bounded(
            lambda: decord.VideoReader(path, ctx=decord.cpu(0), num_threads=threads, fault_tol=1e-9)
        )
        self.num_frames = len(self._reader)
        self.fps = float(self._reader.get_avg_fps())
        if not 0.0 < self.fps <= MAX_FPS:
            raise VideoError(path, f"states {self.fps:g} frames per second")
        times = self._reader.get_frame_timestamp(list(range(self.num_frames)))  # (n, 2) seconds
        if not np.isfinite(times).all() or times[0, 0] < 0 or num_frames not in (None, self.num_frames):
            raise VideoError(path, "has frames that decord miscounts: use pyav")

    def _count_with_pyav(self) -> int:
        with _PyAVReader(self.path, threads=1) as check:
            if check.hides_frames:
                raise VideoError(self.path, "has an edit list that hides frames, which decord miscounts: use pyav")
            return check.num_frames

    def _decode_sorted(self, indices: np.ndarray) -> np.ndarray:
        return self._bounded(lambda: self._reader.get_batch(indices.tolist()).asnumpy())

    def _stream_sorted(self, indices: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        # It goes on from where it is, so that a part at a time costs no second decoding.
        for first in range(0, len(indices), _DECORD_BATCH):
            part = indices[first : first + _DECORD_BATCH]
            yield from zip(part.tolist(), self._decode_sorted(part), strict=True)

    def _bounded(self, call):
        """Run a native call in a thread, so that one which never returns is an error and not a hang."""
        if self.path in _hung_in_decord:
            raise VideoError(self.path, "made decord hang before, in this process")
        outcome: dict = {}

        def run():
            try:
                outcome["value"] = call()
            except Exception as error:  # handed to the caller below
                outcome["error"] = error

        thread = threading.Thread(target=run, daemon=True, name="decord")
        thread.start()
        thread.join(DECORD_TIMEOUT_S)
        if thread.is_alive():
            _hung_in_decord.add(self.path)
            _abandoned.append(self)
            raise VideoError(self.path, f"decord did not return within {DECORD_TIMEOUT_S:g} s")
        if "error" in outcome:
            reason = f"decord cannot read it ({_one_line(outcome['error'])})"
            raise VideoError(self.path, reason) from outcome["error"]
        return outcome["value"]

    def close(self) -> None:
        self._reader = None
