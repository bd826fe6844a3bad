"""The `triton` backend: kernels for GPUs (`triton_kernels.py`), also run by Triton's interpreter for tests.

Forward is one program per row and block of channels. Backward is a fixed number of programs per block of
channels, each taking every so-many-th row: so that its sums over rows stay in registers and its scratch in the
cache. Nothing is added atomically: two runs agree bit for bit. Kept for backward: the inputs, and for T > 32 the state
that enters each later segment of 32 steps, N/32 times u's float32 size.
"""

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .autograd import differentiable
from .triton_kernels import backward_kernel, forward_kernel

_LOG2_E = math.log2(math.e)
_SEGMENT = 32  # steps between the states that are kept for backward


class _Plan(NamedTuple):
    """How the work is cut: channels and warps of a program of forward and of backward, steps of a chunk, programs of
    backward per block of channels."""

    forward_d: int
    forward_warps: int
    backward_d: int
    backward_warps: int
    chunk: int
    programs: int


def _plan(u: Tensor, states: int) -> _Plan:
    rows, steps, channels = u.shape
    if not u.is_cuda:  # the interpreter: small enough to reach every branch at small sizes
        return _Plan(4, 1, 4, 1, 2 if steps < 8 else 4, min(rows, 2))
    processors = torch.cuda.get_device_properties(u.device).multi_processor_count
    # Backward holds the states and decays of a chunk in registers.
    chunk = 4 if states <= 16 else 2 if states <= 32 else 1
    # Few rows: one warp per program, for more programs, since each is a chain of dependent steps.
    wide = rows * channels >= 128 * 8 * processors
    forward_d, backward_d = (128 if wide else 32), 32
    programs = max(1, min(rows, 8 * processors // triton.cdiv(channels, backward_d)))
    return _Plan(forward_d, forward_d // 32, backward_d, backward_d // 32, chunk, programs)


def _float32(A: Tensor, D: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """A as (N, D) times log2(e), D, and the bias (D in its place where there is none: a pointer that is not read)."""
    A_log2 = (A.float() * _LOG2_E).t().contiguous()
    skip = D.float().contiguous()
    return A_log2, skip, skip if bias is None else bias.float().contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()]


def _constants(chunk: int, steps: int, states: int, bias: Tensor | None, softplus: bool, reverse: bool) -> dict:
    # One stage: pipelining the loop over rows would double the registers that are short already.
    return {
        "N": triton.next_power_of_2(states), "CHUNK": chunk, "SEGMENT": _SEGMENT, "HAS_BIAS": bias is not None,
        "SOFTPLUS": softplus, "REVERSE": reverse, "ONE_CHUNK": steps <= chunk, "num_stages": 1,
    }  # fmt: skip


def _entering_shape(u: Tensor, states: int, keep: bool) -> tuple[int, ...]:
    return (u.shape[0], (u.shape[1] - 1) // _SEGMENT if keep else 0, states, u.shape[2])


@torch.library.custom_op("avion::selective_scan_triton", mutates_args=())
def _scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    keep_states: bool,
) -> tuple[Tensor, Tensor]:
    """y (R, T, D), and the states (R, segments - 1, N, D) that enter the later segments of time."""
    rows, steps, channels = u.shape
    states = A.shape[1]
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    entering = u.new_empty(_entering_shape(u, states, keep_states), dtype=torch.float32)
    if y.numel() == 0:
        return y, entering
    plan = _plan(u, states)
    A_log2, skip, bias = _float32(A, D, delta_bias)
    forward_kernel[(rows * triton.cdiv(channels, plan.forward_d),)](
        u, delta, A_log2, B, C, skip, bias, y, entering, steps, channels, states, *_strides(u, delta, B, C),
        **_constants(plan.chunk, steps, states, delta_bias, delta_softplus, reverse), KEEP=entering.numel() > 0,
        BLOCK_D=plan.forward_d, num_warps=plan.forward_warps,
    )  # fmt: skip
    return y, entering


@_scan.register_fake
def _(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse, keep_states):
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    return y, u.new_empty(_entering_shape(u, A.shape[1], keep_states), dtype=torch.float32)


@torch.library.custom_op("avion::selective_scan_triton_backward", mutates_args=())
def _scan_backward(
    dy: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor | None,
    entering: Tensor,
    delta_softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, A, B, C, D and delta_bias (of shape (0,) where there is none)."""
    rows, steps, channels = u.shape
    states = A.shape[1]
    du, d_delta = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (u, delta))
    if du.numel() == 0:
        zeros = [torch.zeros_like(x) for x in (A, B, C, D)]
        return du, d_delta, *zeros, D.new_empty(0) if delta_bias is None else torch.zeros_like(delta_bias)
    plan = _plan(u, states)
    blocks = triton.cdiv(channels, plan.backward_d)
    A_log2, skip, bias = _float32(A, D, delta_bias)
    constants = _constants(plan.chunk, steps, states, delta_bias, delta_softplus, reverse)

    def partial(*shape: int) -> Tensor:
        return u.new_empty(shape, dtype=torch.float32)

    scratch = partial(plan.programs * blocks, _SEGMENT // plan.chunk, constants["N"], plan.backward_d)
    dB, dC = partial(blocks, rows, steps, states), partial(blocks, rows, steps, states)
    dA = partial(plan.programs, states, channels)
    dD, d_bias = partial(plan.programs, channels), partial(plan.programs, channels)
    backward_kernel[(plan.programs * blocks,)](
        dy, u, delta, A_log2, B, C, skip, bias, entering, scratch, du, d_delta, dB, dC, dA, dD, d_bias,
        rows, steps, channels, states, plan.programs, *_strides(dy, u, delta, B, C),
        **constants, KEPT=entering.numel() > 0, BLOCK_D=plan.backward_d, num_warps=plan.backward_warps,
    )  # fmt: skip
    by_bias = D.new_empty(0) if delta_bias is None else d_bias.sum(0).to(delta_bias.dtype)
    by_A = dA.sum(0).t().contiguous().to(A.dtype)
    return du, d_delta, by_A, dB.sum(0).to(B.dtype), dC.sum(0).to(C.dtype), dD.sum(0).to(D.dtype), by_bias


selective_scan_triton = differentiable(_scan, _scan_backward)
