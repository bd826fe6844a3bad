"""Reading a video with its packet index: positioned reads of the packets that decoding needs, and a bare decoder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from .contexts import Decoder
from .decode import pictures
from .errors import VideoError, refused
from .packets import PacketTable
from .picture import Scaling
from .reader import TableReader
from .storage import RangeFile

_SLACK = 0.15  # of the bytes that are needed, so many are read in vain where that saves a read
_AT_ONCE = 32 * 2**20  # bytes of packets in memory


class IndexedReader(TableReader):
    """table: with offsets and sizes. file: open, and closed with the reader. blame: what to raise where the table
    contradicts itself or its video."""

    def __init__(self, table: PacketTable, file: RangeFile, threads: int, blame: Callable[[Exception], Exception]):
        self._blame = blame
        self._file = file
        self._file_size = file.facts().size
        self._threads = threads
        self._decoders: dict[int, Decoder] = {}
        self._fetched: dict[int, bytes] = {}
        # Streams of pictures that were not read to their end, or failed: a decoder is still theirs.
        self._unfinished = 0
        self.path = table.path
        with self._blaming():
            self._use_table(table)

    @property
    def bytes_read(self) -> int:
        """Bytes that were read from the file so far."""
        return self._file.bytes_read

    @contextlib.contextmanager
    def _blaming(self) -> Iterator[None]:
        """Around everything that looks into the table: what nobody checks before it is used contradicts itself here."""
        import av

        try:
            yield
        except av.error.FFmpegError as error:
            raise self._blame(error) from error
        except OSError as error:
            raise refused(self.path, error) from error
        except VideoError:
            raise
        except (ValueError, IndexError, OverflowError) as error:
            raise self._blame(error) from error

    def _pictures(self, indices: Sequence[int]) -> Iterator[tuple[int, object]]:
        with self._blaming():
            self._unfinished += 1
            yield from pictures(self.table, indices, self)
            self._unfinished -= 1

    def _stream_sorted(self, indices: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        with self._blaming():
            yield from super()._stream_sorted(indices)

    def _scale_sorted(self, indices: np.ndarray, scaling: Callable[[int, int], Scaling]) -> np.ndarray:
        with self._blaming():
            return super()._scale_sorted(indices, scaling)

    def frame_at(self, seconds: float) -> int:
        with self._blaming():
            return int(np.int64(super().frame_at(seconds)))  # OverflowError for a number that no array holds

    def seconds_of(self, frame: int) -> float:
        with self._blaming():
            return super().seconds_of(frame)

    def context(self, config: int):
        if config not in self._decoders:
            table = self.table
            self._decoders[config] = Decoder(table.codec, table.configs[config], table.coded_size, self._threads)
        return self._decoders[config].context

    def expect(self, positions: list[int]) -> None:
        self._fetched = {}
        ranges = self._ranges(positions)
        if sum(size for _, size in ranges) <= _AT_ONCE:
            self._fetched = self._fetch(positions, ranges)

    def packets(self, positions: Sequence[int]) -> Iterator:
        import av

        if not positions:
            return
        decoder = self._decoders[self.table.config_at(positions[0])]
        for position in positions:
            if position not in self._fetched:
                self._fetched = self._fetch_from(positions[positions.index(position) :])
            data = self._fetched.pop(position)
            decoder.will_decode(data)
            packet = av.Packet(data)
            packet.pts = packet.dts = position
            yield packet

    def _fetch_from(self, positions: Sequence[int]) -> dict[int, bytes]:
        """The first of these packets, as many as are kept in memory at once."""
        ranges = self._ranges(positions)
        count, total = 0, 0
        while count < len(ranges) and (count == 0 or total + ranges[count][1] <= _AT_ONCE // 4):
            total += ranges[count][1]
            count += 1
        return self._fetch(positions[:count], ranges[:count])

    def _ranges(self, positions: Sequence[int]) -> list[tuple[int, int]]:
        """(offset, size) of each packet."""
        if not positions:
            return []
        table, first = self.table, positions[0]
        offsets, sizes = table.offset[first : positions[-1] + 1], table.size[first : positions[-1] + 1]
        found = [(int(offsets[p - first]), int(sizes[p - first])) for p in positions]
        for offset, size in found:
            if offset < 0 or not 1 <= size <= _AT_ONCE or offset + size > self._file_size:
                raise ValueError("a packet that lies outside of its video")
        return found

    def _fetch(self, positions: Sequence[int], ranges: list[tuple[int, int]]) -> dict[int, bytes]:
        spans = joined(ranges)
        blocks = self._file.read_ranges(spans)
        fetched, k = {}, 0
        for (offset, size), position in sorted(zip(ranges, positions, strict=True)):
            while offset + size > spans[k][0] + spans[k][1]:
                k += 1
            begin = offset - spans[k][0]
            data = blocks[k][begin : begin + size]
            if len(data) < size:
                raise VideoError(self.path, f"is cut short at {self.table.where(position)}")
            fetched[position] = data
        return fetched

    def close(self) -> None:
        decoders, self._decoders = self._decoders, {}
        if not self._unfinished:
            for decoder in decoders.values():
                decoder.give_back()
        self._fetched = {}
        self._file.close()


def joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Fewer, longer ranges (offset, size) that hold these.

    Those that touch become one, and then those with the smallest gaps between them, as long as all gaps together stay a
    small part of what is needed.
    """
    spans: list[list[int]] = []  # begin, end
    for offset, size in sorted(ranges):
        if spans and offset <= spans[-1][1]:
            spans[-1][1] = max(spans[-1][1], offset + size)
        else:
            spans.append([offset, offset + size])
    budget = _SLACK * sum(end - begin for begin, end in spans)
    gaps = sorted((after[0] - before[1], k) for k, (before, after) in enumerate(zip(spans, spans[1:], strict=False)))
    bridged = set()
    for gap, k in gaps:
        budget -= gap
        if budget < 0:
            break
        bridged.add(k)
    merged: list[list[int]] = []
    for k, span in enumerate(spans):
        if k - 1 in bridged:
            merged[-1][1] = span[1]
        else:
            merged.append(list(span))
    return [(begin, end - begin) for begin, end in merged]
