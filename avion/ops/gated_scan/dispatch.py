"""`gated_bidirectional_scan` and the choice of its backend, which goes with the scan's."""

import torch
import torch.nn.functional as F
from torch import Tensor

from avion.ops.selective_scan import resolve_backend, selective_scan
from avion.ops.selective_scan.dispatch import check_shapes
from avion.ops.selective_scan.inputs import ScanInputs

from .torch_backend import gated_scan_torch


def gated_bidirectional_scan(forward: ScanInputs, backward: ScanInputs, z: Tensor, *, backend: str = "auto") -> Tensor:
    """(y forward + y backward) · SiLU(z), (R, T, D) in u's dtype; gradients flow to every tensor.

    Raises UserError for a backend that does not exist or cannot run, ValueError for shapes that do not fit.
    """
    for direction in (forward, backward):
        check_shapes(*direction)
    if backward.u.shape != forward.u.shape:
        both = f"{tuple(forward.u.shape)} and {tuple(backward.u.shape)}"
        raise ValueError(f"gated_bidirectional_scan: u must be (R, T, D) in both directions alike, got {both}")
    if z.shape != forward.u.shape:
        raise ValueError(f"gated_bidirectional_scan: z must be {tuple(forward.u.shape)} as u is, got {tuple(z.shape)}")
    float64 = any(t.dtype == torch.float64 for t in (*forward, *backward, z))
    u, states = forward.u, forward.A.shape[1]
    name = resolve_backend(backend, z.device, float64=float64, like=u, states=states)
    if name == "triton":
        from .triton_backend import gated_scan_triton  # only where there is a GPU for it

        return gated_scan_triton(forward, backward, z)
    if name == "torch":
        return gated_scan_torch(forward, backward, z)
    return _composed(forward, backward, z, name)


def _composed(forward: ScanInputs, backward: ScanInputs, z: Tensor, backend: str) -> Tensor:
    both = ((forward, False), (backward, True))
    y = [selective_scan(*p[:-1], delta_bias=p.delta_bias, reverse=reverse, backend=backend) for p, reverse in both]
    return (y[0] + y[1]) * F.silu(z)
