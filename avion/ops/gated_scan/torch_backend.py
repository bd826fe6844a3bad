"""The `torch` backend: two scans in blocks (`avion.ops.selective_scan.torch_blocks`), the gate while a block is hot.

Kept for backward are the inputs, the sum of both scans, and for T > 32 the states that enter each direction's later
blocks of time.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from avion.ops.selective_scan.torch_blocks import Group, Inputs, backward, compute_dtype, entering_shape, forward

from .autograd import differentiable


def _directions(ahead: Sequence[Tensor], behind: Sequence[Tensor]) -> tuple[Inputs, Inputs]:
    return Inputs(*ahead), Inputs(*behind, reverse=True)


def _silu(z: Tensor, out: Tensor) -> Tensor:
    return torch.sigmoid(z, out=out).mul_(z)


@torch.library.custom_op("avion::gated_scan", mutates_args=())
def _gated_scan(
    ahead: Sequence[Tensor], behind: Sequence[Tensor], z: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output (R, T, D); and if `keep` the sum of the scans (R, T, D), and the states that enter each direction's
    later blocks of time, (R, blocks - 1, N, D)."""
    with torch.autocast(z.device.type, enabled=False):
        first, second = _directions(ahead, behind)
        out = z.new_empty(z.shape, dtype=first.u.dtype)
        # In the compute dtype where it is summed up: y, not its rounding, is what the gate multiplies.
        total = z.new_empty(z.shape, dtype=first.dtype)
        entering = [x.A.new_empty(entering_shape(x.u, x.states, keep)) for x in (first, second)]

        def close(y: Tensor, spare: Tensor, group: Group) -> None:
            sum_at = group.view(total)
            y.add_(sum_at)
            if keep:
                sum_at.copy_(y)
            group.view(out).copy_(_silu(group.view(z).to(y.dtype), out=spare).mul_(y))

        forward(first, lambda y, _, group: group.view(total).copy_(y), entering[0])
        forward(second, close, entering[1])
        return out, total if keep else total.new_empty(0), *entering


@_gated_scan.register_fake
def _(ahead, behind, z, keep):
    dtypes = [compute_dtype(*tensors) for tensors in (ahead, behind)]
    entering = [
        z.new_empty(entering_shape(p[0], p[2].shape[1], keep), dtype=dtype)
        for p, dtype in zip((ahead, behind), dtypes, strict=True)
    ]
    return (
        z.new_empty(z.shape, dtype=ahead[0].dtype),
        z.new_empty(z.shape if keep else 0, dtype=dtypes[0]),
        *entering,
    )


@torch.library.custom_op("avion::gated_scan_backward", mutates_args=())
def _gated_scan_backward(
    d_out: Tensor, ahead: Sequence[Tensor], behind: Sequence[Tensor], z: Tensor, kept: Sequence[Tensor]
) -> list[Tensor]:
    """Gradients of the tensors of `ahead`, of those of `behind`, and of z."""
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
        grads = []
        for p, x, load, states in zip(
            (ahead, behind), _directions(ahead, behind), (through_gate_to_z, through_gate), entering, strict=True
        ):
            grads.extend(backward(x, load, states).as_inputs(p[2], p[5], p[6]))
        return [*grads, dz]


# Inputs of one direction are float64 where the other's are.
gated_scan_torch = differentiable(_gated_scan, _gated_scan_backward)
