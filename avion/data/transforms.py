"""Crops and normalisation of clips.

Two paths with the same crops. The plain one works in float32 and normalises in the worker. The fused one
(`--fused-decode-crop`) stays uint8, a quarter of the memory to move, and `normalize_clip` does the rest on the device.
Given RGB frames it crops and resizes those; they then differ by uint8's rounding only. A `VideoStore` that is given the
transform's `scaling` cuts and resizes what the codec put out, without an RGB picture in between, and `from_scaled`
finishes that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from avion.constants import NORM_STYLES
from avion.data.video import Scaling, compile_scaler
from avion.errors import UserError

CropBox = tuple[int, int, int, int]  # top, left, height, width, in pixels


def random_crop_box(
    height: int,
    width: int,
    rng: np.random.Generator,
    scale: tuple[float, float] = (0.5, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> CropBox:
    """Draw a box of random area and aspect ratio anywhere in the picture.

    This is Inception's crop, as in torchvision's RandomResizedCrop. Ten boxes are tried; if none fits, the largest
    central box of an allowed aspect ratio is taken.

    Args:
        height, width: The size of the picture in pixels.
        scale: The range of the area as a fraction of the picture's area; the area is drawn uniformly.
        ratio: The range of the aspect ratio width/height, which is drawn log-uniformly.
    """
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    aspect = min(max(width / height, ratio[0]), ratio[1])
    h, w = min(height, round(width / aspect)), min(width, round(height * aspect))
    return (height - h) // 2, (width - w) // 2, h, w


def short_side_size(height: int, width: int, size: int) -> tuple[int, int]:
    """Return the (height, width) of a picture whose shorter side is resized to `size` at the same aspect ratio."""
    if height <= width:
        return size, int(size * width / height)
    return int(size * height / width), size


class _ClipTransform:
    """frames (T, H, W, 3) uint8 → (3, T, crop_size, crop_size): float32 normalised, or uint8 where fused."""

    def __init__(self, crop_size: int, norm_style: str = "openai", fused: bool = False):
        if crop_size < 1:
            raise UserError(f"crop size: {crop_size} is not at least 1 pixel")
        _check_norm_style(norm_style)
        self.crop_size, self.norm_style, self.fused = crop_size, norm_style, fused
        if fused:
            compile_scaler()

    def __call__(self, frames: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        return self._finish(self._crop(self._begin(frames), rng))

    def scaling(self, height: int, width: int, rng: np.random.Generator | None) -> Scaling:
        """What this transform cuts out of upright pictures of this size, and the size that it brings it to. Draws from
        rng what `__call__` would draw."""
        return Scaling((0, 0, height, width), short_side_size(height, width, self.crop_size))

    def from_scaled(self, frames: np.ndarray) -> torch.Tensor:
        """frames (T, 3, h, w) uint8, cut and scaled as `scaling` says → what `__call__` returns for a fused clip."""
        assert self.fused, "a scaled clip is uint8"
        return self._finish(self._cut(torch.from_numpy(frames)))

    def _cut(self, clip: torch.Tensor) -> torch.Tensor:
        """(T, 3, h, w), already scaled → (T, 3, crop_size, crop_size)"""
        return clip

    def _begin(self, frames: np.ndarray) -> torch.Tensor:
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
            raise ValueError(f"frames: (T, H, W, 3) uint8 is required, {frames.shape} {frames.dtype} was given")
        return torch.from_numpy(frames).permute(0, 3, 1, 2)  # (T, 3, H, W), channels last in memory

    def _finish(self, clip: torch.Tensor) -> torch.Tensor:
        clip = clip.permute(1, 0, 2, 3)  # (3, T, h, w)
        return clip if self.fused else _normalized(clip, self.norm_style)

    def _crop(self, clip: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        raise NotImplementedError

    def _resize(self, clip: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """(T, 3, H, W) uint8 → (T, 3, *size), uint8 where fused, else float32. Bilinear with antialiasing."""
        if not self.fused:
            clip = clip.contiguous().float()  # planes: what float interpolation and normalisation are fast on
        return F.interpolate(clip, size=size, mode="bilinear", antialias=True, align_corners=False)


class TrainTransform(_ClipTransform):
    """Cut one random box out of all frames of a clip and resize it to crop_size x crop_size.

    The box depends only on the generator and the size of the frames. scale, ratio: as in `random_crop_box`.
    """

    def __init__(
        self,
        crop_size: int,
        scale: tuple[float, float] = (0.5, 1.0),
        norm_style: str = "openai",
        fused: bool = False,
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
    ):
        super().__init__(crop_size, norm_style, fused)
        if not 0.0 < scale[0] <= scale[1]:
            raise UserError(f"crop scale: {scale} is not an ascending pair of positive shares")
        if not 0.0 < ratio[0] <= ratio[1]:
            raise UserError(f"crop ratio: {ratio} is not an ascending pair of positive ratios")
        self.scale, self.ratio = tuple(scale), tuple(ratio)

    def scaling(self, height: int, width: int, rng: np.random.Generator | None) -> Scaling:
        return Scaling(random_crop_box(height, width, rng, self.scale, self.ratio), (self.crop_size, self.crop_size))

    def _crop(self, clip: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        top, left, height, width = self.scaling(*clip.shape[-2:], rng).box
        return self._resize(clip[..., top : top + height, left : left + width], (self.crop_size, self.crop_size))


class EvalTransform(_ClipTransform):
    """Resize the shorter side to crop_size and cut out the centre, crop_size x crop_size.

    No random numbers are drawn.
    """

    def _crop(self, clip: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        return self._cut(self._resize(clip, short_side_size(*clip.shape[-2:], self.crop_size)))

    def _cut(self, clip: torch.Tensor) -> torch.Tensor:
        top, left = (round((side - self.crop_size) / 2) for side in clip.shape[-2:])
        return clip[..., top : top + self.crop_size, left : left + self.crop_size]


class CropsTransform(_ClipTransform):
    """Resize the shorter side to crop_size, then crop at several places along the longer side.

    A call maps frames (T, H, W, 3) uint8 to (num_crops, 3, T, crop_size, crop_size). No random numbers are drawn.

    Args:
        num_crops: 1 takes the centre, as `EvalTransform` does; 3 takes left, centre and right (of upright pictures:
            top, centre and bottom).
    """

    def __init__(self, crop_size: int, num_crops: int, norm_style: str = "openai", fused: bool = False):
        super().__init__(crop_size, norm_style, fused)
        if num_crops not in (1, 3):
            raise UserError(f"number of crops: 1 (centre) or 3 (left, centre, right) are required, found {num_crops}")
        self.num_crops = num_crops

    def __call__(self, frames: np.ndarray, rng: np.random.Generator | None = None) -> torch.Tensor:
        clip = self._begin(frames)
        return self._crops(self._resize(clip, short_side_size(*clip.shape[-2:], self.crop_size)))

    def from_scaled(self, frames: np.ndarray) -> torch.Tensor:
        assert self.fused, "a scaled clip is uint8"
        return self._crops(torch.from_numpy(frames))

    def _crops(self, clip: torch.Tensor) -> torch.Tensor:
        """(T, 3, h, w), already scaled → (num_crops, 3, T, crop_size, crop_size)"""
        size, crops = self.crop_size, []
        for part in (1,) if self.num_crops == 1 else (0, 1, 2):  # halves of the room: 0 left, 1 centre, 2 right
            top, left = (round(part * (side - size) / 2) for side in clip.shape[-2:])
            crops.append(self._finish(clip[..., top : top + size, left : left + size]))
        return torch.stack(crops)


def normalize_clip(video: torch.Tensor, norm_style: str) -> torch.Tensor:
    """Normalise clips that are uint8, on any device; floating-point clips are already normalised and pass unchanged.

    Args:
        video: (..., 3, T, H, W).
        norm_style: A key of NORM_STYLES.

    Returns:
        float32 of the same shape and memory order.

    Raises:
        UserError: `norm_style` is not a key of NORM_STYLES.
    """
    _check_norm_style(norm_style)
    if video.dtype != torch.uint8:
        if not video.is_floating_point():
            raise ValueError(f"video: uint8 or float is required, {video.dtype} was given")
        return video
    return _normalized(video, norm_style)


def _normalized(video: torch.Tensor, norm_style: str) -> torch.Tensor:
    mean, std = _statistics(norm_style, video.device)  # (3, 1, 1, 1)
    return video.to(torch.float32, memory_format=torch.preserve_format).sub(mean).div_(std)


@lru_cache(maxsize=16)
def _statistics(norm_style: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    style = NORM_STYLES[norm_style]
    mean, std = (torch.tensor(v, dtype=torch.float32, device=device).view(3, 1, 1, 1) for v in style)
    return mean, std


def _check_norm_style(norm_style: str) -> None:
    if norm_style not in NORM_STYLES:
        raise UserError(f"norm style: {norm_style!r} is not one of {', '.join(NORM_STYLES)}")


# ---- AVION's, for people's own scripts ---------------------------------------------------------


class Permute(nn.Module):
    """Permute the dimensions of a video, as `Tensor.permute` does.

    The ordering [3, 0, 1, 2] turns the (T, H, W, C) of a decoder into (C, T, H, W).
    """

    def __init__(self, ordering: Sequence[int]):
        super().__init__()
        self.ordering = ordering

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        return frames.permute(*self.ordering)


class SpatialCrop(nn.Module):
    """Cut square crops along the longer side of videos.

    A call maps a list of (C, T, H, W) to a list of (C, T, crop_size, crop_size); the crops of a video follow each
    other. Along the shorter side, every crop is central.

    Args:
        num_crops: 1 takes the centre; 3 takes left, centre and right (of upright videos: top, centre and bottom); 6
            takes these three crops and the same three crops of the mirrored video.

    Raises:
        UserError: `num_crops` is another number, or a video is smaller than the crop.
    """

    def __init__(self, crop_size: int = 224, num_crops: int = 3):
        super().__init__()
        if num_crops not in (1, 3, 6):
            raise UserError(f"num_crops: 1, 3 or 6 are required, found {num_crops!r}")
        self.crop_size, self.num_crops = crop_size, num_crops

    def forward(self, videos: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [crop for video in videos for crop in self._crops(video)]

    def _crops(self, video: torch.Tensor) -> list[torch.Tensor]:
        size, room = self.crop_size, [side - self.crop_size for side in video.shape[-2:]]
        if video.ndim != 4 or min(room) < 0:
            found = tuple(video.shape)
            raise UserError(f"videos of shape (C, T, H, W), at least {size} x {size}, are required; found {found}")
        long = 0 if room[0] > room[1] else 1
        corners = []
        for share in (1,) if self.num_crops == 1 else (0, 1, 2):  # halves of the room before the crop
            corner = [-(-r // 2) for r in room]
            corner[long] = -(-share * room[long] // 2)
            corners.append(corner)
        views = [video, video.flip(-1)] if self.num_crops == 6 else [video]
        return [view[..., top : top + size, left : left + size] for view in views for top, left in corners]
