"""The backward kernel of the selective scan, one direction. `triton_pieces.py` says how a program works."""

from typing import NamedTuple

import triton
import triton.language as tl

from avion.ops.kernel_pieces import cdiv, piece, zeros_in
from avion.ops.kernel_types import Int, Pointer, Scalar, Values, constexpr

from .inputs import ScanInputs
from .triton_chunks import Gradients, Reads, Totals, chunk_gradients, store_chunk_states
from .triton_pieces import (
    Cut,
    Strides,
    Work,
    channels_of,
    load,
    load_states,
    span,
    store,
    store_states,
    time_of,
    where_both,
    zeros,
)


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


@piece
def row_of(x: ScanInputs, z: Pointer, dy: Pointer, strides: Strides, row: Scalar, d: tl.tensor) -> Reads:
    """Return the addresses at the beginning of a row."""
    u, delta = x.u + row * strides.u[0] + d * strides.u[2], x.delta + row * strides.delta[0] + d * strides.delta[2]
    B, C = x.B + row * strides.B[0], x.C + row * strides.C[0]
    z_row, dy_row = z + row * strides.z[0] + d * strides.z[2], dy + row * strides.dy[0] + d * strides.dy[2]
    return Reads(dy_row, u, delta, B, C, z_row)


@piece
def adjoint_after_part(
    carried: Pointer, row: Scalar, part: Scalar, parts: Scalar, d: tl.tensor, in_d: tl.tensor, cut: "Cut"
) -> Values:
    """Return the adjoint of the state after a part of a row: zeros after the last part."""
    K: Int = cut.stacks
    carry = zeros(K, cut.block_d, cut.stack)
    if cut.parted:
        handed = carried + (row * (parts - 1) + part) * cut.n * cut.channels + d
        has_later = where_both(part < parts - 1, in_d)
        carry = load_states(handed, cut.channels, has_later, 0, K, cut.n, cut.stack, False)
    return carry


@piece
def state_before_segment(
    entering: Pointer, row: Scalar, start: Scalar, steps: Scalar, d: tl.tensor, in_d: tl.tensor, cut: "Cut"
) -> Values:
    """Return the state before the segment that begins at step `start`: zeros before the first segment."""
    K: Int = cut.stacks
    state = zeros(K, cut.block_d, cut.stack)
    if cut.kept:
        slot = row * ((steps - 1) // cut.segment) + start // cut.segment - 1
        kept = entering + slot * cut.n * cut.channels + d
        state = load_states(kept, cut.channels, where_both(start > 0, in_d), 0, K, cut.n, cut.stack, False)
    return state


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
    """Take the chunks of a segment from the last one back to the first.

    Return the adjoint of the state before the segment, and the totals with the segment's shares. The pointers are to
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
    """Compute all gradients. With `cut.add`, dz is added to.

    Program (p, block of channels) takes the items p, p + programs, …; an item is a row or a part of a row. In each
    segment of time, from the last to the first, the state before each chunk goes to `scratch` (programs · blocks,
    segment / chunk, N, block_d); then the gradients follow chunk by chunk. A single chunk needs no scratch memory.
    """
    N: Int = cut.n
    K: Int = cut.stacks
    block = (tl.program_id(0) % cut.blocks).to(tl.int64)
    d = channels_of(block, cut.block_d, cut.stack)
    in_d, A = d < cut.channels, x.A + d
    scratch_size: Int = cut.segment // cut.chunk * N * cut.block_d
    scratch += tl.program_id(0).to(tl.int64) * scratch_size + channels_of(0, cut.block_d, cut.stack)
    parts = cdiv(work.steps, work.part_steps)
    rows = work.items // parts
    sum_D = zeros_in(d.shape, tl.float32)
    totals = Totals(zeros(K, cut.block_d, cut.stack), sum_D, sum_D)
    for item in range(tl.program_id(0) // cut.blocks, work.items, work.programs):
        row, part, part_start, end = span(item, work.steps, work.part_steps, cut.parted)
        # Loaded for every item: kept, they would not fit the registers.
        skip, shift = load(x.D + d, in_d, cut.exact), load(x.delta_bias + d, in_d, cut.exact)
        of_row = row_of(x, z_base, dy, strides, row, d)
        place = row * work.steps * cut.channels + d
        target = partial.by_state + (block * rows + row) * work.steps * (2 * N)
        own = Gradients(to.du + place, to.d_delta + place, to.dz + place)
        carry = adjoint_after_part(carried, row, part, parts, d, in_d, cut)
        segments = 1 if cut.one_chunk else cdiv(end - part_start, cut.segment)
        for back in range(segments):
            start = part_start + (segments - 1 - back) * cut.segment
            chunks = 1 if cut.one_chunk else cdiv(tl.minimum(cut.segment, end - start), cut.chunk)
            if not cut.one_chunk:
                before = state_before_segment(entering, row, start, work.steps, d, in_d, cut)
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
