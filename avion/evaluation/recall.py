"""Retrieval between videos and their captions: recall at K and ranks, both directions."""

from __future__ import annotations

import numpy as np

from avion.errors import UserError

LEVELS = (1, 5, 10)
_BLOCK = 1024  # queries at a time


def recall_metrics(similarity: np.ndarray, video_of: np.ndarray) -> dict[str, float]:
    """Recall at 1, 5 and 10, median and mean rank, as MSR-VTT and its like are reported.

    A text query looks for its own video. A video query has found its text with the best of its texts. The rank is 1
    plus the number of others that are as similar or more: equal similarities count against the query, so that a model
    that tells nothing apart finds nothing.

    Args:
        similarity: (videos, texts), float. No NaN.
        video_of: (texts,), the number of the video of each text; every video has at least one.

    Returns:
        `vis_r1`, `vis_r5`, `vis_r10` (shares of 1), `vis_median_rank`, `vis_mean_rank` of video queries, the same with
        `txt_` of text queries, and `avg_recall`, the mean of the six recalls.

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
    """The rank of each text's own video. Shapes as in `recall_metrics` -> (texts,) int64"""
    own = similarity[video_of, np.arange(similarity.shape[1])]
    ranks = [
        (similarity[:, first : first + _BLOCK] >= own[first : first + _BLOCK]).sum(axis=0)
        for first in range(0, len(own), _BLOCK)
    ]
    return np.concatenate(ranks)  # the own one is counted, as the 1


def video_ranks(similarity: np.ndarray, video_of: np.ndarray) -> np.ndarray:
    """The rank of the best of each video's own texts. Shapes as in `recall_metrics` -> (videos,) int64"""
    ranks = []
    for first in range(0, len(similarity), _BLOCK):
        block = similarity[first : first + _BLOCK]  # (b, texts)
        own = video_of[None] == np.arange(first, first + len(block))[:, None]
        best = np.where(own, block, -np.inf).max(axis=1, keepdims=True)
        ranks.append(1 + ((block >= best) & ~own).sum(axis=1))
    return np.concatenate(ranks)
