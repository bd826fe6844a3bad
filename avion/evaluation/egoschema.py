"""The metrics of EgoSchema: multiple choice among five options."""

import math

import numpy as np

OPTIONS = 5
_Z95 = 1.959963984540054  # 97.5 % quantile of the normal distribution


def choose(scores: np.ndarray) -> np.ndarray:
    """Choose the best option of each question.

    Args:
        scores: (n, 5); the higher the score, the likelier the option.

    Returns:
        (n,) int64, the number of the best option; of equal options the lowest number.
    """
    scores = np.asarray(scores)
    if scores.ndim != 2 or scores.shape[1] != OPTIONS:
        raise ValueError(f"choose: scores must be (n, {OPTIONS}), got {scores.shape}")
    if not np.isfinite(scores).all():
        raise ValueError("choose: scores must be finite")
    return scores.argmax(axis=1)


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """Return the 95 % interval of a share measured as correct / total (Wilson, 1927); (0, 1) where total is 0."""
    if not 0 <= correct <= total:
        raise ValueError(f"wilson_interval: {correct} of {total}")
    if total == 0:
        return 0.0, 1.0
    share, z2 = correct / total, _Z95**2
    middle = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z95 / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    # At 0 and 1 the bound is 0 or 1 itself, which rounding would miss.
    return (0.0 if correct == 0 else middle - half), (1.0 if correct == total else middle + half)


def accuracy(chosen: np.ndarray, truth: np.ndarray) -> dict[str, float | int | None]:
    """Return the accuracy with its 95 % interval.

    Args:
        chosen: The chosen options, (n,).
        truth: The right options, (n,).

    Returns:
        `accuracy`, a fraction, or None where n is 0; the interval from `low` to `high`; `correct` and `total`.
    """
    chosen, truth = np.asarray(chosen), np.asarray(truth)
    if chosen.shape != truth.shape or chosen.ndim != 1:
        raise ValueError(f"accuracy: got {chosen.shape} and {truth.shape}, expected two vectors of one length")
    correct, total = int((chosen == truth).sum()), len(truth)
    low, high = wilson_interval(correct, total)
    return {
        "accuracy": correct / total if total else None,
        "low": low,
        "high": high,
        "correct": correct,
        "total": total,
    }
