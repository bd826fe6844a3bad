"""EPIC-KITCHENS-100 multi-instance retrieval: mean average precision and nDCG, both directions.

For every query (a clip: a row, "vis"; a sentence: a column, "txt") the items of the other side are ranked by
similarity, equal similarities in the order of their index. Let rel_j be the relevancy of the item at rank j = 1, 2,
...:

    AP   = mean over the ranks k with rel_k = 1 of (rel_1 + ... + rel_k) / k
    nDCG = sum_{j <= K} rel_j / log2(j + 1)  /  the same sum for the ideal order,   K = #{j: rel_j > 0}

mAP and nDCG are the means over the queries. This is the definition of the dataset (Damen et al., arXiv 2006.13256) as
its challenge, LaViLa and AVION compute it. Only pairs of relevancy 1 are relevant in AP: the mean goes over their ranks
only. The precision at such a rank sums the relevancies, however, so that a half-relevant item before it adds one half,
not nothing. The difference is large: random similarities on the validation split give 5.7 / 5.6 %, and 0.35 / 0.24 %
with a precision that counts relevant items only. `graded_precision=False` gives the latter, which is the textbook's
definition.

A query for which a metric is undefined (nothing relevant for AP, only zeros for nDCG) is left out of the mean. The
annotations of EPIC-KITCHENS have no such query; there are some when clips are dropped.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from avion.errors import UserError

# The number of elements that one thread ranks at a time, a few MiB: about what the cache of a core holds.
BLOCK_ELEMENTS = 1 << 18
_TILE = 256  # of a matrix that is transposed while it is copied
_MAX_THREADS = 4


class _Ranked(NamedTuple):
    """The items of relevancy above 0 as a block of queries ranks them, query after query.

    Attributes:
        gains: Relevancies in (0, 1], float64.
        positions: Their ranks from 0, rising within a query.
        bounds: Where each query begins, and the end: one more than there are queries.
    """

    gains: np.ndarray
    positions: np.ndarray
    bounds: np.ndarray

    def padded(self) -> np.ndarray:
        """Return the gains, (queries, largest number of items of a query), with zeros after them."""
        counts = np.diff(self.bounds)
        padded = np.zeros((len(counts), counts.max()))
        padded[np.arange(padded.shape[1]) < counts[:, None]] = self.gains
        return padded


# Scores of the queries of a block, NaN where undefined.
Scorer = Callable[[_Ranked], np.ndarray]


def retrieval_metrics(
    similarity: ArrayLike, relevancy: ArrayLike, *, graded_precision: bool = True
) -> dict[str, float]:
    """Return all six metrics of the retrieval tables, as fractions of 1.

    Args:
        similarity: Real numbers, (clips, sentences), larger is nearer, on any monotone scale.
        relevancy: (clips, sentences), in [0, 1].
        graded_precision: Whether the precision sums relevancies; see the module's docstring.

    Returns:
        {"vis_map", "txt_map", "avg_map", "vis_ndcg", "txt_ndcg", "avg_ndcg"}: "vis" queries with clips (video to text,
            rows), "txt" with sentences (text to video, columns), and "avg" is their mean.

    Raises:
        UserError: Shapes differ or are not 2-D, a value is not finite, a relevancy is outside [0, 1], or a direction
            has no query with anything relevant.
    """
    checked = _checked(similarity, relevancy)
    scorers = {"map": _ap_scorer(graded_precision), "ndcg": _ndcg}
    return {
        f"{side}_{name}": value
        for name, values in _both_directions(*checked, scorers).items()
        for side, value in zip(("vis", "txt", "avg"), values, strict=True)
    }


def get_mAP(
    similarity_matrix: ArrayLike, rel_matrix: ArrayLike, *, graded_precision: bool = True
) -> tuple[float, float, float]:
    """Return mAP as fractions of 1: video to text, text to video, mean. Arguments and errors are those of
    `retrieval_metrics`.
    """
    similarity, relevancy = _checked(similarity_matrix, rel_matrix)
    return _both_directions(similarity, relevancy, {"map": _ap_scorer(graded_precision)})["map"]


def get_nDCG(similarity_matrix: ArrayLike, rel_matrix: ArrayLike) -> tuple[float, float, float]:
    """Return nDCG as fractions of 1: video to text, text to video, mean. Arguments and errors are those of
    `retrieval_metrics`.
    """
    similarity, relevancy = _checked(similarity_matrix, rel_matrix)
    return _both_directions(similarity, relevancy, {"ndcg": _ndcg})["ndcg"]


def _both_directions(
    similarity: np.ndarray, relevancy: np.ndarray, scorers: dict[str, Scorer]
) -> dict[str, tuple[float, float, float]]:
    rows = _mean_scores(similarity, relevancy, scorers, "clip")
    columns = _mean_scores(similarity.T, relevancy.T, scorers, "sentence")
    return {name: (rows[name], columns[name], (rows[name] + columns[name]) / 2) for name in scorers}


def _mean_scores(
    similarity: np.ndarray, relevancy: np.ndarray, scorers: dict[str, Scorer], query: str
) -> dict[str, float]:
    """Return the mean of each scorer over the rows, which are the queries. The rows are taken in blocks, which bounds
    the memory.
    """
    queries, items = similarity.shape
    scores = np.empty((len(scorers), queries))

    def score(block: slice) -> None:
        ranked = _ranked(_copied(similarity[block]), _copied(relevancy[block]))
        scores[:, block] = [scorer(ranked) for scorer in scorers.values()]

    rows = max(1, BLOCK_ELEMENTS // items)
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as threads:
        list(threads.map(score, (slice(start, start + rows) for start in range(0, queries, rows))))
    means = {}
    for name, values in zip(scorers, scores, strict=True):
        defined = values[~np.isnan(values)]
        if not len(defined):
            needed = "of relevancy 1" if name == "map" else "of relevancy above 0"
            raise UserError(
                f"relevancy: no {query} has a counterpart {needed}, so the figure is undefined; "
                "check that the relevancy file belongs to these annotations"
            )
        means[name] = float(defined.mean())
    return means


def _ap_scorer(graded: bool) -> Scorer:
    def average_precision(ranked: _Ranked) -> np.ndarray:
        hits = np.flatnonzero(ranked.gains == 1)
        bounds = hits.searchsorted(ranked.bounds)
        query = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
        if graded:
            found = ranked.padded().cumsum(axis=1)[query, hits - ranked.bounds[query]]
        else:
            found = np.arange(1, len(hits) + 1) - bounds[query]
        return _sums(found / (ranked.positions[hits] + 1), bounds[:-1], bounds[1:]) / _or_nan(np.diff(bounds))

    return average_precision


def _ndcg(ranked: _Ranked) -> np.ndarray:
    counts = np.diff(ranked.bounds)
    # The discount of place j. The ideal order has no more places than a query has items, and no later place counts.
    discounts = np.log2(np.arange(2, counts.max() + 2))
    starts = ranked.bounds[:-1]
    counted = ranked.positions < np.repeat(counts, counts)
    terms = np.zeros(len(ranked.gains))
    terms[counted] = ranked.gains[counted] / discounts[ranked.positions[counted]]
    # Ranks rise, so the items that count come first.
    dcg = _sums(terms, starts, starts + np.diff(np.append(0, counted.cumsum())[ranked.bounds]))
    ideal = np.sort(ranked.padded(), axis=1)[:, ::-1] / discounts
    ideal_starts = np.arange(len(counts)) * len(discounts)
    return dcg / _or_nan(_sums(ideal.ravel(), ideal_starts, ideal_starts + counts))


def _sums(values: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """Sum pieces of `values` one by one, so that the rounding of a sum does not depend on the other pieces."""
    pieces = zip(starts.tolist(), stops.tolist(), strict=True)
    return np.array([np.add.reduce(values[start:stop]) for start, stop in pieces])


def _or_nan(values: np.ndarray) -> np.ndarray:
    return np.where(values, values, np.nan)


# ---- ranking -------------------------------------------------------------------------------------------


def _copied(block: np.ndarray) -> np.ndarray:
    """Return a contiguous copy (q, n) of rows or columns of the matrix, with each query's items side by side."""
    if block.flags.c_contiguous:
        return block
    copy = np.empty(block.shape, block.dtype)
    for start in range(0, block.shape[1], _TILE):  # in tiles, columns are transposed three times as fast
        copy[:, start : start + _TILE] = block[:, start : start + _TILE]
    return copy


