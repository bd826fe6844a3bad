"""A raw video, decoded once from beginning to end: upright pictures of the target's size, with their display times."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from .container import Demuxed, open_container
from .decode import bare_context
from .errors import VideoError, one_line
from .picture import Converter, orientation_of, upright, upright_size
from .prepare_encode import Colours
from .reader import check_file

# Transfer functions whose values are far from what a display of standard range shows: PQ and HLG.
_HDR_TRANSFERS = (16, 18)
_BT709 = 1
_LIMITED = 1
_FULL = 2
SAMPLED_S = 5.0  # every so many seconds a picture is also converted in a second way, for the check


@dataclass(frozen=True)
class Shot:
    """One frame. time, duration: in ticks, from the beginning of the first frame. picture: an av.VideoFrame in yuv420p.
    sample: the same picture as RGB (height, width, 3) uint8, made in another way; None for most frames."""

    time: int
    duration: int
    picture: object
    sample: np.ndarray | None


def target_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """The even (height, width) nearest to the same aspect at which the shorter side is `short_side`.

    A picture that is smaller keeps its size (odd sides lose a pixel): enlarging it would cost bytes and show nothing
    more.
    """
    short = min(short_side, min(height, width))
    scale = short / min(height, width)
    even = [max(2 * int(side * scale / 2 + (0.5 if scale < 1 else 0)), 2) for side in (height, width)]
    return even[0], even[1]


class RawVideo:
    """A raw video file, open for one pass.

    ticks: time units per second. num_frames: shown frames. seconds: from the first frame's beginning to the last one's
    end. rate: the average one. size: (height, width) of what `shots` gives. notes: what is special about the file, a
    few words each; complete after `shots`.

    Raises VideoError, as `shots` does, for a file that cannot be read to its end.
    """

    def __init__(self, path: str, short_side: int, threads: int = 1):
        self.path, self._threads = path, threads
        check_file(path)
        self._container = open_container(path)
        try:
            self._open(short_side)
        except BaseException:
            self.close()
            raise

    def _open(self, short_side: int) -> None:
        self._demuxed = demuxed = Demuxed(self._container, self.path)
        table, base = demuxed.table, demuxed.stream.time_base
        pts = np.asarray(table.pts)[table.display]
        self.ticks = base.denominator
        self._times = (pts - pts[0]) * base.numerator
        end = max(int(table.end - pts[0]) * base.numerator, int(self._times[-1]) + 1)
        self._durations = np.diff(self._times, append=end)
        self.num_frames, self.seconds = table.num_frames, end / self.ticks
        self.rate = _rate(demuxed.stream, self.num_frames, end, self.ticks)
        self.notes: list[str] = []
        self._note_tracks()
        self._pictures = self._decoded()
        self._first = next(self._pictures, None)
        if self._first is None:
            raise VideoError(self.path, "holds no frame that can be decoded")
        picture = self._first[1]
        self.orientation = self._orientation(picture)
        self._short_side, self._converter = short_side, Converter(table.coded_size, self.orientation)
        height, width = _square_size(table.coded_size, picture, demuxed.stream)
        self.stored_size = (height, width)
        self.size = target_size(*upright_size((height, width), self.orientation), short_side)
        self.hdr = picture.color_trc in _HDR_TRANSFERS
        self.colours = self._colours(picture)
        if self.orientation:
            self.notes.append("turned upright")
        if self.hdr:
            self.notes.append("high dynamic range brought to BT.709")

    def _note_tracks(self) -> None:
        streams = self._container.streams
        if streams.audio:
            self.notes.append("audio dropped")
        if len(streams.video) > 1:
            self.notes.append(f"track {self._demuxed.stream.index} of {len(streams.video)} video tracks")
        if not self._demuxed.table.constant_rate:
            self.notes.append("variable frame rate")
        if not self._demuxed.times_are_true:
            self.notes.append("display times mended")

    def _orientation(self, picture) -> int:
        """The display matrix is the container's, which a decoder without one does not see."""
        found = orientation_of(picture)
        if found:
            return found
        with open_container(self.path) as container:
            stream = container.streams[self._demuxed.stream.index]
            try:
                for frame in container.decode(stream):
                    return orientation_of(frame)
            except (OSError, ValueError) as error:
                raise VideoError(self.path, f"cannot be decoded ({one_line(error)})") from error
        return 0

    def _colours(self, picture) -> Colours:
        """What the written pixels mean: the source's own statements, but limited range, and no high dynamic range."""
        if self.hdr:
            return Colours(_LIMITED, _BT709, _BT709, _BT709)
        matrix = int(picture.colorspace)
        if matrix == 0 or picture.format.is_rgb:  # RGB has none; libswscale converts it with BT.601's
            matrix = 6
        return Colours(_LIMITED, int(picture.color_primaries), int(picture.color_trc), matrix)

    def shots(self) -> Iterator[Shot]:
        """Every shown frame, in display order."""
        from av.video.reformatter import VideoReformatter

        scale, every, next_sample, done = VideoReformatter(), int(SAMPLED_S * self.ticks), 0, 0
        interlaced = False
        for i, picture in self._all():
            if i != done:
                raise VideoError(self.path, f"frame {done} cannot be decoded")
            done += 1
            interlaced |= picture.interlaced_frame
            time, sample = int(self._times[i]), None
            if picture.is_corrupt:
                raise VideoError(self.path, f"is damaged at frame {i}")
            scaled = self._scaled(scale, picture)
            if time >= next_sample:
                next_sample = time + every
                sample = self._sample(picture)
            yield Shot(time, max(int(self._durations[i]), 1), scaled, sample)
        if done < self.num_frames:
            raise VideoError(self.path, f"frame {done} cannot be decoded")
        if interlaced:
            self.notes.append("interlaced: scaling blends the fields")

    def _all(self) -> Iterator[tuple[int, object]]:
        first, self._first = self._first, None
        yield first
        yield from self._pictures

    def _decoded(self) -> Iterator[tuple[int, object]]:
        """(frame number, av.VideoFrame), in the order in which the decoder puts them out."""
        import av

        table, demuxed = self._demuxed.table, self._demuxed
        number = {int(position): i for i, position in enumerate(table.display)}
        packets = iter(demuxed.held if demuxed.held is not None else demuxed.read_again())
        edges = [*table.config_starts.tolist(), table.num_packets]
        try:
            for config, start, stop in zip(table.configs, edges[:-1], edges[1:], strict=True):
                context = bare_context(demuxed.context, config, table.coded_size, self._threads)
                for _ in range(start, stop):
                    for picture in context.decode(next(packets)):
                        if picture.pts in number:
                            yield number[picture.pts], picture
                for picture in context.decode(None):
                    if picture.pts in number:
                        yield number[picture.pts], picture
        except StopIteration:
            raise VideoError(self.path, "has lost packets since it was opened") from None
        except (av.error.FFmpegError, OSError) as error:
            raise VideoError(self.path, f"cannot be decoded to its end ({one_line(error)})") from error

    def _scaled(self, scale, picture):
        """Limited-range yuv420p of the target's size, upright."""
        from av.video.reformatter import Interpolation

        height, width = upright_size(self.size, self.orientation)  # as stored
        how = {"dst_color_range": _LIMITED, "src_color_range": _range_of(picture)}
        if self.hdr:
            how |= {"dst_colorspace": _BT709, "dst_color_trc": _BT709, "dst_color_primaries": _BT709}
        scaled = scale.reformat(
            picture,
            width=width,
            height=height,
            format="yuv420p",
            threads=1,
            interpolation=Interpolation.BICUBIC | Interpolation.ACCURATE_RND,
            **how,
        )
        return _turned(scaled, self.orientation) if self.orientation else scaled

    def _sample(self, picture) -> np.ndarray | None:
        """What a reader of the raw file sees, brought to the target's size by Pillow."""
        if self.hdr:
            return None  # the plain way knows nothing of dynamic range
        from PIL import Image

        rgb = Image.fromarray(np.ascontiguousarray(self._converter.rgb(picture)))
        return np.asarray(rgb.resize((self.size[1], self.size[0]), Image.Resampling.BICUBIC))

    def close(self) -> None:
        self._pictures = iter(())
        self._container.close()


