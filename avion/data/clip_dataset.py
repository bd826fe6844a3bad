"""Narrated clips as training and evaluation samples."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from avion.data.avion_datasets import VideoCaptionDatasetCLIP, VideoClassyDataset, get_downstream_dataset
from avion.data.narrations import Narration
from avion.data.video import SAMPLINGS, VideoError, VideoStore
from avion.errors import UserError

# The last three names are here because AVION has them here.
__all__ = ["ClipDataset", "VideoCaptionDatasetCLIP", "VideoClassyDataset", "get_downstream_dataset"]


class ClipDataset(Dataset):
    """Samples of a narration table, read from a video store.

    `dataset[(epoch, index)]`, or `dataset[index]` for epoch 0, is a dict:

        index        int, the row that was asked for
        video        Tensor (3, T, H, W) as `transform` returns it
        tokens       LongTensor (context,); absent without a tokenizer
        error        str, why the clip could not be read; "" if it could be read
        replaced_by  int, the row that was read instead; -1 if the row itself was read
        clamped      int, the number of frames (of T) after the video's end, which repeat the last frame

    A row that an epoch takes more than once has the keys (epoch, index, 1), (epoch, index, 2), ... from the second time
    on. All random numbers come from seed and key: a sample does not depend on workers, order or other samples.
    Training jitters the frames, draws one of the wordings, and replaces a clip that cannot be read, with its text, by
    another clip. Evaluation takes the middle frames and the first wording, and gives zeros for a clip that cannot be
    read; code that computes metrics must leave out samples with an `error`.

    Args:
        table: A sequence of `Narration`.
        store: The videos.
        num_frames: T.
        transform: A function (frames (T, H, W, 3) uint8, Generator) → Tensor.
        tokenizer: A function from a text or texts to a LongTensor (n, context).
        train: Whether samples are for training.
        seed: The seed of all random numbers.
        sampling, stride: As in `VideoStore.read_clip`.
        max_replacements: After this many unreadable clips in a row, a training sample raises VideoError.
        captions: A function (row, Generator) → (text, further fields of the sample), which replaces the wordings of a
            row in training.
    """

    def __init__(
        self,
        table: Sequence[Narration],
        store: VideoStore,
        *,
        num_frames: int,
        transform: Callable[[np.ndarray, np.random.Generator], torch.Tensor],
        tokenizer: Callable[[str], torch.Tensor] | None,
        train: bool,
        seed: int = 0,
        sampling: str = "uniform",
        stride: int = 16,
        max_replacements: int = 10,
        captions: Callable[[int, np.random.Generator], tuple[str, dict[str, torch.Tensor]]] | None = None,
    ):
        if len(table) == 0:
            raise UserError("the dataset is empty: its annotations hold no clips")
        if num_frames < 1 or stride < 1:
            raise UserError(f"clip length {num_frames} and clip stride {stride} must be at least 1")
        if sampling not in SAMPLINGS:
            raise UserError(f"frame sampling: {sampling!r} is not one of {', '.join(SAMPLINGS)}")
        if seed < 0 or max_replacements < 0:
            raise UserError(f"seed {seed} and max replacements {max_replacements} must not be negative")
        self.table, self.store, self.transform, self.tokenizer = table, store, transform, tokenizer
        self.num_frames, self.sampling, self.stride = num_frames, sampling, stride
        self.train, self.seed, self.max_replacements = train, seed, max_replacements
        self.captions = captions

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, key: int | tuple[int, ...]) -> dict[str, Any]:
        epoch, index, *copy = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < len(self.table):
            raise IndexError(f"sample {index} of {len(self.table)}")
        rng = np.random.default_rng((self.seed, epoch, index, *copy))
        sample = self._training_sample(index, rng) if self.train else self._evaluation_sample(index, rng)
        return {"index": int(index), **sample}

    def _training_sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        error, row = "", index
        for attempt in range(self.max_replacements + 1):
            try:
                return {
                    **self._read(row, rng),
                    "error": error,
                    "replaced_by": int(row) if attempt > 0 else -1,
                }
            except VideoError as failure:
                error = error or str(failure)
                row = int(rng.integers(len(self.table)))
                last = failure
        if self.max_replacements == 0:
            raise last
        raise VideoError(
            last.path, f"{last.reason}; clip {index} and {self.max_replacements} drawn in its place failed"
        )

    def _evaluation_sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        narration = self.table[index]
        try:
            return {**self._read(index, rng), "error": "", "replaced_by": -1}
        except VideoError as failure:
            side = 2 * getattr(self.transform, "crop_size", 64)
            blank = self.transform(np.zeros((self.num_frames, side, side, 3), dtype=np.uint8), rng)
            return {
                "video": torch.zeros_like(blank),
                **self._tokens(narration.texts[0]),
                "clamped": 0,
                "error": str(failure),
                "replaced_by": -1,
            }

    def _read(self, row: int, rng: np.random.Generator) -> dict[str, Any]:
        narration = self.table[row]
        text, more = self._caption(row, narration, rng)
        video, clamped = read_transformed(
            self.store,
            narration,
            self.num_frames,
            self.transform,
            rng,
            jitter=self.train,
            sampling=self.sampling,
            stride=self.stride,
        )
        return {"video": video, **self._tokens(text), **more, "clamped": clamped}

    def _caption(self, row: int, narration: Narration, rng: np.random.Generator) -> tuple[str, dict[str, torch.Tensor]]:
        if self.train and self.captions is not None:
            return self.captions(row, rng)
        texts = narration.texts
        return texts[rng.integers(len(texts))] if self.train and len(texts) > 1 else texts[0], {}

    def _tokens(self, text: str) -> dict[str, torch.Tensor]:
        return {} if self.tokenizer is None else {"tokens": self.tokenizer(text).reshape(-1)}


def read_transformed(
    store: VideoStore,
    row: Narration,
    num_frames: int,
    transform: Callable[[np.ndarray, np.random.Generator], torch.Tensor],
    rng: np.random.Generator | None,
    *,
    jitter: bool = False,
    **sampling: Any,
) -> tuple[torch.Tensor, int]:
    """Read the clip of a row and transform it.

    A fused transform of this project converts and resizes only the part of the picture that it crops.

    Args:
        store: The videos.
        row: The clip.
        num_frames: T.
        transform: A function (frames (T, H, W, 3) uint8, Generator) → Tensor.
        rng: The generator of random numbers, or None.
        jitter: Whether `rng` also draws the frames.
        **sampling: As in `VideoStore.read_clip`.

    Returns:
        What the transform returns, and the number of frames after the video's end, which repeat the last frame.
    """
    fused = getattr(transform, "fused", False) and hasattr(transform, "scaling")
    clip = store.read_clip(
        row.video,
        row.start,
        row.end,
        num_frames,
        rng=rng if jitter else None,
        **sampling,
        scaling=functools.partial(transform.scaling, rng=rng) if fused else None,
    )
    return transform.from_scaled(clip.frames) if fused else transform(clip.frames, rng), clip.clamped
