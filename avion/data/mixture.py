"""Several sources of clips in one epoch, each as often as its weight says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset


class Mixture(Dataset):
    """Datasets one after the other, and the weights with which a sampler draws from them.

    `dataset[(epoch, index)]` is a sample of the part that contains `index`, and the sample has this index.

    Attributes:
        sources: The number of rows and the weight of each part; see `drawn_rows`.
    """

    def __init__(self, parts: Sequence[Dataset], weights: Sequence[float]):
        assert len(parts) == len(weights) > 0
        self.parts = list(parts)
        self.sources = [(len(part), weight) for part, weight in zip(parts, weights, strict=True)]
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, key: tuple[int, ...]) -> dict[str, Any]:
        epoch, index, *copy = key
        part = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[part - 1]) if part > 0 else 0
        sample = self.parts[part][(epoch, index - first, *copy)]
        replaced = sample["replaced_by"]
        return {**sample, "index": index, "replaced_by": replaced if replaced < 0 else replaced + first}


def rows_per_epoch(sources: Sequence[tuple[int, float]]) -> int:
    """Return the number of samples of an epoch.

    Args:
        sources: The number of rows and the weight of each source.
    """
    return sum(_share(rows, weight) for rows, weight in sources)


def drawn_rows(sources: Sequence[tuple[int, float]], seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Return which rows an epoch takes.

    A source of n rows and weight w gives round(w · n) rows. Its epochs continue through one permutation of its rows
    after the other, so that with a weight of 0.5 two epochs together take each row once.

    Args:
        sources: The number of rows and the weight of each source.
        seed: The seed of the permutations.
        epoch: The number of the epoch.

    Returns:
        The numbers of the rows, counted through all sources, (n,), and how often each row has occurred before in the
            same epoch, (n,).
    """
    rows, copies, first = [], [], 0
    for number, (count, weight) in enumerate(sources):
        share = _share(count, weight)
        places = np.arange(epoch * share, (epoch + 1) * share)
        cycles = places // count
        taken = np.empty(share, dtype=np.int64)
        for cycle in np.unique(cycles):
            order = np.random.default_rng((seed, number, int(cycle))).permutation(count)
            taken[cycles == cycle] = order[places[cycles == cycle] % count]
        rows.append(taken + first)
        copies.append(_copies(taken))
        first += count
    return np.concatenate(rows), np.concatenate(copies)


def _share(rows: int, weight: float) -> int:
    return max(round(weight * rows), 1)


def _copies(taken: np.ndarray) -> np.ndarray:
    """Return how often each value has occurred before: (n,) → (n,)."""
    order = np.argsort(taken, kind="stable")
    values = taken[order]
    starts = np.flatnonzero(np.r_[True, values[1:] != values[:-1]])
    position = np.arange(len(values)) - np.repeat(starts, np.diff(np.r_[starts, len(values)]))
    copies = np.empty(len(taken), dtype=np.int64)
    copies[order] = position
    return copies
