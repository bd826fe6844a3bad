"""How the Triton kernels of the scan are launched: one direction of time, with or without the gate.

`forward` and `backward` take a plan, which says how the work is cut. `forward_plans` and `backward_plans` list the few
plans that make sense for a shape, the best guess first. The caller chooses one (`avion.ops.tuning`).
"""

import dataclasses
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .inputs import ScanGradients, ScanInputs, Time
from .triton_backward import PartialSums, backward_kernel
from .triton_chunks import Gradients
from .triton_forward import Part, PartStrides, forward_kernel, join_kernel, part_kernel
from .triton_pieces import Cut, Strides, Work

_LOG2_E = math.log2(math.e)
SEGMENT = 32  # steps between the states that are kept for backward
# A program is one warp and a chain of dependent steps. This many programs per multiprocessor of a GPU hide the
# latencies of each other. In the backward pass there is room for no more, because each takes all registers that a
# thread can have.
_WARPS_TO_KEEP_BUSY = 8
# Forward programs per multiprocessor: several times what a multiprocessor holds at once, so that all end at about the
# same time, and few enough that what a program loads once (A) does not count.
_FORWARD_PROGRAMS = 64
# One stage, because pipelining a loop over rows would double the number of registers, which are short already.
# Multiply-adds are fused: half of the arithmetic consists of them, and a fused one is rounded once instead of twice.
_OPTIONS: dict[str, Any] = {"num_warps": 1, "num_stages": 1, "enable_fp_fusion": True}


class Plan(NamedTuple):
    """How the work of a launch is cut.

    Attributes:
        block_d: the number of channels of a program, which is one warp.
        chunk: the number of steps that are taken at a time.
        group: the number of states that the backward pass takes at a time.
        parts: the number of parts into which the time of a row is cut.
        programs: the number of programs per block of channels; each takes several rows, or parts of rows.
        stack: the number of states in one tensor; more than 1 in the interpreter only.
    """

    block_d: int
    chunk: int
    group: int
    parts: int
    programs: int
    stack: int = 1


class Gate(NamedTuple):
    """The gate of an output y · SiLU(z).

    Attributes:
        z: (R, T, D).
        add: whether the output (dz, in the backward pass) holds the share of the other direction already.
    """

    z: Tensor
    add: bool


def forward_plans(u: Tensor, states: int) -> list[Plan]:
    """List plans for the forward kernel, the best guess first.

    Args:
        u: the input, (R, T, D).
        states: N, the number of states per channel.
    """
    if not u.is_cuda:
        return [_interpreter_plan(u, states)]
    return forward_plans_for(tuple(u.shape), _processors(u))


def forward_plans_for(shape: tuple[int, ...], processors: int) -> list[Plan]:
    """List plans for the forward kernel on (R, T, D), for a GPU with that many multiprocessors."""
    rows, steps, channels = shape
    # Four channels of a thread share the conversions of B and C; fewer channels leave more programs, and registers.
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
    """List plans for the backward kernel, the best guess first.

    Args:
        u: the input, (R, T, D).
        states: N, the number of states per channel.
    """
    if not u.is_cuda:
        return [_interpreter_plan(u, states)]
    return backward_plans_for(tuple(u.shape), states, _processors(u))


