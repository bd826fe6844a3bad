"""The `triton` backend: two kernels, for GPUs and, in tests, Triton's interpreter.

A tile is BLOCK_T steps x BLOCK_D channels of one row. x is loaded at each of the K shifts: all but the first come from
the cache. Backward recomputes what is before the SiLU, at every shift again, and adds up the gradients of weight and
bias in registers over the tiles of a program and then over the programs: no atomics, two runs agree bit for bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .autograd import differentiable


@triton.jit
def _tile(item, steps, channels, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """Row, steps (BLOCK_T, 1) and channels (1, BLOCK_D) of a tile; channels vary fastest, then steps, then rows."""
    blocks_d, blocks_t = tl.cdiv(channels, BLOCK_D), tl.cdiv(steps, BLOCK_T)
    item = tl.full((), 0, tl.int64) + item
    t = (item // blocks_d % blocks_t) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    return item // blocks_d // blocks_t, t, item % blocks_d * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def _convolve(x, weight, bias, t, d, steps, channels, x_t, x_d, K: tl.constexpr, SIGN: tl.constexpr):
    """b + sum_s w[:, K-1-s] x_{t - SIGN·s} at the tile's steps, (BLOCK_T, BLOCK_D) float32. x points to the row."""
    total = tl.load(bias + d, mask=d < channels, other=0.0) + tl.zeros((t.shape[0], d.shape[1]), tl.float32)
    for s in tl.static_range(K):
        at = t - SIGN * s
        inside = (at >= 0) & (at < steps) & (d < channels)
        tap = tl.load(weight + d * K + (K - 1 - s), mask=d < channels, other=0.0)
        total += tap * tl.load(x + at * x_t + d * x_d, mask=inside, other=0.0).to(tl.float32)
    return total


