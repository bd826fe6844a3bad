"""The scan with plain PyTorch operators, in blocks small enough for the cache, on any device.

A block is some rows × up to _MAX_STEPS steps; its (steps, rows, N, D) scratch lies with D contiguous, so that every
operator runs on long vectors. Within a block the exponentials are one call, the recurrence one multiply-add per
step, and sums over N or D batched products. Blocks are prepared in groups, since the (rows, steps, D)-sized work
around them is too little for a block at a time. Scratch, and all views of it, are made once per call, and on a CPU its
memory is kept for the next call. `docs/scan.md` has the maths and the measurements.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from avion.ops.buffers import Buffers, borrowed_buffers

_LOG2_E = math.log2(math.e)
_MAX_STEPS = 32  # per block; the states kept for backward take N / _MAX_STEPS of u's size


# ---- how the work is cut ---------------------------------------------------------------------------------


class _Budget(NamedTuple):
    """Elements of one scratch buffer of (steps, rows, N, D) and of one of a group's (…, D) buffers."""

    block: int
    group: int


def _budget(device: torch.device) -> _Budget:
    if device.type == "cpu":
        # With fewer elements calls cost more than their work, with more the scratch leaves the cache.
        return _Budget(block=200_000 * torch.get_num_threads(), group=100_000 * torch.get_num_threads())
    # Launching kernels costs more than memory traffic saves.
    return _Budget(block=32_000_000, group=32_000_000)


class Group(NamedTuple):
    """`blocks` blocks of `rows` rows from row `start` on, all over the steps `steps`."""

    start: int
    blocks: int
    rows: int
    steps: slice

    @property
    def slice(self) -> slice:
        return slice(self.start, self.start + self.blocks * self.rows)

    def view(self, tensor: Tensor) -> Tensor:
        """The group's part of `tensor` (R, T, X), as (blocks, steps, rows, X)."""
        return tensor[self.slice, self.steps].unflatten(0, (self.blocks, self.rows)).transpose(1, 2)


