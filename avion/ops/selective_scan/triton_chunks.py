"""The gradients of a chunk of steps, of which `triton_backward.py` makes the backward kernel.

The work on a chunk of steps has two halves. What belongs to a step and channel (Δ, the gate, the gradients of u, Δ and
z) is computed once for all steps. In between, the states are taken `group` at a time: a group's states are recomputed
in registers, then the group's adjoint walks the chunk backward. All states at once would not fit the registers with two
channels to a thread, and two channels halve both the exchanges between threads (for dB and dC, sums over channels) and
the conversions of B and C.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from avion.ops.kernel_pieces import piece, sigmoid, zeros_in
from avion.ops.kernel_types import Flag, Int, Pointer, Scalar, Values

from .triton_pieces import (
    Cut,
    Strides,
    channels_of,
    fold,
    load,
    load_states,
    load_weights,
    next_states,
    stack_of,
    step_size,
    store,
    store_states,
    sum_over_lanes,
    sum_over_stack,
    time_of,
    where_both,
    zeros,
)

_LN_2 = tl.constexpr(0.6931471805599453)


class Gradients(NamedTuple):
    """Where the gradients of u, delta and z are written, (R, T, D) each, contiguous; dz only where there is a gate."""

    du: Pointer
    d_delta: Pointer
    dz: Pointer


class Reads(NamedTuple):
    """The tensors that the steps of a chunk read: addresses at the chunk's first step."""

    dy: Pointer
    u: Pointer
    delta: Pointer
    B: Pointer
    C: Pointer
    z: Pointer


class Steps(NamedTuple):
    """Values per channel, one for each step of a chunk.

    Attributes:
        sizes: Δ.
        drives: Δu.
        slopes: dΔ / d(delta).
        dys: the gradient of y.
        by_zs: the factor of y in the gradient of z.
    """

    sizes: Values
    drives: Values
    slopes: Values
    dys: Values
    by_zs: Values


class Sums(NamedTuple):
    """Sums over the states so far, one for each step of a chunk.

    Attributes:
        by_drives: the gradient of Δu.
        by_sizes: the gradient of ΔA, times A.
        ys: y, where there is a gate.
    """

    by_drives: Values
    by_sizes: Values
    ys: Values


class Totals(NamedTuple):
    """The sums of a program over its rows.

    Attributes:
        A: dA, one value per channel and state.
        D: dD, one value per channel.
        bias: the gradient of the bias, one value per channel.
    """

    A: Values
    D: tl.tensor
    bias: tl.tensor


@piece
def step_values(at: Reads, strides: Strides, shift: tl.tensor, left: Scalar, in_d: tl.tensor, cut: "Cut") -> Steps:
    """Compute what belongs to the steps of a chunk and to no state."""
    CHUNK: Int = cut.chunk
    sizes, drives, slopes, dys, by_zs = (), (), (), (), ()
    for j in tl.static_range(CHUNK):
        alive = j < left
        mask = where_both(alive, in_d)
        u_now = load(at.u + cut.sign * j * strides.u[1], mask, cut.exact)
        raw, size = step_size(at.delta + cut.sign * j * strides.delta[1], shift, mask, cut.softplus, cut.exact)
        slope = sigmoid(raw) if cut.softplus else tl.full(raw.shape, 1.0, tl.float32)
        dy_now = load(at.dy + cut.sign * j * strides.dy[1], mask, cut.exact)
        by_z = dy_now
        if cut.gate:
            z_now = load(at.z + cut.sign * j * strides.z[1], mask, cut.exact)
            gate = sigmoid(z_now)
            by_z = dy_now * gate * (1.0 + z_now * (1.0 - gate))
            dy_now = dy_now * z_now * gate
        sizes, drives = sizes + (size,), drives + (size * u_now,)
        slopes, dys, by_zs = slopes + (slope,), dys + (dy_now,), by_zs + (by_z,)
    return Steps(sizes, drives, slopes, dys, by_zs)


