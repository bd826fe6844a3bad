"""The backward kernel of the selective scan, one direction. `triton_pieces.py` says how a program works.

The work on a chunk of steps has two halves. What belongs to a step and channel (Δ, the gate, the gradients of u, Δ and
z) is computed once for all steps. In between, the states are taken `group` at a time: a group's states are recomputed
in registers, then the group's adjoint walks the chunk backward. All states at once would not fit the registers with two
channels to a thread, and two channels halve both the exchanges between threads (for dB and dC, sums over channels) and
the conversions of B and C.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from avion.ops.kernel_types import Flag, Int, Pointer, Scalar, Values, constexpr

from .inputs import ScanInputs
from .triton_pieces import (
    Cut,
    Strides,
    Work,
    channels_of,
    fold,
    load,
    load_states,
    load_weights,
    next_states,
    piece,
    sigmoid,
    span,
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


class PartialSums(NamedTuple):
    """Sums over a program's rows or channels, for the caller to add up.

    Attributes:
        by_state: dC and dB side by side, (blocks of channels, R, T, 2 · N).
        dA: (programs, N, D).
        dD: (programs, D).
        d_bias: the gradient of the bias, (programs, D).
    """

    by_state: Pointer
    dA: Pointer
    dD: Pointer
    d_bias: Pointer


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
    """Computes what belongs to the steps of a chunk and to no state."""
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
    """Stores dC and dB of a step, summed over the program's channels, for COUNT of the states."""
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
    """Returns a group's states before the first step of a chunk, `state`, and after each of its steps."""
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
    """Takes the states FIRST … FIRST + COUNT - 1 of a chunk, and their adjoint from the last step back to the first.

    Stores dB and dC. Returns the adjoint of the state before the chunk, dA so far, and the sums over states so far.
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
    """Takes a chunk's steps from the last one back to the first.

    Returns the adjoint of the state before the chunk, and the totals with the chunk's shares. The pointers are to the
    chunk's first step; `before` points to the state before this step, with `pitch` between states.
    """
    GROUP: Int = cut.group
    CHUNK: Int = cut.chunk
    K: Int = cut.stacks
    steps = step_values(at, strides, shift, left, in_d, cut)
    none = ()
    for _ in tl.static_range(CHUNK):
        none = none + (tl.zeros_like(shift),)
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
    """Stores the state before each chunk of a segment, beginning with `state` before the first chunk.

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


@piece
def segment_gradients(
    carry: Values,
    totals: Totals,
    row: Reads,
    to: Gradients,
    target: Pointer,
    scratch: Pointer,
    strides: Strides,
    A: Pointer,
    skip: tl.tensor,
    shift: tl.tensor,
    start: Scalar,
    chunks: Scalar,
    steps: Scalar,
    in_d: tl.tensor,
    cut: "Cut",
) -> tuple[Values, Totals]:
    """Takes the chunks of a segment from the last one back to the first.

    Returns the adjoint of the state before the segment, and the totals with the segment's shares. The pointers are to
    the beginning of the row.
    """
    N: Int = cut.n
    for c_back in range(chunks):
        c = chunks - 1 - c_back
        t = time_of(start + c * cut.chunk, steps, cut.reverse)
        at = Reads(
            row.dy + t * strides.dy[1],
            row.u + t * strides.u[1],
            row.delta + t * strides.delta[1],
            row.B + t * strides.B[1],
            row.C + t * strides.C[1],
            row.z + t * strides.z[1],
        )
        own = Gradients(to.du + t * cut.channels, to.d_delta + t * cut.channels, to.dz + t * cut.channels)
        of_t, before, left = target + t * (2 * N), scratch + c * N * cut.block_d, steps - start - c * cut.chunk
        carry, totals = chunk_gradients(
            carry,
            totals,
            at,
            own,
            of_t,
            before,
            cut.block_d,
            strides,
            A,
            skip,
            shift,
            left,
            in_d,
            cut,
            cut.one_chunk,
        )
    return carry, totals


