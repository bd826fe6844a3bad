"""One clip of thousands of frames, some tokens at a time: what the walks of all towers share.

The letters of the shapes are those of transformer.py; there is one clip, B = 1. The residual stream, tokens (1, N, T,
D), must be in memory as a whole; there is one copy, which is changed in place.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn

from .transformer import embed_patches, patch_grid
from .utils import resize_position_embed, resize_temporal_embed

# Reads the frames [start, stop) of the clip, normalised: (C, stop - start, height, width) float.
FrameReader = Callable[[int, int], torch.Tensor]


class Stem(NamedTuple):
    """The parts of a tower that come before its blocks; every tower has its own names for them."""

    conv: nn.Conv2d
    fast: bool
    cls: torch.Tensor  # (1, 1, D)
    position: torch.Tensor  # (1, 1+N, D)
    temporal: torch.Tensor | None  # (1, T, D)
    norm: nn.LayerNorm


class Stream(NamedTuple):
    """The residual stream of one clip, and how many of its tokens may be computed at a time."""

    cls: torch.Tensor  # (1, 1, D)
    tokens: torch.Tensor  # (1, N, T, D), patch-major, changed in place
    max_tokens: int

    def rows(self) -> Iterator[slice]:
        """Yield slices of the patches."""
        return pieces(self.tokens.shape[1], self.max_tokens // self.tokens.shape[2])

    def frames(self) -> Iterator[slice]:
        """Yield slices of the frames."""
        return pieces(self.tokens.shape[2], self.max_tokens // (1 + self.tokens.shape[1]))

    def beside(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return memory for as many tokens again, by default in the autocast dtype."""
        return torch.empty_like(self.tokens, dtype=dtype or compute_dtype(self.tokens))


def pieces(total: int, size: int) -> Iterator[slice]:
    """Yield slices of at most `size` (at least 1) elements that cover `total` elements."""
    size = max(1, size)
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the dtype in which matrices are multiplied: the autocast dtype, or without autocast the dtype of `x`."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def embed_frames(stem: Stem, read: FrameReader, num_frames: int, max_tokens: int) -> Stream:
    """Return the residual stream before the first block; the frames are read and embedded some at a time."""
    grid = patch_grid(read(0, 1)[None], stem.conv.kernel_size[0])
    position = resize_position_embed(stem.position, grid)  # (1, 1+N, D)
    temporal = None if stem.temporal is None else resize_temporal_embed(stem.temporal, num_frames)  # (1, T, D)
    tokens = position.new_empty(0)
    for f in pieces(num_frames, max_tokens // position.shape[1]):
        x = embed_patches(read(f.start, f.stop)[None], stem.conv, stem.fast)  # (1, N, t, D)
        x = x + position[:, 1:, None]
        if temporal is not None:
            x = x + temporal[:, f]
        x = stem.norm(x)
        if f.start == 0:
            tokens = x.new_empty(1, x.shape[1], num_frames, x.shape[3])
        tokens[:, :, f] = x
    return Stream(stem.norm(stem.cls + position[:, :1]), tokens, max_tokens)
