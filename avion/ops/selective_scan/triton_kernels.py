"""The Triton kernels of the selective scan, one direction each. `triton.py` launches them.

A program takes BLOCK_D channels of a row. Its tiles are (N, BLOCK_D), channels along the lanes; A comes as (N, D),
times log2(e), so that exp(ΔA) is one exp2. What is loaded is converted to float32. How a tile lies in the threads
follows from how A is loaded, and is what matters: forward wants all N states of a channel in one thread, since it sums
over the states only; backward sums over the channels too, and wants a thread to hold some of either.

Walking order: step i = 0 … T-1 is t = i, or t = T-1-i with REVERSE. Steps are taken CHUNK at a time, unrolled.
In the last chunk steps past the end are dead: they load zeros, and nothing of them is stored.

N is padded to a power of two; padded states have A = B = C = 0 and stay zero.
"""

import triton
import triton.language as tl


@triton.jit
def _softplus(x):
    """log(1 + exp(x)), exact to a few ulp also where exp(x) is tiny: log1p(e) = log(w) · e / (w - 1), w = 1 + e."""
    e = tl.exp(-tl.abs(x))
    w = 1.0 + e
    log1p = tl.where(w == 1.0, e, tl.log(w) * (e / tl.where(w == 1.0, 1.0, w - 1.0)))
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def _at(i, steps, in_d, in_n, REVERSE: tl.constexpr):
    """Of step i: its t, 64 bits wide since offsets can be beyond 2^31, and the masks, all off past the end."""
    i = tl.full((), 0, tl.int64) + i
    alive = i < steps
    return (steps - 1 - i if REVERSE else i), tl.where(alive, in_d, False), tl.where(alive, in_n, False)


@triton.jit
def _drive(u, delta, B, shift, t, live, in_step, u_t, delta_t, B_t, SOFTPLUS: tl.constexpr):
    """What step t feeds the state: u (BLOCK_D,), Δ before and after the softplus, and Δ·B·u (N, BLOCK_D)."""
    u_now = tl.load(u + t * u_t, mask=live, other=0.0).to(tl.float32)
    raw = tl.load(delta + t * delta_t, mask=live, other=0.0).to(tl.float32) + shift
    B_now = tl.load(B + t * B_t, mask=in_step, other=0.0).to(tl.float32)
    size = _softplus(raw) if SOFTPLUS else raw
    return u_now, raw, size, B_now[:, None] * (size * u_now)[None, :]