def _cut_rows(u_shape: torch.Size, states: int, budget: _Budget) -> Iterator[tuple[int, int, int]]:
    """Start, blocks and rows of a block, of each group."""
    rows, steps, channels = u_shape[0], min(u_shape[1], _MAX_STEPS), u_shape[2]
    in_block = max(1, min(rows, budget.block // (steps * states * channels)))
    in_group = max(1, budget.group // (steps * channels * in_block))
    start = 0
    while start < rows:
        blocks = min(in_group, (rows - start) // in_block)
        yield (start, blocks, in_block) if blocks else (start, 1, rows - start)
        start += blocks * in_block if blocks else rows - start


def _cut_steps(steps: int, reverse: bool) -> list[slice]:
    """Time in blocks of _MAX_STEPS, in walking order."""
    cuts = [slice(t, min(t + _MAX_STEPS, steps)) for t in range(0, steps, _MAX_STEPS)]
    return cuts[::-1] if reverse else cuts


def entering_shape(u: Tensor, states: int, keep: bool) -> tuple[int, ...]:
    """Of the states that enter the second and later blocks of time, (R, blocks - 1, N, D)."""
    later_blocks = (u.shape[1] + _MAX_STEPS - 1) // _MAX_STEPS - 1 if keep else 0
    return (u.shape[0], later_blocks, states, u.shape[2])


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    double = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if double else torch.float32


class Inputs:
    """One direction's inputs, those without rows in the compute dtype."""

    def __init__(self, u, delta, A, B, C, D, delta_bias, softplus: bool = True, reverse: bool = False):
        self.dtype = compute_dtype(u, delta, A, B, C, D, delta_bias)
        self.u, self.delta, self.B, self.C = u, delta, B, C
        self.A = A.to(self.dtype).t().contiguous()  # (N, D)
        self.A_log2 = self.A * _LOG2_E  # exp(ΔA) = exp2(Δ·A_log2), the faster of the two on CPUs
        self.D = D.to(self.dtype)
        self.bias = None if delta_bias is None else delta_bias.to(self.dtype)
        self.softplus, self.reverse = softplus, reverse
        self.steps = _cut_steps(u.shape[1], reverse)
        self.rows = list(_cut_rows(u.shape, A.shape[1], _budget(u.device)))

    @property
    def states(self) -> int:
        return self.A.shape[0]


# ---- scratch ---------------------------------------------------------------------------------------------


class _Block(NamedTuple):
    """Views of a group's buffers at one of its blocks, M = steps · rows."""

    step: dict[bool, Tensor]  # Δ (…, rows, 1, D) of all steps where a state enters (True), else of all but the first
    step_u: Tensor  # (steps, rows, 1, D)
    B: Tensor  # (steps, rows, N, 1)
    C_row: Tensor  # (M, 1, N)
    y_row: Tensor  # (M, 1, D)


class _BackwardBlock(NamedTuple):
    dy: tuple[Tensor, ...]  # of each step, (rows, 1, D)
    C: tuple[Tensor, ...]  # of each step, (rows, N, 1)
    dy_row: Tensor  # (M, 1, D), as are step_u_row and d_step_u_row
    step_u_row: Tensor
    d_step_u_row: Tensor
    B_row: Tensor  # (M, 1, N), as are dB_row and dC_row
    dB_row: Tensor
    dC_row: Tensor
    d_step: dict[bool, Tensor]  # as _Block.step, (live, rows, D)


def _as_rows(block: Tensor) -> Tensor:
    """(steps, rows, X) → (M, 1, X), the row vectors of a batched product."""
    return block.flatten(0, 1)[:, None]


class _Scratch:
    """Buffers for one shape of group, and the walk through a block's steps.

    Of the group, (blocks, steps, rows, D): raw (delta + bias), step (Δ), step_u (Δu), y; with N in place of D: B, C.
    Of a block, (steps, rows, N, D): decay exp(ΔA) and states. `first` and `last` are steps in walking order, `rest` all
    but the first and `before` all but the last.
    """

    def __init__(self, buffers: Buffers, x: Inputs, blocks: int, steps: int, rows: int):
        self.x, self.shape = x, (blocks, steps, rows)
        self._buffers = buffers
        states, channels = x.A.shape
        self.raw, self.step, self.step_u = (self._wide(name) for name in ("raw", "step", "step_u"))
        self.y = self.raw  # forward needs no raw once there is a step
        self.B, self.C = self._narrow("B"), self._narrow("C")
        self.decay, self.states = (buffers.view(name, steps, rows, states, channels) for name in ("decay", "states"))
        self.states_flat = self.states.flatten(0, 1)
        self.decay_at, self.states_at = self.decay.unbind(0), self.states.unbind(0)
        order = range(steps - 1, -1, -1) if x.reverse else range(steps)
        self.first, self.last = order[0], order[-1]
        self.rest, self.before = slice(1, steps), slice(0, steps - 1)
        if x.reverse:
            self.rest, self.before = self.before, self.rest
        self.live = {True: slice(None), False: self.rest}
        self.live_decay = {enters: self.decay[live] for enters, live in self.live.items()}
        self.pairs = list(zip(order, order[1:], strict=False))  # a step and the one after it
        self.blocks = [self._block(i) for i in range(blocks)]

    def _wide(self, name: str) -> Tensor:
        return self._buffers.view(name, *self.shape, self.x.A.shape[1])

    def _narrow(self, name: str) -> Tensor:
        return self._buffers.view(name, *self.shape, self.x.A.shape[0])

    def _block(self, i: int) -> _Block:
        step = self.step[i][:, :, None, :]
        return _Block(
            step={enters: step[live] for enters, live in self.live.items()},
            step_u=self.step_u[i][:, :, None, :],
            B=self.B[i][:, :, :, None],
            C_row=_as_rows(self.C[i]),
            y_row=_as_rows(self.y[i]),
        )

    def load(self, group: Group) -> None:
        x = self.x
        self.u = _read(x.u, group, x.dtype)
        delta = group.view(x.delta)
        if x.bias is None:
            self.raw.copy_(delta)
        else:
            torch.add(delta, x.bias, out=self.raw)
        if x.softplus:
            softplus(self.raw, out=self.step, scratch=self.step_u)
        else:
            self.step.copy_(self.raw)
        torch.mul(self.step, self.u, out=self.step_u)
        self.B.copy_(group.view(x.B))
        self.C.copy_(group.view(x.C))

    def run(self, block: _Block, carry: Tensor | None) -> None:
        """Fills `states`, and `decay` but for the first step where no state enters."""
        enters = carry is not None
        torch.mul(block.step[enters], self.x.A_log2, out=self.live_decay[enters]).exp2_()
        torch.mul(block.step_u, block.B, out=self.states)
        if enters:
            self.states_at[self.first].addcmul_(self.decay_at[self.first], carry)
        for now, after in self.pairs:
            self.states_at[after].addcmul_(self.decay_at[after], self.states_at[now])


def _rows(states: Tensor | None, i: int, rows: int) -> Tensor | None:
    """Block i's part of a group's states (R', N, D)."""
    return None if states is None else states[i * rows : (i + 1) * rows]


def _read(source: Tensor, group: Group, dtype: torch.dtype) -> Tensor:
    part = group.view(source)
    return part if part.dtype == dtype else part.to(dtype)


def softplus(x: Tensor, out: Tensor, scratch: Tensor) -> None:
    """out = log(1 + exp(x)). As max(x, 0) + 2·atanh(1 / (2·exp(|x|) + 1)), equal to it and as exact near 0:
    log1p takes three times as long on CPUs."""
    torch.abs(x, out=scratch).mul_(_LOG2_E).add_(1).exp2_().add_(1).reciprocal_().atanh_()
    torch.clamp(x, min=0, out=out).add_(scratch, alpha=2)


class _Scratches:
    """Scratch for each group shape that occurs, all in the same memory."""

    def __init__(self, kind: type[_Scratch], buffers: Buffers, x: Inputs):
        self._make, self._buffers, self._x = kind, buffers, x
        self._by_shape: dict[tuple[int, int, int], _Scratch] = {}

    def loaded(self, group: Group) -> _Scratch:
        shape = (group.blocks, group.steps.stop - group.steps.start, group.rows)
        if shape not in self._by_shape:
            self._by_shape[shape] = self._make(self._buffers, self._x, *shape)
        scratch = self._by_shape[shape]
        scratch.load(group)
        return scratch


# ---- forward ---------------------------------------------------------------------------------------------

# store(y, spare, group): y of the group, (blocks, steps, rows, D), and a buffer like it.
Store = Callable[[Tensor, Tensor, Group], None]


def forward(
    x: Inputs, store: Store, entering: Tensor | None = None, initial: Tensor | None = None, final: Tensor | None = None
) -> None:
    """Hands y to `store`, group by group. Writes `entering`, of entering_shape, and `final` (R, N, D), the state after
    the last step in walking order. `initial` (R, N, D) is the state before the first one."""
    with borrowed_buffers(x.dtype, x.u.device) as buffers:
        scratches = _Scratches(_Scratch, buffers, x)
        for start, blocks, rows in x.rows:
            carry = None if initial is None else initial[start : start + blocks * rows]
            for index, steps in enumerate(x.steps):
                group = Group(start, blocks, rows, steps)
                last = index == len(x.steps) - 1
                if last:
                    leaving = None if final is None else final[group.slice]
                elif entering is not None and entering.shape[1]:
                    leaving = entering[group.slice, index]
                else:
                    leaving = buffers.view("carry", blocks * rows, *x.A.shape)
                _forward_group(scratches.loaded(group), group, carry, leaving, store)
                carry = leaving


def _forward_group(scratch: _Scratch, group: Group, carry, leaving, store: Store) -> None:
    """`carry` and `leaving` (R', N, D) may be the same tensor, or None."""
    for i, block in enumerate(scratch.blocks):
        scratch.run(block, _rows(carry, i, group.rows))
        torch.bmm(block.C_row, scratch.states_flat, out=block.y_row)
        if leaving is not None:
            _rows(leaving, i, group.rows).copy_(scratch.states_at[scratch.last])
    store(scratch.y.addcmul_(scratch.u, scratch.x.D), scratch.step, group)


# ---- backward --------------------------------------------------------------------------------------------

# load_dy(out, spare, group): writes the gradient of y at the group, (blocks, steps, rows, D).
LoadDy = Callable[[Tensor, Tensor, Group], None]


class _BackwardScratch(_Scratch):
    """Adds dy, d_step, d_step_u (…, D) and dB, dC (…, N) of the group, and grad (steps, rows, N, D) of a block."""

    def __init__(self, buffers: Buffers, x: Inputs, blocks: int, steps: int, rows: int):
        super().__init__(buffers, x, blocks, steps, rows)
        self.dy, self.d_step, self.d_step_u = (self._wide(name) for name in ("dy", "d_step", "d_step_u"))
        self.dB, self.dC = self._narrow("dB"), self._narrow("dC")
        self.grad = buffers.view("grad", *self.states.shape)
        self.grad_at, self.grad_flat = self.grad.unbind(0), self.grad.flatten(0, 1)
        self.sum_A = buffers.view("sum_A", x.A.numel())
        # As transposes: the product of a column is eight times slower on CPUs than that of a row.
        self.states_T, self.grad_T = self.states_flat.mT, self.grad_flat.mT
        self.live_states = {enters: self.states[live] for enters, live in self.live.items()}
        self.later_decay, self.earlier_states = self.decay[self.rest], self.states[self.before]
        self.backward_blocks = [self._backward_block(i) for i in range(blocks)]

    def _backward_block(self, i: int) -> _BackwardBlock:
        return _BackwardBlock(
            dy=self.dy[i][:, :, None, :].unbind(0),
            C=self.C[i][:, :, :, None].unbind(0),
            dy_row=_as_rows(self.dy[i]),
            step_u_row=_as_rows(self.step_u[i]),
            d_step_u_row=_as_rows(self.d_step_u[i]),
            B_row=_as_rows(self.B[i]),
            dB_row=_as_rows(self.dB[i]),
            dC_row=_as_rows(self.dC[i]),
            d_step={enters: self.d_step[i][live] for enters, live in self.live.items()},
        )


class Gradients:
    """What backward fills: full-size gradients in their inputs' dtypes, and running sums in compute dtype."""

    def __init__(self, x: Inputs):
        self.u, self.delta = x.u.new_empty(x.u.shape), x.delta.new_empty(x.delta.shape)
        self.B, self.C = x.B.new_empty(x.B.shape), x.C.new_empty(x.C.shape)
        self.A = torch.zeros_like(x.A)  # (N, D)
        self.D = torch.zeros_like(x.D)
        self.bias = torch.zeros_like(x.D)

    def as_inputs(self, A: Tensor, D: Tensor, delta_bias: Tensor | None) -> tuple[Tensor, ...]:
        """Gradients of u, delta, A, B, C, D and delta_bias (of shape (0,) where there is none)."""
        bias = D.new_empty(0) if delta_bias is None else self.bias.to(delta_bias.dtype)
        return self.u, self.delta, self.A.t().contiguous().to(A.dtype), self.B, self.C, self.D.to(D.dtype), bias


def backward(x: Inputs, load_dy: LoadDy, entering: Tensor) -> Gradients:
    """`entering`: as `forward` has written it."""
    grads = Gradients(x)
    with borrowed_buffers(x.dtype, x.u.device) as buffers:
        scratches = _Scratches(_BackwardScratch, buffers, x)
        for start, blocks, rows in x.rows:
            adjoint = None
            if len(x.steps) > 1:
                adjoint = buffers.view("carry", blocks * rows, *x.A.shape).zero_()
            for index in reversed(range(len(x.steps))):
                group = Group(start, blocks, rows, x.steps[index])
                scratch = scratches.loaded(group)
                load_dy(scratch.dy, scratch.d_step, group)
                scratch.d_step.zero_()
                carry = entering[group.slice, index - 1] if index > 0 else None
                for i in range(blocks):
                    at = slice(i * rows, (i + 1) * rows)
                    _backward_block(
                        scratch,
                        i,
                        None if carry is None else carry[at],
                        None if adjoint is None else adjoint[at],
                        grads,
                    )
                _finish_group(scratch, group, grads)
    return grads


def _backward_block(
    s: _BackwardScratch, i: int, carry: Tensor | None, adjoint: Tensor | None, grads: Gradients
) -> None:
    """`adjoint` (rows, N, D), unless None: the gradient of the state that leaves the block comes in, that of the state
    `carry` that enters it goes out."""
    block, enters = s.backward_blocks[i], carry is not None
    s.run(s.blocks[i], carry)
    torch.bmm(block.dy_row, s.states_T, out=block.dC_row)

    # grad: of the states, walked from the last step to the first; decay becomes decay · grad.
    torch.mul(block.dy[s.last], block.C[s.last], out=s.grad_at[s.last])
    if adjoint is not None:
        s.grad_at[s.last].add_(adjoint)
    for now, after in reversed(s.pairs):
        s.decay_at[after].mul_(s.grad_at[after])
        torch.addcmul(s.decay_at[after], block.dy[now], block.C[now], out=s.grad_at[now])
    torch.bmm(block.step_u_row, s.grad_T, out=block.dB_row)
    torch.bmm(block.B_row, s.grad_flat, out=block.d_step_u_row)

    # decay becomes the gradient of the exponent Δ·A: decay · grad · the state before.
    if enters:
        torch.mul(s.decay_at[s.first], s.grad_at[s.first], out=adjoint)
        torch.mul(adjoint, carry, out=s.decay_at[s.first])
    s.later_decay.mul_(s.earlier_states)
    exponent = s.live_decay[enters]
    weighted = torch.mul(exponent, s.blocks[i].step[enters], out=s.live_states[enters])
    torch.sum(weighted.flatten(0, 1).flatten(1), 0, out=s.sum_A)
    grads.A.view(-1).add_(s.sum_A)
    torch.sum(exponent.mul_(s.x.A), 2, out=block.d_step[enters])


def _finish_group(s: _BackwardScratch, group: Group, grads: Gradients) -> None:
    s.d_step.addcmul_(s.d_step_u, s.u)
    if s.x.softplus:
        s.d_step.mul_(s.raw.sigmoid_())
    grads.bias += s.d_step.sum((0, 1, 2))
    group.view(grads.delta).copy_(s.d_step)
    group.view(grads.u).copy_(s.d_step_u.mul_(s.step).addcmul_(s.dy, s.x.D))
    grads.D += torch.mul(s.dy, s.u, out=s.d_step).sum((0, 1, 2))
    group.view(grads.B).copy_(s.dB)
    group.view(grads.C).copy_(s.dC)
