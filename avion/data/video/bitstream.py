"""What the first bytes of a packet say: whether it shows a picture, whether others refer to it, and whether the stream
shows pictures in another order than it codes them.

Sources: ITU-T H.264 7.3.1 and 7.3.3, H.265 7.3.1.2 and 7.4.2.2, RFC 6386 9.1 (VP8), the VP9 bitstream specification 6.2
and annex B, ISO/IEC 14496-2 6.2.5 (MPEG-4 Visual), ISO/IEC 13818-2 6.2.3 (MPEG-2).
"""

from __future__ import annotations

from collections.abc import Iterator

from .packets import DISPOSABLE, HIDDEN

# Codecs that always show pictures in the order in which they are coded.
IN_ORDER = frozenset({"vp8", "vp9", "av1", "mjpeg", "prores", "dnxhd", "ffv1", "huffyuv", "rawvideo", "png", "theora"})

H264_SEI, _HEVC_SEI = 6, 39  # kinds of NAL units: supplemental enhancement information, before the picture
_DISPLAY_ORIENTATION = 47  # ITU-T H.264 D.1, and H.265 D.2.1: of its messages


class PacketReader:
    """Reads the flags of the packets of one stream.

    codec: FFmpeg's name. config: the stream's extradata, which says how H.264 and HEVC packets are cut into NAL units.
    reorders: a packet so far was of a kind that may be shown later than one which follows it.
    turns: a packet so far says how pictures are to be turned. FFmpeg hands this on with that packet's picture alone.
    """

    def __init__(self, codec: str, config: bytes):
        self.codec = codec
        self.reorders = self.turns = False
        self._length_size = nal_length_size(codec, config)
        self._layers: list[int] = []  # HEVC: temporal layer of each packet
        self._read = {"h264": self._h264, "hevc": self._hevc, "vp8": _vp8, "vp9": _vp9, "mpeg4": self._mpeg4}.get(
            codec, self._mpeg2 if codec in ("mpeg1video", "mpeg2video") else None
        )
        if self._read is None and codec not in IN_ORDER:
            self.reorders = True  # nothing is known about it

    def flags(self, data: bytes) -> int:
        """DISPOSABLE and HIDDEN, as far as they can be told. data: a whole packet."""
        try:
            return self._read(data) if self._read is not None else 0
        except (IndexError, ValueError):  # cut short or damaged: the decoder will say so
            return 0

    def correct(self, flags: list[int]) -> None:
        """Take back, of all the packets' flags, what the rest of the stream contradicts.

        In HEVC a picture of a lower temporal layer that its own layer does not refer to may serve a higher layer.
        """
        if self.codec == "hevc" and self._layers and min(self._layers) != max(self._layers):
            top = max(self._layers)
            for i, layer in enumerate(self._layers):
                if layer < top:
                    flags[i] &= ~DISPOSABLE

    def _h264(self, data: bytes) -> int:
        referred = shown = False
        kinds = []
        for at, end in nal_units(data, self._length_size):
            kind = data[at] & 31
            kinds.append(kind)
            if 1 <= kind <= 5:
                shown = True
                referred |= bool(data[at] >> 5 & 3)
                if kind == 1 and not self.reorders:
                    self.reorders = _h264_slice_type(data[at + 1 : at + 9]) == 1  # B
                if referred:
                    break
            elif kind == H264_SEI:
                self._read_messages(data[at + 1 : end])
        if not shown:  # parameter sets and messages; anything else is damage, which the decoder will tell
            return HIDDEN if kinds and all(6 <= kind <= 12 for kind in kinds) else 0
        return 0 if referred else DISPOSABLE

    def _hevc(self, data: bytes) -> int:
        units = list(nal_units(data, self._length_size))
        kinds = [(data[at] >> 1 & 63, (data[at + 1] & 7) - 1) for at, _end in units]
        slices = [(kind, layer) for kind, layer in kinds if kind < 32]
        self._layers.append(slices[0][1] if slices else 0)
        for (kind, _), (at, end) in zip(kinds, units, strict=True):
            if kind == _HEVC_SEI:
                self._read_messages(data[at + 2 : end])
        if not slices:
            return HIDDEN if kinds and all(32 <= kind <= 40 for kind, _ in kinds) else 0
        return DISPOSABLE if all(kind < 16 and kind % 2 == 0 for kind, _ in slices) else 0

    def _read_messages(self, body: bytes) -> None:
        self.turns = self.turns or any(message == _DISPLAY_ORIENTATION for message, _ in sei_messages(body))

    def _mpeg4(self, data: bytes) -> int:
        pictures = 0
        at = data.find(b"\x00\x00\x01\xb6")
        while at >= 0:
            pictures += 1
            self.reorders |= data[at + 4] >> 6 == 2  # a B-VOP
            at = data.find(b"\x00\x00\x01\xb6", at + 4)
        self.reorders |= pictures > 1  # a packed bitstream: one packet holds what two show
        return 0

    def _mpeg2(self, data: bytes) -> int:
        at = data.find(b"\x00\x00\x01\x00")
        if at >= 0:
            self.reorders |= data[at + 5] >> 3 & 7 == 3  # a B-picture
        return 0


