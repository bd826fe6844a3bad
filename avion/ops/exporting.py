"""The operators as `torch.export` takes them: plain PyTorch for any number of rows and steps, on no particular machine.

The backends walk through time in Python loops and in operators of this project, which no other process has. While a
model is exported, `exporting` is true, and the dispatchers take the functions of this file, whatever backend was asked
for. They compute what the `torch` backend computes, and are for inference only.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from avion.ops.selective_scan.inputs import ScanInputs, Time

_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)  # PyTorch 2.6 has none


def exporting() -> bool:
    """Return whether a model is being traced by `torch.export`, with or without Dynamo."""
    return _is_exporting()


def exported_conv_silu(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
    """Compute `causal_conv_silu`: x (R, T, D), weight (D, K), bias (D,) → (R, T, D)."""
    halo = weight.shape[1] - 1
    taps = weight.flip(1) if reverse else weight
    padded = F.pad(x.transpose(1, 2), (0, halo) if reverse else (halo, 0))  # (R, D, T + K - 1)
    return F.silu(F.conv1d(padded, taps[:, None], bias, groups=x.shape[2])).transpose(1, 2)


def exported_scan(p: "ScanInputs", time: "Time") -> Tensor:
    """Compute `selective_scan`, (R, T, D), in one loop over time that stays a loop in the exported program."""
    # A private name, but the only loop over a dimension of unknown size that PyTorch and ONNX both have.
    from torch._higher_order_ops.scan import scan

    dtype = p.compute_dtype
    u, delta, B, C = (t.to(dtype) for t in (p.u, p.delta, p.B, p.C))
    step_size = delta if p.delta_bias is None else delta + p.delta_bias.to(dtype)  # (R, T, D)
    step_size = F.softplus(step_size) if time.softplus else step_size
    A = p.A.to(dtype).t().contiguous()  # (N, D)

    def step(state: Tensor, now: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        size, size_u, b, c = now  # (R, D), (R, D), (R, N), (R, N)
        state = torch.exp(size[:, None] * A) * state + b[..., None] * size_u[:, None]  # (R, N, D)
        return state, (c[..., None] * state).sum(1)

    start = u.new_zeros(u.shape[0], A.shape[0], A.shape[1])
    _, y = scan(step, start, (step_size, step_size * u, B, C), dim=1, reverse=time.reverse)  # (R, T, D)
    return (y + p.D.to(dtype) * u).to(p.u.dtype)
