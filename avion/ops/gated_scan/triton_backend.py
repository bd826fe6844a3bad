"""The `triton` backend: the kernels of `avion.ops.selective_scan`, in two launches forward and two backward.

The second launch reads what the first direction has written, adds its own share and applies the gate, so that the sum
is never written. The backward pass recomputes it beside the states. What is kept is the inputs, and for T > 32 the
states that enter the later segments of 32 steps of each direction.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from avion.ops.selective_scan import triton_launch as launch
from avion.ops.selective_scan.inputs import ScanInputs, Time
from avion.ops.selective_scan.triton_launch import Gate, Plan
from avion.ops.tuning import tuned

from .autograd import differentiable

_AHEAD, _BEHIND = Time(), Time(reverse=True)


@torch.library.custom_op("avion::gated_scan_triton", mutates_args=())
def _gated_scan(
    ahead: Sequence[Tensor], behind: Sequence[Tensor], z: Tensor, keep_states: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output (R, T, D), and for each direction the states (R, segments - 1, N, D) of the later segments."""
    first, second = ScanInputs(*ahead), ScanInputs(*behind)
    u, states = first.u, first.states

    def run(plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
        out = torch.empty_like(u, memory_format=torch.contiguous_format)
        kept = launch.forward(first, plan, out, keep_states, _AHEAD)
        return out, kept, launch.forward(second, plan, out, keep_states, _BEHIND, Gate(z, add=True))

    return tuned("gated scan", u, states, launch.forward_plans(u, states), run)


@_gated_scan.register_fake
def _(ahead: Sequence[Tensor], behind: Sequence[Tensor], z: Tensor, keep_states: bool) -> tuple[Tensor, Tensor, Tensor]:
    first = ScanInputs(*ahead)
    shape = launch.kept_shape(first.u, first.states, keep_states)
    by_first, by_second = (first.u.new_empty(shape, dtype=torch.float32) for _ in range(2))
    return torch.empty_like(first.u, memory_format=torch.contiguous_format), by_first, by_second


@torch.library.custom_op("avion::gated_scan_triton_backward", mutates_args=())
def _gated_scan_backward(
    d_out: Tensor, ahead: Sequence[Tensor], behind: Sequence[Tensor], z: Tensor, kept: Sequence[Tensor]
) -> list[Tensor]:
    """Return the gradients of the tensors of `ahead`, of those of `behind`, and of z."""
    first, second = ScanInputs(*ahead), ScanInputs(*behind)
    u, states = first.u, first.states

    def run(plan: Plan) -> list[Tensor]:
        dz = torch.empty_like(z, memory_format=torch.contiguous_format)
        by_first = launch.backward(first, plan, d_out, kept[0], _AHEAD, Gate(z, add=False), dz)
        return [*by_first, *launch.backward(second, plan, d_out, kept[1], _BEHIND, Gate(z, add=True), dz), dz]

    return tuned("gated scan backward", u, states, launch.backward_plans(u, states), run)


gated_scan_triton = differentiable(_gated_scan, _gated_scan_backward)
