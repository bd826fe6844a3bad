"""EgoMCQ: the accuracy of choosing one of five clips, within videos and between videos."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from avion.constants import EGOMCQ_INTER, EGOMCQ_INTRA
from avion.errors import UserError


def egomcq_metrics(scores: ArrayLike, answers: ArrayLike, types: ArrayLike) -> dict[str, float | int]:
    """Compute the accuracies of both types of questions.

    Args:
        scores: (n, 5), the higher the likelier. Of equal scores the first counts as chosen.
        answers: (n,) int, 0 to 4.
        types: (n,) int, EGOMCQ_INTRA or EGOMCQ_INTER.

    Returns:
        `intra` and `inter`, fractions, with the numbers of questions `intra_questions` and `inter_questions`. A type
        without questions has its number only.

    Raises:
        UserError: The shapes do not fit, or a score is not a number.
    """
    scores, answers, types = np.asarray(scores), np.asarray(answers), np.asarray(types)
    if scores.ndim != 2 or not scores.shape[:1] == answers.shape == types.shape:
        raise UserError(
            f"scores {scores.shape}, answers {answers.shape}, types {types.shape}: (n, 5), (n,) and (n,) are required"
        )
    if not np.isfinite(scores).all():
        raise UserError("scores: some are not numbers; evaluate with --precision fp32")
    right = scores.argmax(axis=1) == answers
    metrics: dict[str, float | int] = {}
    for name, kind in (("intra", EGOMCQ_INTRA), ("inter", EGOMCQ_INTER)):
        own = right[types == kind]
        metrics |= {name: float(own.mean())} if len(own) else {}
        metrics[f"{name}_questions"] = len(own)
    return metrics
