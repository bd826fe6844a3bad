"""The `triton` backend: two kernels, for GPUs and, in tests, for Triton's interpreter.

A tile is block_t steps × block_d channels of one row. x is loaded at each of the K shifts; all loads but the first find
their numbers in the cache. Where both directions of time are wanted they share a launch: x is then read, and the
gradient of x written, once. The backward pass recomputes what is before the SiLU at every shift. It adds up the
gradients of weight and bias in registers over the tiles of a program, and PyTorch adds up those of the programs. No
atomics are used: two runs agree bit for bit.
"""

import dataclasses
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from avion.ops.kernel_pieces import cdiv, piece, sigmoid, sum_along, zeros_in
from avion.ops.kernel_types import Block, Int, Pointer, Scalar, Values, constexpr

from .autograd import Taps, differentiable, differentiable_both


class Strided(NamedTuple):
    """A tensor (R, T, D) as the kernels take it.

    Attributes:
        data: the tensor, or in a kernel an address in it.
        strides: (row, step, channel).
    """

    data: Pointer
    strides: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Cut:
    """All that is known of a launch when its kernel is compiled.

    Attributes:
        taps: K.
        sign: 1 where the first direction walks along time, -1 where it walks from the end.
        count: the number of directions.
        block_t: the number of steps of a tile.
        block_d: the number of channels of a tile.
    """

    taps: int
    sign: int
    count: int
    block_t: int
    block_d: int


class Tile(NamedTuple):
    """The steps (block_t, 1) and channels (1, block_d) of a tile, and T and D."""

    t: Block
    d: Block
    steps: Scalar
    channels: Scalar


class Direction(NamedTuple):
    """The parameters of one direction as the kernels take them: the addresses of weight (D, K) and bias (D,)."""

    weight: Pointer
    bias: Pointer


