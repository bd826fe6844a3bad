"""Charades-Ego: mean average precision over classes, as the code that was released with Charades computes it."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from avion.errors import UserError


def charades_metrics(scores: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """Compute the mean average precision of a multi-label classification.

    The average precision of a class is the mean, over the videos that show the class, of the precision at their rank. A
    video that shows no class at all ranks last everywhere. Of equal scores the first video ranks first.

    Args:
        scores: (n, C), the higher the likelier.
        labels: (n, C) bool.

    Returns:
        `map`, the mean over the classes that occur, and `weighted_map`, the mean weighted by the numbers of videos.
        Fractions.

    Raises:
        UserError: The shapes differ, a score is not a number, or no class occurs.
    """
    scores, labels = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=bool)
    if scores.ndim != 2 or scores.shape != labels.shape:
        raise UserError(
            f"scores of shape {scores.shape} and labels of shape {labels.shape}: both are (videos, classes)"
        )
    if not np.isfinite(scores).all():
        raise UserError("scores: some are not numbers; evaluate with --precision fp32")
    counts = labels.sum(axis=0)
    if not counts.any():
        raise UserError("labels: no video shows any class")
    ranked = np.where(labels.any(axis=1, keepdims=True), scores, -np.inf)
    order = np.argsort(-ranked, axis=0, kind="stable")
    hits = np.take_along_axis(labels, order, axis=0)  # (n, C), by rank
    precision = hits.cumsum(axis=0) / np.arange(1, len(hits) + 1)[:, None]
    occurs = counts > 0
    average = (precision * hits).sum(axis=0)[occurs] / counts[occurs]
    return {"map": float(average.mean()), "weighted_map": float(np.average(average, weights=counts[occurs]))}
