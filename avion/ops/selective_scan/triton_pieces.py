"""What the Triton kernels of the selective scan are made of.

A program takes `block_d` channels, one to four of them per thread. A value per channel is a (block_d,) tensor; a value
per channel and state is a tuple of such tensors, one per state, so that a thread holds all states of its channels. Sums
over states then need no exchange between threads, and softplus, gate and addresses are computed once per channel. B and
C, one number per state, are scalars that all threads read.

This is what a GPU runs, with `stack` = 1. The interpreter takes as long for a tensor of one state as for a tensor of
many, so there a tensor holds `stack` states. A value per channel is then (1, block_d), a value per channel and state
(stack, block_d), B and C are (stack, 1), and "a state" in a tuple is a stack of states, the last one padded with zeros.

Walking order: step i = 0 … T-1 is t = i, or t = T-1-i with `reverse`. Steps are taken `chunk` at a time, unrolled. In
the last chunk the steps past the end are dead: they load zeros, and nothing of them is stored. With `exact` there are
no dead steps and no channels past the last one, and no load is masked.
"""

import dataclasses
from typing import NamedTuple

import triton.language as tl

from avion.ops.kernel_pieces import LOG2_E, cdiv, piece, sum_along, zeros_in
from avion.ops.kernel_types import Block, Dtype, Flag, Int, Pointer, Scalar, Values


class Strides(NamedTuple):
    """The strides of each tensor, (row, step, channel or state), as the kernels take them."""

    u: tuple[int, ...]
    delta: tuple[int, ...]
    B: tuple[int, ...]
    C: tuple[int, ...]
    z: tuple[int, ...]
    dy: tuple[int, ...]


class Work(NamedTuple):
    """How much work there is, and how it is shared out.

    Attributes:
        items: the number of rows, or of parts of rows.
        steps: T.
        part_steps: the number of steps of a part.
        programs: the number of programs per block of channels.
    """

    items: Scalar
    steps: Scalar
    part_steps: Scalar
    programs: Scalar


@dataclasses.dataclass(frozen=True)
class Cut:
    """All that is known of a launch when its kernel is compiled.

    It is no tuple, because a tuple loses its properties in a kernel. Annotations of kernels and pieces quote this name,
    because Triton looks up the names in annotations and refuses this one.

    Attributes:
        channels: D.
        n: N, the number of states per channel.
        stack: the number of states in one tensor; more than 1 in the interpreter only.
        block_d: the number of channels of a program.
        chunk: the number of steps that are taken at a time.
        softplus: whether the step size is the softplus of delta and its bias, or their plain sum.
        reverse: whether time is walked from the last step to the first.
        exact: whether the blocks of channels and the chunks of steps are all full.
        parted: whether the time of a row is cut into parts that run side by side.
        one_chunk: whether all steps fit one chunk.
        kept: whether the states that enter the later segments are kept.
        gate: whether y is multiplied by SiLU(z).
        add: whether the output (dz, in the backward pass) holds the share of the other direction already.
        words: whether B and C can be read in 64-bit words.
        segment: the number of steps between the states that are kept for the backward pass.
        group: the number of states, or stacks of states, that the backward pass takes at a time.
        lanes: the number of threads over which the backward pass sums.
    """

    channels: int
    n: int
    stack: int
    block_d: int
    chunk: int
    softplus: bool
    reverse: bool
    exact: bool
    parted: bool
    one_chunk: bool = False
    kept: bool = False
    gate: bool = False
    add: bool = False
    words: bool = False
    segment: int = 0
    group: int = 0
    lanes: int = 0

    @property
    def stacks(self) -> int:
        """The number of stacks of states."""
        return (self.n + self.stack - 1) // self.stack

    @property
    def sign(self) -> int:
        """The difference in time between a step and the step after it in walking order."""
        return -1 if self.reverse else 1

    @property
    def blocks(self) -> int:
        """The number of blocks of channels."""
        return (self.channels + self.block_d - 1) // self.block_d


@piece
def softplus(x: tl.tensor) -> tl.tensor:
    """Compute log(1 + exp(x)) within a relative error of 3e-7, also where exp(x) is tiny.

    The result is max(x, 0) + log1p(e) with e = exp(-|x|). log1p(e) / e is computed as a polynomial on [0, 1] whose
    constant term is 1, fitted by weighted least squares to a relative error of 4e-8.
    """
    e = tl.exp2(tl.abs(x) * -LOG2_E)
    p = e * 0.005364794749766588 - 0.03006567433476448
    p = p * e + 0.07920434325933456
    p = p * e - 0.1375378668308258
    p = p * e + 0.19153647124767303
    p = p * e - 0.24857161939144135
    p = p * e + 0.333213210105896
    p = p * e - 0.49999648332595825
    return (p * e + 1.0) * e + tl.maximum(x, 0.0)


