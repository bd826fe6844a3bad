"""The scan with plain PyTorch operators, in blocks small enough for the cache, on any device.

A block is some rows × up to MAX_STEPS steps. Blocks are prepared in groups, because the work of size (rows, steps, D)
around a block is too little for one call of an operator. The scratch memory (`torch_walk.py`) and all views of it are
made once per call, and on a CPU the memory is kept for the next call. `docs/scan.md` has the maths and the
measurements.
"""

from collections.abc import Callable, Iterator
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from avion.ops.buffers import Buffers, borrowed_buffers

from .inputs import ScanGradients, ScanInputs, Time
from .torch_walk import BackwardScratch, ParameterGradients, Parameters, Scratch

MAX_STEPS = 32  # per block; the states kept for backward take N / MAX_STEPS of u's size


# ---- how the work is cut ---------------------------------------------------------------------------------


class Budget(NamedTuple):
    """How large buffers may be.

    Attributes:
        block: the number of elements of one scratch buffer of a block, (steps, rows, N, D).
        group: the number of elements of one buffer of a group, (…, D).
    """

    block: int
    group: int


def budget(device: torch.device) -> Budget:
    """Return how large buffers may be on a device."""
    if device.type == "cpu":
        # With fewer elements the calls cost more than their work; with more the scratch memory leaves the cache.
        return Budget(block=400_000 * torch.get_num_threads(), group=200_000 * torch.get_num_threads())
    # Launching kernels costs more than memory traffic saves.
    return Budget(block=32_000_000, group=32_000_000)


class Group(NamedTuple):
    """`blocks` blocks of `rows` rows each, from row `start` on, all over the steps `steps`."""

    start: int
    blocks: int
    rows: int
    steps: slice

    @property
    def slice(self) -> slice:
        """The rows of the group."""
        return slice(self.start, self.start + self.blocks * self.rows)

    def view(self, tensor: Tensor) -> Tensor:
        """Return the group's part of `tensor` (R, T, X) as a view (blocks, steps, rows, X)."""
        return tensor[self.slice, self.steps].unflatten(0, (self.blocks, self.rows)).transpose(1, 2)


