"""Stock decord, with what it takes to trust the frames that it returns."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Iterator

import numpy as np

from avion.reading import open_file

from .errors import VideoError, one_line
from .packets import MAX_FPS, PacketTable, is_constant_rate
from .reader import VideoReader

_DECORD_BATCH = 32  # frames of a stream that decord holds at once
DECORD_TIMEOUT_S = 60.0  # decord has native loops that never end on some damaged files

_hung_in_decord: set[str] = set()
_abandoned: list = []  # readers whose native call never returned; freeing them would wait for it


class DecordReader(VideoReader):
    """Stock decord. It counts frames rather than naming them, so three things are refused or bounded here:
    files with an edit list that hides frames (it miscounts them or never returns), a frame that it repeats in
    place of one that it could not get, and native calls that do not return. Damage inside a frame it conceals.
    Where PyAV is installed as well, its index of the packets is what decides about the first."""

    def __init__(self, path: str, threads: int):
        import decord

        self.path = path
        self._table = self._check_with_pyav() if importlib.util.find_spec("av") else None
        if self._table is None and _is_transport_stream(path):
            raise VideoError(path, "is an MPEG transport stream, which decord miscounts: use pyav")
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
        miscounted = self._table is not None and self._table.num_frames != self.num_frames
        if not np.isfinite(times).all() or times[0, 0] < 0 or miscounted:
            raise VideoError(path, "has frames that decord miscounts: use pyav")
        self._begins, self._end = times[:, 0] - times[0, 0], times[-1, 1] - times[0, 0]
        self.constant_rate = is_constant_rate(self._begins, self.fps)
        if self._table is not None:
            self.constant_rate = self._table.constant_rate

    def _check_with_pyav(self) -> PacketTable:
        from .pyav_reader import PyAVReader

        with PyAVReader(self.path, threads=1) as check:
            reason = _why_miscounted(check)
            if reason:
                raise VideoError(self.path, f"{reason}, which decord miscounts: use pyav")
            return check.table

    def frame_at(self, seconds: float) -> int:
        if self._table is not None:
            return self._table.frame_at(seconds)
        if seconds >= self._end:
            return self.num_frames + int((seconds - self._end) * self.fps)
        return max(int(np.searchsorted(self._begins, seconds + 1e-6, side="right")) - 1, 0)

    def seconds_of(self, frame: int) -> float:
        if self._table is not None:
            return self._table.seconds_of(frame)
        if frame >= self.num_frames:
            return float(self._end) + (frame - self.num_frames) / self.fps
        return float(self._begins[frame])

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
            reason = f"decord cannot read it ({one_line(outcome['error'])})"
            raise VideoError(self.path, reason) from outcome["error"]
        return outcome["value"]

    def close(self) -> None:
        self._reader = None


def _why_miscounted(check) -> str:
    """What decord 0.6.0 does not number or show right about a file, "" for nothing. check: the file's PyAVReader."""
    table = check.table
    if check.hides_frames:
        return "has packets that show nothing (behind an edit list, for example)"
    if not check.demuxed.times_are_true:
        return "has no true display times"
    if len(table.configs) > 1:
        return "has several codec configurations"
    if check.demuxed.format == "mpegts":
        return "is an MPEG transport stream"
    if check.demuxed.turned_by_packets:
        return "says in its packets how it is turned"
    if check.orientation >= 4:
        return "is shown mirrored"
    return ""


def _is_transport_stream(path: str) -> bool:
    """Packets of 188 bytes that each begin with 0x47 (ISO/IEC 13818-1)."""
    with open_file(path) as file:
        head = file.read(3 * 188)
    return len(head) > 2 * 188 and head[0] == head[188] == head[2 * 188] == 0x47
