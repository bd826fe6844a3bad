"""How the Triton kernels of the scan are launched: one direction of time, with or without the gate.

`forward` and `backward` take a plan, how the work is cut; `forward_plans` and `backward_plans` list the few that make
sense for a shape, best guess first. The caller chooses (`avion.ops.tuning`).
"""

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .inputs import ScanInputs
from .triton_backward import backward_kernel
from .triton_forward import forward_kernel, join_kernel, part_kernel

_LOG2_E = math.log2(math.e)
SEGMENT = 32  # steps between the states that are kept for backward
# A program is one warp and a chain of dependent steps. So many of them hide each other's latencies, per multiprocessor
# of a GPU; in backward no more find room, since each takes all registers that a thread can have.
_WARPS_TO_KEEP_BUSY = 8
# Forward programs per multiprocessor: several times what it holds at once, so that all end at about the same time, and
# few enough that what a program loads once (A) does not count.
_FORWARD_PROGRAMS = 64
# One stage: pipelining a loop over rows would double the registers that are short already. Multiply-adds are fused:
# half of the arithmetic is of them, and a fused one is rounded once instead of twice.
_OPTIONS = {"num_warps": 1, "num_stages": 1, "enable_fp_fusion": True}


class Plan(NamedTuple):
    """Channels of a program (of one warp), steps of a chunk, states that backward takes at a time, parts that a row's
    time is cut into, and programs per block of channels (each takes every so-many-th row, or part of one). `stack`: the
    states of one tensor, more than 1 in the interpreter only."""

    block_d: int
    chunk: int
    group: int
    parts: int
    programs: int
    stack: int = 1


class Time(NamedTuple):
    """What a scan does with its steps: softplus of the step sizes or not, from the first step or from the last."""

    softplus: bool = True
    reverse: bool = False


class Gate(NamedTuple):
    """z (R, T, D), and whether the other direction's share is in the output (dz, in backward) already."""

    z: Tensor
    add: bool


class Strides(NamedTuple):
    """Of each tensor (row, step, channel or state), as the kernels take them."""

    u: tuple[int, ...]
    delta: tuple[int, ...]
    B: tuple[int, ...]
    C: tuple[int, ...]
    z: tuple[int, ...]
    dy: tuple[int, ...]


def forward_plans(u: Tensor, states: int) -> list[Plan]:
    """u (R, T, D). The first one is the guess."""
    if not u.is_cuda:
        return [_interpreter_plan(u, states)]
    return forward_plans_for(tuple(u.shape), _processors(u))


