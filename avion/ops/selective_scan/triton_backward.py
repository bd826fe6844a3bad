"""The backward kernel of the selective scan, one direction. `triton_pieces.py` says how a program works.

A chunk of steps is taken in two halves of work. What belongs to a step and channel (Δ, the gate, the gradients of u, Δ
and z) is computed once for all steps; between its beginning and its end the states are taken GROUP at a time: a group's
states are recomputed in registers, then its adjoint walks the chunk backward. All states at once would not fit the
registers with two channels to a thread, and two channels halve both the exchanges between threads (for dB and dC, sums
over channels) and the conversions of B and C.
"""

import triton
import triton.language as tl

from .triton_pieces import (
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


@piece
def step_values(
    dy, u, delta, z, strides, shift, left, in_d,
    CHUNK: tl.constexpr, SIGN: tl.constexpr, SOFTPLUS: tl.constexpr, GATE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Of each step of a chunk: Δ, Δu, dΔ/d(delta), the gradient of y, and what y is multiplied by in z's gradient."""
    sizes, drives, slopes, dys, by_zs = (), (), (), (), ()
    for j in tl.static_range(CHUNK):
        alive = j < left
        mask = where_both(alive, in_d)
        u_now = load(u + SIGN * j * strides.u[1], mask, EXACT)
        raw, size = step_size(delta + SIGN * j * strides.delta[1], shift, mask, SOFTPLUS, EXACT)
        slope = sigmoid(raw) if SOFTPLUS else tl.full(raw.shape, 1.0, tl.float32)
        dy_now = load(dy + SIGN * j * strides.dy[1], mask, EXACT)
        by_z = dy_now
        if GATE:
            z_now = load(z + SIGN * j * strides.z[1], mask, EXACT)
            gate = sigmoid(z_now)
            by_z = dy_now * gate * (1.0 + z_now * (1.0 - gate))
            dy_now = dy_now * z_now * gate
        sizes, drives = sizes + (size,), drives + (size * u_now,)
        slopes, dys, by_zs = slopes + (slope,), dys + (dy_now,), by_zs + (by_z,)
    return sizes, drives, slopes, dys, by_zs


@piece
def store_by_state(
    by_C, by_B, target, alive, FIRST: tl.constexpr, COUNT: tl.constexpr, N: tl.constexpr, STACK: tl.constexpr,
    BLOCK_D: tl.constexpr, LANES: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """A step's dC and dB of COUNT states, summed over the program's channels, into the step's 2 · N numbers."""
    HALF: tl.constexpr = triton.next_power_of_2(COUNT)
    padding = zeros(HALF - COUNT, LANES, STACK)
    sums_B, sums_C = (), ()
    for k in tl.static_range(COUNT):
        sums_B = sums_B + (fold(by_B[k], LANES, BLOCK_D, STACK),)
        sums_C = sums_C + (fold(by_C[k], LANES, BLOCK_D, STACK),)
    values = sum_over_lanes(sums_C + padding + sums_B + padding, 2 * HALF, LANES, STACK)
    lane = channels_of(0, LANES, STACK)
    PER_LANE: tl.constexpr = 2 * HALF // LANES if 2 * HALF > LANES else 1
    SHARERS: tl.constexpr = LANES // (2 * HALF) if 2 * HALF < LANES else 1  # lanes that hold the same sum
    for k in tl.static_range(PER_LANE):
        number = lane // SHARERS * PER_LANE + k
        own, place = number % HALF, target + number // HALF * N
        if STACK > 1:
            n, there = stack_of(FIRST + own, N, STACK)
            tl.store(place + n, values[k], mask=where_both(alive, tl.where(own < COUNT, there, False)))
        elif EXACT and HALF == COUNT:
            tl.store(place + (FIRST + own), values[k])
        else:
            tl.store(place + (FIRST + own), values[k], mask=where_both(alive, own < COUNT))


@piece
def group_states(
    state, B, B_t, B_n, sizes, drives, a, left,
    FIRST: tl.constexpr, COUNT: tl.constexpr, N: tl.constexpr, STACK: tl.constexpr, CHUNK: tl.constexpr,
    SIGN: tl.constexpr, IS_FIRST: tl.constexpr, WORDS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """A group's states before the first step of a chunk, `state`, and after each of its steps."""
    states = (state,)
    for j in tl.static_range(CHUNK):
        b = load_weights(B + SIGN * j * B_t, B_n, j < left, FIRST, COUNT, N, STACK, WORDS, EXACT)
        states = states + (next_states(states[j], sizes[j], drives[j], a, b, COUNT, IS_FIRST and j == 0),)
    return states


@piece
def group_gradients(
    carry, sum_A, A, before, B, C, target, strides, pitch, sizes, drives, dys, by_drives, by_sizes, ys, left, in_d,
    FIRST: tl.constexpr, COUNT: tl.constexpr, CHANNELS: tl.constexpr, N: tl.constexpr, STACK: tl.constexpr,
    BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, LANES: tl.constexpr, SIGN: tl.constexpr, GATE: tl.constexpr,
    IS_FIRST: tl.constexpr, WORDS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """The states FIRST … FIRST + COUNT - 1 of a chunk, and their adjoint from the last step back to the first. Stores
    dB and dC. Returns the adjoint of the state before the chunk, dA so far, and per step the sums over states so far:
    the gradient by Δu, the one by ΔA times A, and y."""
    a = load_states(A, CHANNELS, in_d, FIRST, COUNT, N, STACK, EXACT)
    state = zeros(COUNT, BLOCK_D, STACK)
    if not IS_FIRST:
        state = load_states(before, pitch, in_d, FIRST, COUNT, N, STACK, EXACT)
    states = group_states(state, B, strides.B[1], strides.B[2], sizes, drives, a, left,
                          FIRST, COUNT, N, STACK, CHUNK, SIGN, IS_FIRST, WORDS, EXACT)  # fmt: skip
    all_drives, all_sizes, all_ys = (), (), ()
    for j in tl.static_range(CHUNK - 1, -1, -1):
        alive = j < left
        b = load_weights(B + SIGN * j * strides.B[1], strides.B[2], alive, FIRST, COUNT, N, STACK, WORDS, EXACT)
        c = load_weights(C + SIGN * j * strides.C[1], strides.C[2], alive, FIRST, COUNT, N, STACK, WORDS, EXACT)
        by_drive, by_size, y = by_drives[j], by_sizes[j], ys[j]
        by_B, by_C, new_carry, new_A = (), (), (), ()
        for k in tl.static_range(COUNT):
            adjoint = c[k] * dys[j] + carry[k]
            by_B, by_C = by_B + (adjoint * drives[j],), by_C + (states[j + 1][k] * dys[j],)
            by_drive += sum_over_stack(adjoint * b[k], STACK)
            if GATE:
                y += sum_over_stack(states[j + 1][k] * c[k], STACK)
            if IS_FIRST and j == 0:
                new_carry, new_A = new_carry + (carry[k],), new_A + (sum_A[k],)
            else:
                handed = tl.exp2(sizes[j] * a[k]) * adjoint
                by_exponent = handed * states[j][k]
                by_size += sum_over_stack(by_exponent * a[k], STACK)
                new_carry, new_A = new_carry + (handed,), new_A + (sum_A[k] + by_exponent * sizes[j],)
        carry, sum_A = new_carry, new_A
        all_drives, all_sizes, all_ys = (by_drive,) + all_drives, (by_size,) + all_sizes, (y,) + all_ys
        store_by_state(by_C, by_B, target + SIGN * j * 2 * N, alive, FIRST, COUNT, N, STACK, BLOCK_D, LANES, EXACT)
    return carry, sum_A, all_drives, all_sizes, all_ys


@piece
def chunk_gradients(
    dy, u, delta, B, C, z, du, d_delta, dz, target, before, pitch, strides, carry, sum_A, sum_D, sum_bias,
    A, skip, shift, left, in_d,
    CHANNELS: tl.constexpr, N: tl.constexpr, K: tl.constexpr, STACK: tl.constexpr, BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
    ADD: tl.constexpr, GATE: tl.constexpr, IS_FIRST: tl.constexpr, WORDS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """A chunk's steps, from the last back to the first: the adjoint of the state before it, and the sums with the
    chunk's shares. Pointers are to the first step; `before`: to the state before it, `pitch` between states."""
    SIGN: tl.constexpr = -1 if REVERSE else 1
    sizes, drives, slopes, dys, by_zs = step_values(
        dy, u, delta, z, strides, shift, left, in_d, CHUNK, SIGN, SOFTPLUS, GATE, EXACT
    )
    none = ()
    for _ in tl.static_range(CHUNK):
        none = none + (tl.zeros_like(shift),)
    by_drives, by_sizes, ys = none, none, none
    new_carry, new_A = (), ()
    for FIRST in tl.static_range(0, K, GROUP):
        own_carry, own_A = (), ()
        for n in tl.static_range(FIRST, FIRST + GROUP):
            if n < K:
                own_carry, own_A = own_carry + (carry[n],), own_A + (sum_A[n],)
        own_carry, own_A, by_drives, by_sizes, ys = group_gradients(
            own_carry, own_A, A, before, B, C, target, strides, pitch, sizes, drives, dys, by_drives, by_sizes, ys,
            left, in_d, FIRST, GROUP if FIRST + GROUP <= K else K - FIRST, CHANNELS, N, STACK, BLOCK_D, CHUNK, LANES,
            SIGN, GATE, IS_FIRST, WORDS, EXACT)  # fmt: skip
        new_carry, new_A = new_carry + own_carry, new_A + own_A
    for j in tl.static_range(CHUNK):
        mask, k = where_both(j < left, in_d), SIGN * j * CHANNELS
        u_now = load(u + SIGN * j * strides.u[1], mask, EXACT)  # once more: it would not fit the registers
        if GATE:
            by_z = by_zs[j] * (ys[j] + skip * u_now)
            if ADD:
                by_z += load(dz + k, mask, EXACT)
            store(dz + k, by_z, mask, EXACT)
        by_raw = (by_drives[j] * u_now + by_sizes[j] * _LN_2) * slopes[j]  # A comes times log2(e)
        store(d_delta + k, by_raw, mask, EXACT)
        store(du + k, by_drives[j] * sizes[j] + skip * dys[j], mask, EXACT)
        sum_D += u_now * dys[j]
        sum_bias += by_raw
    return new_carry, new_A, sum_D, sum_bias


@piece
def store_chunk_states(
    scratch, pitch, state, u, delta, B, strides, A, shift, start, chunks, steps, in_d,
    CHANNELS: tl.constexpr, N: tl.constexpr, K: tl.constexpr, STACK: tl.constexpr, CHUNK: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, WORDS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """The state before each chunk of a segment, from the one before the first. u, delta and B point to the row."""
    SIGN: tl.constexpr = -1 if REVERSE else 1
    tl.debug_barrier()  # other threads may still read what was stored for the segment or row before
    a = load_states(A, CHANNELS, in_d, 0, K, N, STACK, EXACT)
    for c in range(chunks):
        store_states(scratch + c * N * pitch, pitch, state, in_d, K, N, STACK, EXACT)
        first = start + c * CHUNK
        t = time_of(first, steps, REVERSE)
        for j in tl.static_range(CHUNK):
            alive, at = first + j < steps, t + SIGN * j
            mask = where_both(alive, in_d)
            u_now = load(u + at * strides.u[1], mask, EXACT)
            _, size = step_size(delta + at * strides.delta[1], shift, mask, SOFTPLUS, EXACT)
            b = load_weights(B + at * strides.B[1], strides.B[2], alive, 0, K, N, STACK, WORDS, EXACT)
            state = next_states(state, size, size * u_now, a, b, K, False)
    tl.debug_barrier()  # a thread may read what another one wrote


@triton.jit
def backward_kernel(
    x, z_base, strides, dy, entering, carried, scratch, du, d_delta, dz, by_state, dA, dD, d_bias,
    items, steps, part_steps, programs,
    CHANNELS: tl.constexpr, N: tl.constexpr, STACK: tl.constexpr, BLOCK_D: tl.constexpr, LANES: tl.constexpr,
    CHUNK: tl.constexpr, GROUP: tl.constexpr, SEGMENT: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
    ADD: tl.constexpr, GATE: tl.constexpr, ONE_CHUNK: tl.constexpr, KEPT: tl.constexpr, PARTED: tl.constexpr,
    WORDS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """All gradients. Program (p, block of channels) takes items p, p + programs, … one after the other; an item is a
    row, or a part of one.

    Per segment of time, last one first: the state before each chunk goes to `scratch` (programs · blocks, SEGMENT /
    CHUNK, N, BLOCK_D); then chunk by chunk from the end the gradients follow. A single chunk needs no scratch.

    du, d_delta, dz (R, T, D) contiguous. Partial sums, for the caller to add up: dC and dB side by side, `by_state`
    (blocks, R, T, 2 · N); dA (programs, N, D), dD and d_bias (programs, D). dz is added to with ADD.
    """
    blocks: tl.constexpr = (CHANNELS + BLOCK_D - 1) // BLOCK_D
    K: tl.constexpr = (N + STACK - 1) // STACK  # stacks of states
    block = (tl.program_id(0) % blocks).to(tl.int64)
    d = channels_of(block, BLOCK_D, STACK)
    in_d = d < CHANNELS
    A = x.A + d
    scratch += tl.program_id(0).to(tl.int64) * (SEGMENT // CHUNK * N * BLOCK_D) + channels_of(0, BLOCK_D, STACK)
    parts = tl.cdiv(steps, part_steps)
    rows = items // parts

    sum_A, sum_D = zeros(K, BLOCK_D, STACK), tl.zeros(d.shape, tl.float32)
    sum_bias = sum_D
    for item in range(tl.program_id(0) // blocks, items, programs):
        row, part, part_start, end = span(item, steps, part_steps, PARTED)
        # Loaded for every item: kept, they would not fit the registers.
        skip, shift = load(x.D + d, in_d, EXACT), load(x.delta_bias + d, in_d, EXACT)
        u, delta = x.u + row * strides.u[0] + d * strides.u[2], x.delta + row * strides.delta[0] + d * strides.delta[2]
        B, C = x.B + row * strides.B[0], x.C + row * strides.C[0]
        z, dy_ = z_base + row * strides.z[0] + d * strides.z[2], dy + row * strides.dy[0] + d * strides.dy[2]
        place, target = row * steps * CHANNELS + d, by_state + (block * rows + row) * steps * (2 * N)
        carry = zeros(K, BLOCK_D, STACK)
        if PARTED:
            handed = carried + (row * (parts - 1) + part) * N * CHANNELS + d
            carry = load_states(handed, CHANNELS, where_both(part < parts - 1, in_d), 0, K, N, STACK, False)
        segments = 1 if ONE_CHUNK else tl.cdiv(end - part_start, SEGMENT)
        for back in range(segments):
            start = part_start + (segments - 1 - back) * SEGMENT
            chunks = 1 if ONE_CHUNK else tl.cdiv(tl.minimum(SEGMENT, end - start), CHUNK)
            if not ONE_CHUNK:
                before = zeros(K, BLOCK_D, STACK)
                if KEPT:
                    slot = row * ((steps - 1) // SEGMENT) + start // SEGMENT - 1
                    kept = entering + slot * N * CHANNELS + d
                    before = load_states(kept, CHANNELS, where_both(start > 0, in_d), 0, K, N, STACK, False)
                store_chunk_states(scratch, BLOCK_D, before, u, delta, B, strides, A, shift, start, chunks, steps, in_d,
                                   CHANNELS, N, K, STACK, CHUNK, SOFTPLUS, REVERSE, WORDS, EXACT)  # fmt: skip
            for c_back in range(chunks):
                c = chunks - 1 - c_back
                t = time_of(start + c * CHUNK, steps, REVERSE)
                carry, sum_A, sum_D, sum_bias = chunk_gradients(
                    dy_ + t * strides.dy[1], u + t * strides.u[1], delta + t * strides.delta[1],
                    B + t * strides.B[1], C + t * strides.C[1], z + t * strides.z[1],
                    du + place + t * CHANNELS, d_delta + place + t * CHANNELS, dz + place + t * CHANNELS,
                    target + t * (2 * N), scratch + c * N * BLOCK_D, BLOCK_D, strides,
                    carry, sum_A, sum_D, sum_bias, A, skip, shift, steps - start - c * CHUNK, in_d,
                    CHANNELS, N, K, STACK, BLOCK_D, CHUNK, GROUP, LANES, SOFTPLUS, REVERSE, ADD, GATE, ONE_CHUNK,
                    WORDS, EXACT)  # fmt: skip
    # In 32 bits, which are enough for these tensors: nothing of it is kept in registers over the loop.
    d, p = channels_of(tl.program_id(0) % blocks, BLOCK_D, STACK), tl.program_id(0) // blocks
    store_states(dA + p * N * CHANNELS + d, CHANNELS, sum_A, in_d, K, N, STACK, EXACT)
    store(dD + p * CHANNELS + d, sum_D, in_d, EXACT)
    store(d_bias + p * CHANNELS + d, sum_bias, in_d, EXACT)
