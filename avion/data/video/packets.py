"""What is known about a video's packets, and which of them a frame needs.

Two orders number the same frames. A *position* counts packets in decoding order, as they lie in the file; a *frame
number* counts the pictures that are shown, in display order. `PacketTable.display` leads from the second to the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .errors import VideoError

KEY, DISPOSABLE, HIDDEN = 1, 2, 4  # flags of a packet
MAX_FPS = 1000.0
# Of a frame: 8K video has half of it.
MAX_PIXELS = 2**26


@dataclass
class PacketTable:
    """The packets of one video track. The columns are arrays, or what is indexed like arrays (an index on disk).

    path: of the video, for messages. pts: (n,) int64, display times in units of `tick` seconds, by position. flags:
    (n,) uint8: KEY, decoding can begin here; DISPOSABLE, no other packet refers to it; HIDDEN, it shows nothing.
    display: (num_frames,) position of each shown frame, in display order. keys: (k,) positions of the key packets,
    ascending. offset, size: (n,) where the packet's bytes lie in the file; None where they do not lie in one piece.
    configs: codec configurations (extradata); config i holds from position config_starts[i] on. codec: FFmpeg's name.
    coded_size: (height, width) as stored. fps: the average rate. orientation: see picture.py; None: not known before
    the first picture. constant_rate: frame i is shown from i / fps on, up to half a frame. end: the time, in ticks, at
    which the last frame's display ends.
    """

    path: str
    codec: str
    coded_size: tuple[int, int]
    fps: float
    tick: float
    pts: Any
    flags: Any
    display: Any
    keys: np.ndarray
    configs: list[bytes] = field(default_factory=lambda: [b""])
    config_starts: np.ndarray = field(default_factory=lambda: np.zeros(1, dtype=np.int64))
    offset: Any = None
    size: Any = None
    orientation: int | None = None
    constant_rate: bool = True
    end: int = 0

    @property
    def num_packets(self) -> int:
        return len(self.pts)

    @property
    def num_frames(self) -> int:
        return len(self.display)

    def where(self, position: int) -> str:
        """The frame at this position, in words."""
        if self.flags[position] & HIDDEN:
            return f"packet {position}"
        stamp = self.pts[position]
        return f"frame {first_true(self.num_frames, lambda i: self.pts[self.display[i]] >= stamp)}"

    def frame_at(self, seconds: float) -> int:
        """The number of the frame that is shown `seconds` after the first one began.

        A frame is shown until the next one begins. Before the first frame it is 0. After the end of the last one it is
        `num_frames` or more, by as many frames of the average rate as the time lies after the end.
        """
        begin = int(self.pts[self.display[0]])
        stamp = begin + seconds / self.tick + 1e-3  # a time computed in floating point may lie just before a tick
        if stamp >= self.end:
            return self.num_frames + int((stamp - self.end) * self.tick * self.fps)
        return max(first_true(self.num_frames, lambda i: self.pts[self.display[i]] > stamp) - 1, 0)

    def seconds_of(self, frame: int) -> float:
        """When this frame begins, counted from the beginning of the first one.

        Frames after the last one go on at the average rate.
        """
        begin = int(self.pts[self.display[0]])
        if frame >= self.num_frames:
            return (self.end - begin) * self.tick + (frame - self.num_frames) / self.fps
        return (int(self.pts[self.display[frame]]) - begin) * self.tick

    def runs(self, frames: Sequence[int], keys_back: int = 0) -> list[tuple[int, int]]:
        """The stretches [start, stop) of positions that decode these frames (ascending): from the key packet before
        each of them, or from `keys_back` key packets earlier, up to its own. Stretches that touch become one."""
        runs: list[tuple[int, int]] = []
        for i in frames:
            position = int(self.display[i])
            k = int(np.searchsorted(self.keys, position, side="right")) - 1
            stamp = self.pts[position]
            while k >= 0 and self.pts[self.keys[k]] > stamp:  # decoded later than the key packet, but shown before it
                k -= 1
            if k < 0:
                raise VideoError(self.path, f"frame {i} comes before the first keyframe")
            start, stop = int(self.keys[max(k - keys_back, 0)]), position + 1
            if runs and start <= runs[-1][1]:
                runs[-1] = (min(runs[-1][0], start), max(runs[-1][1], stop))
            else:
                runs.append((start, stop))
        return runs

    def config_at(self, position: int) -> int:
        """The number of the configuration that a packet is coded with."""
        if len(self.configs) == 1:
            return 0
        return int(np.searchsorted(self.config_starts, position, side="right")) - 1

    def split_by_config(self, start: int, stop: int) -> list[tuple[int, int]]:
        """[start, stop) cut where the codec configuration changes."""
        if len(self.configs) == 1:
            return [(start, stop)]
        inner = [int(c) for c in self.config_starts if start < c < stop]
        edges = [start, *inner, stop]
        return list(zip(edges[:-1], edges[1:], strict=True))


def first_true(count: int, holds) -> int:
    """The smallest i in [0, count) for which `holds(i)`, which is False up to there and True from there on."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low


def is_constant_rate(seconds: np.ndarray, fps: float) -> bool:
    """Whether frame i begins within half a frame of i / fps. seconds: (n,) display times, ascending."""
    due = np.arange(len(seconds)) / fps
    return bool(np.abs(seconds - seconds[0] - due).max() < 0.5 / fps)