def forward_plans_for(shape: tuple[int, ...], processors: int) -> list[Plan]:
    """For a GPU with so many multiprocessors."""
    rows, steps, channels = shape
    # Four channels to a thread share the conversions of B and C; fewer leave more programs, and registers.
    blocks = (128, 64, 32)
    if rows * channels < 128 * _WARPS_TO_KEEP_BUSY * processors:
        blocks = blocks[::-1]
    plans = []
    for parts in _parts(shape, processors):
        for block in blocks:
            programs = max(1, min(rows * parts, _FORWARD_PROGRAMS * processors // triton.cdiv(channels, block)))
            plans.append(Plan(block, 4 if steps > 2 else 2, 0, parts, programs))
    return plans


def backward_plans(u: Tensor, states: int) -> list[Plan]:
    """u (R, T, D). The first one is the guess."""
    if not u.is_cuda:
        return [_interpreter_plan(u, states)]
    return backward_plans_for(tuple(u.shape), states, _processors(u))


def backward_plans_for(shape: tuple[int, ...], states: int, processors: int) -> list[Plan]:
    """For a GPU with so many multiprocessors."""
    rows, steps, channels = shape
    # (channels, steps of a chunk, states at a time.) dA of all states stays in registers, and beyond one chunk the
    # adjoint does: with 16 states two channels of a thread leave room for so much more.
    if states > 16:
        cuts = ((32, 2, 4), (32, 4, 4))
    elif steps <= 4:
        cuts = ((64, 4, 4), (32, 4, 8))
    else:
        cuts = ((64, 2, 4), (32, 4, 8))
    plans = []
    for parts in _parts(shape, processors):
        for block, chunk, group in cuts:
            programs = max(1, min(rows * parts, _WARPS_TO_KEEP_BUSY * processors // triton.cdiv(channels, block)))
            plans.append(Plan(block, min(chunk, triton.next_power_of_2(steps)), group, parts, programs))
    return plans


def _processors(u: Tensor) -> int:
    return torch.cuda.get_device_properties(u.device).multi_processor_count


def _interpreter_plan(u: Tensor, states: int) -> Plan:
    """Small enough to reach every branch at small sizes: several blocks, programs, chunks, parts, groups of states."""
    rows, steps, _ = u.shape
    parts = min(3, triton.cdiv(steps, SEGMENT)) if rows <= 2 else 1
    stack = max(1, triton.next_power_of_2(states) // 2)
    return Plan(4, 2 if steps < 8 else 4, 1, parts, min(rows * parts, 2), stack)


def _parts(shape: tuple[int, ...], processors: int) -> list[int]:
    """Numbers of parts worth trying: one, unless the rows alone leave the GPU idle."""
    rows, steps, channels = shape
    warps = max(1, rows * triton.cdiv(channels, 32))
    wanted = _WARPS_TO_KEEP_BUSY * processors / warps
    most = steps // (2 * SEGMENT)  # shorter parts cost more than they bring: each is walked twice
    found = {max(1, min(most, round(factor * wanted))) for factor in (1, 2)}
    return sorted(found | {1}, reverse=True) if wanted > 1 else sorted(found)[:1]


def _part_steps(steps: int, parts: int) -> int:
    """Of all parts but the last: whole segments, so that chunks end where parts do."""
    return steps if parts == 1 else SEGMENT * triton.cdiv(triton.cdiv(steps, SEGMENT), parts)


def _prepared(p: ScanInputs) -> ScanInputs:
    """For the kernels: A as (N, D) times log2(e), D and the bias in float32, zeros where there is no bias."""
    skip = p.D.float().contiguous()
    bias = torch.zeros_like(skip) if p.delta_bias is None else p.delta_bias.float().contiguous()
    return p._replace(A=(p.A.float() * _LOG2_E).t().contiguous(), D=skip, delta_bias=bias)


def _strides(p: ScanInputs, z: Tensor, dy: Tensor) -> Strides:
    return Strides(*(t.stride() for t in (p.u, p.delta, p.B, p.C, z, dy)))


def _in_words(weights: Tensor, group: int) -> bool:
    """Whether a step's numbers of `weights` (R, T, N), and those of a group, can be read as whole 64-bit words."""
    per_word = 8 // weights.element_size()
    whole = all(count % per_word == 0 for count in (weights.shape[2], group, *weights.stride()[:2]))
    return whole and weights.stride(2) == 1 and weights.data_ptr() % 8 == 0


def _constants(p: ScanInputs, time: Time, plan: Plan) -> dict:
    steps, channels = p.u.shape[1:]
    return {
        "CHANNELS": channels, "N": p.A.shape[1], "STACK": plan.stack, "BLOCK_D": plan.block_d, "CHUNK": plan.chunk,
        "SOFTPLUS": time.softplus, "REVERSE": time.reverse,
        "EXACT": channels % plan.block_d == 0 and steps % plan.chunk == 0, **_OPTIONS,
    }  # fmt: skip


def kept_shape(u: Tensor, states: int, keep: bool) -> tuple[int, ...]:
    """Of the states that enter the later segments, (R, segments - 1, N, D)."""
    return (u.shape[0], (u.shape[1] - 1) // SEGMENT if keep else 0, states, u.shape[2])


def _join_parts(
    p: ScanInputs, x: ScanInputs, time: Time, plan: Plan, v: Tensor, W: Tensor, z: Tensor | None, adjoint: bool
) -> Tensor:
    """`carried` (R, parts - 1, N, D): what enters the parts, of the state (v = u, W = B) or of its adjoint (dy, C)."""
    rows, steps, channels = v.shape
    states = p.A.shape[1]
    part_steps = _part_steps(steps, plan.parts)
    slots = triton.cdiv(steps, part_steps) - 1
    carried = v.new_empty((rows, slots, states, channels), dtype=torch.float32)
    if slots == 0:
        return carried
    total = v.new_empty((rows, slots, channels), dtype=torch.float32)
    gate = v if z is None else z
    strides = (v.stride(), x.delta.stride(), W.stride(), gate.stride())
    part_kernel[(rows * slots * triton.cdiv(channels, plan.block_d),)](
        v, x.delta, x.A, W, x.delta_bias, gate, *strides, carried, total, steps, part_steps,
        GATE=z is not None, ADJOINT=adjoint, WORDS=_in_words(W, 0), **_constants(p, time, plan),
    )  # fmt: skip
    block = min(128, triton.next_power_of_2(states * channels))
    join_kernel[(rows * triton.cdiv(states * channels, block),)](
        carried, total, x.A, slots, CHANNELS=channels, BLOCK=block, N=states, ADJOINT=adjoint, **_OPTIONS
    )
    return carried


def forward(p: ScanInputs, plan: Plan, y: Tensor, keep: bool, time: Time, gate: Gate | None = None) -> Tensor:
    """Writes y (R, T, D) contiguous, or adds to it. Returns the states that enter the later segments."""
    rows, steps, channels = p.u.shape
    states = p.A.shape[1]
    entering = p.u.new_empty(kept_shape(p.u, states, keep), dtype=torch.float32)
    if y.numel() == 0:
        return entering
    x = _prepared(p)
    part_steps = _part_steps(steps, plan.parts)
    parts = triton.cdiv(steps, part_steps)
    carried = _join_parts(p, x, time, plan, p.u, p.B, None, adjoint=False)
    z = p.u if gate is None else gate.z
    forward_kernel[(plan.programs * triton.cdiv(channels, plan.block_d),)](
        x, z, _strides(p, z, y), y, entering, carried, rows * parts, steps, part_steps, plan.programs,
        **_constants(p, time, plan), SEGMENT=SEGMENT, ONE_CHUNK=steps <= plan.chunk, KEEP=entering.numel() > 0,
        PARTED=parts > 1, GATE=gate is not None, ADD=gate is not None and gate.add,
        WORDS=_in_words(p.B, 0) and _in_words(p.C, 0),
    )  # fmt: skip
    return entering


def backward(
    p: ScanInputs,
    plan: Plan,
    dy: Tensor,
    entering: Tensor,
    time: Time,
    gate: Gate | None = None,
    dz: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of u, delta, A, B, C, D and delta_bias (of shape (0,) where there is none). With a gate, dy is the
    gradient of y · SiLU(z), and dz (R, T, D) contiguous is written, or added to."""
    rows, steps, channels = p.u.shape
    states = p.A.shape[1]
    du, d_delta = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (p.u, p.delta))
    if du.numel() == 0:
        zeros = [torch.zeros_like(t) for t in (p.A, p.B, p.C, p.D)]
        bias = p.D.new_empty(0) if p.delta_bias is None else torch.zeros_like(p.delta_bias)
        return du, d_delta, *zeros, bias
    x = _prepared(p)
    part_steps = _part_steps(steps, plan.parts)
    parts = triton.cdiv(steps, part_steps)
    z = None if gate is None else gate.z
    carried = _join_parts(p, x, time, plan, dy, p.C, z, adjoint=True)
    blocks = triton.cdiv(channels, plan.block_d)

    def partial(*shape: int) -> Tensor:
        return p.u.new_empty(shape, dtype=torch.float32)

    scratch = partial(plan.programs * blocks, SEGMENT // plan.chunk, states, plan.block_d)
    by_state, dA = partial(blocks, rows, steps, 2 * states), partial(plan.programs, states, channels)
    dD, d_bias = partial(plan.programs, channels), partial(plan.programs, channels)
    read_z, write_dz = (dy, du) if z is None else (z, dz)
    backward_kernel[(plan.programs * blocks,)](
        x, read_z, _strides(p, read_z, dy), dy, entering, carried, scratch,
        du, d_delta, write_dz, by_state, dA, dD, d_bias, rows * parts, steps, part_steps, plan.programs,
        **_constants(p, time, plan), LANES=32 if plan.block_d >= 32 else max(1, plan.block_d // 2), GROUP=plan.group,
        SEGMENT=SEGMENT, ONE_CHUNK=steps <= plan.chunk, KEPT=entering.numel() > 0, PARTED=parts > 1,
        GATE=z is not None, ADD=gate is not None and gate.add,
        WORDS=_in_words(p.B, plan.group) and _in_words(p.C, plan.group),
    )  # fmt: skip
    bias = p.D.new_empty(0) if p.delta_bias is None else d_bias.sum(0).to(p.delta_bias.dtype)
    dC, dB = by_state[..., :states].sum(0), by_state[..., states:].sum(0)
    by_A = dA.sum(0).t().contiguous().to(p.A.dtype)
    return du, d_delta, by_A, dB.to(p.B.dtype), dC.to(p.C.dtype), dD.sum(0).to(p.D.dtype), bias
