"""Opening a video file with PyAV, and the facts that its container states: which track, which packets, which times."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

import numpy as np

from .bitstream import PacketReader
from .decode import bare_context
from .errors import VideoError, one_line, refused
from .packets import HIDDEN, KEY, MAX_FPS, MAX_PIXELS, PacketTable, is_constant_rate

# What PyAV may open. Other demuxers (playlists, concat scripts) follow names written inside the file.
_OPEN_OPTIONS = {
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg",
    "protocol_whitelist": "file",
}
# Errors of the operating system, which say nothing about the file. FFmpeg's own errors have large or negative numbers.
_REFUSALS = (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ETIMEDOUT)
HELD_BYTES = 64 * 2**20  # packets of a file up to this size stay in memory: it is then read once


def open_container(path: str, file=None):
    """An av container open for reading. VideoError for what is no video of a known format.

    file: what to read from; None: the file at `path`.
    """
    import av

    try:
        # Tags are of no interest here, and not always UTF-8.
        return av.open(path if file is None else file, options=dict(_OPEN_OPTIONS), metadata_errors="replace")
    except (av.error.FFmpegError, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in _REFUSALS:
            raise refused(path, error) from error
        raise VideoError(path, f"is not a readable video ({one_line(error)})") from error


def video_track(container, path: str):
    """The stream to read: of those that are no cover pictures the default one, else the largest."""
    from av.stream import Disposition

    tracks = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not tracks:
        raise VideoError(path, "holds no video stream")
    defaults = [s for s in tracks if s.disposition & Disposition.default] or tracks
    tracks = [s for s in defaults if s.codec_context is not None]
    if not tracks:
        raise VideoError(path, "is of a codec that this PyAV cannot decode")
    stream = max(tracks, key=lambda s: s.codec_context.width * s.codec_context.height)
    context = stream.codec_context
    if context.width < 1 or context.height < 1 or context.width * context.height > MAX_PIXELS:
        raise VideoError(path, f"states a picture of {context.width} x {context.height} pixels")
    return stream


class Demuxed:
    """All packets of a file's video track, read once from beginning to end.

    table: what they say. held: the packets themselves, or None where they take more than HELD_BYTES. Every packet that
    comes out of here has its position as its time, so that a decoded picture says which packet it is.
    """

    def __init__(self, container, path: str, file=None):
        import av

        self._container, self._path, self._file = container, path, file
        self.stream = video_track(container, path)
        self.context = self.stream.codec_context
        self.codec: str = self.context.codec.canonical_name  # of the codec, whichever decoder it is
        self.format: str = container.format.name
        self.held: list | None = []
        self._pts: list[int | None] = []
        self._dts: list[int] = []
        self._flags: list[int] = []
        self._where: list[tuple[int, int]] = []
        self._configs, self._config_starts = [bytes(self.context.extradata or b"")], [0]
        self._last_duration = 0
        self._bits = PacketReader(self.codec, self._configs[0])
        try:
            self._read_all()
        except av.error.FFmpegError as error:
            if getattr(error, "errno", None) in _REFUSALS:
                raise refused(path, error) from error
            raise VideoError(path, f"is damaged after packet {len(self._pts)} ({one_line(error)})") from error
        self._check_whole()
        self.times_are_true = True
        self.table = self._make_table()

    def _read_all(self) -> None:
        held_bytes = 0
        for packet in self._container.demux(self.stream):
            if packet.size == 0:  # the end-of-file marker
                continue
            position = len(self._pts)
            if packet.is_corrupt:
                raise VideoError(self._path, f"is cut short or damaged at packet {position}")
            if packet.has_sidedata("new_extradata"):
                self._note_config(bytes(packet.get_sidedata("new_extradata")), position)
            self._pts.append(packet.pts)
            self._dts.append(packet.dts if packet.dts is not None else packet.pts)
            flags = self._bits.flags(bytes(packet))
            flags |= (KEY if packet.is_keyframe else 0) | (HIDDEN if packet.is_discard else 0)
            self._flags.append(flags)
            self._where.append((-1 if packet.pos is None else packet.pos, packet.size))
            self._last_duration = packet.duration or self._last_duration
            held_bytes += packet.size
            if held_bytes > HELD_BYTES:
                self.held = None
            if self.held is not None:
                self.held.append(_named(packet, position))
        self._bits.correct(self._flags)

    def _note_config(self, config: bytes, position: int) -> None:
        if config != self._configs[-1]:
            if position == 0:
                self._configs[0] = config
            else:
                self._configs.append(config)
                self._config_starts.append(position)
            before = self._bits
            self._bits = PacketReader(self.codec, config)
            self._bits.reorders |= before.reorders
            self._bits.turns |= before.turns

    def _check_whole(self) -> None:
        due, found = self.stream.frames, len(self._pts)
        if found < due and not self._has_null_frames(due):
            raise VideoError(self._path, f"is cut short: {found} of {due} packets are there")
        if not found:
            raise VideoError(self._path, "holds no frames")

    def _has_null_frames(self, due: int) -> bool:
        """In AVI, chunks without a byte count as frames: they show the frame before them once more. A file that is cut
        short has less bytes than its first four-character block states."""
        if self._container.format.name != "avi":
            return False
        with open(self._path, "rb") if self._file is None else contextlib.nullcontext(self._file) as file:
            file.seek(0)
            stated = int.from_bytes(file.read(8)[4:], "little") + 8
            return file.seek(0, os.SEEK_END) >= stated

    def _make_table(self) -> PacketTable:
        flags = np.array(self._flags, dtype=np.uint8)
        display, pts = self._display_order(flags)
        if len(display) == 0:
            raise VideoError(self._path, "holds no frames")
        if len(np.unique(pts[display])) != len(display):
            raise VideoError(self._path, "has two frames with one timestamp")
        rate = self.stream.average_rate or self.stream.guessed_rate
        fps = float(rate) if rate else 0.0
        if not 0.0 < fps <= MAX_FPS:
            raise VideoError(self._path, f"states {fps:g} frames per second")
        tick = float(self.stream.time_base)
        seconds = pts[display] * tick
        return PacketTable(
            self._path,
            self.codec,
            (self.context.height, self.context.width),
            fps,
            tick,
            pts,
            flags,
            display,
            keys=np.nonzero(flags & KEY)[0],
            configs=self._configs,
            config_starts=np.array(self._config_starts, dtype=np.int64),
            constant_rate=is_constant_rate(seconds, fps),
            end=int(pts[display[-1]]) + max(self._last_duration, 1),
        )

    def _display_order(self, flags: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """-> (num_frames,) positions in display order, (n,) display times in ticks."""
        shown = (flags & HIDDEN) == 0
        times = [p for p, s in zip(self._pts, shown, strict=True) if s]
        reorders = self.context.has_b_frames if self.codec == "hevc" else self._bits.reorders
        untimed = any(p is None for p in times)
        coded_order = not untimed and all(a < b for a, b in zip(times, times[1:], strict=False))
        if untimed or (coded_order and reorders):
            return self._order_by_decoding(flags, shown)
        pts = np.array([0 if p is None else p for p in self._pts], dtype=np.int64)
        (positions,) = np.nonzero(shown)
        return positions[np.argsort(pts[positions], kind="stable")], pts

    def _order_by_decoding(self, flags: np.ndarray, shown: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where packets lack times, or carry the order of decoding as their times: the order in which the decoder puts
        pictures out is the display order. Times that are wrong are handed out anew in that order."""
        order = [p for p in self._decoded_order() if shown[p]]
        kept = np.zeros(len(flags), dtype=bool)
        kept[order] = True
        flags[~kept] |= HIDDEN
        display = np.array(order, dtype=np.int64)
        if len(np.unique(display)) != len(display):
            raise VideoError(self._path, "has packets of several pictures and no display times; encode it again")
        times: list[int | None] = [self._pts[p] for p in order]
        known = [t for t in times if t is not None]
        if len(known) == len(times):
            self.times_are_true = times == sorted(known)
            times = sorted(known)
        elif known != sorted(known) or len(known) < 2:
            raise VideoError(self._path, "has no display times; write it anew with times, or encode it again")
        pts = np.array([0 if p is None else p for p in self._pts], dtype=np.int64)
        pts[display] = _filled(times)
        return display, pts

    def _decoded_order(self) -> list[int]:
        """The position of every picture, in the order in which the decoder puts them out."""
        import av

        order: list[int] = []
        edges = [*self._config_starts, len(self._pts)]
        packets = self.packets()
        try:
            for config, start, stop in zip(self._configs, edges[:-1], edges[1:], strict=True):
                context = bare_context(self.context, config, (self.context.height, self.context.width))
                for _ in range(start, stop):
                    packet = next(packets)
                    order += [picture.pts for picture in context.decode(packet)]
                order += [picture.pts for picture in context.decode(None)]
        except av.error.FFmpegError as error:
            raise VideoError(self._path, f"is damaged ({one_line(error)}), and has no display times") from error
        return [position for position in order if position is not None]

    @property
    def turned_by_packets(self) -> bool:
        """Whether packets, and not the container alone, say how pictures are turned."""
        return self._bits.turns

    def packets(self) -> Iterator:
        """All packets, from memory or from the file."""
        return iter(self.held) if self.held is not None else self.read_again()

    def read_again(self, start: int = 0) -> Iterator:
        """The packets from position `start`, a key packet, on, read from the file once more."""
        self._container.seek(int(self._dts[start] or 0), stream=self.stream, backward=True)
        position = None
        for packet in self._container.demux(self.stream):
            if packet.size == 0:
                break
            if position is None:
                if (packet.pts, packet.size) != (self._pts[start], self._where[start][1]):
                    continue  # the seek may land on an earlier keyframe
                position = start
            yield _named(packet, position)
            position += 1
        if position is None:
            raise VideoError(self._path, f"cannot be searched: packet {start} was not found")

    @property
    def file_positions(self) -> list[tuple[int, int]]:
        """(where the demuxer says that the packet lies, its size) of each packet."""
        return self._where


def _named(packet, position: int):
    packet.pts = packet.dts = position
    return packet


def _filled(times: list[int | None]) -> np.ndarray:
    """Times with gaps -> all of them. A gap is filled evenly between its neighbours, an end by the usual step."""
    places = np.array([i for i, t in enumerate(times) if t is not None])
    known = np.array([t for t in times if t is not None], dtype=np.int64)
    step = max(int(np.median(np.diff(known) / np.diff(places))), 1) if len(known) > 1 else 1
    every = np.arange(len(times))
    filled = np.round(np.interp(every, places, known)).astype(np.int64)
    filled[: places[0]] = known[0] - step * (places[0] - every[: places[0]])
    filled[places[-1] + 1 :] = known[-1] + step * (every[places[-1] + 1 :] - places[-1])
    return filled
