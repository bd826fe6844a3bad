"""Which frames of a video make a clip."""

from __future__ import annotations

import numpy as np

from avion.errors import UserError

from .reader import VideoReader

SAMPLINGS = ("uniform", "strided")


def uniform_frame_ids(start: int, end: int, num_frames: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """Frames of [start, end) cut into `num_frames` equal segments: each one's middle, truncated to an integer.

    With `rng` each is moved by up to half a segment either way, a segment then being (end - start - 1) /
    num_frames long, so that no frame leaves the span (AVION's and LaViLa's rule). -> (num_frames,) int64
    """
    edges = np.linspace(start, end, num_frames + 1)
    middles = (edges[:-1] + edges[1:]) / 2
    if rng is not None:
        middles += (rng.random(num_frames) - 0.5) * (end - start - 1) / num_frames
    return middles.astype(np.int64)


def strided_frame_ids(
    start: int, end: int, num_frames: int, stride: int, rng: np.random.Generator | None = None
) -> np.ndarray:
    """`num_frames` frames, `stride` apart, in the middle of [start, end); with `rng` anywhere inside it.

    A window longer than the span stays centred on it, and begins at frame 0 at the earliest.
    -> (num_frames,) int64
    """
    room = (end - start) - ((num_frames - 1) * stride + 1)
    offset = int(rng.integers(room + 1)) if rng is not None and room > 0 else room // 2
    return max(start + offset, 0) + stride * np.arange(num_frames, dtype=np.int64)


def clip_frame_ids(
    start: float,
    end: float,
    fps: float,
    num_frames: int,
    rng: np.random.Generator | None,
    sampling: str,
    stride: int,
    views: int = 1,
) -> np.ndarray:
    """Frame numbers in the whole video, those of each view ascending. -> (views · num_frames,) int64"""
    if num_frames < 1 or stride < 1 or views < 1:
        raise UserError(f"clip length {num_frames}, clip stride {stride} and views {views} must be at least 1")
    assert rng is None or views == 1, "several views are for evaluation, which draws nothing"
    first = max(round(start * fps), 0)
    last = max(round(end * fps), first + num_frames)
    if sampling == "uniform":
        return uniform_frame_ids(first, last, num_frames * views, rng).reshape(num_frames, views).T.ravel()
    if sampling == "strided":
        middle = strided_frame_ids(first, last, num_frames, stride, rng)
        if views == 1:
            return middle
        room = max((last - first) - ((num_frames - 1) * stride + 1), 0)
        offsets = [(2 * v + 1) * room // (2 * views) - room // 2 for v in range(views)]
        return np.concatenate([middle + offset for offset in offsets])
    raise UserError(f"frame sampling: {sampling!r} is not one of {', '.join(SAMPLINGS)}")


def clip_seconds(
    start: float,
    end: float,
    reader: VideoReader,
    num_frames: int,
    rng: np.random.Generator | None,
    sampling: str,
    stride: int,
    views: int = 1,
    offset: float = 0.0,
) -> np.ndarray:
    """The same for a video whose frames are shown for unequal times: when to look, in seconds of the whole video.

    Segments are of equal time, and each one's middle is a moment. Where the span has too few frames for that, and in
    strided sampling, frames are counted as in `clip_frame_ids`. reader: of the file that holds `start`. offset: the
    second of the video at which that file begins. -> (views · num_frames,) float64
    """
    start = max(start, 0.0)
    first, last = reader.frame_at(start - offset), reader.frame_at(end - offset)
    if sampling == "uniform" and last - first >= num_frames:
        count = num_frames * views
        edges = np.linspace(start, end, count + 1)
        moments = (edges[:-1] + edges[1:]) / 2
        if rng is not None:
            moments += (rng.random(count) - 0.5) * max(end - start - 1 / reader.fps, 0.0) / count
        return moments.reshape(num_frames, views).T.ravel()
    ids = clip_frame_ids(first, max(last, first), 1.0, num_frames, rng, sampling, stride, views)
    return offset + np.array([reader.seconds_of(int(i)) for i in ids])
