"""The `torch` backend: plain PyTorch operators on blocks small enough for the cache, on any device.

Work goes in blocks of some steps × some rows, whose (steps, rows, N, D) scratch fits the cache and lies with
D contiguous, so that every operator runs on long vectors. Within a block the exponentials are one call, the
recurrence one multiply-add per step, and sums over N or D batched products. Blocks are prepared in groups,
since the (rows, steps, D)-sized work around them is too little for a block at a time. Backward recomputes a
block's states and walks it the other way; what is kept for it are the inputs and, where T needs several
blocks, the state that enters each block. `docs/scan.md` has the maths and the measurements.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .autograd import differentiable

_LOG2_E = math.log2(math.e)
_MAX_STEPS = 32  # per block; the states kept for backward take N / _MAX_STEPS of u's size


class _Budget(NamedTuple):
    """Elements of one scratch buffer of (steps, rows, N, D) and of one of a group's (…, D) buffers."""

    block: int
    group: int


def _budget(device: torch.device) -> _Budget:
    if device.type == "cpu":
        # A thread's share of the two or three scratch buffers should stay in its core's second-level cache.
        return _Budget(block=400_000 * torch.get_num_threads(), group=200_000 * torch.get_num_threads())
    # Launching kernels costs more than memory traffic saves.
    return _Budget(block=32_000_000, group=32_000_000)


class _Cut(NamedTuple):
    """A group: `blocks` blocks of `rows` rows from row `start` on, all over the same steps."""

    start: int
    blocks: int
    rows: int

    @property
    def slice(self) -> slice:
        return slice(self.start, self.start + self.blocks * self.rows)


