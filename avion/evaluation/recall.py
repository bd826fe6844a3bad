"""Retrieval between videos and their captions: recall at K and ranks, both directions."""

from __future__ import annotations

import numpy as np

from avion.errors import UserError

LEVELS = (1, 5, 10)
_BLOCK = 1024  # queries at a time


def recall_metrics(similarity: np.ndarray, video_of: np.ndarray) -> dict[str, float]:
    """Return recall at 1, 5 and 10, and median and mean rank, as they are reported for MSR-VTT and similar datasets.

    A text query looks for its own video. A video query has found its text with the best of its texts. The rank is 1
    plus the number of other items that are at least as similar: equal similarities count against the query, so that a
    model that gives all pairs the same similarity finds nothing.

    Args:
        similarity: (videos, texts) float, without NaN.
        video_of: (texts,), the number of the video of each text; every video has at least one text.

    Returns:
        `vis_r1`, `vis_r5`, `vis_r10` (fractions of 1), `vis_median_rank`, `vis_mean_rank` of video queries, the same
            with `txt_` of text queries, and `avg_recall`, the mean of the six recalls.

    Raises:
        UserError: A similarity is NaN.
    """
    videos, texts = similarity.shape
    video_of = np.asarray(video_of)
    assert video_of.shape == (texts,) and len(np.unique(video_of)) == videos, "every video needs a text"
    if np.isnan(similarity).any():
        raise UserError("similarities: NaN among them; the model's features are not finite")
    found: dict[str, float] = {}
    for side, ranks in (("vis", video_ranks(similarity, video_of)), ("txt", text_ranks(similarity, video_of))):
        for level in LEVELS:
            found[f"{side}_r{level}"] = float((ranks <= level).mean())
        found[f"{side}_median_rank"], found[f"{side}_mean_rank"] = float(np.median(ranks)), float(ranks.mean())
    found["avg_recall"] = float(np.mean([found[f"{side}_r{level}"] for side in ("vis", "txt") for level in LEVELS]))
    return found


def text_ranks(similarity: np.ndarray, video_of: np.ndarray) -> np.ndarray:
    """Return the rank of each text's own video, (texts,) int64. The arguments are those of `recall_metrics`."""
    own = similarity[video_of, np.arange(similarity.shape[1])]
    ranks = [
        (similarity[:, first : first + _BLOCK] >= own[first : first + _BLOCK]).sum(axis=0)
        for first in range(0, len(own), _BLOCK)
    ]
    return np.concatenate(ranks)  # the query's own video is counted, which adds the 1


def video_ranks(similarity: np.ndarray, video_of: np.ndarray) -> np.ndarray:
    """Return the rank of the best of each video's own texts, (videos,) int64. The arguments are those of
    `recall_metrics`.
    """
    ranks = []
    for first in range(0, len(similarity), _BLOCK):
        block = similarity[first : first + _BLOCK]  # (b, texts)
        own = video_of[None] == np.arange(first, first + len(block))[:, None]
        best = np.where(own, block, -np.inf).max(axis=1, keepdims=True)
        ranks.append(1 + ((block >= best) & ~own).sum(axis=1))
    return np.concatenate(ranks)
