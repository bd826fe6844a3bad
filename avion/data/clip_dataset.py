"""Narrated clips as training and evaluation samples."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from avion.data.decoding import VideoError
from avion.data.ego4d import read_ego4d
from avion.data.ek100 import read_ek100_retrieval
from avion.data.narrations import Narration
from avion.data.transforms import EvalTransform, TrainTransform
from avion.data.video_store import SAMPLINGS, VideoStore
from avion.errors import UserError


class ClipDataset(Dataset):
    """Samples of a narration table, read from a video store.

    `dataset[(epoch, index)]`, or `dataset[index]` for epoch 0, is a dict:

        index        int, the row that was asked for
        video        Tensor (3, T, H, W) as `transform` returns it
        tokens       LongTensor (context,); absent without a tokenizer
        error        str, why the clip could not be read; "" if it could
        replaced_by  int, the row that was read instead; -1 if none was
        clamped      int, frames (of T) past the video's end that show its last frame

    All randomness comes from (seed, epoch, index): a sample does not depend on workers, order or other samples.
    Training jitters the frames, draws one of the wordings, and replaces a clip that cannot be read by another
    one, its text included; after `max_replacements` unreadable ones in a row it raises VideoError. Evaluation takes
    the middle frames and the first wording, and gives zeros for a clip that cannot be read: `error` says why, and
    whoever computes figures leaves it out.

    captions: (row, Generator) -> (text, further fields of the sample): what training pairs a row with, in place of one
    of its wordings.

    table: a sequence of Narration. transform: (frames (T, H, W, 3) uint8, Generator) -> Tensor. tokenizer: text or
    texts -> LongTensor (n, context). sampling, stride: as in `VideoStore.read_clip`.
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

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < len(self.table):
            raise IndexError(f"sample {index} of {len(self.table)}")
        rng = np.random.default_rng((self.seed, epoch, index))
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
        clip = self.store.read_clip(
            narration.video,
            narration.start,
            narration.end,
            self.num_frames,
            rng=rng if self.train else None,
            sampling=self.sampling,
            stride=self.stride,
        )
        return {"video": self.transform(clip.frames, rng), **self._tokens(text), **more, "clamped": clip.clamped}

    def _caption(self, row: int, narration: Narration, rng: np.random.Generator) -> tuple[str, dict[str, torch.Tensor]]:
        if self.train and self.captions is not None:
            return self.captions(row, rng)
        texts = narration.texts
        return texts[rng.integers(len(texts))] if self.train and len(texts) > 1 else texts[0], {}

    def _tokens(self, text: str) -> dict[str, torch.Tensor]:
        return {} if self.tokenizer is None else {"tokens": self.tokenizer(text).reshape(-1)}


class VideoCaptionDatasetCLIP(Dataset):
    """AVION's dataset for people's own scripts: same arguments, items are (frames, tokens or text).

    dataset: "ego4d" (metadata is a pickle) or "ek100_mir" (metadata is a CSV). frames: float32 (T, H, W, 3), 0 to
    255, given to `transform` if there is one. fast_rrc, fast_rcc: crop and resize before that, to uint8 frames of
    rrc_params[0] (random box, area share rrc_params[1]) or rcc_params[0] (central). chunk_len -1 means whole
    files. clip_stride is accepted as in AVION, where uniform sampling does not use it either.
    Unlike there, a clip that cannot be read raises VideoError. Randomness comes from torch's generator.
    """

    def __init__(
        self,
        dataset: str,
        root: str | os.PathLike,
        metadata: str | os.PathLike,
        transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
        is_training: bool = True,
        tokenizer: Callable[[str], torch.Tensor] | None = None,
        chunk_len: int = 300,
        clip_length: int = 32,
        clip_stride: int = 2,
        threads: int = 1,
        fast_rrc: bool = False,
        rrc_params: tuple = (224, (0.5, 1.0)),
        fast_rcc: bool = False,
        rcc_params: tuple = (224,),
    ):
        readers = {"ego4d": read_ego4d, "ek100_mir": read_ek100_retrieval}
        if dataset not in readers:
            raise UserError(f"dataset: {dataset!r} is not one of {', '.join(readers)}")
        if fast_rrc and fast_rcc:
            raise UserError("fast_rrc and fast_rcc: only one of the two crops can be taken")
        self.samples = readers[dataset](metadata)
        layout, chunk_len = ("whole", 1) if chunk_len == -1 else ("auto", chunk_len)
        self.store = VideoStore(root, chunk_length=chunk_len, layout=layout, threads=threads)
        self.transform, self.tokenizer, self.is_training = transform, tokenizer, is_training
        self.clip_length, self.clip_stride = clip_length, clip_stride
        self._crop = None
        if fast_rrc:
            self._crop = TrainTransform(rrc_params[0], scale=tuple(rrc_params[1]), fused=True)
        elif fast_rcc:
            self._crop = EvalTransform(rcc_params[0], fused=True)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor | str]:
        rng = np.random.default_rng(int(torch.randint(2**62, ())))
        row = self.samples[i]
        clip = self.store.read_clip(
            row.video, row.start, row.end, self.clip_length, rng=rng if self.is_training else None
        )
        if self._crop is None:
            frames = torch.from_numpy(clip.frames).float()
        else:
            frames = self._crop(clip.frames, rng).permute(1, 2, 3, 0).float()  # (T, h, w, 3)
        if self.transform is not None:
            frames = self.transform(frames)
        text = row.texts[rng.integers(len(row.texts)) if self.is_training else 0]
        return frames, text if self.tokenizer is None else self.tokenizer(text).reshape(-1)
