"""The forward kernels of the selective scan, one direction each. `triton_pieces.py` says how a program works.

With GATE the output is y · SiLU(z), and with ADD y is first added to what the output holds already, the other
direction's y: both directions and the gate in two launches, and no tensor in between.

With PARTED a row's time is cut into parts of `part_steps` that run side by side, for few and long rows: `part_kernel`
finds what each part would hand on if it began with nothing, `join_kernel` joins these along the row, and the others
begin with what it found, `carried` (R, parts - 1, N, D). Of the state forward, of its adjoint in backward.

x: `ScanInputs`, with A as (N, D) times log2(e), so that exp(ΔA) is one exp2; strides: `triton_launch.Strides`.
"""

import triton
import triton.language as tl

from .triton_pieces import (
    channels_of,
    load,
    load_states,
    load_weights,
    next_states,
    piece,
    sigmoid,
    span,
    step_size,
    store,
    store_states,
    sum_over_stack,
    time_of,
    where_both,
    zeros,
)


@piece
def forward_chunk(
    state, u, delta, B, C, z, out, strides, a, skip, shift, left, in_d,
    CHANNELS: tl.constexpr, N: tl.constexpr, K: tl.constexpr, STACK: tl.constexpr, CHUNK: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, ADD: tl.constexpr, GATE: tl.constexpr, IS_FIRST: tl.constexpr,
    WORDS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """The state after a chunk, whose steps' outputs are stored. Pointers are to its first step; `left`: steps until the
    end; IS_FIRST: nothing came before, so that the first step needs no decay."""
    SIGN: tl.constexpr = -1 if REVERSE else 1
    for j in tl.static_range(CHUNK):
        alive = j < left
        mask = where_both(alive, in_d)
        u_now = load(u + SIGN * j * strides.u[1], mask, EXACT)
        _, size = step_size(delta + SIGN * j * strides.delta[1], shift, mask, SOFTPLUS, EXACT)
        b = load_weights(B + SIGN * j * strides.B[1], strides.B[2], alive, 0, K, N, STACK, WORDS, EXACT)
        c = load_weights(C + SIGN * j * strides.C[1], strides.C[2], alive, 0, K, N, STACK, WORDS, EXACT)
        y = skip * u_now
        if ADD:
            y += load(out + SIGN * j * CHANNELS, mask, EXACT)
        state = next_states(state, size, size * u_now, a, b, K, IS_FIRST and j == 0)
        for k in tl.static_range(K):
            y += sum_over_stack(state[k] * c[k], STACK)
        if GATE:
            z_now = load(z + SIGN * j * strides.z[1], mask, EXACT)
            y *= z_now * sigmoid(z_now)
        store(out + SIGN * j * CHANNELS, y, mask, EXACT)
    return state


@triton.jit
def forward_kernel(
    x, z_base, strides, y, entering, carried, items, steps, part_steps, programs,
    CHANNELS: tl.constexpr, N: tl.constexpr, STACK: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
    SEGMENT: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, ADD: tl.constexpr, GATE: tl.constexpr,
    ONE_CHUNK: tl.constexpr, KEEP: tl.constexpr, PARTED: tl.constexpr, WORDS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """y (R, T, D) contiguous; with KEEP also `entering` (R, segments - 1, N, D), the state before each later segment of
    SEGMENT steps. Program (p, block of channels) takes items p, p + programs, …; an item is a row or a part of one."""
    blocks: tl.constexpr = (CHANNELS + BLOCK_D - 1) // BLOCK_D
    K: tl.constexpr = (N + STACK - 1) // STACK  # stacks of states
    block, p = (tl.program_id(0) % blocks).to(tl.int64), (tl.program_id(0) // blocks).to(tl.int64)
    d = channels_of(block, BLOCK_D, STACK)
    in_d = d < CHANNELS
    a = load_states(x.A + d, CHANNELS, in_d, 0, K, N, STACK, EXACT)
    skip, shift = load(x.D + d, in_d, EXACT), load(x.delta_bias + d, in_d, EXACT)
    for item in range(p, items, programs):
        row, part, start, end = span(item, steps, part_steps, PARTED)
        u, delta = x.u + row * strides.u[0] + d * strides.u[2], x.delta + row * strides.delta[0] + d * strides.delta[2]
        B, C = x.B + row * strides.B[0], x.C + row * strides.C[0]
        z, out = z_base + row * strides.z[0] + d * strides.z[2], y + row * steps * CHANNELS + d
        state = zeros(K, BLOCK_D, STACK)
        if PARTED:
            slot = row * (tl.cdiv(steps, part_steps) - 1) + part - 1
            state = load_states(
                carried + slot * N * CHANNELS + d, CHANNELS, where_both(part > 0, in_d), 0, K, N, STACK, False
            )
        if ONE_CHUNK:
            t = time_of(0, steps, REVERSE)
            forward_chunk(
                state, u + t * strides.u[1], delta + t * strides.delta[1], B + t * strides.B[1], C + t * strides.C[1],
                z + t * strides.z[1], out + t * CHANNELS, strides, a, skip, shift, steps, in_d,
                CHANNELS, N, K, STACK, CHUNK, SOFTPLUS, REVERSE, ADD, GATE, True, WORDS, EXACT)  # fmt: skip
        else:
            for first in range(start, end, CHUNK):
                if KEEP and first > 0 and first % SEGMENT == 0:
                    slot = row * ((steps - 1) // SEGMENT) + first // SEGMENT - 1
                    store_states(entering + slot * N * CHANNELS + d, CHANNELS, state, in_d, K, N, STACK, EXACT)
                t = time_of(first, steps, REVERSE)
                state = forward_chunk(
                    state, u + t * strides.u[1], delta + t * strides.delta[1], B + t * strides.B[1],
                    C + t * strides.C[1], z + t * strides.z[1], out + t * CHANNELS, strides, a, skip, shift,
                    end - first, in_d,
                    CHANNELS, N, K, STACK, CHUNK, SOFTPLUS, REVERSE, ADD, GATE, False, WORDS, EXACT)  # fmt: skip


@piece
def part_chunk(
    state, sizes, v, delta, W, z, v_t, delta_t, W_t, z_t, W_n, a, shift, left, in_d,
    N: tl.constexpr, K: tl.constexpr, STACK: tl.constexpr, CHUNK: tl.constexpr, SIGN: tl.constexpr,
    SOFTPLUS: tl.constexpr, GATE: tl.constexpr, ADJOINT: tl.constexpr, WORDS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """The state, or its adjoint, and the sum of Δ after a chunk. Pointers are to its first step."""
    for j in tl.static_range(CHUNK):
        alive = j < left
        mask = where_both(alive, in_d)
        _, size = step_size(delta + SIGN * j * delta_t, shift, mask, SOFTPLUS, EXACT)
        if not EXACT:
            size = tl.where(alive, size, 0.0)  # a dead step changes nothing
        v_now = load(v + SIGN * j * v_t, mask, EXACT)
        if GATE:
            z_now = load(z + SIGN * j * z_t, mask, EXACT)
            v_now *= z_now * sigmoid(z_now)
        w = load_weights(W + SIGN * j * W_t, W_n, alive, 0, K, N, STACK, WORDS, EXACT)
        if ADJOINT:
            new = ()
            for k in tl.static_range(K):
                new = new + (tl.exp2(size * a[k]) * (w[k] * v_now + state[k]),)
            state = new
        else:
            state = next_states(state, size, size * v_now, a, w, K, False)
        sizes += size
    return state, sizes


@triton.jit
def part_kernel(
    v, delta, A, W, delta_bias, z, v_strides, delta_strides, W_strides, z_strides, carried, total, steps, part_steps,
    CHANNELS: tl.constexpr, N: tl.constexpr, STACK: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, GATE: tl.constexpr, ADJOINT: tl.constexpr,
    WORDS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """What a part hands on if it begins with nothing, into its slot of `carried`, and the sum of its Δ, `total`
    (R, parts - 1, D). The state, from v = u and W = B; with ADJOINT its adjoint, walked from the part's end, from
    v = dy (with GATE times SiLU(z)) and W = C. Program (row, slot, block of channels)."""
    SIGN: tl.constexpr = 1 if REVERSE == ADJOINT else -1
    blocks: tl.constexpr = (CHANNELS + BLOCK_D - 1) // BLOCK_D
    K: tl.constexpr = (N + STACK - 1) // STACK  # stacks of states
    slots = tl.cdiv(steps, part_steps) - 1
    item = (tl.program_id(0) // blocks).to(tl.int64)
    row, slot = item // slots, item % slots
    start = (slot + 1 if ADJOINT else slot) * part_steps  # the last part hands on nothing; of the adjoint, the first
    end = tl.minimum(start + part_steps, steps)
    d = channels_of((tl.program_id(0) % blocks).to(tl.int64), BLOCK_D, STACK)
    in_d = d < CHANNELS
    a = load_states(A + d, CHANNELS, in_d, 0, K, N, STACK, EXACT)
    shift = load(delta_bias + d, in_d, EXACT)
    v += row * v_strides[0] + d * v_strides[2]
    delta += row * delta_strides[0] + d * delta_strides[2]
    W += row * W_strides[0]
    z += row * z_strides[0] + d * z_strides[2]

    state, sizes = zeros(K, BLOCK_D, STACK), tl.zeros_like(shift)
    for walked in range(0, end - start, CHUNK):
        t = time_of(end - 1 - walked if ADJOINT else start + walked, steps, REVERSE)
        state, sizes = part_chunk(
            state, sizes, v + t * v_strides[1], delta + t * delta_strides[1], W + t * W_strides[1],
            z + t * z_strides[1], v_strides[1], delta_strides[1], W_strides[1], z_strides[1], W_strides[2],
            a, shift, end - start - walked, in_d,
            N, K, STACK, CHUNK, SIGN, SOFTPLUS, GATE, ADJOINT, WORDS, EXACT)  # fmt: skip
    store_states(carried + item * N * CHANNELS + d, CHANNELS, state, in_d, K, N, STACK, EXACT)
    tl.store(total + item * CHANNELS + d, sizes, mask=in_d)


@triton.jit
def join_kernel(carried, total, A, slots, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, N: tl.constexpr,
                ADJOINT: tl.constexpr):  # fmt: skip
    """`carried` in place: from what each part alone hands on to what it does after those before it (with ADJOINT,
    those behind it). Program (row, BLOCK of the states and channels, N · CHANNELS of them)."""
    blocks: tl.constexpr = (N * CHANNELS + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64)
    place = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = place < N * CHANNELS
    a = tl.load(A + place, mask=inside, other=0.0)
    state = tl.zeros((BLOCK,), tl.float32)
    for k in range(slots):
        item = row * slots + (slots - 1 - k if ADJOINT else k)
        size = tl.load(total + item * CHANNELS + place % CHANNELS, mask=inside, other=0.0)
        own = carried + item * N * CHANNELS + place
        state = tl.exp2(size * a) * state + tl.load(own, mask=inside, other=0.0)
        tl.store(own, state, mask=inside)
