"""Zero-shot classification into one class: EGTEA and EPIC-KITCHENS-100 actions, as LaViLa judges them."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from avion.evaluation.ek100_cls import label_ranks, mean_class_accuracy
from avion.evaluation.vectors import unit


def best_view_scores(clips: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Score clips of several views: the largest cosine over the views counts (LaViLa).

    Args:
        clips: (n, V, E) features of any length.
        classes: (C, E), each row of length 1.

    Returns:
        (n, C) float32.
    """
    scores = np.empty((len(clips), len(classes)), dtype=np.float32)
    for i, views in enumerate(clips):  # a clip at a time: of a large set, all views of all clips would not fit
        scores[i] = (unit(views, None) @ classes.T).max(axis=0)
    return scores


def class_metrics(scores: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """Compute `top1`, `top5` and `mean_class`, the mean over the classes that occur of their shares of right clips.

    Args:
        scores: (n, C). Of equal scores the class of the lower number is first.
        labels: (n,) int; -1 stands for a class that is not among the C and counts as wrong.

    Returns:
        Fractions.

    Raises:
        UserError: Shapes do not fit, or a score is not a number.
    """
    labels = np.asarray(labels)
    ranks = label_ranks(scores, labels)
    return {
        "top1": float((ranks < 1).mean()),
        "top5": float((ranks < min(5, np.shape(scores)[1])).mean()),
        "mean_class": mean_class_accuracy(ranks, labels),
    }