@triton.jit
def backward_kernel(
    x: ScanInputs,
    z_base: Pointer,
    strides: Strides,
    dy: Pointer,
    entering: Pointer,
    carried: Pointer,
    scratch: Pointer,
    to: Gradients,
    partial: PartialSums,
    work: Work,
    cut: constexpr,
) -> None:
    """Computes all gradients. With `cut.add`, dz is added to.

    Program (p, block of channels) takes the items p, p + programs, … one after the other; an item is a row, or a part
    of a row. In each segment of time, from the last one to the first, the state before each chunk is written to
    `scratch` (programs · blocks, segment / chunk, N, block_d); then the gradients follow chunk by chunk, from the end.
    A single chunk needs no scratch memory.
    """
    N: Int = cut.n
    K: Int = cut.stacks
    block = (tl.program_id(0) % cut.blocks).to(tl.int64)
    d = channels_of(block, cut.block_d, cut.stack)
    in_d = d < cut.channels
    A = x.A + d
    own_scratch = tl.program_id(0).to(tl.int64) * (cut.segment // cut.chunk * N * cut.block_d)
    scratch += own_scratch + channels_of(0, cut.block_d, cut.stack)
    parts = tl.cdiv(work.steps, work.part_steps)
    rows = work.items // parts

    sum_D = tl.zeros(d.shape, tl.float32)
    totals = Totals(zeros(K, cut.block_d, cut.stack), sum_D, sum_D)
    for item in range(tl.program_id(0) // cut.blocks, work.items, work.programs):
        row, part, part_start, end = span(item, work.steps, work.part_steps, cut.parted)
        # Loaded for every item: kept, they would not fit the registers.
        skip, shift = load(x.D + d, in_d, cut.exact), load(x.delta_bias + d, in_d, cut.exact)
        u, delta = x.u + row * strides.u[0] + d * strides.u[2], x.delta + row * strides.delta[0] + d * strides.delta[2]
        B, C = x.B + row * strides.B[0], x.C + row * strides.C[0]
        z, dy_row = z_base + row * strides.z[0] + d * strides.z[2], dy + row * strides.dy[0] + d * strides.dy[2]
        of_row, place = Reads(dy_row, u, delta, B, C, z), row * work.steps * cut.channels + d
        target = partial.by_state + (block * rows + row) * work.steps * (2 * N)
        own = Gradients(to.du + place, to.d_delta + place, to.dz + place)
        carry = zeros(K, cut.block_d, cut.stack)
        if cut.parted:
            handed = carried + (row * (parts - 1) + part) * N * cut.channels + d
            has_later = where_both(part < parts - 1, in_d)
            carry = load_states(handed, cut.channels, has_later, 0, K, N, cut.stack, False)
        segments = 1 if cut.one_chunk else tl.cdiv(end - part_start, cut.segment)
        for back in range(segments):
            start = part_start + (segments - 1 - back) * cut.segment
            chunks = 1 if cut.one_chunk else tl.cdiv(tl.minimum(cut.segment, end - start), cut.chunk)
            if not cut.one_chunk:
                before = zeros(K, cut.block_d, cut.stack)
                if cut.kept:
                    slot = row * ((work.steps - 1) // cut.segment) + start // cut.segment - 1
                    kept = entering + slot * N * cut.channels + d
                    before = load_states(kept, cut.channels, where_both(start > 0, in_d), 0, K, N, cut.stack, False)
                store_chunk_states(
                    scratch, cut.block_d, before, of_row, strides, A, shift, start, chunks, work.steps, in_d, cut
                )
            carry, totals = segment_gradients(
                carry,
                totals,
                of_row,
                own,
                target,
                scratch,
                strides,
                A,
                skip,
                shift,
                start,
                chunks,
                work.steps,
                in_d,
                cut,
            )
    # In 32 bits, which are enough for these tensors, so that nothing of it is kept in registers over the loop.
    d, p = channels_of(tl.program_id(0) % cut.blocks, cut.block_d, cut.stack), tl.program_id(0) // cut.blocks
    store_states(partial.dA + p * N * cut.channels + d, cut.channels, totals.A, in_d, K, N, cut.stack, cut.exact)
    store(partial.dD + p * cut.channels + d, totals.D, in_d, cut.exact)
    store(partial.d_bias + p * cut.channels + d, totals.bias, in_d, cut.exact)
