"""The forward kernels of the selective scan, one direction each. `triton_pieces.py` says how a program works.

With `gate` the output is y · SiLU(z). With `add` y is first added to what the output holds already, which is y of the
other direction. Both directions and the gate then take two launches, with no tensor in between.

With `parted` the time of a row is cut into parts of `part_steps` steps that run side by side, for few and long rows.
`part_kernel` finds what each part would hand on if it began with nothing, and `join_kernel` joins these along the row.
The other kernels begin with the result, `carried` (R, parts - 1, N, D): the states in the forward pass, their adjoint
in the backward pass.

The kernels take `ScanInputs` with A as (N, D) times log2(e), so that exp(ΔA) is one exp2.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from avion.ops.kernel_pieces import cdiv, piece, sigmoid, zeros_in
from avion.ops.kernel_types import Flag, Int, Pointer, Scalar, Values, constexpr

from .inputs import ScanInputs
from .triton_pieces import (
    Cut,
    Strides,
    Work,
    channels_of,
    load,
    load_states,
    load_weights,
    next_states,
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
    state: Values,
    u: Pointer,
    delta: Pointer,
    B: Pointer,
    C: Pointer,
    z: Pointer,
    out: Pointer,
    strides: Strides,
    a: Values,
    skip: tl.tensor,
    shift: tl.tensor,
    left: Scalar,
    in_d: tl.tensor,
    cut: "Cut",
    IS_FIRST: Flag,
) -> Values:
    """Store the outputs of a chunk's steps and return the state after the chunk.

    The pointers are to the first step of the chunk; `left` steps are left until the end. With IS_FIRST nothing came
    before the chunk, so that its first step needs no decay.
    """
    CHUNK: Int = cut.chunk
    K: Int = cut.stacks
    for j in tl.static_range(CHUNK):
        alive = j < left
        mask = where_both(alive, in_d)
        u_now = load(u + cut.sign * j * strides.u[1], mask, cut.exact)
        _, size = step_size(delta + cut.sign * j * strides.delta[1], shift, mask, cut.softplus, cut.exact)
        b = load_weights(B + cut.sign * j * strides.B[1], strides.B[2], alive, 0, K, cut)
        c = load_weights(C + cut.sign * j * strides.C[1], strides.C[2], alive, 0, K, cut)
        y = skip * u_now
        if cut.add:
            y += load(out + cut.sign * j * cut.channels, mask, cut.exact)
        state = next_states(state, size, size * u_now, a, b, K, IS_FIRST and j == 0)
        for k in tl.static_range(K):
            y += sum_over_stack(state[k] * c[k], cut.stack)
        if cut.gate:
            z_now = load(z + cut.sign * j * strides.z[1], mask, cut.exact)
            y *= z_now * sigmoid(z_now)
        store(out + cut.sign * j * cut.channels, y, mask, cut.exact)
    return state


@triton.jit
def forward_kernel(
    x: ScanInputs,
    z_base: Pointer,
    strides: Strides,
    y: Pointer,
    entering: Pointer,
    carried: Pointer,
    work: Work,
    cut: constexpr,
) -> None:
    """Write y (R, T, D), contiguous.

    With `cut.kept` it also writes `entering` (R, segments - 1, N, D), the state before each later segment of steps.
    Program (p, block of channels) takes the items p, p + programs, …; an item is a row or a part of a row.
    """
    N: Int = cut.n
    K: Int = cut.stacks
    block, p = (tl.program_id(0) % cut.blocks).to(tl.int64), (tl.program_id(0) // cut.blocks).to(tl.int64)
    d = channels_of(block, cut.block_d, cut.stack)
    in_d = d < cut.channels
    a = load_states(x.A + d, cut.channels, in_d, 0, K, N, cut.stack, cut.exact)
    skip, shift = load(x.D + d, in_d, cut.exact), load(x.delta_bias + d, in_d, cut.exact)
    for item in range(p, work.items, work.programs):
        row, part, start, end = span(item, work.steps, work.part_steps, cut.parted)
        u, delta = x.u + row * strides.u[0] + d * strides.u[2], x.delta + row * strides.delta[0] + d * strides.delta[2]
        B, C = x.B + row * strides.B[0], x.C + row * strides.C[0]
        z, out = z_base + row * strides.z[0] + d * strides.z[2], y + row * work.steps * cut.channels + d
        state = zeros(K, cut.block_d, cut.stack)
        if cut.parted:
            slot = row * (cdiv(work.steps, work.part_steps) - 1) + part - 1
            before = carried + slot * N * cut.channels + d
            state = load_states(before, cut.channels, where_both(part > 0, in_d), 0, K, N, cut.stack, False)
        if cut.one_chunk:
            t = time_of(0, work.steps, cut.reverse)
            u, delta = u + t * strides.u[1], delta + t * strides.delta[1]
            B, C = B + t * strides.B[1], C + t * strides.C[1]
            z, out = z + t * strides.z[1], out + t * cut.channels
            forward_chunk(state, u, delta, B, C, z, out, strides, a, skip, shift, work.steps, in_d, cut, True)
        else:
            for first in range(start, end, cut.chunk):
                if cut.kept and first > 0 and first % cut.segment == 0:
                    slot = row * ((work.steps - 1) // cut.segment) + first // cut.segment - 1
                    kept = entering + slot * N * cut.channels + d
                    store_states(kept, cut.channels, state, in_d, K, N, cut.stack, cut.exact)
                t = time_of(first, work.steps, cut.reverse)
                u_t, delta_t = u + t * strides.u[1], delta + t * strides.delta[1]
                B_t, C_t = B + t * strides.B[1], C + t * strides.C[1]
                z_t, out_t, left = z + t * strides.z[1], out + t * cut.channels, end - first
                state = forward_chunk(
                    state, u_t, delta_t, B_t, C_t, z_t, out_t, strides, a, skip, shift, left, in_d, cut, False
                )


class Part(NamedTuple):
    """What `part_kernel` reads.

    It is the state that is handed on, with v = u and W = B; or its adjoint, with v = dy and W = C.

    Attributes:
        v: (R, T, D).
        delta: the step size before bias and softplus, (R, T, D).
        A: (N, D), times log2(e).
        W: (R, T, N).
        delta_bias: (D,).
        z: the gate before its SiLU, by which v is multiplied, (R, T, D); it is read only where there is a gate.
    """

    v: Pointer
    delta: Pointer
    A: Pointer
    W: Pointer
    delta_bias: Pointer
    z: Pointer


class PartStrides(NamedTuple):
    """The strides of the tensors of a `Part` that have rows, (row, step, channel or state)."""

    v: tuple[int, ...]
    delta: tuple[int, ...]
    W: tuple[int, ...]
    z: tuple[int, ...]


@piece
def part_chunk(
    state: Values,
    sizes: tl.tensor,
    at: Part,
    strides: PartStrides,
    a: Values,
    shift: tl.tensor,
    left: Scalar,
    in_d: tl.tensor,
    cut: "Cut",
    SIGN: Int,
    ADJOINT: Flag,
) -> tuple[Values, tl.tensor]:
    """Return the state, or its adjoint, and the sum of Δ after a chunk. The pointers are to the chunk's first step."""
    CHUNK: Int = cut.chunk
    K: Int = cut.stacks
    for j in tl.static_range(CHUNK):
        alive = j < left
        mask = where_both(alive, in_d)
        _, size = step_size(at.delta + SIGN * j * strides.delta[1], shift, mask, cut.softplus, cut.exact)
        if not cut.exact:
            size = tl.where(alive, size, 0.0)  # a dead step changes nothing
        v_now = load(at.v + SIGN * j * strides.v[1], mask, cut.exact)
        if cut.gate:
            z_now = load(at.z + SIGN * j * strides.z[1], mask, cut.exact)
            v_now *= z_now * sigmoid(z_now)
        w = load_weights(at.W + SIGN * j * strides.W[1], strides.W[2], alive, 0, K, cut)
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
    x: Part,
    strides: PartStrides,
    carried: Pointer,
    total: Pointer,
    steps: Scalar,
    part_steps: Scalar,
    cut: constexpr,
    ADJOINT: constexpr,
) -> None:
    """Write what a part hands on if it begins with nothing to the part's slot of `carried`, and the sum of its Δ.

    The sums, `total`, are (R, parts - 1, D). With ADJOINT it is the adjoint of the state, walked from the part's end.
    Program (row, slot, block of channels).
    """
    SIGN: Int = 1 if cut.reverse == ADJOINT else -1
    N: Int = cut.n
    K: Int = cut.stacks
    slots = cdiv(steps, part_steps) - 1
    item = (tl.program_id(0) // cut.blocks).to(tl.int64)
    row, slot = item // slots, item % slots
    start = (slot + 1 if ADJOINT else slot) * part_steps  # the last part hands on nothing; of the adjoint, the first
    end = tl.minimum(start + part_steps, steps)
    d = channels_of((tl.program_id(0) % cut.blocks).to(tl.int64), cut.block_d, cut.stack)
    in_d = d < cut.channels
    a = load_states(x.A + d, cut.channels, in_d, 0, K, N, cut.stack, cut.exact)
    shift = load(x.delta_bias + d, in_d, cut.exact)
    v = x.v + (row * strides.v[0] + d * strides.v[2])
    delta = x.delta + (row * strides.delta[0] + d * strides.delta[2])
    W = x.W + row * strides.W[0]
    z = x.z + (row * strides.z[0] + d * strides.z[2])

    state, sizes = zeros(K, cut.block_d, cut.stack), zeros_in(shift.shape, tl.float32)
    for walked in range(0, end - start, cut.chunk):
        t = time_of(end - 1 - walked if ADJOINT else start + walked, steps, cut.reverse)
        v_t, delta_t = v + t * strides.v[1], delta + t * strides.delta[1]
        at = Part(v_t, delta_t, x.A, W + t * strides.W[1], x.delta_bias, z + t * strides.z[1])
        state, sizes = part_chunk(state, sizes, at, strides, a, shift, end - start - walked, in_d, cut, SIGN, ADJOINT)
    store_states(carried + item * N * cut.channels + d, cut.channels, state, in_d, K, N, cut.stack, cut.exact)
    tl.store(total + item * cut.channels + d, sizes, mask=in_d)


@triton.jit
def join_kernel(
    carried: Pointer,
    total: Pointer,
    A: Pointer,
    slots: Scalar,
    CHANNELS: constexpr,
    BLOCK: constexpr,
    N: constexpr,
    ADJOINT: constexpr,
) -> None:
    """Turns, in place, what each part alone hands on into what it hands on after the parts before it.

    With ADJOINT it is what the part hands on after the parts behind it. Program (row, BLOCK of the N · CHANNELS states
    and channels).
    """
    blocks: Int = (N * CHANNELS + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64)
    place = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = place < N * CHANNELS
    a = tl.load(A + place, mask=inside, other=0.0)
    state = zeros_in((BLOCK,), tl.float32)
    for k in range(slots):
        item = row * slots + (slots - 1 - k if ADJOINT else k)
        size = tl.load(total + item * CHANNELS + place % CHANNELS, mask=inside, other=0.0)
        own = carried + item * N * CHANNELS + place
        state = tl.exp2(size * a) * state + tl.load(own, mask=inside, other=0.0)
        tl.store(own, state, mask=inside)
