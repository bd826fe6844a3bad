"""Decoding the frames that are wanted, and of the others only what they need.

A run goes from the keyframe before a wanted frame to that frame. Frames that no other frame refers to and nobody wants
(about half of x264's default output) are left out. Each packet carries its position as its time, so that every picture
that comes out of the decoder says which frame it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Protocol

from .errors import VideoError, one_line
from .packets import DISPOSABLE, PacketTable

# Codecs of which the packets and the configuration are all that decoding needs. MPEG-4 Visual is none of them: without
# its container, the decoder takes whole pictures for damaged ones.
BARE_CODECS = ("h264", "hevc", "vp8", "vp9", "av1", "mjpeg")


_DECODERS = {"av1": "libdav1d"}  # FFmpeg's own decoder of that name needs a GPU
_LONGEST_RUN = 2**21  # packets: ten hours without a keyframe


class PacketSource(Protocol):
    """Where packets come from, and the decoder that they go to."""

    def context(self, config: int):
        """A flushed codec context for the codec configuration of this number."""

    def expect(self, positions: list[int]) -> None:
        """The packets at these ascending positions will be asked for, one stretch of them after the other."""

    def packets(self, positions: Sequence[int]) -> Iterator:
        """The av.Packets at these ascending positions, each with its position as its time."""


def bare_context(codec, config: bytes, size: tuple[int, int], threads: int = 1):
    """A decoder that no container feeds.

    codec: an av.Codec's name, or an av codec context of the same stream. config: its extradata. size: (height, width),
    for codecs whose packets do not say it.
    """
    import av

    name = _DECODERS.get(codec, codec) if isinstance(codec, str) else codec.codec
    context = av.CodecContext.create(name, "r")
    if config:
        context.extradata = config
    if not isinstance(codec, str):
        context.codec_tag = codec.codec_tag
    context.height, context.width = size
    if context.name == "h264":
        # Where the stream does not say how many pictures it reorders, assume the most, or early ones would be dropped.
        context.options = {"strict": "1"}
    context.thread_count = threads
    context.thread_type = "NONE" if threads == 1 else "FRAME"
    return context


def pictures(table: PacketTable, frames: Sequence[int], source: PacketSource) -> Iterator[tuple[int, object]]:
    """Decode the frames of these numbers: ascending, distinct and in range -> (number, av.VideoFrame), mostly in
    ascending order. Raises VideoError, at the latest after the last one, where a frame cannot be decoded intact."""
    missing = {int(table.display[i]): int(i) for i in frames}  # position -> frame number
    # Twice more for what is then still missing: a stream may rely on the skipped frames for its output order,
    # and one without true keyframes (intra refresh) needs what lies before the last of them.
    for skip, keys_back in ((True, 0), (False, 0), (False, 2)):
        if not missing:
            return
        stretches = []
        for run in table.runs(sorted(missing.values()), keys_back):
            if run[1] - run[0] > _LONGEST_RUN:
                raise VideoError(table.path, f"has no keyframe within {_LONGEST_RUN} frames before a wanted one")
            for start, stop in table.split_by_config(*run):
                stretches.append((start, _sent(table, start, stop, missing, skip)))
        source.expect([position for _, sent in stretches for position in sent])
        for start, sent in stretches:
            yield from _decode_run(table, start, sent, missing, source)
    if missing:
        raise VideoError(table.path, f"frame {min(missing.values())} cannot be decoded")


def _decode_run(
    table: PacketTable, start: int, sent: list[int], missing: dict[int, int], source: PacketSource
) -> Iterator[tuple[int, object]]:
    """Decode the packets at the positions `sent`, of which `start` is the keyframe: (number, picture) of the frames in
    `missing`, which are then taken out of it."""
    import av

    context = source.context(table.config_at(start))
    first_shown = table.pts[start]
    try:
        for packet in chain(source.packets(sent), (None,)):
            for picture in context.decode(packet):
                position = picture.pts
                if position not in missing and not picture.is_corrupt:
                    continue
                if position is None or table.pts[position] < first_shown:
                    continue  # shown before the keyframe, refers to frames that were not decoded
                if picture.is_corrupt:
                    raise VideoError(table.path, f"is damaged at {table.where(position)}")
                yield missing.pop(position), picture
    except av.error.FFmpegError as error:
        raise VideoError(table.path, f"cannot be decoded after {table.where(start)} ({one_line(error)})") from error
    finally:
        context.flush_buffers()


def _sent(table: PacketTable, start: int, stop: int, missing: dict[int, int], skip: bool) -> list[int]:
    """The positions of [start, stop) that the decoder is given."""
    if not skip:
        return list(range(start, stop))
    flags = table.flags[start:stop]
    return [start + k for k, flag in enumerate(flags.tolist()) if not flag & DISPOSABLE or start + k in missing]