def _range_of(picture) -> int:
    full = picture.color_range == _FULL or picture.format.name.startswith("yuvj") or picture.format.is_rgb
    return _FULL if full else _LIMITED


def _rate(stream, frames: int, end: int, ticks: int) -> Fraction:
    rate = stream.average_rate or stream.guessed_rate or Fraction(frames * ticks, end)
    return Fraction(rate).limit_denominator(1001 * 60)


def _square_size(coded: tuple[int, int], picture, stream) -> tuple[int, int]:
    """The stored (height, width) with square pixels: one side of anamorphic pictures is stretched."""
    shape = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio
    if not shape or not Fraction(1, 10) <= shape <= 10:
        return coded
    height, width = coded
    return height, max(round(width * shape), 1)


def _turned(picture, orientation: int):
    """A new yuv420p picture, turned and mirrored as `orientation` says."""
    import av

    height, width = upright_size((picture.height, picture.width), orientation)
    turned = av.VideoFrame(width, height, "yuv420p")
    turned.color_range, turned.colorspace = picture.color_range, picture.colorspace
    for k, plane in enumerate(picture.planes):
        shift = int(k > 0)
        rows = np.frombuffer(plane, dtype=np.uint8).reshape(-1, plane.line_size)
        pixels = rows[: picture.height >> shift, : picture.width >> shift]
        target = turned.planes[k]
        out = np.frombuffer(target, dtype=np.uint8).reshape(-1, target.line_size)
        out[: height >> shift, : width >> shift] = upright(pixels, orientation)
    return turned