@piece
def time_of(i: Scalar, steps: Scalar, REVERSE: Flag) -> Scalar:
    """Return t of step i. It is 64 bits wide, because offsets can be beyond 2^31."""
    i = tl.full((), 0, tl.int64) + i
    return steps - 1 - i if REVERSE else i


@piece
def span(item: Scalar, steps: Scalar, part_steps: Scalar, PARTED: Flag) -> tuple[Scalar, Scalar, Scalar, Scalar]:
    """Return the row and the part of an item, and the first step and the end of the part."""
    item = tl.full((), 0, tl.int64) + item
    if PARTED:
        parts = cdiv(steps, part_steps)
        first = (item % parts) * part_steps
        return item // parts, item % parts, first, tl.minimum(first + part_steps, steps)
    else:
        nothing = item * 0
        return item, nothing, nothing, nothing + steps


@piece
def where_both(condition: Block, mask: tl.tensor) -> tl.tensor:
    """Combine a scalar condition with a mask. (In the interpreter `&` does not give a mask.)"""
    return tl.where(condition, mask, False)


@piece
def channels_of(block: Scalar, BLOCK_D: Int, STACK: Int) -> tl.tensor:
    """Return the channels of a block, in the shape of a value per channel."""
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    return d if STACK == 1 else d[None, :]


@piece
def load(pointer: Pointer, mask: tl.tensor, EXACT: Flag) -> tl.tensor:
    """Load values in float32, and zeros where the mask is not set. With EXACT the mask is set everywhere."""
    if EXACT:
        return tl.load(pointer).to(tl.float32)
    else:
        return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@piece
def store(pointer: Pointer, value: tl.tensor, mask: tl.tensor, EXACT: Flag) -> None:
    """Store values where the mask is set, in the pointer's dtype. With EXACT the mask is set everywhere."""
    if EXACT:
        tl.store(pointer, value.to(pointer.dtype.element_ty))
    else:
        tl.store(pointer, value.to(pointer.dtype.element_ty), mask=mask)


@piece
def zeros(COUNT: Int, SIZE: Int, STACK: Int) -> Values:
    """Return zeros for COUNT stacks of states and SIZE channels."""
    values = ()
    for _ in tl.static_range(COUNT):
        values = values + (zeros_in((SIZE,) if STACK == 1 else (STACK, SIZE), tl.float32),)
    return values


@piece
def stack_of(k: Scalar, N: Int, STACK: Int) -> tuple[tl.tensor, tl.tensor]:
    """Return the numbers of the states in a stack, (STACK, 1), and which of these states exist."""
    n = k * STACK + tl.arange(0, STACK)[:, None]
    return n, n < N


@piece
def load_states(
    pointer: Pointer, pitch: Scalar, mask: tl.tensor, FIRST: Int, COUNT: Int, N: Int, STACK: Int, EXACT: Flag
) -> Values:
    """Load the states FIRST … FIRST + COUNT - 1 of float32 numbers per state and channel, `pitch` between states."""
    values = ()
    for k in tl.static_range(FIRST, FIRST + COUNT):
        if STACK > 1:
            n, there = stack_of(k, N, STACK)
            values = values + (tl.load(pointer + n * pitch, mask=tl.where(there, mask, False), other=0.0),)
        elif EXACT:
            values = values + (tl.load(pointer + k * pitch),)
        else:
            values = values + (tl.load(pointer + k * pitch, mask=mask, other=0.0),)
    return values


@piece
def store_states(
    pointer: Pointer, pitch: Scalar, values: Values, mask: tl.tensor, COUNT: Int, N: Int, STACK: Int, EXACT: Flag
) -> None:
    """Store the first COUNT states, with `pitch` between states."""
    for k in tl.static_range(COUNT):
        if STACK > 1:
            n, there = stack_of(k, N, STACK)
            tl.store(pointer + n * pitch, values[k], mask=tl.where(there, mask, False))
        elif EXACT:
            tl.store(pointer + k * pitch, values[k])
        else:
            tl.store(pointer + k * pitch, values[k], mask=mask)


@piece
def _unpacked(word: tl.tensor, kind: Dtype) -> Values:
    """Return the numbers in 64 bits, in float32. A bfloat16 is the upper half of a float32: one instruction each."""
    values = ()
    for half in tl.static_range(2):
        bits = (word >> (32 * half)).to(tl.int32)
        if kind == tl.float32:
            values = values + (bits.to(tl.float32, bitcast=True),)
        elif kind == tl.bfloat16:
            lower, upper = bits << 16, bits & -65536
            values = values + (lower.to(tl.float32, bitcast=True), upper.to(tl.float32, bitcast=True))
        else:
            lower, upper = bits.to(tl.int16), (bits >> 16).to(tl.int16)
            values = values + (
                lower.to(kind, bitcast=True).to(tl.float32),
                upper.to(kind, bitcast=True).to(tl.float32),
            )
    return values