@piece
def store_by_state(
    by_C: Values, by_B: Values, target: Pointer, alive: tl.tensor, FIRST: Int, COUNT: Int, cut: "Cut"
) -> None:
    """Store dC and dB of a step, summed over the program's channels, for COUNT of the states."""
    LANES: Int = cut.lanes
    STACK: Int = cut.stack
    HALF: Int = triton.next_power_of_2(COUNT)
    padding = zeros(HALF - COUNT, LANES, STACK)
    sums_B, sums_C = (), ()
    for k in tl.static_range(COUNT):
        sums_B = sums_B + (fold(by_B[k], LANES, cut.block_d, STACK),)
        sums_C = sums_C + (fold(by_C[k], LANES, cut.block_d, STACK),)
    values = sum_over_lanes(sums_C + padding + sums_B + padding, 2 * HALF, LANES, STACK)
    lane = channels_of(0, LANES, STACK)
    PER_LANE: Int = 2 * HALF // LANES if 2 * HALF > LANES else 1
    SHARERS: Int = LANES // (2 * HALF) if 2 * HALF < LANES else 1  # lanes that hold the same sum
    for k in tl.static_range(PER_LANE):
        number = lane // SHARERS * PER_LANE + k
        own, place = number % HALF, target + number // HALF * cut.n
        if STACK > 1:
            n, there = stack_of(FIRST + own, cut.n, STACK)
            tl.store(place + n, values[k], mask=where_both(alive, tl.where(own < COUNT, there, False)))
        elif cut.exact and HALF == COUNT:
            tl.store(place + (FIRST + own), values[k])
        else:
            tl.store(place + (FIRST + own), values[k], mask=where_both(alive, own < COUNT))


@piece
def group_states(
    state: Values,
    B: Pointer,
    strides: Strides,
    steps: Steps,
    a: Values,
    left: Scalar,
    FIRST: Int,
    COUNT: Int,
    cut: "Cut",
    IS_FIRST: Flag,
) -> tuple[Values, ...]:
    """Return a group's states before the first step of a chunk, `state`, and after each of its steps."""
    CHUNK: Int = cut.chunk
    states = (state,)
    for j in tl.static_range(CHUNK):
        b = load_weights(B + cut.sign * j * strides.B[1], strides.B[2], j < left, FIRST, COUNT, cut)
        now = next_states(states[j], steps.sizes[j], steps.drives[j], a, b, COUNT, IS_FIRST and j == 0)
        states = states + (now,)
    return states


@piece
def group_gradients(
    carry: Values,
    sum_A: Values,
    sums: Sums,
    A: Pointer,
    before: Pointer,
    pitch: Scalar,
    at: Reads,
    target: Pointer,
    strides: Strides,
    steps: Steps,
    left: Scalar,
    in_d: tl.tensor,
    cut: "Cut",
    FIRST: Int,
    COUNT: Int,
    IS_FIRST: Flag,
) -> tuple[Values, Values, Sums]:
    """Take the states FIRST … FIRST + COUNT - 1 of a chunk, and their adjoint from the last step back to the first.

    Store dB and dC. Return the adjoint of the state before the chunk, dA so far, and the sums over states so far.
    """
    CHUNK: Int = cut.chunk
    a = load_states(A, cut.channels, in_d, FIRST, COUNT, cut.n, cut.stack, cut.exact)
    state = zeros(COUNT, cut.block_d, cut.stack)
    if not IS_FIRST:
        state = load_states(before, pitch, in_d, FIRST, COUNT, cut.n, cut.stack, cut.exact)
    states = group_states(state, at.B, strides, steps, a, left, FIRST, COUNT, cut, IS_FIRST)
    all_drives, all_sizes, all_ys = (), (), ()
    for j in tl.static_range(CHUNK - 1, -1, -1):
        alive = j < left
        b = load_weights(at.B + cut.sign * j * strides.B[1], strides.B[2], alive, FIRST, COUNT, cut)
        c = load_weights(at.C + cut.sign * j * strides.C[1], strides.C[2], alive, FIRST, COUNT, cut)
        size, drive, dy = steps.sizes[j], steps.drives[j], steps.dys[j]
        by_drive, by_size, y = sums.by_drives[j], sums.by_sizes[j], sums.ys[j]
        by_B, by_C, new_carry, new_A = (), (), (), ()
        for k in tl.static_range(COUNT):
            adjoint = c[k] * dy + carry[k]
            by_B, by_C = by_B + (adjoint * drive,), by_C + (states[j + 1][k] * dy,)
            by_drive += sum_over_stack(adjoint * b[k], cut.stack)
            if cut.gate:
                y += sum_over_stack(states[j + 1][k] * c[k], cut.stack)
            if IS_FIRST and j == 0:
                new_carry, new_A = new_carry + (carry[k],), new_A + (sum_A[k],)
            else:
                handed = tl.exp2(size * a[k]) * adjoint
                by_exponent = handed * states[j][k]
                by_size += sum_over_stack(by_exponent * a[k], cut.stack)
                new_carry, new_A = new_carry + (handed,), new_A + (sum_A[k] + by_exponent * size,)
        carry, sum_A = new_carry, new_A
        all_drives, all_sizes, all_ys = (by_drive,) + all_drives, (by_size,) + all_sizes, (y,) + all_ys
        store_by_state(by_C, by_B, target + cut.sign * j * 2 * cut.n, alive, FIRST, COUNT, cut)
    return carry, sum_A, Sums(all_drives, all_sizes, all_ys)