def _cut_rows(u_shape: torch.Size, states: int, limits: Budget) -> Iterator[tuple[int, int, int]]:
    """Yields, for each group, the first row, the number of blocks and the rows of a block."""
    rows, steps, channels = u_shape[0], min(u_shape[1], MAX_STEPS), u_shape[2]
    in_block = max(1, min(rows, limits.block // (steps * states * channels)))
    in_group = max(1, limits.group // (steps * channels * in_block))
    start = 0
    while start < rows:
        blocks = min(in_group, (rows - start) // in_block)
        yield (start, blocks, in_block) if blocks else (start, 1, rows - start)
        start += blocks * in_block if blocks else rows - start


def whole_rows(shape: torch.Size, states: int, device: torch.device) -> Iterator[Group]:
    """Yield the groups of a tensor (R, T, D), T at most MAX_STEPS: each row's time is in one piece."""
    for start, blocks, rows in _cut_rows(shape, states, budget(device)):
        yield Group(start, blocks, rows, slice(0, shape[1]))


def _cut_steps(steps: int, reverse: bool) -> list[slice]:
    """Cut time into blocks of MAX_STEPS, in walking order."""
    cuts = [slice(t, min(t + MAX_STEPS, steps)) for t in range(0, steps, MAX_STEPS)]
    return cuts[::-1] if reverse else cuts


def entering_shape(u: Tensor, states: int, keep: bool) -> tuple[int, ...]:
    """Return the shape of the states that enter the second and later blocks of time, (R, blocks - 1, N, D).

    Args:
        u: the input, (R, T, D).
        states: N, the number of states per channel.
        keep: whether the states are kept; without it there are no blocks.
    """
    later_blocks = (u.shape[1] + MAX_STEPS - 1) // MAX_STEPS - 1 if keep else 0
    return (u.shape[0], later_blocks, states, u.shape[2])


class Direction(Parameters):
    """The inputs of one direction, those without rows in the compute dtype, and how the rows and steps are cut."""

    def __init__(self, inputs: ScanInputs, time: Time):
        super().__init__(inputs.A, inputs.D, inputs.delta_bias, inputs.compute_dtype, time)
        self.inputs = inputs
        self.steps = _cut_steps(inputs.u.shape[1], time.reverse)
        self.rows = list(_cut_rows(inputs.u.shape, inputs.states, budget(inputs.u.device)))

    def load(self, scratch: Scratch, group: Group) -> None:
        """Fill the group's buffers; u is not copied."""
        u = group.view(self.inputs.u)
        scratch.u = u if u.dtype == self.dtype else u.to(self.dtype)
        delta = group.view(self.inputs.delta)
        if self.bias is None:
            scratch.raw.copy_(delta)
        else:
            torch.add(delta, self.bias, out=scratch.raw)
        scratch.B.copy_(group.view(self.inputs.B))
        scratch.C.copy_(group.view(self.inputs.C))
        scratch.derive()


Kind = TypeVar("Kind", bound=Scratch)


class _Scratches(Generic[Kind]):
    """The scratch memory of each group shape that occurs, all of it in the same buffers."""

    def __init__(self, kind: type[Kind], buffers: Buffers, x: Direction):
        self._make, self._buffers, self._x = kind, buffers, x
        self._by_shape: dict[tuple[int, int, int], Kind] = {}

    def loaded(self, group: Group) -> Kind:
        shape = (group.blocks, group.steps.stop - group.steps.start, group.rows)
        if shape not in self._by_shape:
            self._by_shape[shape] = self._make(self._buffers, self._x, *shape)
        scratch = self._by_shape[shape]
        self._x.load(scratch, group)
        return scratch


# ---- forward ---------------------------------------------------------------------------------------------

# store(y, spare, group): y of the group, (blocks, steps, rows, D), and a spare buffer of this shape.
Store = Callable[[Tensor, Tensor, Group], object]


def forward(
    x: Direction,
    store: Store,
    entering: Tensor | None = None,
    initial: Tensor | None = None,
    final: Tensor | None = None,
) -> None:
    """Walk one direction forward.

    Args:
        x: the direction.
        store: is called with y of each group.
        entering: where the states are written that enter the second and later blocks of time, of `entering_shape`.
        initial: the state before the first step, (R, N, D); None means zeros.
        final: where the state after the last step in walking order is written, (R, N, D).
    """
    with borrowed_buffers(x.dtype, x.inputs.u.device) as buffers:
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

# load_dy(out, spare, group): writes the gradient of y at the group, (blocks, steps, rows, D), to `out`.
LoadDy = Callable[[Tensor, Tensor, Group], object]


class Gradients(ParameterGradients):
    """What the backward pass fills: gradients in the dtypes of the inputs, and the running sums of the parameters'."""

    def __init__(self, x: Direction):
        super().__init__(x)
        self._inputs = x.inputs
        self.u, self.delta, self.B, self.C = (
            t.new_empty(t.shape) for t in (x.inputs.u, x.inputs.delta, x.inputs.B, x.inputs.C)
        )

    def store(self, scratch: BackwardScratch, group: Group) -> None:
        """Take the gradients of u, delta, B and C at the group."""
        group.view(self.u).copy_(scratch.d_step_u)
        group.view(self.delta).copy_(scratch.d_step)
        group.view(self.B).copy_(scratch.dB)
        group.view(self.C).copy_(scratch.dC)

    def of_inputs(self) -> ScanGradients:
        """Return the gradients of u, delta, A, B, C, D and delta_bias, which is (0,) where there is no bias."""
        A, D, delta_bias = self._inputs.A, self._inputs.D, self._inputs.delta_bias
        bias = D.new_empty(0) if delta_bias is None else self.bias.to(delta_bias.dtype)
        return self.u, self.delta, self.A.t().contiguous().to(A.dtype), self.B, self.C, self.D.to(D.dtype), bias


def backward(x: Direction, load_dy: LoadDy, entering: Tensor) -> ScanGradients:
    """Walk one direction back.

    Args:
        x: the direction.
        load_dy: writes the gradient of y at a group.
        entering: the states that `forward` wrote.

    Returns:
        The gradients of u, delta, A, B, C, D and delta_bias; the last one has the shape (0,) where there is no bias.
    """
    grads = Gradients(x)
    with borrowed_buffers(x.dtype, x.inputs.u.device) as buffers:
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
    return grads.of_inputs()
