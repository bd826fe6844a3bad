"""The scan with plain PyTorch operators, in blocks small enough for the cache, on any device.

A block is some rows × up to MAX_STEPS steps. Blocks are prepared in groups, since the (rows, steps, D)-sized work
around them is too little for a block at a time. Scratch (`torch_walk.py`), and all views of it, are made once per call,
and on a CPU its memory is kept for the next call. `docs/scan.md` has the maths and the measurements.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from avion.ops.buffers import Buffers, borrowed_buffers

from .torch_walk import BackwardScratch, ParameterGradients, Parameters, Scratch

MAX_STEPS = 32  # per block; the states kept for backward take N / MAX_STEPS of u's size


# ---- how the work is cut ---------------------------------------------------------------------------------


class _Budget(NamedTuple):
    """Elements of one scratch buffer of (steps, rows, N, D) and of one of a group's (…, D) buffers."""

    block: int
    group: int


def _budget(device: torch.device) -> _Budget:
    if device.type == "cpu":
        # With fewer elements calls cost more than their work, with more the scratch leaves the cache.
        return _Budget(block=400_000 * torch.get_num_threads(), group=200_000 * torch.get_num_threads())
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
    rows, steps, channels = u_shape[0], min(u_shape[1], MAX_STEPS), u_shape[2]
    in_block = max(1, min(rows, budget.block // (steps * states * channels)))
    in_group = max(1, budget.group // (steps * channels * in_block))
    start = 0
    while start < rows:
        blocks = min(in_group, (rows - start) // in_block)
        yield (start, blocks, in_block) if blocks else (start, 1, rows - start)
        start += blocks * in_block if blocks else rows - start


def whole_rows(shape: torch.Size, states: int, device: torch.device) -> Iterator[Group]:
    """The groups of (R, T, D), T at most MAX_STEPS: each row's time in one piece."""
    for start, blocks, rows in _cut_rows(shape, states, _budget(device)):
        yield Group(start, blocks, rows, slice(0, shape[1]))


def _cut_steps(steps: int, reverse: bool) -> list[slice]:
    """Time in blocks of MAX_STEPS, in walking order."""
    cuts = [slice(t, min(t + MAX_STEPS, steps)) for t in range(0, steps, MAX_STEPS)]
    return cuts[::-1] if reverse else cuts


def entering_shape(u: Tensor, states: int, keep: bool) -> tuple[int, ...]:
    """Of the states that enter the second and later blocks of time, (R, blocks - 1, N, D)."""
    later_blocks = (u.shape[1] + MAX_STEPS - 1) // MAX_STEPS - 1 if keep else 0
    return (u.shape[0], later_blocks, states, u.shape[2])


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    double = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if double else torch.float32


class Inputs(Parameters):
    """One direction's inputs, those without rows in the compute dtype."""

    def __init__(self, u, delta, A, B, C, D, delta_bias, softplus: bool = True, reverse: bool = False):
        super().__init__(A, D, delta_bias, compute_dtype(u, delta, A, B, C, D, delta_bias), softplus, reverse)
        self.u, self.delta, self.B, self.C = u, delta, B, C
        self.steps = _cut_steps(u.shape[1], reverse)
        self.rows = list(_cut_rows(u.shape, A.shape[1], _budget(u.device)))

    def load(self, scratch: Scratch, group: Group) -> None:
        """Fills the group's buffers; u is read where it lies."""
        u = group.view(self.u)
        scratch.u = u if u.dtype == self.dtype else u.to(self.dtype)
        delta = group.view(self.delta)
        if self.bias is None:
            scratch.raw.copy_(delta)
        else:
            torch.add(delta, self.bias, out=scratch.raw)
        scratch.B.copy_(group.view(self.B))
        scratch.C.copy_(group.view(self.C))
        scratch.derive()


class _Scratches:
    """Scratch for each group shape that occurs, all in the same memory."""

    def __init__(self, kind: type[Scratch], buffers: Buffers, x: Inputs):
        self._make, self._buffers, self._x = kind, buffers, x
        self._by_shape: dict[tuple[int, int, int], Scratch] = {}

    def loaded(self, group: Group) -> Scratch:
        shape = (group.blocks, group.steps.stop - group.steps.start, group.rows)
        if shape not in self._by_shape:
            self._by_shape[shape] = self._make(self._buffers, self._x, *shape)
        scratch = self._by_shape[shape]
        self._x.load(scratch, group)
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
        scratches = _Scratches(Scratch, buffers, x)
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
                scratch = scratches.loaded(group)
                store(scratch.forward(carry, leaving), scratch.step, group)
                carry = leaving


# ---- backward --------------------------------------------------------------------------------------------

# load_dy(out, spare, group): writes the gradient of y at the group, (blocks, steps, rows, D).
LoadDy = Callable[[Tensor, Tensor, Group], None]


class Gradients(ParameterGradients):
    """What backward fills: full-size gradients in their inputs' dtypes, and running sums."""

    def __init__(self, x: Inputs):
        super().__init__(x)
        self.u, self.delta = x.u.new_empty(x.u.shape), x.delta.new_empty(x.delta.shape)
        self.B, self.C = x.B.new_empty(x.B.shape), x.C.new_empty(x.C.shape)

    def store(self, scratch: BackwardScratch, group: Group) -> None:
        group.view(self.u).copy_(scratch.d_step_u)
        group.view(self.delta).copy_(scratch.d_step)
        group.view(self.B).copy_(scratch.dB)
        group.view(self.C).copy_(scratch.dC)

    def as_inputs(self, A: Tensor, D: Tensor, delta_bias: Tensor | None) -> tuple[Tensor, ...]:
        """Gradients of u, delta, A, B, C, D and delta_bias (of shape (0,) where there is none)."""
        bias = D.new_empty(0) if delta_bias is None else self.bias.to(delta_bias.dtype)
        return self.u, self.delta, self.A.t().contiguous().to(A.dtype), self.B, self.C, self.D.to(D.dtype), bias


def backward(x: Inputs, load_dy: LoadDy, entering: Tensor) -> Gradients:
    """`entering`: as `forward` has written it."""
    grads = Gradients(x)
    with borrowed_buffers(x.dtype, x.u.device) as buffers:
        scratches = _Scratches(BackwardScratch, buffers, x)
        for start, blocks, rows in x.rows:
            adjoint = None
            if len(x.steps) > 1:
                adjoint = buffers.view("carry", blocks * rows, *x.A.shape).zero_()
            for index in reversed(range(len(x.steps))):
                group = Group(start, blocks, rows, x.steps[index])
                scratch = scratches.loaded(group)
                load_dy(scratch.dy, scratch.d_step, group)
                carry = entering[group.slice, index - 1] if index > 0 else None
                scratch.backward(carry, adjoint, grads)
                grads.store(scratch, group)
    return grads
