"""Exact cosine similarities of a query with millions of windows that lie on disk in float16.

The rows are read through a memory map, and converted to float32 block by block, in a buffer that stays in a core's
cache. The whole array is thus never in memory in float32, and half as many bytes are read from memory as float32 would
need. Each thread has rows of its own, because blocks of this size are too small to be shared between threads.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

BLOCK_BYTES = 1 << 20  # of float32, which a core's cache holds

_ONE_AT_A_TIME = threading.Lock()


def similarities(query: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Compute the scalar products of a query with all rows. They are cosines, because both have length 1.

    Args:
        query: (E,) float.
        rows: (n, E) float16, possibly a memory map.

    Returns:
        (n,) float32, each computed in float32 from the stored values.
    """
    vector = torch.from_numpy(np.ascontiguousarray(query, dtype=np.float32))
    found = torch.empty(len(rows), dtype=torch.float32)
    if not len(rows):
        return found.numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a map of a file is read-only, and nothing here writes to it
        values = torch.from_numpy(rows)
    with _ONE_AT_A_TIME:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # of each of the threads below
        try:
            edges = np.linspace(0, len(rows), threads + 1).astype(int)
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(lambda i: _fill(found, values, vector, *edges[i : i + 2]), range(threads)))
        finally:
            torch.set_num_threads(threads)
    return found.numpy()


@torch.inference_mode()
def _fill(found: torch.Tensor, values: torch.Tensor, vector: torch.Tensor, first: int, last: int) -> None:
    """Compute found[first:last]."""
    block = max(BLOCK_BYTES // (4 * len(vector)), 1)
    buffer = torch.empty(block, len(vector), dtype=torch.float32)
    for begin in range(first, last, block):
        end = min(begin + block, last)
        part = buffer[: end - begin]
        part.copy_(values[begin:end])
        torch.mv(part, vector, out=found[begin:end])


def ranked(scores: np.ndarray, first: int = 256) -> Iterator[int]:
    """Iterate over the rows in descending order of their scores; of equal scores the earlier row comes first.

    The best rows are sorted first, and more rows only if they are asked for. Rows of -inf are left out.

    Args:
        scores: (n,) float32 without NaN.
        first: How many rows are sorted at first.

    Yields:
        The number of a row.
    """
    given, size = 0, first
    total = int(np.count_nonzero(scores > -np.inf))
    while given < total:
        size = min(size, total)
        # All rows that are as good as the last one, so that equal scores keep their order.
        limit = np.partition(scores, len(scores) - size)[len(scores) - size]
        (rows,) = np.nonzero(scores >= limit) if limit > -np.inf else np.nonzero(scores > -np.inf)
        rows = rows[np.argsort(-scores[rows], kind="stable")]
        yield from map(int, rows[given:])
        given, size = len(rows), 8 * size


def top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """Find the rows of the k largest scores; of equal scores the earlier row comes first.

    Args:
        scores: (n,) float32 without NaN.
        k: The number of rows.

    Returns:
        (k,) int64, the row of the largest score first.
    """
    best = []
    for row in ranked(scores, max(k, 1)):
        if len(best) == k:
            break
        best.append(row)
    return np.array(best, dtype=np.int64)
