"""Encoding for random access: H.264 of which any frame is decoded at the cost of a few others.

Between two keyframes lie anchors, each of which refers to what lies before it, and between the anchors B-frames that no
other frame refers to. A reader leaves out the B-frames that it does not want. `benchmarks/bench_encoding.py` measured
the default against a dozen others; docs/data.md shows the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from avion.errors import UserError

PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow")


@dataclass(frozen=True)
class Encoding:
    """How x264 writes.

    gop: frames from one keyframe to the next, at most. bframes: B-frames between two anchors. refs: anchors that a
    frame may refer to. cabac: entropy coding with CABAC, which is smaller, instead of CAVLC, which is faster to read.
    deblock: smooth the edges of blocks, which costs the reader time. crf: x264's constant quality, 0 to 51, lower is
    better. preset: x264's effort.
    """

    gop: int = 21
    bframes: int = 3
    refs: int = 1
    cabac: bool = False
    deblock: bool = False
    crf: float = 23.0
    preset: str = "medium"

    def __post_init__(self):
        for name, low, high in (("gop", 1, 1000), ("bframes", 0, 16), ("refs", 1, 16), ("crf", 0, 51)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise UserError(f"--{name} {value:g}: must be from {low} to {high}")
        if self.preset not in PRESETS:
            raise UserError(f"--preset {self.preset}: is not one of {', '.join(PRESETS)}")

    def options(self) -> dict[str, str]:
        """The options of FFmpeg's libx264."""
        # b-adapt=0: always as many B-frames, or fewer frames could be left out. A scene cut gets no keyframe of its
        # own: the next one is near. The weighting of references helps fades, and every reader pays for it.
        settings = {
            "keyint": self.gop,
            "min-keyint": 1,
            "scenecut": 0,
            "bframes": self.bframes,
            "b-adapt": 0,
            "b-pyramid": "none",
            "open-gop": 0,
            "ref": self.refs,
            "cabac": int(self.cabac),
            "weightp": 0,
            "weightb": 0,
            "mbtree": int(self.gop > 1),
            "rc-lookahead": 40,
        }
        if not self.deblock:
            settings["no-deblock"] = 1
        listed = ":".join(f"{name}={value}" for name, value in settings.items())
        # a53cc: closed captions of the source are no part of the pictures.
        return {"crf": f"{self.crf:g}", "preset": self.preset, "x264-params": listed, "a53cc": "0"}


@dataclass(frozen=True)
class Colours:
    """FFmpeg's numbers of what pixel values mean; 2 is "not stated", and 0 of the range is."""

    range: int = 1
    primaries: int = 2
    transfer: int = 2
    matrix: int = 2


class Encoder:
    """One MP4 file, written frame by frame.

    path: of the file. size: height, width, both even. ticks: time units per second. rate: frames per second, which x264
    shares out the bits by. encoding, colours: as above. threads: of x264.
    """

    def __init__(
        self,
        path: str,
        size: tuple[int, int],
        ticks: int,
        rate: Fraction,
        encoding: Encoding,
        colours: Colours = Colours(),
        threads: int = 1,
    ):
        import av

        # Without the movie's own time scale, a first frame that begins after 0 would be moved to the millisecond.
        options = {"movie_timescale": str(ticks), "movflags": "+faststart"}
        self._time_base = Fraction(1, ticks)
        self._durations: dict[int, int] = {}
        self._container = av.open(path, "w", format="mp4", options=options)
        try:
            stream = self._container.add_stream("libx264", rate=rate, options=encoding.options())
            stream.height, stream.width = size
            stream.pix_fmt = "yuv420p"
            context = stream.codec_context
            context.time_base = self._time_base
            context.thread_count = threads
            context.color_range, context.color_primaries = colours.range, colours.primaries
            context.color_trc, context.colorspace = colours.transfer, colours.matrix
        except BaseException:
            self._container.close()
            raise
        self._stream = stream

    @property
    def config(self) -> bytes:
        """Parameter sets, with start codes; known once the first frame was added."""
        return bytes(self._stream.codec_context.extradata or b"")

    def add(self, picture, time: int, duration: int) -> list:
        """picture: an av.VideoFrame in yuv420p; time, duration: in ticks. -> the packets that are ready (av.Packet)"""
        picture.pts, picture.time_base = time, self._time_base
        picture.pict_type = 0  # or x264 would repeat the kinds of frames of the source
        self._durations[time] = duration
        return list(self._mux(self._stream.encode(picture)))

    def close(self) -> list:
        """Write what is left. -> the last packets"""
        packets = list(self._mux(self._stream.encode(None)))
        self._container.close()
        return packets

    def abandon(self) -> None:
        """Close the file as it is, to be removed."""
        self._container.close()

    def _mux(self, packets) -> Iterator:
        for packet in packets:
            packet.duration = self._durations.pop(packet.pts)
            data = _Written(bytes(packet), packet.pts, packet.is_keyframe)
            self._container.mux(packet)  # afterwards the packet is empty
            yield data


@dataclass(frozen=True)
class _Written:
    """A packet as x264 made it: NAL units behind start codes; its display time in ticks; whether it is a keyframe."""

    data: bytes
    time: int
    key: bool