@piece
def _tile(item: Scalar, steps: Scalar, channels: Scalar, cut: constexpr) -> tuple[Scalar, Tile]:
    """Return the row and the tile of an item; channels vary fastest, then steps, then rows."""
    blocks_d, blocks_t = cdiv(channels, cut.block_d), cdiv(steps, cut.block_t)
    item = tl.full((), 0, tl.int64) + item
    t = (item // blocks_d % blocks_t) * cut.block_t + tl.arange(0, cut.block_t)[:, None]
    d = item % blocks_d * cut.block_d + tl.arange(0, cut.block_d)[None, :]
    return item // blocks_d // blocks_t, Tile(t, d, steps, channels)


@piece
def _load_shifted(x: Strided, tile: Tile, shift: Scalar) -> tl.tensor:
    """Load x at the steps t - shift of a tile, in float32; zeros outside of the sequence. x points to the row."""
    at = tile.t - shift
    inside = (at >= 0) & (at < tile.steps) & (tile.d < tile.channels)
    place = x.data + at * x.strides[1] + tile.d * x.strides[2]
    return tl.load(place, mask=inside, other=0.0).to(tl.float32)


@piece
def _tap(p: Direction, tile: Tile, s: Int, K: Int) -> tl.tensor:
    """Load the tap of x_{t ∓ s}, (1, block_d)."""
    return tl.load(p.weight + tile.d * K + (K - 1 - s), mask=tile.d < tile.channels, other=0.0)


@piece
def _convolve(x: Strided, p: Direction, tile: Tile, K: Int, SIGN: Int) -> tl.tensor:
    """Compute b + sum_s w[:, K-1-s] x_{t - SIGN·s} at a tile, (block_t, block_d). x points to the row."""
    bias = tl.load(p.bias + tile.d, mask=tile.d < tile.channels, other=0.0)
    total = bias + zeros_in((tile.t.shape[0], tile.d.shape[1]), tl.float32)
    for s in tl.static_range(K):
        total += _tap(p, tile, s, K) * _load_shifted(x, tile, SIGN * s)
    return total


@triton.jit
def forward_kernel(
    x: Strided, parameters: Direction, y: Pointer, y_b: Pointer, steps: Scalar, channels: Scalar, cut: constexpr
) -> None:
    """Write y (R, T, D), contiguous, and y_b of the other direction where there are two.

    The weights and the biases of the two directions lie one behind the other.
    """
    K: Int = cut.taps
    COUNT: Int = cut.count
    row, tile = _tile(tl.program_id(0), steps, channels, cut)
    place = (row * steps + tile.t) * channels + tile.d
    of_row = Strided(x.data + row * x.strides[0], x.strides)
    for i in tl.static_range(COUNT):
        p = Direction(parameters.weight + i * channels * K, parameters.bias + i * channels)
        conv = _convolve(of_row, p, tile, K, cut.sign if i == 0 else -cut.sign)
        out = (y if i == 0 else y_b) + place
        inside = (tile.t < steps) & (tile.d < channels)
        tl.store(out, (conv * sigmoid(conv)).to(y.dtype.element_ty), mask=inside)


@piece
def _by_conv(dy: Strided, x: Strided, p: Direction, tile: Tile, K: Int, SIGN: Int) -> tl.tensor:
    """Compute the gradient of what is before the SiLU at a tile, zero outside of the sequence."""
    inside = (tile.t >= 0) & (tile.t < tile.steps) & (tile.d < tile.channels)
    conv = _convolve(x, p, tile, K, SIGN)
    gate = sigmoid(conv)
    slope = gate * (1.0 + conv * (1.0 - gate))
    return tl.where(inside, _load_shifted(dy, tile, 0) * slope, 0.0)


@piece
def _tile_gradients(
    dy: Strided, x: Strided, p: Direction, sums: Values, tile: Tile, K: Int, SIGN: Int
) -> tuple[tl.tensor, Values]:
    """Return one direction's share of a tile's dx, and `sums` with the tile's shares.

    The sums are the K gradients of the taps and the gradient of the bias. x and dy point to the row.
    """
    own = _by_conv(dy, x, p, tile, K, SIGN)
    total = zeros_in(own.shape, tl.float32)
    new = ()
    for s in tl.static_range(K):
        new = new + (sums[s] + own * _load_shifted(x, tile, SIGN * s),)
        # x_t reaches y_{t + SIGN·s}.
        reached = own
        if s > 0:
            later = Tile(tile.t + SIGN * s, tile.d, tile.steps, tile.channels)
            reached = _by_conv(dy, x, p, later, K, SIGN)
        total += _tap(p, tile, s, K) * reached
    return total, new + (sums[K] + own,)


@piece
def _no_sums(cut: constexpr) -> Values:
    COUNT: Int = cut.taps + 1
    sums = ()
    for _ in tl.static_range(COUNT):
        sums = sums + (zeros_in((cut.block_t, cut.block_d), tl.float32),)
    return sums


@piece
def _store_sums(
    sums: Values, by_taps: Pointer, by_bias: Pointer, p: Scalar, d: Scalar, channels: Scalar, K: Int
) -> None:
    for s in tl.static_range(K):
        tl.store(by_taps + (p * K + K - 1 - s) * channels + d, sum_along(sums[s], axis=0), mask=d < channels)
    tl.store(by_bias + p * channels + d, sum_along(sums[K], axis=0), mask=d < channels)


@triton.jit
def backward_kernel(
    dy: Strided,
    dy_b: Strided,
    x: Strided,
    parameters: Direction,
    dx: Pointer,
    by_taps: Pointer,
    by_bias: Pointer,
    tiles_per_block: Scalar,
    steps: Scalar,
    channels: Scalar,
    programs: Scalar,
    cut: constexpr,
) -> None:
    """Write dx (R, T, D), contiguous, and partial sums of the parameters' gradients.

    The partial sums are by_taps (directions, programs, K, D) and by_bias (directions, programs, D). Program (p, block
    of channels) takes the tiles p, p + programs, … of the block.
    """
    K: Int = cut.taps
    blocks_d = cdiv(channels, cut.block_d)
    block, p = tl.program_id(0) % blocks_d, (tl.program_id(0) // blocks_d).to(tl.int64)
    sums, sums_b = _no_sums(cut), _no_sums(cut)
    other_parameters = Direction(parameters.weight + channels * K, parameters.bias + channels)
    for number in range(p, tiles_per_block, programs):
        row, tile = _tile(number * blocks_d + block, steps, channels, cut)
        x_row = Strided(x.data + row * x.strides[0], x.strides)
        dy_row = Strided(dy.data + row * dy.strides[0], dy.strides)
        total, sums = _tile_gradients(dy_row, x_row, parameters, sums, tile, K, cut.sign)
        if cut.count == 2:
            dy_row = Strided(dy_b.data + row * dy_b.strides[0], dy_b.strides)
            other, sums_b = _tile_gradients(dy_row, x_row, other_parameters, sums_b, tile, K, -cut.sign)
            total += other
        place = dx + (row * steps + tile.t) * channels + tile.d
        tl.store(place, total.to(dx.dtype.element_ty), mask=(tile.t < steps) & (tile.d < channels))
    d = block * cut.block_d + tl.arange(0, cut.block_d)
    _store_sums(sums, by_taps, by_bias, p, d, channels, K)
    if cut.count == 2:
        _store_sums(sums_b, by_taps, by_bias, programs + p, d, channels, K)


# A fused multiply-add is rounded once instead of twice, and is one instruction instead of two.
_OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}


def _blocks(x: Tensor) -> tuple[int, int]:
    """Return the steps and the channels of a tile."""
    if x.device.type == "cpu":  # in the interpreter: several tiles at small sizes
        return 4, 4
    return min(4, triton.next_power_of_2(x.shape[1])), 128  # with more steps the backward kernel runs out of registers


def _stacked(directions: list[Taps]) -> Direction:
    """Return the parameters of all directions, one behind the other, in float32."""
    return Direction(torch.stack([w for w, _ in directions]).float(), torch.stack([b for _, b in directions]).float())


def forward(x: Tensor, directions: list[Taps], sign: int) -> list[Tensor]:
    """Convolve in one or two directions.

    Args:
        x: the input, (R, T, D).
        directions: weight (D, K) and bias (D,) of each direction.
        sign: 1 where the first direction walks along time, -1 where it walks from the end.

    Returns:
        y of each direction, (R, T, D), contiguous.
    """
    outputs = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in directions]
    if x.numel() == 0:
        return outputs
    rows, steps, channels = x.shape
    block_t, block_d = _blocks(x)
    tiles = rows * triton.cdiv(steps, block_t) * triton.cdiv(channels, block_d)
    cut = Cut(directions[0][0].shape[1], sign, len(directions), block_t, block_d)
    forward_kernel[(tiles,)](
        Strided(x, x.stride()), _stacked(directions), outputs[0], outputs[-1], steps, channels, cut, **_OPTIONS
    )
    return outputs


