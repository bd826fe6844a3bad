"""The `triton` backend: two kernels, for GPUs and, in tests, Triton's interpreter.

A tile is BLOCK_T steps x BLOCK_D channels of one row. x is loaded at each of the K shifts: all but the first come from
the cache. Both directions of time share a launch where both are wanted: x is then read, and its gradient written, once.
Backward recomputes what is before the SiLU, at every shift again, and adds up the gradients of weight and bias in
registers over the tiles of a program and then over the programs: no atomics, two runs agree bit for bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .autograd import differentiable, differentiable_both


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
    x, weight, bias, y, y_b, steps, channels, x_r, x_t, x_d,
    K: tl.constexpr, SIGN: tl.constexpr, COUNT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y (R, T, D) contiguous, and with COUNT 2 also y_b, of the other direction, whose weight and bias follow."""
    row, t, d = _tile(tl.program_id(0), steps, channels, BLOCK_T, BLOCK_D)
    place = (row * steps + t) * channels + d
    for i in tl.static_range(COUNT):
        w, b = weight + i * channels * K, bias + i * channels
        conv = _convolve(x + row * x_r, w, b, t, d, steps, channels, x_t, x_d, K, SIGN if i == 0 else -SIGN)
        out = (y if i == 0 else y_b) + place
        tl.store(out, (conv * tl.sigmoid(conv)).to(y.dtype.element_ty), mask=(t < steps) & (d < channels))


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
def _tile_gradients(
    dy, x, weight, bias, sums, t, d, steps, channels, dy_t, dy_d, x_t, x_d, K: tl.constexpr, SIGN: tl.constexpr
):  # fmt: skip
    """One direction's share of a tile's dx, and `sums`, K of the weight's and one of the bias's, with the tile's."""
    own = _by_conv(dy, x, weight, bias, t, d, steps, channels, dy_t, dy_d, x_t, x_d, K, SIGN)
    total = tl.zeros(own.shape, tl.float32)
    new = ()
    for s in tl.static_range(K):
        at = t - SIGN * s
        inside = (at >= 0) & (at < steps) & (d < channels)
        x_at = tl.load(x + at * x_t + d * x_d, mask=inside, other=0.0).to(tl.float32)
        new = new + (sums[s] + own * x_at,)
        # x_t reaches y_{t + SIGN·s}.
        reached = own
        if s > 0:
            reached = _by_conv(dy, x, weight, bias, t + SIGN * s, d, steps, channels, dy_t, dy_d, x_t, x_d, K, SIGN)
        total += tl.load(weight + d * K + (K - 1 - s), mask=d < channels, other=0.0) * reached
    return total, new + (sums[K] + own,)


