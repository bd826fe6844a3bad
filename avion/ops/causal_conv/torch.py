"""The `torch` backend: K shifted multiply-adds on blocks that fit the cache, on any device; nn.Conv1d would want the
layout (R, D, T). Backward recomputes what is before the SiLU from x, so that x alone is kept.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .autograd import differentiable

_BLOCK_ELEMENTS = 200_000  # of a block's (rows, steps, D) on a CPU, so that its few buffers fit the cache
_BLOCK_ELEMENTS_ELSEWHERE = 64_000_000


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in {t.dtype for t in tensors} else torch.float32


def _blocks(x: Tensor) -> Iterator[tuple[slice, int, int]]:
    """Rows, first step and end of each block."""
    rows, steps, channels = x.shape
    budget = _BLOCK_ELEMENTS if x.device.type == "cpu" else _BLOCK_ELEMENTS_ELSEWHERE
    in_steps = max(1, min(steps, budget // channels))
    in_rows = max(1, budget // (in_steps * channels))
    for row in range(0, rows, in_rows):
        for start in range(0, steps, in_steps):
            yield slice(row, row + in_rows), start, min(start + in_steps, steps)


def _overlap(start: int, stop: int, shift: int, low: int, high: int) -> tuple[slice, slice] | None:
    """Steps t of [start, stop) with t - shift in [low, high): as a slice from `start`, and of t - shift
    from `low`; None where there are none."""
    first, end = max(start, low + shift), min(stop, high + shift)
    if first >= end:
        return None
    return slice(first - start, end - start), slice(first - shift - low, end - shift - low)


def _convolve(x: Tensor, taps: list[Tensor], bias: Tensor, start: int, stop: int, sign: int) -> Tensor:
    """Steps [start, stop) before the SiLU, of x (rows, T, D); taps[s] (D,) weighs x_{t - sign·s}."""
    y = torch.addcmul(bias, x[:, start:stop], taps[0])
    for s, tap in enumerate(taps[1:], 1):
        overlap = _overlap(start, stop, sign * s, 0, x.shape[1])
        if overlap is not None:
            y[:, overlap[0]].addcmul_(x[:, overlap[1]], tap)
    return y


@torch.library.custom_op("avion::causal_conv_silu", mutates_args=())
def _conv_silu(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
    dtype, sign = _compute_dtype(x, weight, bias), -1 if reverse else 1
    taps, bias = _taps(weight, dtype), bias.to(dtype)
    y = x.new_empty(x.shape)
    for rows, start, stop in _blocks(x):
        block, first = _with_halo(x, rows, start, stop, len(taps) - 1, dtype)
        conv = _convolve(block, taps, bias, start - first, stop - first, sign)
        y[rows, start:stop] = torch.nn.functional.silu(conv, inplace=True)
    return y


def _taps(weight: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The weights of x_t, x_{t-1}, …, (D,) each."""
    return list(weight.to(dtype).t().flip(0).contiguous().unbind(0))


def _with_halo(x: Tensor, rows: slice, start: int, stop: int, halo: int, dtype: torch.dtype):
    """Rows of x with up to `halo` steps around [start, stop), in the compute dtype, and their first step."""
    first = max(0, start - halo)
    return x[rows, first : min(stop + halo, x.shape[1])].to(dtype), first


@_conv_silu.register_fake
def _(x, weight, bias, reverse):
    return x.new_empty(x.shape)


@torch.library.custom_op("avion::causal_conv_silu_backward", mutates_args=())
def _conv_silu_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    dtype, sign = _compute_dtype(x, weight, bias), -1 if reverse else 1
    taps, bias_compute = _taps(weight, dtype), bias.to(dtype)
    dx = x.new_empty(x.shape)
    d_taps = torch.zeros(len(taps), x.shape[2], dtype=dtype, device=x.device)
    d_bias = torch.zeros_like(bias_compute)
    halo = len(taps) - 1
    for rows, start, stop in _blocks(x):
        # The steps of y that x_t reaches, t in [start, stop): up to `halo` later ones, earlier in reverse.
        low = max(0, start - halo) if reverse else start
        high = stop if reverse else min(stop + halo, x.shape[1])
        block, first = _with_halo(x, rows, low, high, halo, dtype)
        conv = _convolve(block, taps, bias_compute, low - first, high - first, sign)
        d_conv = torch.ops.aten.silu_backward(dy[rows, low:high].to(dtype), conv)

        own = slice(start - low, stop - low)  # a step's weight gradients belong to one block
        d_bias += d_conv[:, own].sum((0, 1))
        d_block = d_conv[:, own] * taps[0]
        for s, tap in enumerate(taps):
            seen = _overlap(start, stop, sign * s, first, first + block.shape[1])
            if seen is not None:
                d_taps[s] += (d_conv[:, own][:, seen[0]] * block[:, seen[1]]).sum((0, 1))
            reached = _overlap(start, stop, -sign * s, low, high)
            if s > 0 and reached is not None:
                d_block[:, reached[0]].addcmul_(d_conv[:, reached[1]], tap)
        dx[rows, start:stop] = d_block
    return dx, d_taps.flip(0).t().contiguous().to(weight.dtype), d_bias.to(bias.dtype)


differentiable(_conv_silu, _conv_silu_backward)


def causal_conv_silu_torch(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
    """See the package's docstring."""
    return _conv_silu(x, weight, bias, reverse)
