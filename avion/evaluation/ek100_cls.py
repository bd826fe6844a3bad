"""EPIC-KITCHENS-100 action recognition: verb and noun scores from action scores, class accuracies."""

from collections.abc import Mapping, Sequence

import numpy as np

from avion.errors import UserError


def get_marginal_indexes(actions: Mapping, mode: str, num_classes: int | None = None) -> list[np.ndarray]:
    """For each verb (or noun) class, the indices of the actions that contain it.

    Args:
        actions: column name -> the class of each action, in the order of the action scores: a dict of
            sequences or a data frame with the columns "verb" and "noun".
        mode: the column, "verb" or "noun".
        num_classes: length of the result; by default the largest class among the actions, plus one.

    Returns:
        num_classes int64 arrays. That of a class which no action contains is empty.

    Raises:
        UserError: no such column, no actions, or a class outside [0, num_classes).
    """
    if mode not in actions:
        raise UserError(f"actions: no column {mode!r}, found {', '.join(map(str, actions))}")
    classes = np.asarray(list(actions[mode]))
    if classes.ndim != 1 or not len(classes) or classes.dtype.kind not in "iu":
        raise UserError(f"actions: column {mode!r} needs one integer class per action, found {classes!r:.60}")
    if num_classes is None:
        num_classes = int(classes.max()) + 1
    if classes.min() < 0 or classes.max() >= num_classes:
        raise UserError(
            f"actions: {mode} classes run from {classes.min()} to {classes.max()}, expected 0 to {num_classes - 1}"
        )
    return [np.flatnonzero(classes == c) for c in range(num_classes)]


def marginalize(probs, indexes: Sequence[np.ndarray]) -> np.ndarray:
    """Sum action probabilities into class probabilities.

    Args:
        probs: (n, actions) probabilities.
        indexes: from `get_marginal_indexes`; a class without actions scores zero.

    Returns:
        (n, len(indexes)) of the dtype of `probs`.
    """
    probs = np.asarray(probs)
    return np.stack([probs[:, np.asarray(i, dtype=np.int64)].sum(axis=1) for i in indexes], axis=1)


def get_mean_accuracy(cm) -> tuple[float, float]:
    """Mean class accuracy and accuracy over all samples, both in percent.

    Args:
        cm: (classes, classes) confusion counts, cm[true, predicted]. A class without samples counts as
            zero in the mean, as it does in AVION.

    Raises:
        UserError: not a square matrix, or without any sample.
    """
    cm = np.asarray(cm, dtype=np.float64)
    if cm.ndim != 2 or cm.shape[0] != cm.shape[1] or cm.sum() <= 0:
        raise UserError(f"confusion matrix: shape {cm.shape}, expected a square one with at least one sample")
    samples = cm.sum(axis=1)
    per_class = np.divide(cm.diagonal(), samples, out=np.zeros(len(cm)), where=samples > 0)
    return 100 * float(per_class.mean()), 100 * float(cm.trace() / cm.sum())