def _ranked(similarity: np.ndarray, relevancy: np.ndarray) -> _Ranked:
    """Rank the items of (q, n) similarities and relevancies."""
    queries, items = similarity.shape
    gains = np.empty_like(relevancy)  # in the order in which each query ranks them
    digits = _descending_digits(similarity)
    for row in range(queries):
        relevancy[row].take(_order([digit[row] for digit in digits]), out=gains[row], mode="clip")
    places = np.flatnonzero(gains > 0)
    bounds = places.searchsorted(np.arange(queries + 1) * items)
    return _Ranked(gains.ravel()[places].astype(np.float64), places % items, bounds)


def _descending_digits(similarity: np.ndarray) -> list[np.ndarray]:
    """Map floats (q, n) to integers that fall as the floats rise, and return their uint16 digits, (q, n) each, lowest
    first.
    """
    bits = similarity.dtype.itemsize * 8
    # Adding zero turns -0.0 into 0.0, which is equal to it. The bits of positive IEEE floats, read as integers, rise
    # with the floats; those of negative floats fall, and by their sign bit they come last. So the bits of the positive
    # floats are inverted.
    keys = (similarity + similarity.dtype.type(0)).view(f"i{bits // 8}")
    keys ^= ~(keys >> (bits - 1)) & np.iinfo(keys.dtype).max
    return [(keys >> shift).astype(np.uint16) for shift in range(0, bits, 16)]