def _cut_rows(u_shape: torch.Size, states: int, budget: _Budget) -> Iterator[_Cut]:
    rows, steps, channels = u_shape[0], min(u_shape[1], _MAX_STEPS), u_shape[2]
    in_block = max(1, min(rows, budget.block // (steps * states * channels)))
    in_group = max(1, budget.group // (steps * channels * in_block))
    start = 0
    while start < rows:
        blocks = min(in_group, (rows - start) // in_block)
        cut = _Cut(start, blocks, in_block) if blocks else _Cut(start, 1, rows - start)
        yield cut
        start = cut.slice.stop


def _cut_steps(steps: int, reverse: bool) -> list[slice]:
    """Time in blocks of _MAX_STEPS, in walking order."""
    cuts = [slice(t, min(t + _MAX_STEPS, steps)) for t in range(0, steps, _MAX_STEPS)]
    return cuts[::-1] if reverse else cuts


class _Inputs:
    """The op's arguments, and a group of them at a time in the compute dtype."""

    def __init__(self, u, delta, A, B, C, D, delta_bias, delta_softplus, reverse):
        dtypes = [x.dtype for x in (u, delta, A, B, C, D, delta_bias) if x is not None]
        self.dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        self.u, self.delta, self.B, self.C = u, delta, B, C
        self.A = A.to(self.dtype).t().contiguous()  # (N, D)
        self.A_log2 = self.A * _LOG2_E  # exp(ΔA) = exp2(Δ·A_log2), the faster of the two on CPUs
        self.D = D.to(self.dtype)
        self.bias = torch.zeros_like(self.D) if delta_bias is None else delta_bias.to(self.dtype)
        self.softplus, self.reverse = delta_softplus, reverse
        self.steps = _cut_steps(u.shape[1], reverse)
        self.rows = list(_cut_rows(u.shape, A.shape[1], _budget(u.device)))

    def gather(self, source: Tensor, cut: _Cut, steps: slice, out: Tensor) -> Tensor:
        """`source` (R, T, X) at the group -> `out` (blocks, steps, rows, X), in the compute dtype."""
        part = source[cut.slice, steps].unflatten(0, (cut.blocks, cut.rows))
        return out.copy_(part.transpose(1, 2))

    def scatter(self, group: Tensor, cut: _Cut, steps: slice, target: Tensor) -> None:
        """The way back, into `target` (R, T, X) in its dtype."""
        target[cut.slice, steps].unflatten(0, (cut.blocks, cut.rows)).copy_(group.transpose(1, 2))


def _softplus(x: Tensor, out: Tensor) -> None:
    """out = log(1 + exp(x)). As max(x, 0) + 2·atanh(1 / (2·exp(|x|) + 1)), equal to it and as exact near 0:
    log1p takes three times as long on CPUs."""
    torch.abs(x, out=out).mul_(_LOG2_E).add_(1).exp2_().add_(1).reciprocal_().atanh_()
    out.mul_(2).add_(x.clamp(min=0))


class _Scratch:
    """Buffers for one group shape, and the walk through a block's steps.

    Group-sized, (blocks, steps, rows, D): u, raw (delta + bias), step (Δ), step_u (Δu) and some spare ones;
    (blocks, steps, rows, N): B, C. Block-sized, (steps, rows, N, D): decay exp(ΔA), states, and for backward
    grad. `first` and `last` are steps in walking order; each step of the slice `rest` follows the one at the
    same place in `before`; `pairs` are (step, the one after it) in walking order.
    """

    def __init__(self, memory: dict[str, list[Tensor]], x: _Inputs, blocks: int, steps: int, rows: int):
        states, channels = x.A.shape

        def views(kind: str, *shape: int) -> list[Tensor]:
            return [flat[: math.prod(shape)].view(shape) for flat in memory[kind]]

        self.u, self.raw, self.step, self.step_u, *self.spare = views("D", blocks, steps, rows, channels)
        self.B, self.C, *self.spare_N = views("N", blocks, steps, rows, states)
        self.decay, self.states, *self.grad = views("ND", steps, rows, states, channels)
        self.decay_at, self.states_at = self.decay.unbind(0), self.states.unbind(0)
        order = range(steps - 1, -1, -1) if x.reverse else range(steps)
        self.first, self.last = order[0], order[-1]
        self.rest, self.before = slice(1, steps), slice(0, steps - 1)
        if x.reverse:
            self.rest, self.before = self.before, self.rest
        self.pairs = list(zip(order, order[1:], strict=False))

    def load(self, x: _Inputs, cut: _Cut, steps: slice) -> None:
        x.gather(x.u, cut, steps, self.u)
        x.gather(x.delta, cut, steps, self.raw).add_(x.bias)
        if x.softplus:
            _softplus(self.raw, self.step)
        else:
            self.step.copy_(self.raw)
        torch.mul(self.step, self.u, out=self.step_u)
        x.gather(x.B, cut, steps, self.B)
        x.gather(x.C, cut, steps, self.C)

    def run(self, x: _Inputs, i: int, carry: Tensor | None) -> None:
        """Fills `states` of block `i`, and `decay` but for the first step where no state enters."""
        live = self.rest if carry is None else slice(None)
        torch.mul(self.step[i][live, :, None, :], x.A_log2, out=self.decay[live]).exp2_()
        torch.mul(self.step_u[i][:, :, None, :], self.B[i][:, :, :, None], out=self.states)
        if carry is not None:
            self.states_at[self.first].addcmul_(self.decay_at[self.first], carry)
        for now, after in self.pairs:
            self.states_at[after].addcmul_(self.decay_at[after], self.states_at[now])


class _Scratches:
    """Scratch for each group shape that occurs, all in the same memory."""

    def __init__(self, x: _Inputs, backward: bool):
        self._x = x
        steps = max(cut.stop - cut.start for cut in x.steps)
        per_block = max((cut.rows for cut in x.rows), default=0) * steps
        per_group = max((cut.rows * cut.blocks for cut in x.rows), default=0) * steps
        states, channels = x.A.shape
        sizes = {"ND": per_block * states * channels, "D": per_group * channels, "N": per_group * states}
        counts = {"ND": 3, "D": 7, "N": 4} if backward else {"ND": 2, "D": 5, "N": 2}
        self._memory = {k: [x.A.new_empty(sizes[k]) for _ in range(n)] for k, n in counts.items()}
        self._by_shape: dict[tuple[int, int, int], _Scratch] = {}

    def get(self, steps: slice, cut: _Cut) -> _Scratch:
        shape = (cut.blocks, steps.stop - steps.start, cut.rows)
        if shape not in self._by_shape:
            self._by_shape[shape] = _Scratch(self._memory, self._x, *shape)
        return self._by_shape[shape]


def _sum_states(weights: Tensor, block: Tensor, out: Tensor) -> None:
    """out = sum_n weights (steps, rows, N) · block (steps, rows, N, D), (steps, rows, D)."""
    torch.bmm(weights.flatten(0, 1)[:, None], block.flatten(0, 1), out=out.flatten(0, 1)[:, None])


def _sum_channels(weights: Tensor, block: Tensor, out: Tensor) -> None:
    """out = sum_d weights (steps, rows, D) · block (steps, rows, N, D), (steps, rows, N)."""
    # The row vector times the transpose: the column form is eight times slower on CPUs.
    torch.bmm(weights.flatten(0, 1)[:, None], block.flatten(0, 1).mT, out=out.flatten(0, 1)[:, None])


def _entering_shape(u: Tensor, A: Tensor, keep: bool) -> tuple[int, ...]:
    later_blocks = (u.shape[1] + _MAX_STEPS - 1) // _MAX_STEPS - 1 if keep else 0
    return (u.shape[0], later_blocks, A.shape[1], A.shape[0])


@torch.library.custom_op("avion::selective_scan", mutates_args=())
def _scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    keep_states: bool,
) -> tuple[Tensor, Tensor]:
    """y (R, T, D), and the states (R, blocks of time - 1, N, D) that enter the second and later blocks
    (no blocks unless `keep_states`)."""
    with torch.autocast(u.device.type, enabled=False):
        x = _Inputs(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse)
        y = u.new_empty(u.shape)
        entering = x.A.new_empty(_entering_shape(u, A, keep_states))
        scratches = _Scratches(x, backward=False)
        for cut in x.rows:
            carry = None
            for index, steps in enumerate(x.steps):
                leaving = x.A.new_empty(cut.blocks * cut.rows, *x.A.shape) if steps is not x.steps[-1] else None
                _forward_group(x, cut, steps, carry, leaving, scratches.get(steps, cut), y)
                if keep_states and leaving is not None:
                    entering[cut.slice, index] = leaving
                carry = leaving
        return y, entering


def _forward_group(x: _Inputs, cut: _Cut, steps: slice, carry, leaving, scratch: _Scratch, y: Tensor) -> None:
    """Writes y at the group and, unless it is None, `leaving`; `carry` and `leaving` are (R', N, D) states."""
    scratch.load(x, cut, steps)
    y_group = scratch.spare[0]
    for i in range(cut.blocks):
        rows = slice(i * cut.rows, (i + 1) * cut.rows)
        scratch.run(x, i, None if carry is None else carry[rows])
        _sum_states(scratch.C[i], scratch.states, out=y_group[i])
        if leaving is not None:
            leaving[rows] = scratch.states_at[scratch.last]
    x.scatter(y_group.addcmul_(scratch.u, x.D), cut, steps, y)


@_scan.register_fake
def _(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse, keep_states):
    dtypes = {t.dtype for t in (u, delta, A, B, C, D, delta_bias) if t is not None}
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    return u.new_empty(u.shape), u.new_empty(_entering_shape(u, A, keep_states), dtype=dtype)


class _Gradients:
    """What backward fills: full-size gradients in their inputs' dtypes, and running sums in compute dtype."""

    def __init__(self, x: _Inputs):
        self.u, self.delta = x.u.new_empty(x.u.shape), x.delta.new_empty(x.delta.shape)
        self.B, self.C = x.B.new_empty(x.B.shape), x.C.new_empty(x.C.shape)
        self.A = torch.zeros_like(x.A)  # (N, D)
        self.D = torch.zeros_like(x.D)
        self.bias = torch.zeros_like(x.D)


@torch.library.custom_op("avion::selective_scan_backward", mutates_args=())
def _scan_backward(
    dy: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor | None,
    entering: Tensor,
    delta_softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, A, B, C, D and delta_bias (of shape (0,) where there is none)."""
    with torch.autocast(u.device.type, enabled=False):
        x = _Inputs(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse)
        grads = _Gradients(x)
        scratches = _Scratches(x, backward=True)
        for cut in x.rows:
            adjoint = None
            for index in reversed(range(len(x.steps))):
                carry = entering[cut.slice, index - 1] if index > 0 else None
                scratch = scratches.get(x.steps[index], cut)
                adjoint = _backward_group(x, dy, cut, x.steps[index], carry, adjoint, scratch, grads)
        bias = D.new_empty(0) if delta_bias is None else grads.bias.to(delta_bias.dtype)
        dA = grads.A.t().contiguous().to(A.dtype)
        return grads.u, grads.delta, dA, grads.B, grads.C, grads.D.to(D.dtype), bias


def _backward_group(
    x: _Inputs, dy: Tensor, cut: _Cut, steps: slice, carry, adjoint, scratch: _Scratch, grads: _Gradients
) -> Tensor | None:
    """Adds the group's part to `grads`. `adjoint` is the gradient of the state that leaves the group, from
    later blocks of time (None: zero); returned is that of the state `carry` that enters it, (R', N, D)."""
    scratch.load(x, cut, steps)
    dy_group, d_step, d_step_u = scratch.spare
    dB, dC = scratch.spare_N
    x.gather(dy, cut, steps, dy_group)
    d_step.zero_()
    entering_adjoint = None if carry is None else torch.empty_like(carry)
    ones = dy_group.new_ones(cut.rows * len(scratch.states_at))
    (grad,) = scratch.grad
    grad_at, decay_at = grad.unbind(0), scratch.decay_at
    for i in range(cut.blocks):
        rows = slice(i * cut.rows, (i + 1) * cut.rows)
        block_carry = None if carry is None else carry[rows]
        scratch.run(x, i, block_carry)
        _sum_channels(dy_group[i], scratch.states, out=dC[i])

        # grad: of the states, walked from the last step to the first; decay becomes decay · grad.
        torch.mul(dy_group[i][:, :, None, :], scratch.C[i][:, :, :, None], out=grad)
        if adjoint is not None:
            grad_at[scratch.last].add_(adjoint[rows])
        for now, after in reversed(scratch.pairs):
            grad_at[now].add_(decay_at[after].mul_(grad_at[after]))
        _sum_channels(scratch.step_u[i], grad, out=dB[i])
        _sum_states(scratch.B[i], grad, out=d_step_u[i])

        # decay becomes the gradient of the exponent Δ·A: decay · grad · the state before.
        live = scratch.rest
        if carry is not None:
            live = slice(None)
            torch.mul(decay_at[scratch.first], grad_at[scratch.first], out=entering_adjoint[rows])
            torch.mul(entering_adjoint[rows], block_carry, out=decay_at[scratch.first])
        exponent = scratch.decay[live]
        scratch.decay[scratch.rest].mul_(scratch.states[scratch.before])
        weighted = torch.mul(exponent, scratch.step[i][live, :, None, :], out=scratch.states[live])
        grads.A.view(-1).addmv_(weighted.view(-1, x.A.numel()).t(), ones[: weighted.shape[0] * cut.rows])
        torch.sum(exponent.mul_(x.A), 2, out=d_step[i][live])

    d_step.addcmul_(d_step_u, scratch.u)
    if x.softplus:
        d_step.mul_(scratch.raw.sigmoid_())
    grads.bias += d_step.sum((0, 1, 2))
    x.scatter(d_step, cut, steps, grads.delta)
    x.scatter(d_step_u.mul_(scratch.step).addcmul_(dy_group, x.D), cut, steps, grads.u)
    grads.D += scratch.u.mul_(dy_group).sum((0, 1, 2))
    x.scatter(dB, cut, steps, grads.B)
    x.scatter(dC, cut, steps, grads.C)
    return entering_adjoint


selective_scan_torch = differentiable(_scan, _scan_backward)