@piece
def load_weights(pointer: Pointer, stride: Scalar, alive: tl.tensor, FIRST: Int, COUNT: Int, cut: "Cut") -> Values:
    """Load B or C of a step, for the states FIRST … FIRST + COUNT - 1, as float32 scalars.

    Where the numbers lie next to each other in whole 64-bit words, they are read in such words.
    """
    values = ()
    if cut.stack > 1:
        for k in tl.static_range(FIRST, FIRST + COUNT):
            n, there = stack_of(k, cut.n, cut.stack)
            mask = there if cut.exact else tl.where(alive, there, False)
            values = values + (tl.load(pointer + n * stride, mask=mask, other=0.0).to(tl.float32),)
    elif cut.words:
        kind: Dtype = pointer.dtype.element_ty
        per_word: Int = 64 // kind.primitive_bitwidth
        words = pointer.to(tl.pointer_type(tl.int64), bitcast=True)
        for i in tl.static_range(FIRST // per_word, (FIRST + COUNT) // per_word):
            if cut.exact:
                values = values + _unpacked(tl.load(words + i), kind)
            else:
                values = values + _unpacked(tl.load(words + i, mask=alive, other=0), kind)
    else:
        for n in tl.static_range(FIRST, FIRST + COUNT):
            if cut.exact:
                values = values + (tl.load(pointer + n * stride).to(tl.float32),)
            else:
                values = values + (tl.load(pointer + n * stride, mask=alive, other=0.0).to(tl.float32),)
    return values


@piece
def sum_over_stack(x: tl.tensor, STACK: Int) -> Block:
    """Return the sum over the states of a stack."""
    return x if STACK == 1 else sum_along(x, axis=0, keep_dims=True)


@piece
def _exchange(values: Values, lane: tl.tensor, COUNT: Int, MASK: Int, AXIS: Int) -> Values:
    """Add up the values of lanes that differ in bit MASK.

    Each lane of a pair gives away one half of the values and keeps the sums of the other half. Both lanes keep the sum
    of a single value.
    """
    if COUNT == 1:
        sums = (values[0] + tl.gather(values[0], lane ^ MASK, AXIS),)
    else:
        upper = (lane & MASK) != 0
        sums = ()
        for k in tl.static_range(COUNT // 2):
            low, high = values[k], values[COUNT // 2 + k]
            given = tl.gather(tl.where(upper, low, high), lane ^ MASK, AXIS)
            sums = sums + (tl.where(upper, high, low) + given,)
    return sums


@piece
def sum_over_lanes(values: Values, COUNT: Int, LANES: Int, STACK: Int) -> Values:
    """Sum each of COUNT tensors over its last LANES elements; COUNT and LANES are powers of two, LANES at most 32.

    This is a butterfly that transposes: it takes COUNT - 1 exchanges where COUNT sums one by one would take 5 · COUNT.
    Return max(1, COUNT / LANES) tensors: element l of tensor k is the sum number l · COUNT / LANES + k, rounded down.
    """
    lane = tl.arange(0, LANES)
    if STACK > 1:
        lane = lane[None, :] + zeros_in((STACK, LANES), tl.int32)
    for i in tl.static_range(5):
        if (LANES >> (i + 1)) > 0:
            values = _exchange(
                values, lane, (COUNT >> i) if (COUNT >> i) > 0 else 1, LANES >> (i + 1), 0 if STACK == 1 else 1
            )
    return values


@piece
def fold(x: tl.tensor, LANES: Int, BLOCK_D: Int, STACK: Int) -> Block:
    """Sum over the channels of a thread: the last BLOCK_D elements become LANES."""
    if BLOCK_D == LANES:
        return x
    elif STACK == 1:
        return sum_along(tl.reshape(x, (LANES, BLOCK_D // LANES)), axis=1)
    else:
        return sum_along(tl.reshape(x, (STACK, LANES, BLOCK_D // LANES)), axis=2)


@piece
def next_states(
    state: Values, size: tl.tensor, drive: tl.tensor, a: Values, b: Values, COUNT: Int, IS_FIRST: Flag
) -> Values:
    """Compute exp(ΔA) · state + B · Δu for COUNT states. With IS_FIRST no state came before."""
    new = ()
    for n in tl.static_range(COUNT):
        now = b[n] * drive
        if not IS_FIRST:
            now += tl.exp2(size * a[n]) * state[n]
        new = new + (now,)
    return new


@piece
def step_size(
    delta: Pointer, shift: tl.tensor, mask: tl.tensor, SOFTPLUS: Flag, EXACT: Flag
) -> tuple[tl.tensor, tl.tensor]:
    """Return Δ before and after the softplus."""
    raw = load(delta, mask, EXACT) + shift
    return raw, (softplus(raw) if SOFTPLUS else raw)