def _order(digits: list[np.ndarray]) -> np.ndarray:
    """Return the indices that sort numbers in rising order, (n,), equal numbers by index.

    This is a radix sort over the numbers' uint16 digits, lowest first, (n,) each: NumPy's stable sort of 16-bit numbers
    is a radix sort, and a few times faster than the sort of floats.
    """
    order = digits[0].argsort(kind="stable")
    for digit in digits[1:]:
        order = order.take(digit.take(order).argsort(kind="stable"))
    return order


def _checked(similarity_like: ArrayLike, relevancy_like: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    similarity, relevancy = _as_matrix(similarity_like, "similarity"), _as_matrix(relevancy_like, "relevancy")
    if similarity.shape != relevancy.shape:
        raise UserError(
            f"relevancy: its shape (clips, sentences) is {relevancy.shape}, that of the similarities "
            f"{similarity.shape}; give the relevancy file that belongs to these clips and sentences"
        )
    if relevancy.min() < 0 or relevancy.max() > 1:
        raise UserError(
            f"relevancy: values run from {relevancy.min():g} to {relevancy.max():g}, expected 0 to 1; "
            "check the relevancy file"
        )
    return similarity, relevancy


def _as_matrix(value: ArrayLike, name: str) -> np.ndarray:
    matrix = np.asarray(value)
    if matrix.ndim != 2 or not matrix.size:
        raise UserError(f"{name}: shape {matrix.shape}, expected a matrix (clips, sentences) with entries")
    if matrix.dtype.kind not in "fiub":
        raise UserError(f"{name}: holds {matrix.dtype}, expected real numbers")
    if matrix.dtype not in (np.float32, np.float64):
        matrix = matrix.astype(np.float32 if matrix.dtype in (np.float16, np.bool_) else np.float64)
    # A NaN spreads to both extremes and an infinity is one, so no mask of the whole matrix is needed.
    if not (np.isfinite(matrix.min()) and np.isfinite(matrix.max())):
        row, column = np.argwhere(~np.isfinite(matrix))[0]
        raise UserError(
            f"{name}: {matrix[row, column]} at clip {row}, sentence {column}; "
            "the model's output is broken, check its weights and precision"
        )
    return matrix
