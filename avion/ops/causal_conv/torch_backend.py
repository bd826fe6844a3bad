"""The `torch` backend: K shifted multiply-adds on blocks that fit the cache, on any device.

nn.Conv1d would need the layout (R, D, T). The backward pass recomputes what is before the SiLU from x, so that only x
and the parameters are kept.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from avion.ops.buffers import Buffers, borrowed_buffers
from avion.ops.selective_scan.inputs import compute_dtype

from .autograd import Taps, differentiable, differentiable_both

# The number of elements of a block (rows, steps, D): on a CPU the few buffers of a block fit the cache.
BLOCK_ELEMENTS = 200_000
BLOCK_ELEMENTS_ELSEWHERE = 64_000_000


def _blocks(x: Tensor) -> Iterator[tuple[slice, int, int]]:
    """Yield the rows, the first step and the end of each block."""
    rows, steps, channels = x.shape
    budget = BLOCK_ELEMENTS if x.device.type == "cpu" else BLOCK_ELEMENTS_ELSEWHERE
    in_steps = max(1, min(steps, budget // channels))
    in_rows = max(1, budget // (in_steps * channels))
    for row in range(0, rows, in_rows):
        for start in range(0, steps, in_steps):
            yield slice(row, row + in_rows), start, min(start + in_steps, steps)


def _overlap(start: int, stop: int, shift: int, low: int, high: int) -> tuple[slice, slice] | None:
    """Find the steps t of [start, stop) for which t - shift is in [low, high).

    Returns:
        The steps t as a slice that counts from `start`, and the steps t - shift as a slice that counts from `low`; None
        where there are no such steps.
    """
    first, end = max(start, low + shift), min(stop, high + shift)
    if first >= end:
        return None
    return slice(first - start, end - start), slice(first - shift - low, end - shift - low)


class _Direction:
    """The bias of one direction and its taps of x_t, x_{t ∓ 1}, …, (D,) each, in the compute dtype."""

    def __init__(self, parameters: Taps, reverse: bool, dtype: torch.dtype):
        weight, bias = parameters
        self.taps = list(weight.to(dtype).t().flip(0).contiguous().unbind(0))
        self.bias = bias.to(dtype)
        self.reverse, self.sign, self.halo = reverse, -1 if reverse else 1, len(self.taps) - 1

    def convolve(self, x: Tensor, start: int, stop: int, out: Tensor) -> None:
        """Write the steps [start, stop) of x (rows, T, D), convolved, without the SiLU, to `out`."""
        torch.addcmul(self.bias, x[:, start:stop], self.taps[0], out=out)
        for s, tap in enumerate(self.taps[1:], 1):
            overlap = _overlap(start, stop, self.sign * s, 0, x.shape[1])
            if overlap is not None:
                out[:, overlap[0]].addcmul_(x[:, overlap[1]], tap)


def _forward(x: Tensor, directions: list[_Direction], outputs: list[Tensor], dtype: torch.dtype) -> None:
    with borrowed_buffers(dtype, x.device) as buffers:
        for rows, start, stop in _blocks(x):
            for p, y in zip(directions, outputs, strict=True):
                block, first = _with_halo(x, rows, start, stop, p.halo, dtype)
                conv = buffers.view("conv", len(block), stop - start, x.shape[2])
                p.convolve(block, start - first, stop - first, out=conv)
                y[rows, start:stop] = torch.nn.functional.silu(conv, inplace=True)


def _with_halo(x: Tensor, rows: slice, start: int, stop: int, halo: int, dtype: torch.dtype) -> tuple[Tensor, int]:
    """Return rows of x with up to `halo` steps around [start, stop), in the compute dtype, and the first step."""
    first = max(0, start - halo)
    return x[rows, first : min(stop + halo, x.shape[1])].to(dtype), first


class _Gradients:
    """The gradients of a direction's parameters, in the compute dtype."""

    def __init__(self, p: _Direction):
        self.taps = torch.stack(p.taps).zero_()
        self.bias = torch.zeros_like(p.bias)

    def as_inputs(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return self.taps.flip(0).t().contiguous().to(weight.dtype), self.bias.to(bias.dtype)


def _backward(
    x: Tensor, directions: list[_Direction], by_y: list[Tensor], dtype: torch.dtype
) -> tuple[Tensor, list[_Gradients]]:
    """Return dx, summed over the directions, and the gradients of each direction's taps and bias."""
    dx, grads = x.new_empty(x.shape), [_Gradients(p) for p in directions]
    with borrowed_buffers(dtype, x.device) as buffers:
        for rows, start, stop in _blocks(x):
            d_block = buffers.view("d_block", len(range(len(x))[rows]), stop - start, x.shape[2]).zero_()
            for p, dy, grad in zip(directions, by_y, grads, strict=True):
                _backward_block(p, x, dy, (rows, start, stop), d_block, grad, buffers)
            dx[rows, start:stop] = d_block
    return dx, grads


def _backward_block(
    p: _Direction,
    x: Tensor,
    dy: Tensor,
    at: tuple[slice, int, int],
    d_block: Tensor,
    grad: _Gradients,
    buffers: Buffers,
) -> None:
    """Add one direction's share to d_block, the gradient of x at the block, and to `grad`."""
    rows, start, stop = at
    # The steps of y that x_t reaches, t in [start, stop): up to `halo` later ones, or earlier ones in reverse.
    low = max(0, start - p.halo) if p.reverse else start
    high = stop if p.reverse else min(stop + p.halo, x.shape[1])
    block, first = _with_halo(x, rows, low, high, p.halo, d_block.dtype)
    shape = (len(block), high - low, x.shape[2])
    conv, d_conv = (buffers.view(name, *shape) for name in ("conv", "d_conv"))
    p.convolve(block, low - first, high - first, out=conv)
    torch.ops.aten.silu_backward.grad_input(dy[rows, low:high].to(conv.dtype), conv, grad_input=d_conv)

    own = d_conv[:, start - low : stop - low]  # the weight gradients of a step are counted in one block
    grad.bias += own.sum((0, 1))
    product = conv[:, : stop - start]  # conv is not needed any more
    for s, tap in enumerate(p.taps):
        seen = _overlap(start, stop, p.sign * s, first, first + block.shape[1])
        if seen is not None:
            grad.taps[s] += torch.mul(own[:, seen[0]], block[:, seen[1]], out=product[:, seen[0]]).sum((0, 1))
        reached = _overlap(start, stop, -p.sign * s, low, high)
        if reached is not None:
            d_block[:, reached[0]].addcmul_(d_conv[:, reached[1]], tap)


# ---- the operators -----------------------------------------------------------------------------------------


@torch.library.custom_op("avion::causal_conv_silu", mutates_args=())
def _conv_silu(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
    dtype, y = compute_dtype(x, weight, bias), x.new_empty(x.shape)
    _forward(x, [_Direction((weight, bias), reverse, dtype)], [y], dtype)
    return y


@_conv_silu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("avion::causal_conv_silu_backward", mutates_args=())
def _conv_silu_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias."""
    dtype = compute_dtype(x, weight, bias)
    dx, (grad,) = _backward(x, [_Direction((weight, bias), reverse, dtype)], [dy], dtype)
    return dx, *grad.as_inputs(weight, bias)


differentiable(_conv_silu, _conv_silu_backward)


@torch.library.custom_op("avion::causal_conv_silu_both", mutates_args=())
def _conv_silu_both(x: Tensor, weight: Tensor, bias: Tensor, weight_b: Tensor, bias_b: Tensor) -> tuple[Tensor, Tensor]:
    """Return y of both directions of time; x is read once."""
    dtype, directions = _both(x, (weight, bias), (weight_b, bias_b))
    outputs = [x.new_empty(x.shape) for _ in directions]
    _forward(x, directions, outputs, dtype)
    return outputs[0], outputs[1]


def _both(x: Tensor, ahead: Taps, behind: Taps) -> tuple[torch.dtype, list[_Direction]]:
    dtype = compute_dtype(x, *ahead, *behind)
    return dtype, [_Direction(ahead, False, dtype), _Direction(behind, True, dtype)]


@_conv_silu_both.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, weight_b: Tensor, bias_b: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@torch.library.custom_op("avion::causal_conv_silu_both_backward", mutates_args=())
def _conv_silu_both_backward(
    dy: Tensor, dy_b: Tensor, x: Tensor, weight: Tensor, bias: Tensor, weight_b: Tensor, bias_b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x and of the parameters."""
    dtype, directions = _both(x, (weight, bias), (weight_b, bias_b))
    dx, (ahead, behind) = _backward(x, directions, [dy, dy_b], dtype)
    return dx, *ahead.as_inputs(weight, bias), *behind.as_inputs(weight_b, bias_b)


differentiable_both(_conv_silu_both, _conv_silu_both_backward)


def causal_conv_silu_torch(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
    """Compute y, (R, T, D) in x's dtype. The package's docstring has the maths."""
    return _conv_silu(x, weight, bias, reverse)


def causal_conv_silu_both_torch(x: Tensor, ahead: Taps, behind: Taps) -> tuple[Tensor, Tensor]:
    """Compute y of both directions, (R, T, D) each in x's dtype."""
    return _conv_silu_both(x, *ahead, *behind)
