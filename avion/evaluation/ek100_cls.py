"""EPIC-KITCHENS-100 action recognition: verb and noun scores from action scores, accuracies on the official subsets."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from avion.constants import EK100_NOUNS, EK100_VERBS
from avion.errors import UserError

KINDS = ("verb", "noun", "action")
_ROWS_AT_ONCE = 1024


def get_marginal_indexes(
    actions: Mapping[str, Iterable[int]], mode: str, num_classes: int | None = None
) -> list[np.ndarray]:
    """For each verb (or noun) class, return the indices of the actions that contain the class.

    Args:
        actions: The class of each action by column name, in the order of the action scores: a dict of sequences or a
            data frame with the columns "verb" and "noun".
        mode: The column, "verb" or "noun".
        num_classes: The length of the result; by default the largest class among the actions, plus one.

    Returns:
        num_classes int64 arrays. The array of a class that no action contains is empty.

    Raises:
        UserError: There is no such column, there are no actions, or a class is outside [0, num_classes).
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


def marginalize(probs: ArrayLike, indexes: Sequence[np.ndarray]) -> np.ndarray:
    """Sum action probabilities into class probabilities.

    Args:
        probs: Probabilities, (n, actions).
        indexes: What `get_marginal_indexes` returned; a class without actions scores zero.

    Returns:
        (n, len(indexes)) in the dtype of `probs`.
    """
    probs = np.asarray(probs)
    return np.stack([probs[:, np.asarray(i, dtype=np.int64)].sum(axis=1) for i in indexes], axis=1)


def get_mean_accuracy(cm: ArrayLike) -> tuple[float, float]:
    """Return the mean class accuracy and the accuracy over all samples, both in percent.

    Args:
        cm: The confusion counts, (classes, classes), cm[true, predicted]. A class without samples counts as zero in the
            mean, as in AVION.

    Raises:
        UserError: `cm` is not a square matrix, or has no samples.
    """
    cm = np.asarray(cm, dtype=np.float64)
    if cm.ndim != 2 or cm.shape[0] != cm.shape[1] or cm.sum() <= 0:
        raise UserError(f"confusion matrix: shape {cm.shape}, expected a square one with at least one sample")
    samples = cm.sum(axis=1)
    per_class = np.divide(cm.diagonal(), samples, out=np.zeros(len(cm)), where=samples > 0)
    return 100 * float(per_class.mean()), 100 * float(cm.trace() / cm.sum())


