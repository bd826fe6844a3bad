"""Is what was written what was asked for? Pictures are compared while they are encoded, files when they are closed.

Three independent questions. (1) The packets that x264 made are decoded at once, and every picture is compared with the
one that the encoder was given. (2) Some pictures are compared with the raw frame as any reader would show it, which
notices what was wrong before encoding: orientation, colours, range. (3) The closed file is opened in the readers' way:
its frames, their times, keyframes and every coded byte are those of step 1.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from .container import Demuxed, open_container
from .decode import bare_context
from .errors import VideoError
from .packets import KEY
from .picture import Converter

# Peak signal-to-noise ratios in dB below which a picture is another one, not a coarse copy.
LEAST_PSNR = 15.0  # of one picture to what the encoder was given
LEAST_MEAN_PSNR = 20.0  # of a file
LEAST_SAMPLE_PSNR = 18.0  # of one picture to the raw frame, both at a quarter of the size
_BEST = 100.0  # dB, of pictures that are equal


@dataclass(frozen=True)
class Quality:
    """Of all pictures of a file: the mean and the least PSNR in dB, and how many were compared with the raw frame."""

    mean: float
    least: float
    samples: int


class StreamCheck:
    """Follows the encoder of one file. path: of the file, for messages. size: height, width."""

    def __init__(self, path: str, size: tuple[int, int]):
        self.path, self.size = path, size
        self.times: list[int] = []
        self.keys = 0
        self._crcs: dict[int, int] = {}
        self._waiting: dict[int, tuple] = {}
        self._decoder = None
        self._converter = Converter(size, 0)
        self._psnrs: list[float] = []
        self._samples = 0

    def expect(self, time: int, picture, sample: np.ndarray | None) -> None:
        """This av.VideoFrame goes to the encoder. sample: see `prepare_source.Shot`."""
        self.times.append(time)
        self._waiting[time] = (picture, sample)

    def packets(self, packets: Iterable, config: bytes) -> None:
        """The encoder made these packets; config: its parameter sets."""
        import av

        for packet in packets:
            if self._decoder is None:
                self._decoder = bare_context("h264", config, self.size)
            self._crcs[packet.time] = _crc(packet.data, 0)
            self.keys += packet.key
            copy = av.Packet(packet.data)
            copy.pts = copy.dts = packet.time
            self._compare(copy)

    def _compare(self, packet) -> None:
        for decoded in self._decoder.decode(packet):
            if decoded.is_corrupt or decoded.pts not in self._waiting:
                raise VideoError(self.path, f"the encoder wrote a wrong frame at {decoded.pts}")
            picture, sample = self._waiting.pop(decoded.pts)
            found = psnr(_planes(decoded), _planes(picture))
            if found < LEAST_PSNR:
                raise VideoError(self.path, f"the frame at {decoded.pts} differs from its source: PSNR {found:.1f} dB")
            self._psnrs.append(found)
            if sample is not None:
                self._compare_sample(decoded, sample)

    def _compare_sample(self, decoded, sample: np.ndarray) -> None:
        found = psnr([_quarter(self._converter.rgb(decoded))], [_quarter(sample)])
        if found < LEAST_SAMPLE_PSNR:
            reason = f"the frame at {decoded.pts} does not look like the source's: PSNR {found:.1f} dB"
            raise VideoError(self.path, reason)
        self._samples += 1

    def finish(self) -> Quality:
        """All packets have come."""
        if self._decoder is not None:
            self._compare(None)
        if self._waiting:
            raise VideoError(self.path, f"the encoder lost {len(self._waiting)} of {len(self.times)} frames")
        mean = sum(self._psnrs) / len(self._psnrs)
        if mean < LEAST_MEAN_PSNR:
            raise VideoError(self.path, f"differs from its source: mean PSNR {mean:.1f} dB")
        return Quality(mean, min(self._psnrs), self._samples)

    def check_file(self, path: str, ticks: int) -> None:
        """The closed file holds exactly these frames at these times. ticks: time units per second."""
        with open_container(path) as container:
            demuxed = Demuxed(container, path)
            table, base = demuxed.table, demuxed.stream.time_base
            length_size = (demuxed.table.configs[0][4] & 3) + 1
            stamps = np.asarray(table.pts)
            packets = demuxed.held if demuxed.held is not None else demuxed.read_again()
            crcs = [_crc(bytes(packet), length_size) for packet in packets]
        if table.num_frames != len(self.times):
            raise VideoError(path, f"holds {table.num_frames} frames, {len(self.times)} were written")
        # stamp * base == time / ticks, in whole numbers
        found = (stamps * (base.numerator * ticks)).tolist()
        due = [time * base.denominator for time in self.times]
        if sorted(found) != due:
            i = next(i for i, (a, b) in enumerate(zip(sorted(found), due, strict=True)) if a != b)
            raise VideoError(path, f"frame {i} is at another time than in the source")
        for stamp, crc in zip(found, crcs, strict=True):
            if self._crcs[stamp // base.denominator] != crc:
                raise VideoError(path, f"holds other bytes than were written, at {stamp / base.denominator / ticks} s")
        if int((np.asarray(table.flags) & KEY != 0).sum()) != self.keys:
            raise VideoError(path, "marks other keyframes than were written")


def psnr(found: list[np.ndarray], due: list[np.ndarray]) -> float:
    """Peak signal-to-noise ratio of lists of uint8 planes, in dB; at most 100."""
    squares = sum(float(np.square(a.astype(np.float32) - b).sum()) for a, b in zip(found, due, strict=True))
    mean = squares / sum(a.size for a in found)
    return min(10 * math.log10(255**2 / mean), _BEST) if mean > 0 else _BEST


def _planes(picture) -> list[np.ndarray]:
    """The planes of a yuv420p picture."""
    planes = []
    for k, plane in enumerate(picture.planes):
        rows = np.frombuffer(plane, dtype=np.uint8).reshape(-1, plane.line_size)
        planes.append(rows[: picture.height >> int(k > 0), : picture.width >> int(k > 0)])
    return planes


def _quarter(rgb: np.ndarray) -> np.ndarray:
    """Means of 4 x 4 pixels: noise and the sharpness of scaling do not count. (H, W, 3) -> (H/4, W/4, 3), uint8"""
    step = 4 if min(rgb.shape[:2]) >= 16 else 1
    height, width = (side // step * step for side in rgb.shape[:2])
    blocks = rgb[:height, :width].reshape(height // step, step, width // step, step, 3)
    return np.round(blocks.mean(axis=(1, 3))).astype(np.uint8)


def _crc(data: bytes, length_size: int) -> int:
    """CRC-32 of the slices in a packet. Start codes and lengths, parameter sets and messages may be written anew."""
    crc = 0
    for unit in _units(data, length_size):
        if unit and 1 <= unit[0] & 31 <= 5:
            crc = zlib.crc32(unit, crc)
    return crc


def _units(data: bytes, length_size: int) -> list[bytes]:
    if not length_size:
        # A start code may begin with one more zero, and a unit never ends with one.
        return [unit.rstrip(b"\0") for unit in data.split(b"\0\0\1")]
    units, at = [], 0
    while at < len(data):
        length = int.from_bytes(data[at : at + length_size], "big")
        if at + length_size + length > len(data):  # a damaged length: the unit in its whole would go unnoticed
            return []
        units.append(data[at + length_size : at + length_size + length])
        at += length_size + length
    return units
