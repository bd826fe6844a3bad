"""Turns the scores of windows into moments: neighbours are merged, and each part of a video is found once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .index import SearchIndex
from .rank import ranked


@dataclass(frozen=True)
class Moment:
    """A part of a video that answers a query.

    Attributes:
        video: The name of the video.
        start: The begin of the moment, in seconds.
        end: The end of the moment, in seconds.
        score: The cosine similarity of the best window.
        peak_start: The begin of the best window, in seconds.
        peak_end: The end of the best window, in seconds.
    """

    video: str
    start: float
    end: float
    score: float
    peak_start: float
    peak_end: float

    def as_dict(self) -> dict[str, Any]:
        """Return the moment as JSON values."""
        return {name: round(v, 6) if isinstance(v, float) else v for name, v in asdict(self).items()}


def find_moments(
    index: SearchIndex,
    scores: np.ndarray,
    count: int,
    *,
    longest: float = 30.0,
    videos: Sequence[int] | None = None,
) -> list[Moment]:
    """Find the best moments of a query, the best first.

    The best window that is in no moment yet begins a moment. The window before it and the window after it in the same
    video join the moment, the better one first, as long as three conditions hold: they touch the moment; their score is
    nearer to the score of the best window than to the median score of all windows; and the moment does not become
    longer than `longest`. Windows that overlap with a moment begin no other moment (non-maximum suppression).

    Args:
        index: The index.
        scores: (n,) float32, the score of each window.
        count: The largest number of moments.
        longest: The length in seconds that a moment does not exceed by merging.
        videos: The numbers of the videos to search; None: all.

    Returns:
        At most `count` moments.
    """
    median = float(np.median(scores))
    wanted = scores
    if videos is not None:
        wanted = np.full(len(scores), -np.inf, dtype=np.float32)
        for video in videos:
            rows = index.rows_of(video)
            wanted[rows.start : rows.stop] = scores[rows.start : rows.stop]
    taken: dict[int, list[tuple[float, float]]] = {}
    found: list[Moment] = []
    for peak in ranked(wanted):
        if len(found) == count:
            break
        video = index.video_of(peak)
        start, end = map(float, index.times[peak])
        others = taken.setdefault(video, [])
        if any(start < b and a < end for a, b in others):
            continue
        moment = _grown(index, scores, peak, index.rows_of(video), (float(scores[peak]) + median) / 2, longest, others)
        others.append(moment)
        found.append(Moment(index.videos[video], *moment, float(scores[peak]), start, end))
    return found


def _grown(
    index: SearchIndex,
    scores: np.ndarray,
    peak: int,
    rows: range,
    enough: float,
    longest: float,
    others: Sequence[tuple[float, float]],
) -> tuple[float, float]:
    """Return begin and end of the moment around a window."""
    start, end = map(float, index.times[peak])
    low, high = peak - 1, peak + 1
    while True:
        choices = []
        for row in (low, high):
            if row in rows and float(scores[row]) > enough:
                a, b = map(float, index.times[row])
                longer = (min(a, start), max(b, end))
                free = not any(longer[0] < d and c < longer[1] for c, d in others)
                if a <= end + 1e-6 and start <= b + 1e-6 and longer[1] - longer[0] <= longest + 1e-6 and free:
                    choices.append((float(scores[row]), row, longer))
        if not choices:
            return start, end
        _, row, (start, end) = max(choices)
        low, high = (row - 1, high) if row == low else (low, row + 1)


def listed(moments: Sequence[Moment]) -> list[str]:
    """Return moments as the lines of a table: rank, score, time, video."""
    rows = [("", "score", "time", "video")]
    rows += [
        (str(i), f"{m.score:.3f}", f"{clock(m.start)} - {clock(m.end)}", m.video) for i, m in enumerate(moments, 1)
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [f"{a:>{widths[0]}}  {b:>{widths[1]}}  {c:<{widths[2]}}  {d}".rstrip() for a, b, c, d in rows]


def clock(seconds: float) -> str:
    """Return a time in seconds as a text such as 1:02:03.4."""
    minutes, tenths = divmod(round(10 * seconds), 600)
    return f"{minutes // 60}:{minutes % 60:02d}:{tenths // 10:02d}.{tenths % 10}"