def nal_length_size(codec: str, config: bytes) -> int:
    """Bytes of the length before each NAL unit; 0 where start codes separate them."""
    if codec == "h264" and len(config) > 6 and config[0] == 1:
        return (config[4] & 3) + 1
    if codec == "hevc" and len(config) > 22 and config[:3] not in (b"\x00\x00\x00", b"\x00\x00\x01"):
        return (config[21] & 3) + 1
    return 0


def nal_units(data: bytes, length_size: int) -> Iterator[tuple[int, int]]:
    """Where each NAL unit begins and ends, its length or start code left out."""
    if length_size:
        at, total = 0, len(data)
        while at + length_size < total:
            length = int.from_bytes(data[at : at + length_size], "big")
            at += length_size
            if length:
                yield at, min(at + length, total)
            at += length
        return
    at = data.find(b"\x00\x00\x01")
    while 0 <= at < len(data) - 3:
        following = data.find(b"\x00\x00\x01", at + 3)
        yield at + 3, following if following >= 0 else len(data)
        at = following


def sei_messages(body: bytes) -> Iterator[tuple[int, bytes]]:
    """The kind and the content of each message of supplemental information (ITU-T H.264 and H.265, 7.3.2.3).

    body: a NAL unit without its header.
    """
    body, at = body.replace(b"\x00\x00\x03", b"\x00\x00"), 0
    while at + 2 < len(body):  # the last byte ends the unit
        numbers = []
        for _ in ("kind", "length"):  # each a sum of bytes, of which all but the last are 255
            number = 0
            while at < len(body) - 1 and body[at] == 255:
                number, at = number + 255, at + 1
            numbers.append(number + body[at])
            at += 1
            if at == len(body):
                return  # cut short
        kind, length = numbers
        yield kind, body[at : at + length]
        at += length


def _h264_slice_type(header: bytes) -> int:
    """0 P, 1 B, 2 I, 3 SP, 4 SI. header: the bytes after the NAL unit's first."""
    bits = int.from_bytes(header.replace(b"\x00\x00\x03", b"\x00\x00"), "big")
    left = 8 * len(header.replace(b"\x00\x00\x03", b"\x00\x00"))
    values = []
    for _ in range(2):  # first_mb_in_slice, slice_type: Exp-Golomb
        zeros = 0
        while left > 0 and not bits >> (left - 1) & 1:
            zeros, left = zeros + 1, left - 1
        if left < zeros + 1:
            raise ValueError("cut short")
        left -= zeros + 1
        values.append((bits >> left & ((1 << (zeros + 1)) - 1)) - 1)
    return values[1] % 5


def _vp8(data: bytes) -> int:
    return 0 if data[0] >> 4 & 1 else HIDDEN


def _vp9(data: bytes) -> int:
    return 0 if any(_vp9_shows(data[at]) for at in _vp9_frames(data)) else HIDDEN


def _vp9_frames(data: bytes) -> list[int]:
    """Where the frames of a superframe begin."""
    marker = data[-1]
    if marker >> 5 != 0b110:
        return [0]
    count, width = (marker & 7) + 1, (marker >> 3 & 3) + 1
    index = data[-(2 + count * width) :]
    if len(index) < 2 + count * width or index[0] != marker:
        return [0]
    starts, at = [], 0
    for k in range(count):
        starts.append(at)
        at += int.from_bytes(index[1 + k * width : 1 + (k + 1) * width], "little")
    return starts


def _vp9_shows(first: int) -> bool:
    profile_3 = first >> 4 & 3 == 3
    bits = first << 1 & 0xFF if profile_3 else first
    return bool(bits >> 3 & 1) or bool(bits >> 1 & 1)  # show_existing_frame, or show_frame after frame_type
