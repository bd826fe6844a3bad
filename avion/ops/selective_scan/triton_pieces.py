"""What the Triton kernels of the selective scan are made of.

A program takes BLOCK_D channels, one to four of them per thread. A value per channel is a (BLOCK_D,) tensor; a value
per channel and state is a tuple of such tensors, one per state, so that a thread holds all states of its channels:
sums over states need no exchange between threads, and softplus, gate and addresses are computed once per channel.
B and C, one number per state, are scalars that all threads read.

That is STACK = 1, what a GPU runs. The interpreter takes as long for a tensor of one state as for one of many: there
tensors hold STACK states each. A value per channel is then (1, BLOCK_D), one per state (STACK, BLOCK_D), B and C are
(STACK, 1), and "a state" in a tuple is a stack of them, the last one padded with zeros.

Walking order: step i = 0 … T-1 is t = i, or t = T-1-i with REVERSE. Steps are taken CHUNK at a time, unrolled. In the
last chunk steps past the end are dead: they load zeros, and nothing of them is stored. With EXACT there are no dead
steps and no channels past the last one, and no load is masked.
"""

from collections.abc import Callable

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)


def piece(function: Callable) -> Callable:
    """A function that kernels call: compiled with them. In the interpreter it stays a Python function, since a call of
    a jit function takes 0.3 ms there."""
    return function if triton.knobs.runtime.interpret else triton.jit(function)


@piece
def softplus(x):
    """log(1 + exp(x)), within 3e-7 of it in relative terms, also where exp(x) is tiny.

    max(x, 0) + log1p(e) with e = exp(-|x|); log1p(e) / e is a polynomial on [0, 1] whose constant term is 1, fitted by
    weighted least squares to a relative error of 4e-8."""
    e = tl.exp2(tl.abs(x) * -_LOG2_E)
    p = e * 0.005364794749766588 - 0.03006567433476448
    p = p * e + 0.07920434325933456
    p = p * e - 0.1375378668308258
    p = p * e + 0.19153647124767303
    p = p * e - 0.24857161939144135
    p = p * e + 0.333213210105896
    p = p * e - 0.49999648332595825
    return (p * e + 1.0) * e + tl.maximum(x, 0.0)


@piece
def sigmoid(x):
    """1 / (1 + exp(-x)). The reciprocal square root is one instruction, a division would be ten."""
    root = tl.rsqrt(1.0 + tl.exp2(x * -_LOG2_E))
    return root * root


@piece
def time_of(i, steps, REVERSE: tl.constexpr):
    """Of step i: its t, 64 bits wide since offsets can be beyond 2^31. Within a chunk they are few steps from there."""
    i = tl.full((), 0, tl.int64) + i
    return steps - 1 - i if REVERSE else i


@piece
def span(item, steps, part_steps, PARTED: tl.constexpr):
    """Row, part, the part's first step and its end, of a (row, part)."""
    item = tl.full((), 0, tl.int64) + item
    if PARTED:
        parts = tl.cdiv(steps, part_steps)
        first = (item % parts) * part_steps
        return item // parts, item % parts, first, tl.minimum(first + part_steps, steps)
    else:
        nothing = item * 0
        return item, nothing, nothing, nothing + steps


@piece
def where_both(condition, mask):
    """A scalar condition and a mask. (The interpreter's `&` does not give a mask.)"""
    return tl.where(condition, mask, False)


@piece
def channels_of(block, BLOCK_D: tl.constexpr, STACK: tl.constexpr):
    """The channels of a block, of the shape that a value per channel has."""
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    return d if STACK == 1 else d[None, :]


@piece
def load(pointer, mask, EXACT: tl.constexpr):
    """In float32; zeros where the mask is not set, as that of a dead step or of no channel. EXACT: it is set."""
    if EXACT:
        return tl.load(pointer).to(tl.float32)
    else:
        return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@piece
def store(pointer, value, mask, EXACT: tl.constexpr):
    if EXACT:
        tl.store(pointer, value.to(pointer.dtype.element_ty))
    else:
        tl.store(pointer, value.to(pointer.dtype.element_ty), mask=mask)


@piece
def zeros(COUNT: tl.constexpr, SIZE: tl.constexpr, STACK: tl.constexpr):
    """Of COUNT states."""
    values = ()
    for _ in tl.static_range(COUNT):
        values = values + (tl.zeros((SIZE,) if STACK == 1 else (STACK, SIZE), tl.float32),)
    return values


@piece
def stack_of(k, N: tl.constexpr, STACK: tl.constexpr):
    """The numbers of the states in a stack, (STACK, 1), and which of them there are."""
    n = k * STACK + tl.arange(0, STACK)[:, None]
    return n, n < N


