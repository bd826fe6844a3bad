"""How the Triton kernels of the scan are launched: one direction of time, with or without the gate.

`forward` and `backward` take a `Plan`, how the work is cut; `forward_plans` and `backward_plans` list the few that make
sense for a shape, best guess first. The caller chooses (`avion.ops.tuning`).
"""

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .triton_kernels import backward_kernel, forward_kernel, join_kernel, part_kernel

_LOG2_E = math.log2(math.e)
SEGMENT = 32  # steps between the states that are kept for backward
# A program is a chain of dependent steps. So many of them hide each other's latencies, per multiprocessor of a GPU.
_WARPS_TO_KEEP_BUSY = 8


class Plan(NamedTuple):
    """Channels and warps of a program, steps of a chunk, parts that a row's time is cut into, and for backward the
    programs per block of channels (each takes every so-many-th item)."""

    block_d: int
    warps: int
    chunk: int
    parts: int
    programs: int = 0


class Direction(NamedTuple):
    """One direction's inputs, as `avion.ops.selective_scan` has them; delta_bias may be None."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    delta_bias: Tensor | None
    softplus: bool = True
    reverse: bool = False


class Gate(NamedTuple):
    """z (R, T, D), and whether the other direction's share is in the output (dz, in backward) already."""

    z: Tensor
    add: bool


def forward_plans(u: Tensor) -> list[Plan]:
    """u (R, T, D). The first one is the guess."""
    if not u.is_cuda:
        return [_interpreter_plan(u)]
    chunk = 4 if u.shape[1] > 2 else 2
    # Two channels to a thread share the conversions of B and C; one leaves more programs.
    cuts = ((128, 2), (64, 1), (128, 4), (32, 1))
    plans = [Plan(block, warps, chunk, parts) for parts in _parts(u) for block, warps in cuts]
    few = u.shape[0] * u.shape[2] < 128 * _WARPS_TO_KEEP_BUSY * _processors(u)
    return plans[::-1] if few else plans