# Without a known alignment A is loaded element by element, 32 channels to a warp and all N states to a thread.
@triton.jit(do_not_specialize_on_alignment=["A", "entering"])
def forward_kernel(
    u, delta, A, B, C, D, bias, y, entering,
    steps, channels, states,
    u_r, u_t, u_d, delta_r, delta_t, delta_d, B_r, B_t, B_n, C_r, C_t, C_n,
    N: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, SEGMENT: tl.constexpr,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
    ONE_CHUNK: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """y (R, T, D) contiguous; with KEEP also `entering` (R, segments - 1, states, D), the state before each later
    segment of SEGMENT steps. Program (row, block of channels)."""
    blocks = tl.cdiv(channels, BLOCK_D)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    d = (tl.program_id(0) % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, N)
    in_d, in_n = d < channels, n < states
    in_tile = in_n[:, None] & in_d[None, :]
    a = tl.load(A + n[:, None] * channels + d[None, :], mask=in_tile, other=0.0)
    skip = tl.load(D + d, mask=in_d, other=0.0)
    shift = tl.load(bias + d, mask=in_d, other=0.0) if HAS_BIAS else tl.zeros((BLOCK_D,), tl.float32)
    u += row * u_r + d * u_d
    delta += row * delta_r + d * delta_d
    B += row * B_r + n * B_n
    C += row * C_r + n * C_n
    out = y + row * steps * channels + d

    state = tl.zeros((N, BLOCK_D), tl.float32)
    for first in range(0, steps, CHUNK):
        if KEEP and first > 0 and first % SEGMENT == 0:
            slot = row * ((steps - 1) // SEGMENT) + first // SEGMENT - 1
            tl.store(entering + (slot * states + n[:, None]) * channels + d[None, :], state, mask=in_tile)
        for j in tl.static_range(CHUNK):
            t, live, in_step = _at(first + j, steps, in_d, in_n, REVERSE)
            u_now, _, size, drive = _drive(u, delta, B, shift, t, live, in_step, u_t, delta_t, B_t, SOFTPLUS)
            if ONE_CHUNK and j == 0:
                state = drive  # nothing came before: no decay
            else:
                state = tl.exp2(size[None, :] * a) * state + drive
            C_now = tl.load(C + t * C_t, mask=in_step, other=0.0).to(tl.float32)
            y_now = tl.sum(state * C_now[:, None], axis=0) + skip * u_now
            tl.store(out + t * channels, y_now.to(y.dtype.element_ty), mask=live)


@triton.jit
def _store_chunk_states(
    scratch, lane, before, a, u, delta, B, shift, start, chunks, steps, in_d, in_n, u_t, delta_t, B_t,
    CHUNK: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The state before each chunk of a segment, the first of which starts from `before`."""
    tl.debug_barrier()  # other threads may still read what was stored for the segment or row before
    for c in range(chunks):
        tl.store(scratch + c * before.numel + lane, before)
        for j in tl.static_range(CHUNK):
            t, live, in_step = _at(start + c * CHUNK + j, steps, in_d, in_n, REVERSE)
            _, _, size, drive = _drive(u, delta, B, shift, t, live, in_step, u_t, delta_t, B_t, SOFTPLUS)
            before = tl.exp2(size[None, :] * a) * before + drive
    tl.debug_barrier()  # a thread may read what another one wrote


@triton.jit
def _chunk_states(
    before, a, u, delta, B, shift, first, steps, in_d, in_n, u_t, delta_t, B_t,
    CHUNK: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, ONE_CHUNK: tl.constexpr,
):  # fmt: skip
    """Of every step of a chunk: the state before it (and after the last), its decay, u, Δ before and after softplus."""
    state = before
    states, decays, us, raws, sizes = (before,), (), (), (), ()
    for j in tl.static_range(CHUNK):
        t, live, in_step = _at(first + j, steps, in_d, in_n, REVERSE)
        u_now, raw, size, drive = _drive(u, delta, B, shift, t, live, in_step, u_t, delta_t, B_t, SOFTPLUS)
        if ONE_CHUNK and j == 0:
            decay = tl.zeros_like(drive)  # there is no state before
            state = drive
        else:
            decay = tl.exp2(size[None, :] * a)
            state = decay * state + drive
        states, decays = states + (state,), decays + (decay,)
        us, raws, sizes = us + (u_now,), raws + (raw,), sizes + (size,)
    return states, decays, us, raws, sizes


@triton.jit
def _step_gradients(
    dy, B, C, du, d_delta, dB, dC,
    state, previous, decay, u_now, raw, size, carry, a, skip, live, in_step,
    SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """One step of the adjoint. Stores what belongs to the step; returns the adjoint of the state before it, and the
    step's shares of dA (N, BLOCK_D), dD and d_bias (BLOCK_D,)."""
    dy_now = tl.load(dy, mask=live, other=0.0).to(tl.float32)
    B_now = tl.load(B, mask=in_step, other=0.0).to(tl.float32)
    C_now = tl.load(C, mask=in_step, other=0.0).to(tl.float32)
    adjoint = C_now[:, None] * dy_now[None, :] + carry
    tl.store(dC, tl.sum(state * dy_now[None, :], axis=1), mask=in_step)
    tl.store(dB, tl.sum(adjoint * (size * u_now)[None, :], axis=1), mask=in_step)
    by_drive = tl.sum(adjoint * B_now[:, None], axis=0)  # by Δu
    carry = decay * adjoint
    by_exponent = carry * previous  # by ΔA
    by_size = tl.sum(by_exponent * a, axis=0) * 0.6931471805599453 + by_drive * u_now  # a is A · log2(e)
    by_raw = by_size * tl.sigmoid(raw) if SOFTPLUS else by_size
    by_u = by_drive * size + skip * dy_now
    tl.store(d_delta, by_raw.to(d_delta.dtype.element_ty), mask=live)
    tl.store(du, by_u.to(du.dtype.element_ty), mask=live)
    return carry, by_exponent * size[None, :], u_now * dy_now, by_raw


@triton.jit
def backward_kernel(
    dy, u, delta, A, B, C, D, bias, entering, scratch,
    du, d_delta, dB, dC, dA, dD, d_bias,
    rows, steps, channels, states, programs,
    dy_r, dy_t, dy_d, u_r, u_t, u_d, delta_r, delta_t, delta_d, B_r, B_t, B_n, C_r, C_t, C_n,
    N: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, SEGMENT: tl.constexpr,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
    ONE_CHUNK: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """All gradients. Program (p, block of channels) takes rows p, p + programs, … one after the other.

    Per segment of time, last one first: the state before each chunk goes to `scratch` (programs · blocks, SEGMENT /
    CHUNK, N, BLOCK_D), which stays in the second-level cache; then chunk by chunk from the end the states are
    recomputed in registers and the adjoint is walked the other way.

    du, d_delta (R, T, D) contiguous. Partial sums, for the caller to add up: dB, dC (blocks, R, T, states),
    dA (programs, states, D), dD and d_bias (programs, D).
    """
    blocks = tl.cdiv(channels, BLOCK_D)
    block, p = (tl.program_id(0) % blocks).to(tl.int64), (tl.program_id(0) // blocks).to(tl.int64)
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, N)
    in_d, in_n = d < channels, n < states
    in_tile = in_n[:, None] & in_d[None, :]
    a = tl.load(A + n[:, None] * channels + d[None, :], mask=in_tile, other=0.0)
    skip = tl.load(D + d, mask=in_d, other=0.0)
    shift = tl.load(bias + d, mask=in_d, other=0.0) if HAS_BIAS else tl.zeros((BLOCK_D,), tl.float32)
    scratch += tl.program_id(0).to(tl.int64) * (SEGMENT // CHUNK) * N * BLOCK_D
    lane = n[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    segments = tl.cdiv(tl.full((), 0, tl.int64) + steps, SEGMENT)

    sum_A, sum_D, sum_bias = tl.zeros_like(a), tl.zeros_like(skip), tl.zeros_like(skip)
    for row in range(p, rows, programs):
        u_, delta_ = u + row * u_r + d * u_d, delta + row * delta_r + d * delta_d
        B_, C_ = B + row * B_r + n * B_n, C + row * C_r + n * C_n
        carry = tl.zeros_like(a)
        for back in range(segments):
            segment, start = segments - 1 - back, (segments - 1 - back) * SEGMENT
            chunks = tl.cdiv(tl.minimum(SEGMENT, steps - start), CHUNK)
            before = tl.zeros_like(a)
            if KEPT:
                slot = row * (segments - 1) + segment - 1
                kept = entering + (slot * states + n[:, None]) * channels + d[None, :]
                before = tl.load(kept, mask=tl.where(segment > 0, in_tile, False), other=0.0)
            if not ONE_CHUNK:
                _store_chunk_states(scratch, lane, before, a, u_, delta_, B_, shift, start, chunks, steps,
                                    in_d, in_n, u_t, delta_t, B_t, CHUNK, SOFTPLUS, REVERSE)  # fmt: skip
            for c_back in range(chunks):
                first = start + (chunks - 1 - c_back) * CHUNK
                if not ONE_CHUNK:
                    before = tl.load(scratch + (chunks - 1 - c_back) * N * BLOCK_D + lane)
                kept_states, decays, us, raws, sizes = _chunk_states(
                    before, a, u_, delta_, B_, shift, first, steps, in_d, in_n, u_t, delta_t, B_t,
                    CHUNK, SOFTPLUS, REVERSE, ONE_CHUNK)  # fmt: skip
                for j_back in tl.static_range(CHUNK):
                    t, live, in_step = _at(first + CHUNK - 1 - j_back, steps, in_d, in_n, REVERSE)
                    place = (row * steps + t) * channels + d
                    target = ((block * rows + row) * steps + t) * states + n
                    carry, by_A, by_D, by_bias = _step_gradients(
                        dy + row * dy_r + t * dy_t + d * dy_d, B_ + t * B_t, C_ + t * C_t, du + place, d_delta + place,
                        dB + target, dC + target,
                        kept_states[CHUNK - j_back], kept_states[CHUNK - 1 - j_back], decays[CHUNK - 1 - j_back],
                        us[CHUNK - 1 - j_back], raws[CHUNK - 1 - j_back], sizes[CHUNK - 1 - j_back], carry, a, skip,
                        live, in_step, SOFTPLUS)  # fmt: skip
                    sum_A += by_A
                    sum_D += by_D
                    sum_bias += by_bias
    tl.store(dA + (p * states + n[:, None]) * channels + d[None, :], sum_A, mask=in_tile)
    tl.store(dD + p * channels + d, sum_D, mask=in_d)
    tl.store(d_bias + p * channels + d, sum_bias, mask=in_d)
