"""Decoders that are kept from one clip to the next, because the memory of their frames costs half a millisecond to get.

What a decoder gives must never depend on what it decoded before. Flushing makes it forget all pictures, but not the
parameter sets, nor all of the messages that came with the packets: the encoder's version, that a recovery point was
seen, film grain. So only decoders of H.264 are kept, of profiles without 4:4:4 (where the version matters), and only as
long as no packet brought parameter sets, or a message that is not known to leave nothing behind.
"""

from __future__ import annotations

import os
import re
import threading
from collections import OrderedDict

from .bitstream import H264_SEI, nal_length_size, nal_units, sei_messages
from .decode import bare_context

_KEPT = 4  # decoders per process; each holds up to seventeen frames
_PROFILES = (66, 77, 88, 100, 110)  # baseline, main, extended, high, high 10
# Of NAL units: slices, access unit delimiters and filler (ITU-T H.264, table 7-1).
_HARMLESS = frozenset({1, 5, 9, 12})
# Of messages: buffering, timing, captions, the encoder's own (ITU-T H.264, D.1).
_HARMLESS_MESSAGES = frozenset({0, 1, 4, 5})
# Builds of x264 before this one coded B-frames in a way of their own, and FFmpeg decodes them by the build it has seen.
_ENCODER = re.compile(rb"x264 - core (\d+)")
_FIRST_BUILD = 152

_lock = threading.Lock()
_kept: OrderedDict[tuple, object] = OrderedDict()


class Decoder:
    """A bare decoder, and whether another clip may use it afterwards.

    codec: FFmpeg's name. config: the extradata. size: (height, width). threads: at least 1.
    """

    def __init__(self, codec: str, config: bytes, size: tuple[int, int], threads: int):
        self._key = codec, config, size
        self._length_size = nal_length_size(codec, config)
        self._reusable = codec == "h264" and threads == 1 and self._length_size > 0 and config[1] in _PROFILES
        self.context = _taken(self._key) if self._reusable else None
        if self.context is None:
            self.context = bare_context(codec, config, size, threads)

    def will_decode(self, data: bytes) -> None:
        """data: a packet that the decoder is given."""
        if self._reusable:
            self._reusable = all(_leaves_nothing(data[at:end]) for at, end in nal_units(data, self._length_size))

    def give_back(self) -> None:
        """Let others have the decoder. Everything was decoded without an error, and the decoder has been flushed."""
        if not self._reusable:
            return
        with _lock:
            _kept[self._key] = self.context
            _kept.move_to_end(self._key)
            while len(_kept) > _KEPT:
                _kept.popitem(last=False)


def _after_fork() -> None:
    """A thread that held the lock is not there in the new process to release it."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


def _leaves_nothing(unit: bytes) -> bool:
    """Whether a decoder that was given this NAL unit, and flushed, is like one that was not."""
    kind = unit[0] & 31
    if kind != H264_SEI:
        return kind in _HARMLESS
    for message, content in sei_messages(unit[1:]):
        if message not in _HARMLESS_MESSAGES:
            return False
        build = _ENCODER.search(content)
        if build and int(build[1]) < _FIRST_BUILD:
            return False
    return True


def _taken(key: tuple) -> object | None:
    with _lock:
        return _kept.pop(key, None)


def forget_decoders() -> None:
    """Release what is kept."""
    with _lock:
        _kept.clear()
