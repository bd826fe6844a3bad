"""What the EPIC-KITCHENS-100 servers accept, checked before it is sent: arrays in, the content of the files out."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from avion.constants import EK100_NOUNS, EK100_VERBS
from avion.errors import UserError

# The supervision that a method declares, in pretraining, labels and data (arXiv 2008.09890).
SLS = ("sls_pt", "sls_tl", "sls_td")
SLS_LEVELS = range(6)
_TOLERANCE = 1e-4  # sums of thousands of float32


def action_submission(
    narration_ids: Sequence[str], verb_scores: np.ndarray, noun_scores: np.ndarray, sls: Mapping[str, int]
) -> dict[str, Any]:
    """Return the content of `test.json`, for the action recognition server.

    Args:
        narration_ids: n distinct ids.
        verb_scores: (n, 97), in [0, 1].
        noun_scores: (n, 300), in [0, 1].
        sls: The levels sls_pt, sls_tl and sls_td, 0 to 5.

    Raises:
        UserError: The server would refuse the submission. The message is one line about the first reason.
    """
    _check_ids(narration_ids, "narration ids")
    columns = {}
    for kind, scores, classes in (("verb", verb_scores, EK100_VERBS), ("noun", noun_scores, EK100_NOUNS)):
        _check_matrix(scores, (len(narration_ids), classes), f"{kind} scores", f"{len(narration_ids)} ids", "classes")
        # More digits than float32 has would double the file.
        rows = np.clip(np.asarray(scores, dtype=np.float64), 0, 1).round(8).tolist()
        keys = [str(number) for number in range(classes)]
        columns[kind] = [dict(zip(keys, row, strict=True)) for row in rows]
    pairs = zip(narration_ids, columns["verb"], columns["noun"], strict=True)
    results = {name: {"verb": verb, "noun": noun} for name, verb, noun in pairs}
    return {"version": "0.2", "challenge": "action_recognition", **_levels(sls), "results": results}


def retrieval_submission(
    similarity: np.ndarray, vis_ids: Sequence[str], txt_ids: Sequence[str], sls: Mapping[str, int]
) -> dict[str, Any]:
    """Return the content of `test.pkl`, for the multi-instance retrieval server.

    Args:
        similarity: (cosine + 1) / 2, (clips, sentences), in [0, 1].
        vis_ids: The narration ids of the rows.
        txt_ids: The narration ids of the columns.
        sls: The levels sls_pt, sls_tl and sls_td, 0 to 5.

    Raises:
        UserError: The server would refuse the submission. The message is one line about the first reason.
    """
    _check_ids(vis_ids, "ids of the clips")
    _check_ids(txt_ids, "ids of the sentences")
    shape = (len(vis_ids), len(txt_ids))
    _check_matrix(similarity, shape, "similarities", f"{shape[0]} clips", "sentences", "; (cosine + 1) / 2 is required")
    return {
        "version": "0.1",
        "challenge": "multi_instance_retrieval",
        **_levels(sls),
        "sim_mat": np.clip(np.asarray(similarity, dtype=np.float32), 0, 1),
        "vis_ids": list(vis_ids),
        "txt_ids": list(txt_ids),
    }


def check_same_ids(found: Sequence[str], expected: Sequence[str], source: str) -> None:
    """Check that the ids `found` are the ids `expected`, in any order.

    Raises:
        UserError: The ids differ. The message names `source`.
    """
    missing, foreign = (sorted(set(a) - set(b)) for a, b in ((expected, found), (found, expected)))
    if missing or foreign:
        what = [f"{len(ids)} {word} ({ids[0]})" for ids, word in ((missing, "missing"), (foreign, "too many")) if ids]
        raise UserError(f"{source}: narration ids: {' and '.join(what)}; give the predictions of the same split")


def _levels(sls: Mapping[str, int]) -> dict[str, int]:
    for name in SLS:
        level = sls.get(name)
        if isinstance(level, bool) or not isinstance(level, int) or level not in SLS_LEVELS:
            raise UserError(f"{name}: a level from 0 to 5 is required, found {level!r}")
    return {name: sls[name] for name in SLS}


def _check_ids(ids: Sequence[str], what: str) -> None:
    if len(ids) == 0:
        raise UserError(f"{what}: there are none")
    seen = set()
    for name in ids:
        if not isinstance(name, str) or not name:
            raise UserError(f"{what}: {name!r} is no id, a text is required")
        if name in seen:
            raise UserError(f"{what}: {name} comes twice")
        seen.add(name)


def _check_matrix(
    matrix: np.ndarray, shape: tuple[int, int], what: str, rows: str, columns: str, cure: str = ""
) -> None:
    matrix = np.asarray(matrix)
    if matrix.shape != shape or matrix.dtype.kind not in "fiu":
        raise UserError(
            f"{what}: {matrix.dtype} of shape {matrix.shape}, expected numbers for {rows} x {shape[1]} {columns}"
        )
    if not np.isfinite(matrix).all():
        raise UserError(f"{what}: hold values that are not numbers")
    low, high = float(matrix.min()), float(matrix.max())
    if low < -_TOLERANCE or high > 1 + _TOLERANCE:
        raise UserError(f"{what}: run from {low:.4g} to {high:.4g}, 0 to 1 is required{cure}")
