"""Labelled clips: training samples, and the views of each clip over which an evaluation averages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from avion.data.clip_dataset import ClipDataset, read_transformed
from avion.data.narrations import Narration
from avion.data.transforms import CropsTransform
from avion.data.video import VideoError, VideoStore
from avion.errors import UserError


class LabelledClips(Dataset):
    """Training samples of a `ClipDataset` with a field `label`, int: the class of the clip that is shown.

    Args:
        labels: (n,) int64, one class per row of the dataset.
    """

    def __init__(self, clips: ClipDataset, labels: np.ndarray):
        assert len(clips) == len(labels), "one label per clip"
        self.clips, self.labels = clips, labels

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        sample = self.clips[key]
        shown = sample["replaced_by"] if sample["replaced_by"] >= 0 else sample["index"]
        return {**sample, "label": int(self.labels[shown])}


class ClipViews(Dataset):
    """All views of a clip, for evaluation: views in time, and the transform's crops of each of them.

    `dataset[index]` is a dict with `index`; `video`, Tensor (num_clips · num_crops, 3, T, H, W), in which the crops of
    one view in time follow each other; and `error`, why the clip could not be read ("" if it could be read; the video
    is zeros otherwise). `VideoStore.read_clip` (views) says which frames a view takes; a single view takes the frames
    of `ClipDataset`'s evaluation sample.
    """

    def __init__(
        self,
        table: Sequence[Narration],
        store: VideoStore,
        *,
        num_frames: int,
        num_clips: int,
        transform: CropsTransform,
        sampling: str = "uniform",
        stride: int = 16,
    ):
        if num_frames < 1 or num_clips < 1 or stride < 1:
            raise UserError(f"clip length {num_frames}, clips {num_clips} and clip stride {stride} must be at least 1")
        self.table, self.store, self.transform = table, store, transform
        self.num_frames, self.num_clips, self.sampling, self.stride = num_frames, num_clips, sampling, stride

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row, error = self.table[index], ""
        try:
            crops, _clamped = read_transformed(
                self.store,
                row,
                self.num_frames,
                self.transform,
                None,
                sampling=self.sampling,
                stride=self.stride,
                views=self.num_clips,
            )
        except VideoError as failure:
            side = self.transform.crop_size
            frames = np.zeros((self.num_clips * self.num_frames, side, side, 3), dtype=np.uint8)
            error = str(failure)
            crops = self.transform(frames)  # (crops, 3, clips · T, H, W)
        video = crops.unflatten(2, (self.num_clips, self.num_frames)).permute(2, 0, 1, 3, 4, 5).flatten(0, 1)
        return {"index": int(index), "video": torch.zeros_like(video) if error else video, "error": error}
