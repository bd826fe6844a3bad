"""Accuracy within time-reversed pairs: is a clip nearer to its own text than to the text of the reversed action?

"Put the cup down" played backwards is "take the cup": the frames are the same, and only their order differs. A model
that does not see time gives both clips of a pair the same embedding, is right about one of them and wrong about the
other, and so reaches one half.
"""

import numpy as np
from numpy.typing import ArrayLike

from avion.errors import UserError


def pair_accuracy(video_embed: ArrayLike, own_text: ArrayLike, other_text: ArrayLike) -> dict[str, float | int]:
    """Return the share of the clips whose cosine with their own text is the larger one; equal cosines count one half.

    Args:
        video_embed: One row per clip, (n, E), of any length, because only the direction counts.
        own_text: The text of the clip, (n, E).
        other_text: The text of the reversed action, (n, E).

    Returns:
        {"pair_acc": a fraction of 1, "n": the number of clips}

    Raises:
        UserError: Shapes differ, there is no clip, or a value is not finite.
    """
    given = {"video_embed": video_embed, "own_text": own_text, "other_text": other_text}
    video, own, other = (_unit_rows(value, name) for name, value in given.items())
    if not video.shape == own.shape == other.shape:
        raise UserError(
            f"reversed pairs: video_embed {video.shape}, own_text {own.shape} and other_text {other.shape} "
            "differ; give one row of each per clip"
        )
    margin = (video * own).sum(axis=1) - (video * other).sum(axis=1)
    return {"pair_acc": float(((np.sign(margin) + 1) / 2).mean()), "n": len(margin)}


def _unit_rows(value: ArrayLike, name: str) -> np.ndarray:
    rows = np.asarray(value, dtype=np.float64)
    if rows.ndim != 2 or not rows.size:
        raise UserError(f"reversed pairs: {name} has shape {rows.shape}, expected (clips, embed) with entries")
    if not np.isfinite(rows).all():
        clip = int(np.argwhere(~np.isfinite(rows))[0, 0])
        raise UserError(f"reversed pairs: {name} of clip {clip} is not finite; check the model's weights")
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
