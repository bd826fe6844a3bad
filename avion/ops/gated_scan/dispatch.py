"""`gated_bidirectional_scan`, which runs on the backend that the selective scan would run on."""

import torch
import torch.nn.functional as F
from torch import Tensor

from avion.ops.exporting import exported_scan, exporting
from avion.ops.selective_scan import resolve_backend, selective_scan
from avion.ops.selective_scan.dispatch import check_shapes
from avion.ops.selective_scan.inputs import ScanInputs, Time

from .torch_backend import gated_scan_torch


def gated_bidirectional_scan(forward: ScanInputs, backward: ScanInputs, z: Tensor, *, backend: str = "auto") -> Tensor:
    """Compute (y forward + y backward) · SiLU(z). Gradients flow to every tensor.

    Args:
        forward: the inputs of the scan along time.
        backward: the inputs of the scan from the end of time.
        z: the gate before its SiLU, (R, T, D).
        backend: a backend's name, or `auto`.

    Returns:
        The gated sum, (R, T, D) in u's dtype.

    Raises:
        UserError: the backend does not exist or cannot run.
        ValueError: the shapes do not fit.
    """
    for direction in (forward, backward):
        check_shapes(direction)
    if backward.u.shape != forward.u.shape:
        both = f"{tuple(forward.u.shape)} and {tuple(backward.u.shape)}"
        raise ValueError(f"gated_bidirectional_scan: u must be (R, T, D) in both directions alike, got {both}")
    if z.shape != forward.u.shape:
        raise ValueError(f"gated_bidirectional_scan: z must be {tuple(forward.u.shape)} as u is, got {tuple(z.shape)}")
    if exporting():
        return (exported_scan(forward, Time()) + exported_scan(backward, Time(reverse=True))) * F.silu(z)
    float64 = any(t.dtype == torch.float64 for t in (*forward.given(), *backward.given(), z))
    name = resolve_backend(backend, z.device, float64=float64, like=forward.u, states=forward.states)
    if name == "triton":
        from .triton_backend import gated_scan_triton  # only where there is a GPU for it

        return gated_scan_triton(_tensors(forward), _tensors(backward), z)
    if name == "torch":
        return gated_scan_torch(_tensors(forward), _tensors(backward), z)
    return _composed(forward, backward, z, name)


def _tensors(p: ScanInputs) -> list[Tensor]:
    """Return the seven tensors as the custom operators take them: a bias is among them in any case."""
    return [*p[:6], p.D.new_zeros(p.D.shape) if p.delta_bias is None else p.delta_bias]


def _composed(forward: ScanInputs, backward: ScanInputs, z: Tensor, backend: str) -> Tensor:
    both = ((forward, False), (backward, True))
    y = [selective_scan(*p[:-1], delta_bias=p.delta_bias, reverse=reverse, backend=backend) for p, reverse in both]
    return (y[0] + y[1]) * F.silu(z)