def backward_plans_for(shape: tuple[int, ...], states: int, processors: int) -> list[Plan]:
    """List plans for the backward kernel on (R, T, D), for a GPU with that many multiprocessors."""
    rows, steps, channels = shape
    # (channels, steps of a chunk, states at a time.) dA of all states stays in registers, and with more than one chunk
    # the adjoint as well. With 16 states and two channels to a thread these numbers are what the other registers hold.
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
    """Return a plan that reaches every branch at small sizes: several blocks, programs, chunks, parts, groups."""
    rows, steps, _ = u.shape
    parts = min(3, triton.cdiv(steps, SEGMENT)) if rows <= 2 else 1
    stack = max(1, triton.next_power_of_2(states) // 2)
    return Plan(4, 2 if steps < 8 else 4, 1, parts, min(rows * parts, 2), stack)


def _parts(shape: tuple[int, ...], processors: int) -> list[int]:
    """List the numbers of parts that are worth trying: one, unless the rows alone leave the GPU idle."""
    rows, steps, channels = shape
    warps = max(1, rows * triton.cdiv(channels, 32))
    wanted = _WARPS_TO_KEEP_BUSY * processors / warps
    most = steps // (2 * SEGMENT)  # shorter parts cost more than they gain, because each is walked twice
    found = {max(1, min(most, round(factor * wanted))) for factor in (1, 2)}
    return sorted(found | {1}, reverse=True) if wanted > 1 else sorted(found)[:1]


def _part_steps(steps: int, parts: int) -> int:
    """Return the steps of all parts but the last: whole segments, so that chunks end where parts do."""
    return steps if parts == 1 else SEGMENT * triton.cdiv(triton.cdiv(steps, SEGMENT), parts)


def prepared(p: ScanInputs) -> ScanInputs:
    """Prepare inputs for the kernels: A as (N, D) times log2(e), D and the bias in float32, zeros without a bias."""
    skip = p.D.float().contiguous()
    bias = torch.zeros_like(skip) if p.delta_bias is None else p.delta_bias.float().contiguous()
    return p._replace(A=(p.A.float() * _LOG2_E).t().contiguous(), D=skip, delta_bias=bias)


def _strides(p: ScanInputs, z: Tensor, dy: Tensor) -> Strides:
    return Strides(*(t.stride() for t in (p.u, p.delta, p.B, p.C, z, dy)))


def _in_words(weights: Tensor, group: int) -> bool:
    """Return whether the numbers of a step of `weights` (R, T, N), and those of a group, fill whole 64-bit words."""
    per_word = 8 // weights.element_size()
    whole = all(count % per_word == 0 for count in (weights.shape[2], group, *weights.stride()[:2]))
    return whole and weights.stride(2) == 1 and weights.data_ptr() % 8 == 0


def _cut(p: ScanInputs, time: Time, plan: Plan) -> Cut:
    """Return what all kernels of a launch are compiled for."""
    _, steps, channels = p.u.shape
    return Cut(
        channels,
        n=p.states,
        stack=plan.stack,
        block_d=plan.block_d,
        chunk=plan.chunk,
        softplus=time.softplus,
        reverse=time.reverse,
        exact=channels % plan.block_d == 0 and steps % plan.chunk == 0,
        parted=_part_steps(steps, plan.parts) < steps,
        one_chunk=steps <= plan.chunk,
        segment=SEGMENT,
        group=plan.group,
        lanes=32 if plan.block_d >= 32 else max(1, plan.block_d // 2),
    )


def kept_shape(u: Tensor, states: int, keep: bool) -> tuple[int, ...]:
    """Return the shape of the states that enter the later segments, (R, segments - 1, N, D).

    Args:
        u: the input, (R, T, D).
        states: N, the number of states per channel.
        keep: whether the states are kept; without it there are no segments.
    """
    return (u.shape[0], (u.shape[1] - 1) // SEGMENT if keep else 0, states, u.shape[2])


def _join_parts(x: ScanInputs, plan: Plan, cut: Cut, v: Tensor, W: Tensor, gate: Gate | None, adjoint: bool) -> Tensor:
    """Return `carried` (R, parts - 1, N, D), what enters the parts.

    It is the state, from v = u and W = B; with `adjoint` its adjoint, from v = dy and W = C.
    """
    rows, steps, channels = v.shape
    part_steps = _part_steps(steps, plan.parts)
    slots = triton.cdiv(steps, part_steps) - 1
    carried = v.new_empty((rows, slots, cut.n, channels), dtype=torch.float32)
    if slots == 0:
        return carried
    total = v.new_empty((rows, slots, channels), dtype=torch.float32)
    z = v if gate is None else gate.z
    part = Part(v, x.delta, x.A, W, x.delta_bias, z)
    strides = PartStrides(*(t.stride() for t in (v, x.delta, W, z)))
    # A kernel is compiled for every cut that differs: what this one does not read is the same for all.
    cut = dataclasses.replace(cut, gate=gate is not None, add=False, words=_in_words(W, 0), kept=False)
    part_kernel[(rows * slots * cut.blocks,)](
        part, strides, carried, total, steps, part_steps, cut, adjoint, **_OPTIONS
    )
    block = min(128, triton.next_power_of_2(cut.n * channels))
    join_kernel[(rows * triton.cdiv(cut.n * channels, block),)](
        carried, total, x.A, slots, channels, block, cut.n, adjoint, **_OPTIONS
    )
    return carried


def forward(p: ScanInputs, plan: Plan, y: Tensor, keep: bool, time: Time, gate: Gate | None = None) -> Tensor:
    """Scan one direction.

    Args:
        p: the inputs.
        plan: how the work is cut.
        y: where the output is written, (R, T, D), contiguous; with a gate whose `add` is set, the output is added to.
        keep: whether the states that enter the later segments are kept.
        time: how the steps are walked.
        gate: the gate of the output.

    Returns:
        The states that enter the later segments, of `kept_shape`.
    """
    rows, steps, _ = p.u.shape
    entering = p.u.new_empty(kept_shape(p.u, p.states, keep), dtype=torch.float32)
    if y.numel() == 0:
        return entering
    x, cut = prepared(p), _cut(p, time, plan)
    part_steps = _part_steps(steps, plan.parts)
    carried = _join_parts(x, plan, cut, p.u, p.B, None, adjoint=False)
    z, items = p.u if gate is None else gate.z, rows * triton.cdiv(steps, part_steps)
    cut = dataclasses.replace(
        cut,
        gate=gate is not None,
        add=gate is not None and gate.add,
        words=_in_words(p.B, 0) and _in_words(p.C, 0),
        kept=entering.numel() > 0,
    )
    forward_kernel[(plan.programs * cut.blocks,)](
        x, z, _strides(p, z, y), y, entering, carried, Work(items, steps, part_steps, plan.programs), cut, **_OPTIONS
    )
    return entering


def backward(
    p: ScanInputs,
    plan: Plan,
    dy: Tensor,
    entering: Tensor,
    time: Time,
    gate: Gate | None = None,
    dz: Tensor | None = None,
) -> ScanGradients:
    """Compute the gradients of one direction.

    Args:
        p: the inputs.
        plan: how the work is cut.
        dy: the gradient of y, or with a gate of y · SiLU(z), (R, T, D).
        entering: what `forward` returned.
        time: how the steps are walked.
        gate: the gate of the output.
        dz: where the gradient of z is written, (R, T, D), contiguous; with a gate whose `add` is set, it is added to.

    Returns:
        The gradients of u, delta, A, B, C, D and delta_bias; the last one has the shape (0,) where there is no bias.
    """
    rows, steps, _ = p.u.shape
    du, d_delta = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (p.u, p.delta))
    if du.numel() == 0:
        dA, dB, dC, dD = (torch.zeros_like(t) for t in (p.A, p.B, p.C, p.D))
        return du, d_delta, dA, dB, dC, dD, _of_bias(p, torch.zeros_like(p.D))
    x, cut = prepared(p), _cut(p, time, plan)
    part_steps = _part_steps(steps, plan.parts)
    carried = _join_parts(x, plan, cut, dy, p.C, gate, adjoint=True)
    # Without a gate nothing is read from z and nothing is written to dz.
    z, to_z = (dy, du) if gate is None or dz is None else (gate.z, dz)
    cut = dataclasses.replace(
        cut,
        gate=gate is not None,
        add=gate is not None and gate.add,
        words=_in_words(p.B, plan.group) and _in_words(p.C, plan.group),
        kept=entering.numel() > 0,
    )
    scratch_shape = (plan.programs * cut.blocks, SEGMENT // plan.chunk, p.states, plan.block_d)
    scratch = p.u.new_empty(scratch_shape, dtype=torch.float32)
    partial = _partial_sums(p, plan, cut)
    to, items = Gradients(du, d_delta, to_z), rows * triton.cdiv(steps, part_steps)
    backward_kernel[(plan.programs * cut.blocks,)](
        x,
        z,
        _strides(p, z, dy),
        dy,
        entering,
        carried,
        scratch,
        to,
        partial,
        Work(items, steps, part_steps, plan.programs),
        cut,
        **_OPTIONS,
    )
    return (du, d_delta, *_summed(p, partial))


def _partial_sums(p: ScanInputs, plan: Plan, cut: Cut) -> PartialSums:
    rows, steps, channels = p.u.shape
    shapes = ((cut.blocks, rows, steps, 2 * cut.n), (plan.programs, cut.n, channels), *[(plan.programs, channels)] * 2)
    return PartialSums(*(p.u.new_empty(shape, dtype=torch.float32) for shape in shapes))


def _summed(p: ScanInputs, partial: PartialSums) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of A, B, C, D and delta_bias from the kernel's partial sums."""
    dC, dB = partial.by_state[..., : p.states].sum(0), partial.by_state[..., p.states :].sum(0)
    dA = partial.dA.sum(0).t().contiguous().to(p.A.dtype)
    dD, bias = partial.dD.sum(0).to(p.D.dtype), partial.d_bias.sum(0)
    return dA, dB.to(p.B.dtype), dC.to(p.C.dtype), dD, _of_bias(p, bias)


def _of_bias(p: ScanInputs, gradient: Tensor) -> Tensor:
    return p.D.new_empty(0) if p.delta_bias is None else gradient.to(p.delta_bias.dtype)
