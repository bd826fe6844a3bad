"""Training pairs for multi-instance retrieval: a clip and one of the sentences that are relevant to the clip."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from avion.data.narrations import Narration
from avion.errors import UserError

# Rows of the relevancy matrix that are searched at a time; the train split has 67,217 rows of 15,989 sentences.
_BLOCK_ROWS = 1024


class ClipsWithPositives(Sequence):
    """The clips of a split to which at least one sentence is relevant; `draw` draws one sentence of a clip.

    Only the positives are kept, with six bytes each, so that the memory of the matrix can be freed. `skipped` counts
    the clips without a positive.

    Args:
        clips: All clips of the split.
        sentences: Texts.
        relevancy: (clips, sentences) in [0, 1].
        threshold: A sentence is a positive of a clip if its relevancy is above this number, in [0, 1).
    """

    def __init__(
        self, clips: Sequence[Narration], sentences: Sequence[str], relevancy: np.ndarray, threshold: float = 0.1
    ):
        if relevancy.shape != (len(clips), len(sentences)):
            raise ValueError(f"relevancy of shape {relevancy.shape} for {len(clips)} clips, {len(sentences)} sentences")
        if not 0.0 <= threshold < 1.0:
            raise UserError(f"relevancy threshold: {threshold:g} is not in [0, 1), where relevancies lie above it")
        columns, values, counts = [], [], []
        for first in range(0, len(clips), _BLOCK_ROWS):
            block = relevancy[first : first + _BLOCK_ROWS]
            rows, found = np.nonzero(block > threshold)
            columns.append(found.astype(np.min_scalar_type(max(len(sentences) - 1, 0))))
            values.append(block[rows, found].astype(np.float32))
            counts.append(np.bincount(rows, minlength=len(block)))
        count = np.concatenate(counts) if counts else np.zeros(0, dtype=np.int64)
        self.clips, self.sentences = clips, sentences
        self._rows = np.flatnonzero(count)  # (n,) the clips that are left
        self._ends = np.cumsum(count[self._rows])  # (n,) where each one's positives end
        self._columns = np.concatenate(columns) if columns else np.zeros(0, dtype=np.int64)
        self._values = np.concatenate(values) if values else np.zeros(0, dtype=np.float32)
        self.skipped = len(clips) - len(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> Narration:
        return self.clips[int(self._rows[i])]

    @property
    def positives(self) -> int:
        """The number of pairs of a clip and a relevant sentence."""
        return len(self._columns)

    def draw(self, i: int, rng: np.random.Generator) -> tuple[str, dict[str, torch.Tensor]]:
        """Draw one of clip i's positives, all equally likely, and return its text and {"relevancy": 0-d float32}."""
        first = self._ends[i - 1] if i > 0 else 0
        at = rng.integers(first, self._ends[i])
        return self.sentences[self._columns[at]], {"relevancy": torch.tensor(self._values[at])}
