"""The Triton kernels of the selective scan, one direction each. `triton.py` launches them.

A program takes BLOCK_D channels of a row. Its tiles are (N, BLOCK_D), channels along the lanes; A comes as (N, D),
times log2(e), so that exp(ΔA) is one exp2. What is loaded is converted to float32. How a tile lies in the threads
follows from how A is loaded, and is what matters: forward wants all N states of a channel in one thread, since it sums
over the states only; backward sums over the channels too, and wants a thread to hold some of either.

Walking order: step i = 0 … T-1 is t = i, or t = T-1-i with REVERSE. Steps are taken CHUNK at a time, unrolled.
In the last chunk steps past the end are dead: they load zeros, and nothing of them is stored.

With GATE the output is y · SiLU(z), and with ADD y is first added to what the output holds already, the other
direction's y: both directions and the gate in two launches, and no tensor in between.

With PARTED a row's time is cut into parts of `part_steps` that run side by side, for few and long rows: `part_kernel`
finds what each part would hand on if it began with nothing, `join_kernel` joins these along the row, and the others
begin with what it found, `carried` (R, parts - 1, N, D). Of the state forward, of its adjoint in backward.

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
def _time(i, steps, REVERSE: tl.constexpr):
    """Of step i: its t, 64 bits wide since offsets can be beyond 2^31. Within a chunk they are few steps from there."""
    i = tl.full((), 0, tl.int64) + i
    return steps - 1 - i if REVERSE else i


@triton.jit
def _load(pointer, alive, inside, EXACT: tl.constexpr):
    """In float32; zeros where the step is dead or out of the tensor. EXACT: that nothing is."""
    if EXACT:
        return tl.load(pointer).to(tl.float32)
    else:
        return tl.load(pointer, mask=tl.where(alive, inside, False), other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, value, alive, inside, EXACT: tl.constexpr):
    if EXACT:
        tl.store(pointer, value.to(pointer.dtype.element_ty))
    else:
        tl.store(pointer, value.to(pointer.dtype.element_ty), mask=tl.where(alive, inside, False))


@triton.jit
def _span(item, steps, part_steps, PARTED: tl.constexpr):
    """Row, part, the part's first step and its end, of a (row, part)."""
    item = tl.full((), 0, tl.int64) + item
    if PARTED:
        parts = tl.cdiv(steps, part_steps)
        first = (item % parts) * part_steps
        return item // parts, item % parts, first, tl.minimum(first + part_steps, steps)
    else:
        nothing = item * 0
        return item, nothing, nothing, nothing + steps


@triton.jit
def _carried(carried, row, slot, there, parts, states, channels, n, d, in_tile):
    """A tile of `carried`, or zeros where there is no such slot."""
    place = carried + ((row * (parts - 1) + slot) * states + n[:, None]) * channels + d[None, :]
    return tl.load(place, mask=tl.where(there, in_tile, False), other=0.0)


@triton.jit
def _size(delta, shift, alive, in_d, SOFTPLUS: tl.constexpr, EXACT: tl.constexpr):
    """Δ before and after the softplus (BLOCK_D,)."""
    raw = _load(delta, alive, in_d, EXACT) + shift
    return raw, (_softplus(raw) if SOFTPLUS else raw)


@triton.jit
def _drive(u, delta, B, shift, alive, in_d, in_n, SOFTPLUS: tl.constexpr, EXACT: tl.constexpr):
    """What a step feeds the state: u (BLOCK_D,), Δ before and after the softplus, and Δ·B·u (N, BLOCK_D)."""
    u_now, B_now = _load(u, alive, in_d, EXACT), _load(B, alive, in_n, EXACT)
    raw, size = _size(delta, shift, alive, in_d, SOFTPLUS, EXACT)
    return u_now, raw, size, B_now[:, None] * (size * u_now)[None, :]