def label_ranks(scores: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """Count how many classes score above the right class: 0 is top-1. Of equal scores the lower class comes first.

    Args:
        scores: (n, classes); larger is better.
        labels: (n,) int; -1 is a class that has no score, and ranks behind all classes.

    Returns:
        (n,) int64.

    Raises:
        UserError: A label is no class, or the scores are not numbers.
    """
    scores, labels = np.asarray(scores), np.asarray(labels)
    if scores.ndim != 2 or labels.shape != scores.shape[:1] or labels.dtype.kind not in "iu":
        raise UserError(f"scores of shape {scores.shape} need one whole number per row as label, found {labels.shape}")
    count = scores.shape[1]
    if len(labels) and not -1 <= labels.min() <= labels.max() < count:
        raise UserError(f"labels run from {labels.min()} to {labels.max()}, the scores have {count} classes")
    ranks = np.empty(len(scores), dtype=np.int64)
    for first in range(
        0, len(scores), _ROWS_AT_ONCE
    ):  # what counts is the memory of the comparisons, not the size of the scores
        block, own = scores[first : first + _ROWS_AT_ONCE], labels[first : first + _ROWS_AT_ONCE, None]
        if not np.isfinite(block).all():
            row = first + int(np.flatnonzero(~np.isfinite(block).all(axis=1))[0])
            raise UserError(f"scores: row {row} holds values that are not numbers; evaluate with --precision fp32")
        right = np.take_along_axis(block, np.maximum(own, 0), axis=1)
        ahead = (block > right) | ((block == right) & (np.arange(count) < own))
        ranks[first : first + _ROWS_AT_ONCE] = np.where(own[:, 0] < 0, count, ahead.sum(axis=1))
    return ranks


def mean_class_accuracy(ranks: ArrayLike, labels: ArrayLike) -> float:
    """Return the mean over classes of the share of right samples, a fraction. Classes without samples do not count.

    Args:
        ranks: What `label_ranks` returned, (n,).
        labels: (n,) int, at least 0.
    """
    _, classes = np.unique(np.asarray(labels), return_inverse=True)
    right = np.bincount(classes, weights=np.asarray(ranks) == 0)
    return float((right / np.bincount(classes)).mean())


def action_metrics(
    probs: ArrayLike,
    actions: tuple[np.ndarray, np.ndarray],
    verb_class: ArrayLike,
    noun_class: ArrayLike,
    *,
    tail_verbs: ArrayLike | None = None,
    tail_nouns: ArrayLike | None = None,
    unseen: ArrayLike | None = None,
) -> dict[str, float]:
    """Return the accuracies of verbs, nouns and actions, overall and on EPIC's official subsets.

    Verb and noun scores are sums of action probabilities (`marginalize`).

    Args:
        probs: Action probabilities, (n, actions).
        actions: The verb class and the noun class of each action, (actions,) int each.
        verb_class: The right verb classes, (n,) int. An action that is not among `actions` counts as not found.
        noun_class: The right noun classes, (n,) int.
        tail_verbs: Class numbers of the tail verbs. An action is a tail action if its verb or its noun is a tail class.
        tail_nouns: Class numbers of the tail nouns.
        unseen: (n,) bool, the clips of participants who are not in the training data.

    Returns:
        Fractions. For each kind of verb, noun and action: `{kind}_top1`, `{kind}_top5`, `{kind}_mean_class`. Where the
            lists are given, also `tail_{kind}_top1` and `tail_{kind}_top5` (of clips whose class is in the tail;
            actions need both lists) and `unseen_{kind}_...`, with `tail_{kind}_clips` and `unseen_clips`. A subset
            without clips has its count only.

    Raises:
        UserError: There are no clips, shapes do not fit, a class does not exist, or scores are not numbers.
    """
    probs = np.asarray(probs)
    verb_class, noun_class = np.asarray(verb_class), np.asarray(noun_class)
    columns = {"verb": np.asarray(actions[0]), "noun": np.asarray(actions[1])}
    if probs.ndim != 2 or not len(probs) or probs.shape[1] != len(columns["verb"]):
        raise UserError(f"probabilities: shape {probs.shape}, expected clips x {len(columns['verb'])} actions")
    place = {(int(v), int(n)): i for i, (v, n) in enumerate(zip(columns["verb"], columns["noun"], strict=True))}
    own = [place.get((int(v), int(n)), -1) for v, n in zip(verb_class, noun_class, strict=True)]
    verbs, nouns = action_marginals(probs, actions)
    ranks = {
        "verb": label_ranks(verbs, verb_class),
        "noun": label_ranks(nouns, noun_class),
        "action": label_ranks(probs, np.array(own, dtype=np.int64)),
    }
    labels = {"verb": verb_class, "noun": noun_class, "action": verb_class * EK100_NOUNS + noun_class}
    metrics: dict[str, float] = {}
    for kind in KINDS:
        metrics |= _top(f"{kind}_", ranks[kind])
        metrics[f"{kind}_mean_class"] = mean_class_accuracy(ranks[kind], labels[kind])
    for kind, rows in _tail_rows(verb_class, noun_class, tail_verbs, tail_nouns).items():
        metrics |= _top(f"tail_{kind}_", ranks[kind][rows]) | {f"tail_{kind}_clips": int(rows.sum())}
    if unseen is not None:
        rows = np.asarray(unseen, dtype=bool)
        metrics |= {name: value for kind in KINDS for name, value in _top(f"unseen_{kind}_", ranks[kind][rows]).items()}
        metrics["unseen_clips"] = int(rows.sum())
    return metrics


def action_marginals(probs: ArrayLike, actions: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return verb scores (n, 97) and noun scores (n, 300) of action probabilities (n, actions)."""
    columns = {"verb": actions[0], "noun": actions[1]}
    counts = {"verb": EK100_VERBS, "noun": EK100_NOUNS}
    verbs, nouns = (marginalize(probs, get_marginal_indexes(columns, k, counts[k])) for k in ("verb", "noun"))
    return verbs, nouns


def _tail_rows(
    verb_class: np.ndarray, noun_class: np.ndarray, tail_verbs: ArrayLike | None, tail_nouns: ArrayLike | None
) -> dict[str, np.ndarray]:
    """Return which clips are in the tail, (n,) bool, for each kind that the given lists decide."""
    rows: dict[str, np.ndarray] = {}
    if tail_verbs is not None:
        rows["verb"] = np.isin(verb_class, tail_verbs)
    if tail_nouns is not None:
        rows["noun"] = np.isin(noun_class, tail_nouns)
    if len(rows) == 2:
        rows["action"] = rows["verb"] | rows["noun"]
    return rows


def _top(prefix: str, ranks: np.ndarray) -> dict[str, float]:
    if len(ranks) == 0:
        return {}
    return {f"{prefix}top{k}": float((ranks < k).mean()) for k in (1, 5)}
