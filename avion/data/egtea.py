"""EGTEA Gaze+: 106 actions in trimmed clips, and the windows of each clip that LaViLa looks at.

action_idx.txt       a class per line, `Name_of_action N`, N from 1
test_split1.txt      a clip per line, `CLIP_ID ACTION VERB NOUN …`, classes from 1
{root}/{S}/{CLIP_ID}.mp4    the clips; S is the first three parts of the id between dashes, the recording
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from avion.data.text_lines import text_lines
from avion.data.transforms import CropsTransform
from avion.data.video import VideoError, VideoStore, open_video
from avion.errors import UserError

_CLIP = re.compile(r"[A-Za-z0-9_]+(-[A-Za-z0-9_.&]+){3,}")
_LONGEST_NAME = 200
_BLACK = -1  # in the place of a frame's number


@dataclass(frozen=True)
class EgteaSplit:
    """The clips of a split and their classes.

    Attributes:
        clips: The ids.
        labels: (n,) int64, counted from 0.
    """

    clips: tuple[str, ...]
    labels: np.ndarray

    @property
    def videos(self) -> list[str]:
        """Of each clip, the path below the root without its extension."""
        return [f"{'-'.join(clip.split('-')[:3])}/{clip}" for clip in self.clips]


def read_egtea_classes(path: str | os.PathLike) -> list[str]:
    """Read the names of the classes in the order of their numbers, in lower case and with spaces.

    Raises:
        UserError: A line has no number, or the numbers are not 1, 2, 3, … The message names file and line.
    """
    names: dict[int, str] = {}
    for line, content in text_lines(path, "classes"):
        words = content.split()
        *name, number = words
        text = " ".join(name).replace("_", " ").strip().lower()
        if not text or not re.fullmatch(r"[0-9]{1,4}", number):
            raise UserError(
                f"classes {path}: line {line}: `Name_of_action N` is required, found {' '.join(words)[:60]!r}"
            )
        if int(number) in names:
            raise UserError(f"classes {path}: line {line}: class {int(number)} is there twice; remove one of the two")
        names[int(number)] = text
    if sorted(names) != list(range(1, len(names) + 1)):
        missing = next(n for n in range(1, len(names) + 1) if n not in names)
        raise UserError(f"classes {path}: class {missing} is missing; classes are numbered from 1 without a gap")
    return [names[number] for number in sorted(names)]


def read_egtea_split(path: str | os.PathLike, num_classes: int) -> EgteaSplit:
    """Read the clips of a split.

    Args:
        path: The split's file.
        num_classes: The number of classes.

    Raises:
        UserError: A line has no clip id and class, the class does not exist, or a clip occurs twice. The message names
            file and line.
    """
    labels: dict[str, int] = {}
    for line, content in text_lines(path, "split"):
        clip, *classes = content.split()
        where = f"split {path}: line {line}"
        if not _CLIP.fullmatch(clip) or len(clip) > _LONGEST_NAME:
            raise UserError(f"{where}: an id such as OP01-R01-PastaSalad-… is required, found {clip[:60]!r}")
        if not classes or not re.fullmatch(r"[0-9]{1,4}", classes[0]) or not 1 <= int(classes[0]) <= num_classes:
            found = repr(classes[0][:20]) if classes else "nothing"
            raise UserError(f"{where}: an action from 1 to {num_classes} is required after the id, found {found}")
        if clip in labels:
            raise UserError(f"{where}: {clip} is there twice; remove one of the two")
        labels[clip] = int(classes[0]) - 1
    return EgteaSplit(tuple(labels), np.array(list(labels.values()), dtype=np.int64))


def window_frame_ids(video_frames: int, num_frames: int, stride: int, windows: int) -> np.ndarray:
    """Choose the frames of the windows of a trimmed clip.

    A window spans `num_frames` · `stride` frames of the clip, of which every `stride`-th is taken. The windows begin at
    equal distances from the first to the last place where a whole window fits (LaViLa); a single window lies in the
    middle. A clip that is shorter than a window is shown from its first frame, and black frames follow.

    Returns:
        (windows, num_frames) int64; -1 stands for a black frame.
    """
    if min(video_frames, num_frames, stride, windows) < 1:
        raise UserError(f"{num_frames} frames, stride {stride}, {windows} windows of a clip of {video_frames} frames")
    steps = stride * np.arange(num_frames, dtype=np.int64)
    room = video_frames - num_frames * stride
    if room < 0:
        return np.tile(np.where(steps < video_frames, steps, _BLACK), (windows, 1))
    starts = [room // 2] if windows == 1 else np.linspace(0, room, windows).astype(np.int64)
    return np.asarray(starts, dtype=np.int64)[:, None] + steps


class TrimmedClips(Dataset):
    """Windows and crops of trimmed clips, one file each.

    `dataset[i]` is a dict with `index`; `video`, Tensor (windows · crops, 3, T, S, S) uint8, in which the crops of one
    window follow each other; and `error`, why the clip could not be read ("" if it could be read; the video is zeros
    otherwise).

    Args:
        videos: The clips' paths below the root, without extension.
        store: The videos, as whole files.
        num_frames, stride, windows: As in `window_frame_ids`.
        transform: The crops; it must be a fused one.
    """

    def __init__(
        self,
        videos: Sequence[str],
        store: VideoStore,
        *,
        num_frames: int,
        stride: int,
        windows: int,
        transform: CropsTransform,
    ):
        assert transform.fused, "black frames are zeros before they are normalised"
        self.videos, self.store, self.transform = videos, store, transform
        self.num_frames, self.stride, self.windows = num_frames, stride, windows

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return {"index": int(index), "video": self._read(self.videos[index]), "error": ""}
        except VideoError as error:
            size, crops = self.transform.crop_size, self.transform.num_crops
            blank = torch.zeros(self.windows * crops, 3, self.num_frames, size, size, dtype=torch.uint8)
            return {"index": int(index), "video": blank, "error": str(error)}

    def _read(self, video: str) -> torch.Tensor:
        with open_video(self.store.chunk_path(video, 0), self.store.decoder, self.store.threads) as reader:
            ids = window_frame_ids(reader.num_frames, self.num_frames, self.stride, self.windows)
            needed = np.unique(ids[ids != _BLACK])
            scaling = lambda height, width: self.transform.scaling(height, width, None)  # noqa: E731
            crops = self.transform.from_scaled(reader.get_scaled(needed, scaling))  # (crops, 3, n, S, S)
        black = torch.zeros_like(crops[:, :, :1])
        places = np.where(ids == _BLACK, len(needed), np.searchsorted(needed, ids))  # (windows, T)
        views = torch.cat([crops, black], dim=2)[:, :, torch.from_numpy(places)]  # (crops, 3, windows, T, S, S)
        return views.permute(2, 0, 1, 3, 4, 5).flatten(0, 1)
