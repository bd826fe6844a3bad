"""What both ways to compute the mixer share: the products on the way to the step sizes, and the operator's shapes.

Legend: M tokens of a group of rows, I width, N states, Q rank of the step size. "Linear" is the dtype of the products:
that of xz, as autocast would have it.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from avion.ops.selective_scan.inputs import compute_dtype

from .weights import MixerWeights


class Projections(Protocol):
    """The weights of the products of a direction, in the linear dtype; or their gradients, in the compute dtype."""

    x_proj: Tensor  # (Q + 2N, I)
    dt_proj: Tensor  # (I, Q)


def raw_step_sizes(p: Projections, projected: Tensor, delta_bias: Tensor, out: Tensor) -> None:
    """Write the step sizes before the softplus, (M, I), to `out`.

    Args:
        p: the weights.
        projected: the output of x_proj, (M, Q + 2N), in the linear dtype.
        delta_bias: (I,), in the compute dtype, as `out`.
        out: is written.
    """
    dt = projected[:, : p.dt_proj.shape[1]]
    if dt.dtype == out.dtype:
        torch.addmm(delta_bias, dt, p.dt_proj.t(), out=out)
    else:
        torch.add(dt @ p.dt_proj.t(), delta_bias, out=out)


def products_backward(
    p: Projections, sums: Projections, projected: Tensor, u: Tensor, d_raw: Tensor, d_projected: Tensor, du: Tensor
) -> None:
    """Walk back through x_proj and dt_proj.

    Args:
        p: the weights.
        sums: their gradients, to which this group's are added.
        projected: the output of x_proj, (M, Q + 2N), in the linear dtype.
        u: the input of x_proj, (M, I), in the compute dtype, as what follows.
        d_raw: the gradient of the step sizes before the softplus, (M, I).
        d_projected: the gradient of `projected`; the columns of B and C are filled, those of dt are written.
        du: the gradient of u by the scan, (M, I), to which that by x_proj is added.
    """
    rank, linear = p.dt_proj.shape[1], projected.dtype
    dt, d_dt = projected[:, :rank], d_projected[:, :rank]
    if linear == d_projected.dtype:
        torch.mm(d_raw, p.dt_proj, out=d_dt)
        sums.dt_proj.addmm_(d_raw.t(), dt)
        sums.x_proj.addmm_(d_projected.t(), u)
        du.addmm_(d_projected, p.x_proj)
        return
    d_raw = d_raw.to(linear)
    d_dt.copy_(d_raw @ p.dt_proj)
    sums.dt_proj += d_raw.t() @ dt
    d_projected = d_projected.to(linear)
    sums.x_proj += d_projected.t() @ u.to(linear)
    du.add_(d_projected @ p.x_proj)


def outputs_without_values(
    ahead: Sequence[Tensor], behind: Sequence[Tensor], xz: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what the operator of the forward pass returns, with no values in it (`torch.library`'s fake)."""
    rows, steps, channels = xz.shape[0], xz.shape[1], xz.shape[2] // 2
    tokens = rows * steps if keep else 0
    by_ahead, by_behind = (xz.new_empty(tokens, len(MixerWeights(*p).x_proj)) for p in (ahead, behind))
    total = xz.new_empty(tokens, channels, dtype=compute_dtype(xz, *ahead, *behind))
    return xz.new_empty(rows, steps, channels), total, by_ahead, by_behind