@piece
def load_states(
    pointer, pitch, mask, FIRST: tl.constexpr, COUNT: tl.constexpr, N: tl.constexpr, STACK: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """States FIRST … FIRST + COUNT - 1 of float32 numbers per state and channel, `pitch` between states."""
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
    pointer, pitch, values, mask, COUNT: tl.constexpr, N: tl.constexpr, STACK: tl.constexpr, EXACT: tl.constexpr
):  # fmt: skip
    for k in tl.static_range(COUNT):
        if STACK > 1:
            n, there = stack_of(k, N, STACK)
            tl.store(pointer + n * pitch, values[k], mask=tl.where(there, mask, False))
        elif EXACT:
            tl.store(pointer + k * pitch, values[k])
        else:
            tl.store(pointer + k * pitch, values[k], mask=mask)


@piece
def _unpacked(word, kind: tl.constexpr):
    """The numbers of 64 bits, in float32. A bfloat16 is the upper half of a float32: one instruction each."""
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
def load_weights(
    pointer, stride, alive, FIRST: tl.constexpr, COUNT: tl.constexpr, N: tl.constexpr, STACK: tl.constexpr,
    WORDS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """A step's B or C of the states FIRST … FIRST + COUNT - 1: float32 scalars. WORDS: they lie next to each other, in
    whole 64-bit words, which are read as such."""
    values = ()
    if STACK > 1:
        for k in tl.static_range(FIRST, FIRST + COUNT):
            n, there = stack_of(k, N, STACK)
            mask = there if EXACT else tl.where(alive, there, False)
            values = values + (tl.load(pointer + n * stride, mask=mask, other=0.0).to(tl.float32),)
    elif WORDS:
        kind: tl.constexpr = pointer.dtype.element_ty
        per_word: tl.constexpr = 64 // kind.primitive_bitwidth
        words = pointer.to(tl.pointer_type(tl.int64), bitcast=True)
        for i in tl.static_range(FIRST // per_word, (FIRST + COUNT) // per_word):
            if EXACT:
                values = values + _unpacked(tl.load(words + i), kind)
            else:
                values = values + _unpacked(tl.load(words + i, mask=alive, other=0), kind)
    else:
        for n in tl.static_range(FIRST, FIRST + COUNT):
            if EXACT:
                values = values + (tl.load(pointer + n * stride).to(tl.float32),)
            else:
                values = values + (tl.load(pointer + n * stride, mask=alive, other=0.0).to(tl.float32),)
    return values


@piece
def sum_over_stack(x, STACK: tl.constexpr):
    """The sum over the states of a stack."""
    return x if STACK == 1 else tl.sum(x, axis=0, keep_dims=True)


@piece
def _exchange(values, lane, COUNT: tl.constexpr, MASK: tl.constexpr, AXIS: tl.constexpr):
    """Adds up the values of lanes that differ in bit MASK: each lane of a pair gives away one half of the values and
    keeps the sums of the other half. A single value both of them keep."""
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
def sum_over_lanes(values, COUNT: tl.constexpr, LANES: tl.constexpr, STACK: tl.constexpr):
    """COUNT tensors, each summed over its LANES last elements; COUNT and LANES powers of two, LANES at most 32.

    A butterfly that transposes: COUNT - 1 exchanges where COUNT sums one by one would take 5 · COUNT. Returns
    max(1, COUNT / LANES) tensors: element l of tensor k is sum number l · COUNT / LANES + k, rounded down."""
    lane = tl.arange(0, LANES)
    if STACK > 1:
        lane = lane[None, :] + tl.zeros((STACK, LANES), tl.int32)
    for i in tl.static_range(5):
        if (LANES >> (i + 1)) > 0:
            values = _exchange(
                values, lane, (COUNT >> i) if (COUNT >> i) > 0 else 1, LANES >> (i + 1), 0 if STACK == 1 else 1
            )
    return values


@piece
def fold(x, LANES: tl.constexpr, BLOCK_D: tl.constexpr, STACK: tl.constexpr):
    """BLOCK_D last elements → LANES: the sum over the channels of a thread."""
    if BLOCK_D == LANES:
        return x
    elif STACK == 1:
        return tl.sum(tl.reshape(x, (LANES, BLOCK_D // LANES)), axis=1)
    else:
        return tl.sum(tl.reshape(x, (STACK, LANES, BLOCK_D // LANES)), axis=2)


@piece
def next_states(state, size, drive, a, b, COUNT: tl.constexpr, IS_FIRST: tl.constexpr):
    """exp(ΔA) · state + B · Δu for COUNT states. IS_FIRST: nothing came before."""
    new = ()
    for n in tl.static_range(COUNT):
        now = b[n] * drive
        if not IS_FIRST:
            now += tl.exp2(size * a[n]) * state[n]
        new = new + (now,)
    return new


@piece
def step_size(delta, shift, mask, SOFTPLUS: tl.constexpr, EXACT: tl.constexpr):
    """Δ before and after the softplus."""
    raw = load(delta, mask, EXACT) + shift
    return raw, (softplus(raw) if SOFTPLUS else raw)