# Without a known alignment A is loaded element by element, 32 channels to a warp and all N states to a thread.
@triton.jit(do_not_specialize_on_alignment=["A", "entering", "carried"])
def forward_kernel(
    u, delta, A, B, C, D, bias, z, y, entering, carried,
    steps, channels, states, part_steps,
    u_r, u_t, u_d, delta_r, delta_t, delta_d, B_r, B_t, B_n, C_r, C_t, C_n, z_r, z_t, z_d,
    N: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, SEGMENT: tl.constexpr,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, ADD: tl.constexpr, GATE: tl.constexpr,
    ONE_CHUNK: tl.constexpr, KEEP: tl.constexpr, PARTED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """y (R, T, D) contiguous; with KEEP also `entering` (R, segments - 1, states, D), the state before each later
    segment of SEGMENT steps. Program (row, part, block of channels)."""
    SIGN: tl.constexpr = -1 if REVERSE else 1
    blocks = tl.cdiv(channels, BLOCK_D)
    row, part, start, end = _span(tl.program_id(0) // blocks, steps, part_steps, PARTED)
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
    z += row * z_r + d * z_d
    out = y + row * steps * channels + d

    state = tl.zeros((N, BLOCK_D), tl.float32)
    if PARTED:
        state = _carried(carried, row, part - 1, part > 0, tl.cdiv(steps, part_steps), states, channels, n, d, in_tile)
    for first in range(start, end, CHUNK):
        if KEEP and first > 0 and first % SEGMENT == 0:
            slot = row * ((steps - 1) // SEGMENT) + first // SEGMENT - 1
            tl.store(entering + (slot * states + n[:, None]) * channels + d[None, :], state, mask=in_tile)
        t = _time(first, steps, REVERSE)
        u_, delta_, z_, out_ = u + t * u_t, delta + t * delta_t, z + t * z_t, out + t * channels
        B_, C_ = B + t * B_t, C + t * C_t
        for j in tl.static_range(CHUNK):
            alive, k = first + j < end, SIGN * j
            u_now, _, size, drive = _drive(
                u_ + k * u_t, delta_ + k * delta_t, B_ + k * B_t, shift, alive, in_d, in_n, SOFTPLUS, EXACT
            )
            if ONE_CHUNK and j == 0:
                state = drive  # nothing came before: no decay
            else:
                state = tl.exp2(size[None, :] * a) * state + drive
            C_now = _load(C_ + k * C_t, alive, in_n, EXACT)
            y_now = tl.sum(state * C_now[:, None], axis=0) + skip * u_now
            if ADD:
                y_now += _load(out_ + k * channels, alive, in_d, EXACT)
            if GATE:
                z_now = _load(z_ + k * z_t, alive, in_d, EXACT)
                y_now *= z_now * tl.sigmoid(z_now)
            _store(out_ + k * channels, y_now, alive, in_d, EXACT)


@triton.jit(do_not_specialize_on_alignment=["A", "carried"])
def part_kernel(
    v, delta, A, W, bias, z, carried, total,
    steps, channels, states, part_steps,
    v_r, v_t, v_d, delta_r, delta_t, delta_d, W_r, W_t, W_n, z_r, z_t, z_d,
    N: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, GATE: tl.constexpr, ADJOINT: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """What a part hands on if it begins with nothing, into its slot of `carried`, and the sum of its Δ, `total`
    (R, parts - 1, D). The state, from v = u and W = B; with ADJOINT its adjoint, walked from the part's end, from
    v = dy (with GATE times SiLU(z)) and W = C. Program (row, slot, block of channels)."""
    SIGN: tl.constexpr = -1 if REVERSE else 1
    blocks, parts = tl.cdiv(channels, BLOCK_D), tl.cdiv(steps, part_steps)
    item = (tl.program_id(0) // blocks).to(tl.int64)
    row, slot = item // (parts - 1), item % (parts - 1)
    start = (slot + 1 if ADJOINT else slot) * part_steps  # the last part hands on nothing; of the adjoint, the first
    end = tl.minimum(start + part_steps, steps)
    d = (tl.program_id(0) % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, N)
    in_d, in_n = d < channels, n < states
    in_tile = in_n[:, None] & in_d[None, :]
    a = tl.load(A + n[:, None] * channels + d[None, :], mask=in_tile, other=0.0)
    shift = tl.load(bias + d, mask=in_d, other=0.0) if HAS_BIAS else tl.zeros((BLOCK_D,), tl.float32)
    v += row * v_r + d * v_d
    delta += row * delta_r + d * delta_d
    W += row * W_r + n * W_n
    z += row * z_r + d * z_d

    state, sizes = tl.zeros((N, BLOCK_D), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
    for walked in range(0, end - start, CHUNK):
        t = _time(end - 1 - walked if ADJOINT else start + walked, steps, REVERSE)
        v_, delta_, W_, z_ = v + t * v_t, delta + t * delta_t, W + t * W_t, z + t * z_t
        for j in tl.static_range(CHUNK):
            alive, k = walked + j < end - start, (-SIGN if ADJOINT else SIGN) * j
            _, size = _size(delta_ + k * delta_t, shift, alive, in_d, SOFTPLUS, EXACT)
            if not EXACT:
                size = tl.where(alive, size, 0.0)  # a dead step changes nothing
            v_now, W_now = _load(v_ + k * v_t, alive, in_d, EXACT), _load(W_ + k * W_t, alive, in_n, EXACT)
            decay = tl.exp2(size[None, :] * a)
            if ADJOINT:
                if GATE:
                    z_now = _load(z_ + k * z_t, alive, in_d, EXACT)
                    v_now *= z_now * tl.sigmoid(z_now)
                state = decay * (state + W_now[:, None] * v_now[None, :])
            else:
                state = decay * state + W_now[:, None] * (size * v_now)[None, :]
            sizes += size
    tl.store(carried + (item * states + n[:, None]) * channels + d[None, :], state, mask=in_tile)
    tl.store(total + item * channels + d, sizes, mask=in_d)


@triton.jit(do_not_specialize_on_alignment=["A", "carried"])
def join_kernel(
    carried, total, A, slots, channels, states, N: tl.constexpr, BLOCK_D: tl.constexpr, ADJOINT: tl.constexpr
):  # fmt: skip
    """`carried` in place: from what each part alone hands on to what it does after those before it (with ADJOINT,
    those behind it). Program (row, block of channels)."""
    blocks = tl.cdiv(channels, BLOCK_D)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    d = (tl.program_id(0) % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, N)
    in_d, in_tile = d < channels, (n < states)[:, None] & (d < channels)[None, :]
    a = tl.load(A + n[:, None] * channels + d[None, :], mask=in_tile, other=0.0)
    state = tl.zeros((N, BLOCK_D), tl.float32)
    for k in range(slots):
        item = row * slots + (slots - 1 - k if ADJOINT else k)
        place = carried + (item * states + n[:, None]) * channels + d[None, :]
        size = tl.load(total + item * channels + d, mask=in_d, other=0.0)
        state = tl.exp2(size[None, :] * a) * state + tl.load(place, mask=in_tile, other=0.0)
        tl.store(place, state, mask=in_tile)


@triton.jit
def _store_chunk_states(
    scratch, lane, before, a, u, delta, B, shift, start, chunks, steps, in_d, in_n, u_t, delta_t, B_t,
    CHUNK: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """The state before each chunk of a segment, the first of which starts from `before`."""
    SIGN: tl.constexpr = -1 if REVERSE else 1
    tl.debug_barrier()  # other threads may still read what was stored for the segment or row before
    for c in range(chunks):
        tl.store(scratch + c * before.numel + lane, before)
        first = start + c * CHUNK
        t = _time(first, steps, REVERSE)
        u_, delta_, B_ = u + t * u_t, delta + t * delta_t, B + t * B_t
        for j in tl.static_range(CHUNK):
            alive, k = first + j < steps, SIGN * j
            _, _, size, drive = _drive(
                u_ + k * u_t, delta_ + k * delta_t, B_ + k * B_t, shift, alive, in_d, in_n, SOFTPLUS, EXACT
            )
            before = tl.exp2(size[None, :] * a) * before + drive
    tl.debug_barrier()  # a thread may read what another one wrote


@triton.jit
def _chunk_states(
    before, a, u, delta, B, shift, first, steps, in_d, in_n, u_t, delta_t, B_t,
    CHUNK: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, ONE_CHUNK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """The states before the steps of a chunk and after the last. u, delta and B point to the first step."""
    SIGN: tl.constexpr = -1 if REVERSE else 1
    state = before
    states = (before,)
    for j in tl.static_range(CHUNK):
        alive, k = first + j < steps, SIGN * j
        _, _, size, drive = _drive(
            u + k * u_t, delta + k * delta_t, B + k * B_t, shift, alive, in_d, in_n, SOFTPLUS, EXACT
        )
        if ONE_CHUNK and j == 0:
            state = a * 0.0 + drive  # nothing came before; laid out in the threads as `a` is, like all other states
        else:
            state = tl.exp2(size[None, :] * a) * state + drive
        states = states + (state,)
    return states


@triton.jit
def _ungated(dy_now, z, dz, state, C_now, skip, u_now, alive, in_d, ADD: tl.constexpr, EXACT: tl.constexpr):
    """The gradient of y from that of y · SiLU(z). Stores z's, to which each direction adds its share."""
    z_now = _load(z, alive, in_d, EXACT)
    gate = tl.sigmoid(z_now)
    y = tl.sum(state * C_now[:, None], axis=0) + skip * u_now
    by_z = dy_now * y * gate * (1.0 + z_now * (1.0 - gate))
    if ADD:
        by_z += _load(dz, alive, in_d, EXACT)
    _store(dz, by_z, alive, in_d, EXACT)
    return dy_now * z_now * gate


@triton.jit
def _step_gradients(
    dy, u, delta, B, C, z, du, d_delta, dB, dC, dz,
    state, previous, carry, a, skip, shift, alive, in_d, in_n,
    SOFTPLUS: tl.constexpr, ADD: tl.constexpr, GATE: tl.constexpr, IS_FIRST: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One step of the adjoint. Stores what belongs to the step; returns the adjoint of the state before it, and the
    step's shares of dA (N, BLOCK_D), dD and d_bias (BLOCK_D,). IS_FIRST: nothing came before this step.

    u and delta are read, and the decay is computed, once more: four steps of them would not fit the registers."""
    dy_now, u_now = _load(dy, alive, in_d, EXACT), _load(u, alive, in_d, EXACT)
    B_now, C_now = _load(B, alive, in_n, EXACT), _load(C, alive, in_n, EXACT)
    raw, size = _size(delta, shift, alive, in_d, SOFTPLUS, EXACT)
    if GATE:
        dy_now = _ungated(dy_now, z, dz, state, C_now, skip, u_now, alive, in_d, ADD, EXACT)
    adjoint = C_now[:, None] * dy_now[None, :] + carry
    _store(dC, tl.sum(state * dy_now[None, :], axis=1), alive, in_n, EXACT)
    _store(dB, tl.sum(adjoint * (size * u_now)[None, :], axis=1), alive, in_n, EXACT)
    by_drive = tl.sum(adjoint * B_now[:, None], axis=0)  # by Δu
    by_size = by_drive * u_now
    by_A = tl.zeros_like(a)
    if IS_FIRST:
        carry = by_A
    else:
        carry = tl.exp2(size[None, :] * a) * adjoint
        by_exponent = carry * previous  # by ΔA
        by_size += tl.sum(by_exponent * a, axis=0) * 0.6931471805599453  # a is A · log2(e)
        by_A = by_exponent * size[None, :]
    by_raw = by_size * tl.sigmoid(raw) if SOFTPLUS else by_size
    by_u = by_drive * size + skip * dy_now
    _store(d_delta, by_raw, alive, in_d, EXACT)
    _store(du, by_u, alive, in_d, EXACT)
    return carry, by_A, u_now * dy_now, by_raw


@triton.jit
def _chunk_gradients(
    dy, u, delta, B, C, z, du, d_delta, dB, dC, dz,
    before, carry, sum_A, sum_D, sum_bias, a, skip, shift, first, steps, channels, states, in_d, in_n,
    dy_t, u_t, delta_t, B_t, C_t, z_t,
    CHUNK: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, ADD: tl.constexpr, GATE: tl.constexpr,
    ONE_CHUNK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """A chunk's steps, from the last back to the first, from the state before it: the adjoint of that state, and the
    sums with the chunk's shares. Pointers are to the chunk's first step."""
    SIGN: tl.constexpr = -1 if REVERSE else 1
    kept = _chunk_states(before, a, u, delta, B, shift, first, steps, in_d, in_n, u_t, delta_t, B_t,
                         CHUNK, SOFTPLUS, REVERSE, ONE_CHUNK, EXACT)  # fmt: skip
    for j in tl.static_range(CHUNK - 1, -1, -1):
        carry, by_A, by_D, by_bias = _step_gradients(
            dy + SIGN * j * dy_t, u + SIGN * j * u_t, delta + SIGN * j * delta_t, B + SIGN * j * B_t,
            C + SIGN * j * C_t, z + SIGN * j * z_t, du + SIGN * j * channels, d_delta + SIGN * j * channels,
            dB + SIGN * j * states, dC + SIGN * j * states, dz + SIGN * j * channels,
            kept[j + 1], kept[j], carry, a, skip, shift, first + j < steps, in_d, in_n,
            SOFTPLUS, ADD, GATE, ONE_CHUNK and j == 0, EXACT)  # fmt: skip
        sum_A += by_A
        sum_D += by_D
        sum_bias += by_bias
    return carry, sum_A, sum_D, sum_bias


@triton.jit
def backward_kernel(
    dy, u, delta, A, B, C, D, bias, z, entering, carried, scratch,
    du, d_delta, dB, dC, dA, dD, d_bias, dz,
    items, steps, channels, states, part_steps, programs,
    dy_r, dy_t, dy_d, u_r, u_t, u_d, delta_r, delta_t, delta_d, B_r, B_t, B_n, C_r, C_t, C_n, z_r, z_t, z_d,
    N: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, SEGMENT: tl.constexpr,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, ADD: tl.constexpr, GATE: tl.constexpr,
    ONE_CHUNK: tl.constexpr, KEPT: tl.constexpr, PARTED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """All gradients. Program (p, block of channels) takes items p, p + programs, … one after the other; an item is a
    row, or a part of one.

    Per segment of time, last one first: the state before each chunk goes to `scratch` (programs · blocks, SEGMENT /
    CHUNK, N, BLOCK_D), which stays in the second-level cache; then chunk by chunk from the end the states are
    recomputed in registers and the adjoint is walked the other way.

    du, d_delta, dz (R, T, D) contiguous. Partial sums, for the caller to add up: dB, dC (blocks, R, T, states),
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
    parts = tl.cdiv(steps, part_steps)
    rows = items // parts
    kept_per_row = (steps - 1) // SEGMENT

    sum_A, sum_D, sum_bias = tl.zeros_like(a), tl.zeros_like(skip), tl.zeros_like(skip)
    for item in range(p, items, programs):
        row, part, part_start, end = _span(item, steps, part_steps, PARTED)
        u_, delta_ = u + row * u_r + d * u_d, delta + row * delta_r + d * delta_d
        B_, C_ = B + row * B_r + n * B_n, C + row * C_r + n * C_n
        dy_, z_ = dy + row * dy_r + d * dy_d, z + row * z_r + d * z_d
        carry = tl.zeros_like(a)
        if PARTED:
            carry = _carried(carried, row, part, part < parts - 1, parts, states, channels, n, d, in_tile)
        segments = tl.cdiv(end - part_start, SEGMENT)
        for back in range(segments):
            start = part_start + (segments - 1 - back) * SEGMENT
            chunks = tl.cdiv(tl.minimum(SEGMENT, end - start), CHUNK)
            before = tl.zeros_like(a)
            if KEPT:
                slot = row * kept_per_row + start // SEGMENT - 1
                kept = entering + (slot * states + n[:, None]) * channels + d[None, :]
                before = tl.load(kept, mask=tl.where(start > 0, in_tile, False), other=0.0)
            if not ONE_CHUNK:
                _store_chunk_states(scratch, lane, before, a, u_, delta_, B_, shift, start, chunks, steps,
                                    in_d, in_n, u_t, delta_t, B_t, CHUNK, SOFTPLUS, REVERSE, EXACT)  # fmt: skip
            for c_back in range(chunks):
                first = start + (chunks - 1 - c_back) * CHUNK
                if not ONE_CHUNK:
                    before = tl.load(scratch + (chunks - 1 - c_back) * N * BLOCK_D + lane)
                t = _time(first, steps, REVERSE)
                place, target = (row * steps + t) * channels + d, ((block * rows + row) * steps + t) * states + n
                carry, sum_A, sum_D, sum_bias = _chunk_gradients(
                    dy_ + t * dy_t, u_ + t * u_t, delta_ + t * delta_t, B_ + t * B_t, C_ + t * C_t, z_ + t * z_t,
                    du + place, d_delta + place, dB + target, dC + target, dz + place,
                    before, carry, sum_A, sum_D, sum_bias, a, skip, shift, first, steps, channels, states, in_d, in_n,
                    dy_t, u_t, delta_t, B_t, C_t, z_t,
                    CHUNK, SOFTPLUS, REVERSE, ADD, GATE, ONE_CHUNK, EXACT)  # fmt: skip
    tl.store(dA + (p * states + n[:, None]) * channels + d[None, :], sum_A, mask=in_tile)
    tl.store(dD + p * channels + d, sum_D, mask=in_d)
    tl.store(d_bias + p * channels + d, sum_bias, mask=in_d)
