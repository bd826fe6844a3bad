"""Mixup and cutmix for clips (arXiv 1710.09412, 1905.04899), by timm."""

import torch
from timm.data.mixup import Mixup

from avion.errors import UserError


class VideoMixup:
    """Mix clip i of a batch with clip B-1-i, and their labels in the same way.

    One box, or one weight, is used for all frames of a clip. Random numbers come from numpy's global generator, once
    per `mode` ("batch", "pair", "elem"). Labels are smoothed before they are mixed. A call maps (B, 3, T, H, W) and
    labels (B,) to (B, 3, T, H, W), in place where possible, and soft targets (B, num_classes) float32.

    Args:
        mixup: The alpha of mixup's beta distribution; 0 turns mixup off.
        cutmix: The alpha of cutmix's beta distribution; 0 turns cutmix off.
        cutmix_minmax: The range of the box's sides as fractions of the frame; it replaces cutmix's alpha.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        mixup: float,
        cutmix: float,
        cutmix_minmax: tuple[float, float] | None = None,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        mode: str = "batch",
        smoothing: float = 0.0,
    ):
        if cutmix_minmax is not None and not 0 <= cutmix_minmax[0] < cutmix_minmax[1] <= 1:
            raise UserError(f"cutmix minmax: two ascending shares of 0 to 1 are required, found {list(cutmix_minmax)}")
        self.minmax = cutmix_minmax
        self.mix = Mixup(
            mixup_alpha=mixup,
            cutmix_alpha=cutmix,
            cutmix_minmax=cutmix_minmax,
            prob=prob,
            switch_prob=switch_prob,
            mode=mode,
            label_smoothing=smoothing,
            num_classes=num_classes,
        )

    def __call__(self, video: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if len(video) % 2:
            raise UserError(f"mixup takes clips in pairs: a batch of {len(video)} is odd")
        if self.minmax is not None and len({int(video.shape[-1] * share) for share in self.minmax}) == 1:
            raise UserError(f"cutmix minmax: {list(self.minmax)} are the same in whole pixels of {video.shape[-1]}")
        frames = video.shape[2]
        # timm mixes pictures. The frames become channels, so that all frames of a clip are mixed in the same way.
        mixed, targets = self.mix(video.flatten(1, 2), labels)  # (B, 3·T, H, W), (B, num_classes)
        return mixed.unflatten(1, (-1, frames)), targets
