"""Decoders that are kept from one clip to the next, because the memory of their frames costs half a millisecond to get.

What a decoder gives must never depend on what it decoded before. Flushing makes it forget all pictures, but not the
parameter sets and the encoder's version that came with the packets. So only decoders of H.264 are kept, of profiles
without 4:4:4 (where the version matters), and only as long as no packet brought parameter sets.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

from .bitstream import nal_length_size, nal_units
from .decode import bare_context

_KEPT = 4  # decoders per process; each holds up to seventeen frames
_PROFILES = (66, 77, 88, 100, 110)  # baseline, main, extended, high, high 10
# Of NAL units: slices, supplemental information, access unit delimiters and filler (ITU-T H.264, table 7-1).
_HARMLESS = frozenset({1, 5, 6, 9, 12})

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
            self._reusable = all(data[at] & 31 in _HARMLESS for at, _ in nal_units(data, self._length_size))

    def spoil(self) -> None:
        """Something went wrong: nobody else gets this decoder."""
        self._reusable = False

    def give_back(self) -> None:
        """Let others have the decoder. It has been flushed, and is not used any more."""
        if not self._reusable:
            return
        with _lock:
            _kept[self._key] = self.context
            _kept.move_to_end(self._key)
            while len(_kept) > _KEPT:
                _kept.popitem(last=False)


def _taken(key: tuple) -> object | None:
    with _lock:
        return _kept.pop(key, None)


def forget_decoders() -> None:
    """Release what is kept."""
    with _lock:
        _kept.clear()