@triton.jit
def _no_sums(K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    sums = ()
    for _ in tl.static_range(K + 1):
        sums = sums + (tl.zeros((BLOCK_T, BLOCK_D), tl.float32),)
    return sums


@triton.jit
def _store_sums(sums, d_weight, d_bias, p, d, channels, K: tl.constexpr):
    for s in tl.static_range(K):
        tl.store(d_weight + (p * K + K - 1 - s) * channels + d, tl.sum(sums[s], axis=0), mask=d < channels)
    tl.store(d_bias + p * channels + d, tl.sum(sums[K], axis=0), mask=d < channels)


@triton.jit
def backward_kernel(
    dy, dy_b, x, weight, bias, dx, d_weight, d_bias, tiles_per_block, steps, channels, programs,
    dy_r, dy_t, dy_d, dy_b_r, dy_b_t, dy_b_d, x_r, x_t, x_d,
    K: tl.constexpr, SIGN: tl.constexpr, COUNT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx (R, T, D) contiguous; d_weight (COUNT, programs, K, D) and d_bias (COUNT, programs, D) are partial sums.
    Program (p, block of channels) takes the tiles p, p + programs, … of its channels."""
    blocks_d = tl.cdiv(channels, BLOCK_D)
    block, p = tl.program_id(0) % blocks_d, (tl.program_id(0) // blocks_d).to(tl.int64)
    sums, sums_b = _no_sums(K, BLOCK_T, BLOCK_D), _no_sums(K, BLOCK_T, BLOCK_D)
    for tile in range(p, tiles_per_block, programs):
        row, t, d = _tile(tile * blocks_d + block, steps, channels, BLOCK_T, BLOCK_D)
        total, sums = _tile_gradients(
            dy + row * dy_r, x + row * x_r, weight, bias, sums, t, d, steps, channels, dy_t, dy_d, x_t, x_d, K, SIGN
        )
        if COUNT == 2:
            other, sums_b = _tile_gradients(
                dy_b + row * dy_b_r, x + row * x_r, weight + channels * K, bias + channels, sums_b, t, d,
                steps, channels, dy_b_t, dy_b_d, x_t, x_d, K, -SIGN)  # fmt: skip
            total += other
        tl.store(
            dx + (row * steps + t) * channels + d, total.to(dx.dtype.element_ty), mask=(t < steps) & (d < channels)
        )
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    _store_sums(sums, d_weight, d_bias, p, d, channels, K)
    if COUNT == 2:
        _store_sums(sums_b, d_weight, d_bias, programs + p, d, channels, K)


# Multiply-adds are fused: rounded once instead of twice, and one instruction instead of two.
_OPTIONS: dict = {"enable_fp_fusion": True}


def _blocks(x: Tensor) -> tuple[int, int]:
    """BLOCK_T and BLOCK_D."""
    if x.device.type == "cpu":  # the interpreter: several tiles at small sizes
        return 4, 4
    return min(4, triton.next_power_of_2(x.shape[1])), 128  # more steps than that and backward runs out of registers


def _forward(x: Tensor, weights: list[Tensor], biases: list[Tensor], sign: int) -> list[Tensor]:
    """y of the first direction, and of the other one where there are two of each."""
    outputs = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in weights]
    if x.numel() == 0:
        return outputs
    rows, steps, channels = x.shape
    block_t, block_d = _blocks(x)
    tiles = rows * triton.cdiv(steps, block_t) * triton.cdiv(channels, block_d)
    forward_kernel[(tiles,)](
        x, torch.stack(weights).float(), torch.stack(biases).float(), outputs[0], outputs[-1], steps, channels,
        *x.stride(), K=weights[0].shape[1], SIGN=sign, COUNT=len(weights), BLOCK_T=block_t, BLOCK_D=block_d,
        **_OPTIONS,
    )  # fmt: skip
    return outputs


def _backward(dys: list[Tensor], x: Tensor, weights: list[Tensor], biases: list[Tensor], sign: int) -> list[Tensor]:
    """Gradients of x, and of each direction's weight and bias."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    if dx.numel() == 0:
        pairs = zip(weights, biases, strict=True)
        return [dx, *(torch.zeros_like(t) for pair in pairs for t in pair)]
    rows, steps, channels = x.shape
    block_t, block_d = _blocks(x)
    blocks_d, tiles = triton.cdiv(channels, block_d), rows * triton.cdiv(steps, block_t)
    busy = 8 * torch.cuda.get_device_properties(x.device).multi_processor_count // blocks_d if x.is_cuda else 2
    programs, count, taps = max(1, min(tiles, busy)), len(weights), weights[0].shape[1]
    d_weight = x.new_empty((count, programs, taps, channels), dtype=torch.float32)
    d_bias = x.new_empty((count, programs, channels), dtype=torch.float32)
    backward_kernel[(programs * blocks_d,)](
        dys[0], dys[-1], x, torch.stack(weights).float(), torch.stack(biases).float(), dx, d_weight, d_bias, tiles,
        steps, channels, programs, *dys[0].stride(), *dys[-1].stride(), *x.stride(),
        K=taps, SIGN=sign, COUNT=count, BLOCK_T=block_t, BLOCK_D=block_d,
        **_OPTIONS,
    )  # fmt: skip
    grads = [dx]
    for weight, bias, by_weight, by_bias in zip(weights, biases, d_weight, d_bias, strict=True):
        grads += [by_weight.sum(0).t().contiguous().to(weight.dtype), by_bias.sum(0).to(bias.dtype)]
    return grads


@torch.library.custom_op("avion::causal_conv_silu_triton", mutates_args=())
def _conv_silu(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
    return _forward(x, [weight], [bias], -1 if reverse else 1)[0]


@_conv_silu.register_fake
def _(x, weight, bias, reverse):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("avion::causal_conv_silu_triton_backward", mutates_args=())
def _conv_silu_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    dx, d_weight, d_bias = _backward([dy], x, [weight], [bias], -1 if reverse else 1)
    return dx, d_weight, d_bias


differentiable(_conv_silu, _conv_silu_backward)


@torch.library.custom_op("avion::causal_conv_silu_both_triton", mutates_args=())
def _conv_silu_both(x: Tensor, weight: Tensor, bias: Tensor, weight_b: Tensor, bias_b: Tensor) -> tuple[Tensor, Tensor]:
    ahead, behind = _forward(x, [weight, weight_b], [bias, bias_b], 1)
    return ahead, behind


@_conv_silu_both.register_fake
def _(x, weight, bias, weight_b, bias_b):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))


@torch.library.custom_op("avion::causal_conv_silu_both_triton_backward", mutates_args=())
def _conv_silu_both_backward(
    dy: Tensor, dy_b: Tensor, x: Tensor, weight: Tensor, bias: Tensor, weight_b: Tensor, bias_b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias, weight_b and bias_b."""
    dx, d_weight, d_bias, d_weight_b, d_bias_b = _backward([dy, dy_b], x, [weight, weight_b], [bias, bias_b], 1)
    return dx, d_weight, d_bias, d_weight_b, d_bias_b


differentiable_both(_conv_silu_both, _conv_silu_both_backward)


def causal_conv_silu_triton(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
    """See the package's docstring; x float32, bfloat16 or float16, K up to 4."""
    return _conv_silu(x, weight, bias, reverse)


def causal_conv_silu_both_triton(
    x: Tensor, forward: tuple[Tensor, Tensor], backward: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Both directions of `causal_conv_silu_triton`; both weights (D, K) of one K."""
    return _conv_silu_both(x, *forward, *backward)