@triton.jit
def forward_kernel(
    x, weight, bias, y, steps, channels, x_r, x_t, x_d,
    K: tl.constexpr, SIGN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row, t, d = _tile(tl.program_id(0), steps, channels, BLOCK_T, BLOCK_D)
    conv = _convolve(x + row * x_r, weight, bias, t, d, steps, channels, x_t, x_d, K, SIGN)
    target = y + (row * steps + t) * channels + d
    tl.store(target, (conv * tl.sigmoid(conv)).to(y.dtype.element_ty), mask=(t < steps) & (d < channels))


@triton.jit
def _by_conv(
    dy, x, weight, bias, t, d, steps, channels, dy_t, dy_d, x_t, x_d, K: tl.constexpr, SIGN: tl.constexpr
):  # fmt: skip
    """The gradient of what is before the SiLU at steps t, zero outside of the sequence."""
    inside = (t >= 0) & (t < steps) & (d < channels)
    conv = _convolve(x, weight, bias, t, d, steps, channels, x_t, x_d, K, SIGN)
    gate = tl.sigmoid(conv)
    slope = gate * (1.0 + conv * (1.0 - gate))
    return tl.where(inside, tl.load(dy + t * dy_t + d * dy_d, mask=inside, other=0.0).to(tl.float32) * slope, 0.0)


@triton.jit
def backward_kernel(
    dy, x, weight, bias, dx, d_weight, d_bias, tiles_per_block, steps, channels, programs,
    dy_r, dy_t, dy_d, x_r, x_t, x_d,
    K: tl.constexpr, SIGN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx (R, T, D) contiguous; d_weight (programs, K, D) and d_bias (programs, D) are partial sums. Program (p, block
    of channels) takes the tiles p, p + programs, … of its channels."""
    blocks_d = tl.cdiv(channels, BLOCK_D)
    block, p = tl.program_id(0) % blocks_d, (tl.program_id(0) // blocks_d).to(tl.int64)
    sums = ()
    for _ in tl.static_range(K + 1):
        sums = sums + (tl.zeros((BLOCK_T, BLOCK_D), tl.float32),)
    for tile in range(p, tiles_per_block, programs):
        row, t, d = _tile(tile * blocks_d + block, steps, channels, BLOCK_T, BLOCK_D)
        x_row, dy_row = x + row * x_r, dy + row * dy_r
        own = _by_conv(dy_row, x_row, weight, bias, t, d, steps, channels, dy_t, dy_d, x_t, x_d, K, SIGN)
        total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        new = ()
        for s in tl.static_range(K):
            at = t - SIGN * s
            inside = (at >= 0) & (at < steps) & (d < channels)
            x_at = tl.load(x_row + at * x_t + d * x_d, mask=inside, other=0.0).to(tl.float32)
            new = new + (sums[s] + own * x_at,)
            # x_t reaches y_{t + SIGN·s}.
            reached = own
            if s > 0:
                reached = _by_conv(
                    dy_row, x_row, weight, bias, t + SIGN * s, d, steps, channels, dy_t, dy_d, x_t, x_d, K, SIGN
                )
            total += tl.load(weight + d * K + (K - 1 - s), mask=d < channels, other=0.0) * reached
        sums = new + (sums[K] + own,)
        tl.store(
            dx + (row * steps + t) * channels + d, total.to(dx.dtype.element_ty), mask=(t < steps) & (d < channels)
        )
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    for s in tl.static_range(K):
        tl.store(d_weight + (p * K + K - 1 - s) * channels + d, tl.sum(sums[s], axis=0), mask=d < channels)
    tl.store(d_bias + p * channels + d, tl.sum(sums[K], axis=0), mask=d < channels)


def _blocks(x: Tensor) -> tuple[int, int]:
    """BLOCK_T and BLOCK_D."""
    if not x.is_cuda:  # the interpreter: several tiles at small sizes
        return 4, 4
    return min(4, triton.next_power_of_2(x.shape[1])), 128  # more steps than that and backward runs out of registers


def _constants(weight: Tensor, reverse: bool, block_t: int, block_d: int) -> dict[str, int]:
    return {"K": weight.shape[1], "SIGN": -1 if reverse else 1, "BLOCK_T": block_t, "BLOCK_D": block_d}


@torch.library.custom_op("avion::causal_conv_silu_triton", mutates_args=())
def _conv_silu(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel() == 0:
        return y
    rows, steps, channels = x.shape
    block_t, block_d = _blocks(x)
    tiles = rows * triton.cdiv(steps, block_t) * triton.cdiv(channels, block_d)
    forward_kernel[(tiles,)](
        x, weight.float().contiguous(), bias.float().contiguous(), y, steps, channels, *x.stride(),
        **_constants(weight, reverse, block_t, block_d),
    )  # fmt: skip
    return y


@_conv_silu.register_fake
def _(x, weight, bias, reverse):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("avion::causal_conv_silu_triton_backward", mutates_args=())
def _conv_silu_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    if dx.numel() == 0:
        return dx, torch.zeros_like(weight), torch.zeros_like(bias)
    rows, steps, channels = x.shape
    block_t, block_d = _blocks(x)
    blocks_d, tiles = triton.cdiv(channels, block_d), rows * triton.cdiv(steps, block_t)
    busy = 8 * torch.cuda.get_device_properties(x.device).multi_processor_count // blocks_d if x.is_cuda else 2
    programs = max(1, min(tiles, busy))
    d_weight = x.new_empty((programs, weight.shape[1], channels), dtype=torch.float32)
    d_bias = x.new_empty((programs, channels), dtype=torch.float32)
    backward_kernel[(programs * blocks_d,)](
        dy, x, weight.float().contiguous(), bias.float().contiguous(), dx, d_weight, d_bias, tiles, steps, channels,
        programs, *dy.stride(), *x.stride(), **_constants(weight, reverse, block_t, block_d),
    )  # fmt: skip
    return dx, d_weight.sum(0).t().contiguous().to(weight.dtype), d_bias.sum(0).to(bias.dtype)


differentiable(_conv_silu, _conv_silu_backward)


def causal_conv_silu_triton(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
    """See the package's docstring; x float32, bfloat16 or float16, K up to 4."""
    return _conv_silu(x, weight, bias, reverse)