def backward(dys: list[Tensor], x: Tensor, directions: list[Taps], sign: int) -> tuple[Tensor, list[Taps]]:
    """Compute the gradients of `forward`.

    Args:
        dys: the gradient of y of each direction, (R, T, D).
        x: the input, (R, T, D).
        directions: weight (D, K) and bias (D,) of each direction.
        sign: 1 where the first direction walks along time, -1 where it walks from the end.

    Returns:
        The gradient of x, and the gradients of each direction's weight and bias.
    """
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    if dx.numel() == 0:
        return dx, [(torch.zeros_like(weight), torch.zeros_like(bias)) for weight, bias in directions]
    rows, steps, channels = x.shape
    block_t, block_d = _blocks(x)
    blocks_d, tiles = triton.cdiv(channels, block_d), rows * triton.cdiv(steps, block_t)
    busy = 8 * torch.cuda.get_device_properties(x.device).multi_processor_count // blocks_d if x.is_cuda else 2
    programs, count, taps = max(1, min(tiles, busy)), len(directions), directions[0][0].shape[1]
    by_taps = x.new_empty((count, programs, taps, channels), dtype=torch.float32)
    by_bias = x.new_empty((count, programs, channels), dtype=torch.float32)
    dy, dy_b, of_x = (Strided(t, t.stride()) for t in (dys[0], dys[-1], x))
    cut = Cut(taps, sign, count, block_t, block_d)
    backward_kernel[(programs * blocks_d,)](
        dy, dy_b, of_x, _stacked(directions), dx, by_taps, by_bias, tiles, steps, channels, programs, cut, **_OPTIONS
    )
    return dx, [
        (by_w.sum(0).t().contiguous().to(weight.dtype), by_b.sum(0).to(bias.dtype))
        for (weight, bias), by_w, by_b in zip(directions, by_taps, by_bias, strict=True)
    ]


@torch.library.custom_op("avion::causal_conv_silu_triton", mutates_args=())
def _conv_silu(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
    return forward(x, [(weight, bias)], -1 if reverse else 1)[0]


@_conv_silu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("avion::causal_conv_silu_triton_backward", mutates_args=())
def _conv_silu_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias."""
    dx, (grads,) = backward([dy], x, [(weight, bias)], -1 if reverse else 1)
    return dx, *grads


differentiable(_conv_silu, _conv_silu_backward)


@torch.library.custom_op("avion::causal_conv_silu_both_triton", mutates_args=())
def _conv_silu_both(x: Tensor, weight: Tensor, bias: Tensor, weight_b: Tensor, bias_b: Tensor) -> tuple[Tensor, Tensor]:
    ahead, behind = forward(x, [(weight, bias), (weight_b, bias_b)], 1)
    return ahead, behind


@_conv_silu_both.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, weight_b: Tensor, bias_b: Tensor) -> tuple[Tensor, Tensor]:
    ahead, behind = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    return ahead, behind


@torch.library.custom_op("avion::causal_conv_silu_both_triton_backward", mutates_args=())
def _conv_silu_both_backward(
    dy: Tensor, dy_b: Tensor, x: Tensor, weight: Tensor, bias: Tensor, weight_b: Tensor, bias_b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight, bias, weight_b and bias_b."""
    dx, (ahead, behind) = backward([dy, dy_b], x, [(weight, bias), (weight_b, bias_b)], 1)
    return dx, *ahead, *behind


differentiable_both(_conv_silu_both, _conv_silu_both_backward)


def causal_conv_silu_triton(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
    """Compute y, (R, T, D) in x's dtype, which is float32, bfloat16 or float16; K is at most 4."""
    return _conv_silu(x, weight, bias, reverse)


def causal_conv_silu_both_triton(x: Tensor, ahead: Taps, behind: Taps) -> tuple[Tensor, Tensor]:
    """Compute y of both directions, whose weights (D, K) have the same K."""
    return _conv_silu_both(x, *ahead, *behind)
