"""The `torch` backend: two scans in blocks (`avion.ops.selective_scan.torch_blocks`), the gate while a block is cached.

Kept for the backward pass are the inputs, the sum of both scans, and for T > 32 the states that enter the later blocks
of time of each direction.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from avion.ops.selective_scan.inputs import ScanInputs, Time
from avion.ops.selective_scan.torch_blocks import Direction, Group, backward, entering_shape, forward

from .autograd import differentiable


def _directions(ahead: Sequence[Tensor], behind: Sequence[Tensor]) -> tuple[Direction, Direction]:
    return Direction(ScanInputs(*ahead), Time()), Direction(ScanInputs(*behind), Time(reverse=True))


def _silu(z: Tensor, out: Tensor) -> Tensor:
    return torch.sigmoid(z, out=out).mul_(z)


@torch.library.custom_op("avion::gated_scan", mutates_args=())
def _gated_scan(
    ahead: Sequence[Tensor], behind: Sequence[Tensor], z: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the output (R, T, D), and what the backward pass needs, which is empty unless `keep`.

    The latter is the sum of the scans (R, T, D), and for each direction the states that enter the later blocks of time,
    (R, blocks - 1, N, D).
    """
    with torch.autocast(z.device.type, enabled=False):
        first, second = _directions(ahead, behind)
        out = z.new_empty(z.shape, dtype=first.inputs.u.dtype)
        # Summed up in the compute dtype, so that the gate multiplies y before it is rounded.
        total = z.new_empty(z.shape, dtype=first.dtype)
        entering = [x.A.new_empty(entering_shape(x.inputs.u, x.states, keep)) for x in (first, second)]

        def close(y: Tensor, spare: Tensor, group: Group) -> None:
            sum_at = group.view(total)
            y.add_(sum_at)
            if keep:
                sum_at.copy_(y)
            group.view(out).copy_(_silu(group.view(z).to(y.dtype), out=spare).mul_(y))

        forward(first, lambda y, _, group: group.view(total).copy_(y), entering[0])
        forward(second, close, entering[1])
        return out, total if keep else total.new_empty(0), entering[0], entering[1]


@_gated_scan.register_fake
def _(
    ahead: Sequence[Tensor], behind: Sequence[Tensor], z: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    first, second = ScanInputs(*ahead), ScanInputs(*behind)
    by_first, by_second = (
        z.new_empty(entering_shape(p.u, p.states, keep), dtype=p.compute_dtype) for p in (first, second)
    )
    out = z.new_empty(z.shape, dtype=first.u.dtype)
    return out, z.new_empty(z.shape if keep else 0, dtype=first.compute_dtype), by_first, by_second


@torch.library.custom_op("avion::gated_scan_backward", mutates_args=())
def _gated_scan_backward(
    d_out: Tensor, ahead: Sequence[Tensor], behind: Sequence[Tensor], z: Tensor, kept: Sequence[Tensor]
) -> list[Tensor]:
    """Return the gradients of the tensors of `ahead`, of those of `behind`, and of z."""
    total, *entering = kept
    dz = z.new_empty(z.shape)

    def through_gate(out: Tensor, spare: Tensor, group: Group) -> None:
        _silu(group.view(z).to(out.dtype), out=spare)
        torch.mul(spare, group.view(d_out), out=out)

    def through_gate_to_z(out: Tensor, spare: Tensor, group: Group) -> None:
        torch.mul(group.view(d_out), group.view(total), out=spare)
        torch.ops.aten.silu_backward.grad_input(spare, group.view(z).to(out.dtype), grad_input=out)
        group.view(dz).copy_(out)
        through_gate(out, spare, group)

    with torch.autocast(z.device.type, enabled=False):
        first, second = _directions(ahead, behind)
        by_first = backward(first, through_gate_to_z, entering[0])
        return [*by_first, *backward(second, through_gate, entering[1]), dz]


gated_scan_torch = differentiable(_gated_scan, _gated_scan_backward)
