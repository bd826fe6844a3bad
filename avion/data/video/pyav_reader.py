"""Reading a video with its container: all packets are looked at once, for each opening of the file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

from .container import Demuxed, open_container
from .decode import bare_context, pictures
from .errors import VideoError, one_line
from .picture import orientation_of
from .reader import TableReader


class PyAVReader(TableReader):
    """One pass over the packets gives the numbering, then only the runs that are needed are decoded."""

    def __init__(self, path: str, threads: int, file=None):
        """path: of the file. file: what to read it from, where it does not lie here; closed with the reader."""
        self.path = path
        self._file = file
        self._container = open_container(path, file)
        self._threads = threads
        self._bare: dict[int, object] = {}
        try:
            self._demuxed = Demuxed(self._container, path, file)
            context = self._demuxed.context
            if not context.is_open or context.thread_count != threads:
                context.thread_count = threads
                context.thread_type = "NONE" if threads == 1 else "FRAME"
            self._context = context
            table = self._demuxed.table
            if len(table.configs) > 1 or self._demuxed.turned_by_packets:
                table.orientation = self._first_orientation()
            self._use_table(table)
        except BaseException:
            self.close()
            raise

    @property
    def hides_frames(self) -> bool:
        return self.num_frames < self.table.num_packets

    @property
    def orientation(self) -> int:
        """How the pictures are turned and mirrored; see picture.py."""
        if self.table.orientation is not None:
            return self.table.orientation
        _, picture = next(self._pictures([0]))
        return self._converter.orientation_of(picture)

    def _first_orientation(self) -> int:
        """What the first picture says, for files whose later pictures do not all say it: those of a decoder for
        one of several configurations, and those whose own packet brings no message about it."""
        import av

        try:
            for packet in chain(self._demuxed.packets(), (None,)):
                for picture in self._context.decode(packet):
                    return orientation_of(picture)
        except av.error.FFmpegError as error:
            raise VideoError(self.path, f"cannot be decoded ({one_line(error)})") from error
        finally:
            self._context.flush_buffers()
        raise VideoError(self.path, "holds no frame that can be decoded")

    @property
    def demuxed(self) -> Demuxed:
        return self._demuxed

    def _pictures(self, indices: Sequence[int]) -> Iterator[tuple[int, object]]:
        return pictures(self.table, indices, self)

    def context(self, config: int):
        if len(self.table.configs) == 1:
            return self._context  # its pictures carry the display matrix
        if config not in self._bare:
            size = self.table.coded_size
            self._bare[config] = bare_context(self._context, self.table.configs[config], size, self._threads)
        return self._bare[config]

    def expect(self, positions: list[int]) -> None:
        pass

    def packets(self, positions: Sequence[int]) -> Iterator:
        held = self._demuxed.held
        if held is not None:
            yield from (held[position] for position in positions)
            return
        wanted = iter(positions)
        due = next(wanted, None)
        for packet in self._demuxed.read_again(positions[0]) if due is not None else ():
            if packet.pts == due:
                yield packet
                due = next(wanted, None)
            if due is None:
                return
        raise VideoError(self.path, f"packet {due} was not found again")

    def close(self) -> None:
        self._demuxed = None
        self._bare = {}
        self._container.close()
        if self._file is not None:
            self._file.close()