def backward_plans(u: Tensor, states: int) -> list[Plan]:
    """u (R, T, D). The first one is the guess."""
    if not u.is_cuda:
        return [_interpreter_plan(u)]
    # The states and decays of a chunk are held in registers.
    longest = max(1, min(4, 64 // triton.next_power_of_2(states)))
    plans = []
    for parts in _parts(u):
        for block, chunk in ((32, longest), (16, longest), (32, max(1, longest // 2)), (64, longest)):
            blocks = triton.cdiv(u.shape[2], block)
            programs = max(1, min(u.shape[0] * parts, _WARPS_TO_KEEP_BUSY * _processors(u) // blocks))
            plans.append(Plan(block, max(1, block // 32), chunk, parts, programs))
    return plans


def _processors(u: Tensor) -> int:
    return torch.cuda.get_device_properties(u.device).multi_processor_count


def _interpreter_plan(u: Tensor) -> Plan:
    """Small enough to reach every branch at small sizes."""
    rows, steps, _ = u.shape
    parts = min(3, triton.cdiv(steps, SEGMENT)) if rows <= 2 else 1
    return Plan(4, 1, 2 if steps < 8 else 4, parts, min(rows * parts, 2))


def _parts(u: Tensor) -> list[int]:
    """Numbers of parts worth trying: one, unless the rows alone leave the GPU idle."""
    rows, steps, channels = u.shape
    warps = max(1, rows * triton.cdiv(channels, 32))
    wanted = _WARPS_TO_KEEP_BUSY * _processors(u) / warps
    most = steps // (2 * SEGMENT)  # shorter parts cost more than they bring: each is walked twice
    found = {max(1, min(most, round(factor * wanted))) for factor in (1, 2)}
    return sorted(found | {1}, reverse=True) if wanted > 1 else sorted(found)[:1]


def _part_steps(steps: int, parts: int) -> int:
    """Of all parts but the last: whole segments, so that chunks end where parts do."""
    return steps if parts == 1 else SEGMENT * triton.cdiv(triton.cdiv(steps, SEGMENT), parts)


class _Float32(NamedTuple):
    """A as (N, D) times log2(e), D, and the bias (D in its place where there is none: a pointer that is not read)."""

    A: Tensor
    D: Tensor
    bias: Tensor


def _float32(p: Direction) -> _Float32:
    skip = p.D.float().contiguous()
    bias = skip if p.delta_bias is None else p.delta_bias.float().contiguous()
    return _Float32((p.A.float() * _LOG2_E).t().contiguous(), skip, bias)


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()]


def _constants(p: Direction, plan: Plan) -> dict:
    steps, channels = p.u.shape[1:]
    states = p.A.shape[1]
    exact = channels % plan.block_d == 0 and steps % plan.chunk == 0 and states == triton.next_power_of_2(states)
    # One stage: pipelining the loop over rows would double the registers that are short already.
    return {
        "N": triton.next_power_of_2(states), "BLOCK_D": plan.block_d, "CHUNK": plan.chunk,
        "HAS_BIAS": p.delta_bias is not None, "SOFTPLUS": p.softplus, "REVERSE": p.reverse,
        "EXACT": exact, "num_warps": plan.warps, "num_stages": 1,
    }  # fmt: skip


def kept_shape(u: Tensor, states: int, keep: bool) -> tuple[int, ...]:
    """Of the states that enter the later segments, (R, segments - 1, N, D)."""
    return (u.shape[0], (u.shape[1] - 1) // SEGMENT if keep else 0, states, u.shape[2])


def _join_parts(p: Direction, f: _Float32, plan: Plan, v: Tensor, W: Tensor, z: Tensor | None, adjoint: bool) -> Tensor:
    """`carried` (R, parts - 1, N, D): what enters the parts, of the state (v = u, W = B) or of its adjoint (dy, C)."""
    rows, steps, channels = v.shape
    states = p.A.shape[1]
    part_steps = _part_steps(steps, plan.parts)
    slots = triton.cdiv(steps, part_steps) - 1
    carried = v.new_empty((rows, slots, states, channels), dtype=torch.float32)
    if slots == 0:
        return carried
    total = v.new_empty((rows, slots, channels), dtype=torch.float32)
    blocks = triton.cdiv(channels, plan.block_d)
    gate = v if z is None else z
    part_kernel[(rows * slots * blocks,)](
        v, p.delta, f.A, W, f.bias, gate, carried, total, steps, channels, states, part_steps,
        *_strides(v, p.delta, W, gate), GATE=z is not None, ADJOINT=adjoint, **_constants(p, plan),
    )  # fmt: skip
    join_kernel[(rows * triton.cdiv(channels, 32),)](
        carried, total, f.A, slots, channels, states, N=triton.next_power_of_2(states), BLOCK_D=32, ADJOINT=adjoint,
        num_warps=1,
    )  # fmt: skip
    return carried


def forward(p: Direction, plan: Plan, y: Tensor, keep: bool, gate: Gate | None = None) -> Tensor:
    """Writes y (R, T, D) contiguous, or adds to it. Returns the states that enter the later segments."""
    rows, steps, channels = p.u.shape
    states = p.A.shape[1]
    entering = p.u.new_empty(kept_shape(p.u, states, keep), dtype=torch.float32)
    if y.numel() == 0:
        return entering
    f = _float32(p)
    part_steps = _part_steps(steps, plan.parts)
    parts = triton.cdiv(steps, part_steps)
    carried = _join_parts(p, f, plan, p.u, p.B, None, adjoint=False)
    z = p.u if gate is None else gate.z
    forward_kernel[(rows * parts * triton.cdiv(channels, plan.block_d),)](
        p.u, p.delta, f.A, p.B, p.C, f.D, f.bias, z, y, entering, carried, steps, channels, states, part_steps,
        *_strides(p.u, p.delta, p.B, p.C, z), **_constants(p, plan), SEGMENT=SEGMENT, ONE_CHUNK=steps <= plan.chunk,
        KEEP=entering.numel() > 0, PARTED=parts > 1, GATE=gate is not None, ADD=gate is not None and gate.add,
    )  # fmt: skip
    return entering


def backward(
    p: Direction, plan: Plan, dy: Tensor, entering: Tensor, gate: Gate | None = None, dz: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Gradients of u, delta, A, B, C, D and delta_bias (of shape (0,) where there is none). With a gate, dy is the
    gradient of y · SiLU(z), and dz (R, T, D) contiguous is written, or added to."""
    rows, steps, channels = p.u.shape
    states = p.A.shape[1]
    du, d_delta = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (p.u, p.delta))
    if du.numel() == 0:
        zeros = [torch.zeros_like(x) for x in (p.A, p.B, p.C, p.D)]
        bias = p.D.new_empty(0) if p.delta_bias is None else torch.zeros_like(p.delta_bias)
        return du, d_delta, *zeros, bias
    f = _float32(p)
    part_steps = _part_steps(steps, plan.parts)
    parts = triton.cdiv(steps, part_steps)
    z = None if gate is None else gate.z
    carried = _join_parts(p, f, plan, dy, p.C, z, adjoint=True)
    blocks, constants = triton.cdiv(channels, plan.block_d), _constants(p, plan)

    def partial(*shape: int) -> Tensor:
        return p.u.new_empty(shape, dtype=torch.float32)

    scratch = partial(plan.programs * blocks, SEGMENT // plan.chunk, constants["N"], plan.block_d)
    dB, dC = partial(blocks, rows, steps, states), partial(blocks, rows, steps, states)
    dA = partial(plan.programs, states, channels)
    dD, d_bias = partial(plan.programs, channels), partial(plan.programs, channels)
    read_z, write_dz = (dy, du) if z is None else (z, dz)
    backward_kernel[(plan.programs * blocks,)](
        dy, p.u, p.delta, f.A, p.B, p.C, f.D, f.bias, read_z, entering, carried, scratch,
        du, d_delta, dB, dC, dA, dD, d_bias, write_dz, rows * parts, steps, channels, states, part_steps, plan.programs,
        *_strides(dy, p.u, p.delta, p.B, p.C, read_z), **constants, SEGMENT=SEGMENT, ONE_CHUNK=steps <= plan.chunk,
        KEPT=entering.numel() > 0, PARTED=parts > 1, GATE=z is not None, ADD=gate is not None and gate.add,
    )  # fmt: skip
    by_bias = p.D.new_empty(0) if p.delta_bias is None else d_bias.sum(0).to(p.delta_bias.dtype)
    by_A = dA.sum(0).t().contiguous().to(p.A.dtype)
    return du, d_delta, by_A, dB.sum(0).to(p.B.dtype), dC.sum(0).to(p.C.dtype), dD.sum(0).to(p.D.dtype), by_bias
