"""The `triton` backend: kernels for GPUs, which tests run in Triton's interpreter.

The forward pass takes one program per row and block of channels, or per part of a row where rows are few and long. The
backward pass takes a fixed number of programs per block of channels, and each program takes several rows (or parts), so
that its sums over rows stay in registers and its scratch memory in the cache. Nothing is added atomically: two runs
agree bit for bit. Kept for the backward pass are the inputs, and for T > 32 the state that enters each later segment of
32 steps, N/32 times u's float32 size.
"""

import torch
from torch import Tensor

from avion.ops.tuning import tuned

from .autograd import differentiable
from .inputs import ScanInputs, Time
from .triton_launch import Plan, backward, backward_plans, forward, forward_plans, kept_shape


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
    """Return y (R, T, D), and the states (R, segments - 1, N, D) that enter the later segments of time."""
    p, time = ScanInputs(u, delta, A, B, C, D, delta_bias), Time(delta_softplus, reverse)

    def run(plan: Plan) -> tuple[Tensor, Tensor]:
        y = torch.empty_like(u, memory_format=torch.contiguous_format)
        return y, forward(p, plan, y, keep_states, time)

    return tuned("scan", u, A.shape[1], forward_plans(u, A.shape[1]), run)


@_scan.register_fake
def _(
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
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    return y, u.new_empty(kept_shape(u, A.shape[1], keep_states), dtype=torch.float32)


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
    """Return the gradients of u, delta, A, B, C, D and delta_bias, (0,) where there is no bias."""
    p, time = ScanInputs(u, delta, A, B, C, D, delta_bias), Time(delta_softplus, reverse)
    plans = backward_plans(u, A.shape[1])
    return tuned("scan backward", u, A.shape[1], plans, lambda plan: backward(p, plan, dy, entering, time))


selective_scan_triton = differentiable(_scan, _scan_backward)