@piece
def chunk_gradients(
    carry: Values,
    totals: Totals,
    at: Reads,
    to: Gradients,
    target: Pointer,
    before: Pointer,
    pitch: Scalar,
    strides: Strides,
    A: Pointer,
    skip: tl.tensor,
    shift: tl.tensor,
    left: Scalar,
    in_d: tl.tensor,
    cut: "Cut",
    IS_FIRST: Flag,
) -> tuple[Values, Totals]:
    """Take a chunk's steps from the last one back to the first.

    Return the adjoint of the state before the chunk, and the totals with the chunk's shares. The pointers are to the
    chunk's first step; `before` points to the state before this step, with `pitch` between states.
    """
    GROUP: Int = cut.group
    CHUNK: Int = cut.chunk
    K: Int = cut.stacks
    steps = step_values(at, strides, shift, left, in_d, cut)
    none = ()
    for _ in tl.static_range(CHUNK):
        none = none + (zeros_in(shift.shape, tl.float32),)
    sums = Sums(none, none, none)
    new_carry, new_A = (), ()
    for FIRST in tl.static_range(0, K, GROUP):
        own_carry, own_A = (), ()
        for n in tl.static_range(FIRST, FIRST + GROUP):
            if n < K:
                own_carry, own_A = own_carry + (carry[n],), own_A + (totals.A[n],)
        own_carry, own_A, sums = group_gradients(
            own_carry,
            own_A,
            sums,
            A,
            before,
            pitch,
            at,
            target,
            strides,
            steps,
            left,
            in_d,
            cut,
            FIRST,
            GROUP if FIRST + GROUP <= K else K - FIRST,
            IS_FIRST,
        )
        new_carry, new_A = new_carry + own_carry, new_A + own_A
    sum_D, sum_bias = totals.D, totals.bias
    for j in tl.static_range(CHUNK):
        mask, k = where_both(j < left, in_d), cut.sign * j * cut.channels
        u_now = load(at.u + cut.sign * j * strides.u[1], mask, cut.exact)  # again: it would not fit the registers
        if cut.gate:
            by_z = steps.by_zs[j] * (sums.ys[j] + skip * u_now)
            if cut.add:
                by_z += load(to.dz + k, mask, cut.exact)
            store(to.dz + k, by_z, mask, cut.exact)
        by_raw = (sums.by_drives[j] * u_now + sums.by_sizes[j] * _LN_2) * steps.slopes[j]  # A comes times log2(e)
        store(to.d_delta + k, by_raw, mask, cut.exact)
        store(to.du + k, sums.by_drives[j] * steps.sizes[j] + skip * steps.dys[j], mask, cut.exact)
        sum_D += u_now * steps.dys[j]
        sum_bias += by_raw
    return new_carry, Totals(new_A, sum_D, sum_bias)


@piece
def store_chunk_states(
    scratch: Pointer,
    pitch: Scalar,
    state: Values,
    row: Reads,
    strides: Strides,
    A: Pointer,
    shift: tl.tensor,
    start: Scalar,
    chunks: Scalar,
    steps: Scalar,
    in_d: tl.tensor,
    cut: "Cut",
) -> None:
    """Store the state before each chunk of a segment, beginning with `state` before the first chunk.

    The pointers of `row` are to the beginning of the row.
    """
    CHUNK: Int = cut.chunk
    N: Int = cut.n
    K: Int = cut.stacks
    tl.debug_barrier()  # other threads may still read what was stored for the segment or row before
    a = load_states(A, cut.channels, in_d, 0, K, N, cut.stack, cut.exact)
    for c in range(chunks):
        store_states(scratch + c * N * pitch, pitch, state, in_d, K, N, cut.stack, cut.exact)
        first = start + c * cut.chunk
        t = time_of(first, steps, cut.reverse)
        for j in tl.static_range(CHUNK):
            alive, at = first + j < steps, t + cut.sign * j
            mask = where_both(alive, in_d)
            u_now = load(row.u + at * strides.u[1], mask, cut.exact)
            _, size = step_size(row.delta + at * strides.delta[1], shift, mask, cut.softplus, cut.exact)
            b = load_weights(row.B + at * strides.B[1], strides.B[2], alive, 0, K, cut)
            state = next_states(state, size, size * u_now, a, b, K, False)
    tl.debug_barrier()  # a thread may read what another one wrote
