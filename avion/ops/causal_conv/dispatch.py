"""`causal_conv_silu` and the choice of its backend, which goes with the scan's."""

import torch
from torch import Tensor

from avion.ops.selective_scan import resolve_backend
from avion.ops.selective_scan.mamba_ssm import causal_conv_silu_mamba_ssm

from .torch_backend import causal_conv_silu_both_torch, causal_conv_silu_torch

# Of the kernels that are not plain PyTorch.
_TAPS = range(2, 5)


def causal_conv_silu(
    x: Tensor, weight: Tensor, bias: Tensor, *, reverse: bool = False, backend: str = "auto"
) -> Tensor:
    """x (R, T, D) of any strides, weight (D, K), bias (D,) -> (R, T, D) in x's dtype.

    The sums are float32 (float64 where an argument is float64). `backend`: one of the scan's;
    "triton" and "mamba_ssm" have kernels for this too (for K from 2 to 4 and some rows), with the others
    it is plain operators. Raises ValueError for shapes that do not fit.
    """
    _check_shapes(x, weight, bias)
    float64 = torch.float64 in (x.dtype, weight.dtype, bias.dtype)
    name = resolve_backend(backend, x.device, float64=float64)
    if name == "mamba_ssm" and weight.shape[1] in _TAPS and len(x) > 0:
        return causal_conv_silu_mamba_ssm(x, weight, bias, reverse)
    if name == "triton" and weight.shape[1] in _TAPS:
        from .triton_backend import causal_conv_silu_triton  # only where there is a GPU for it

        return causal_conv_silu_triton(x, weight, bias, reverse)
    return causal_conv_silu_torch(x, weight, bias, reverse)


def causal_conv_silu_both(
    x: Tensor, forward: tuple[Tensor, Tensor], backward: tuple[Tensor, Tensor], *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """`causal_conv_silu` of x with the weight and bias `forward`, and with those of `backward` in reverse."""
    _check_shapes(x, *forward)
    _check_shapes(x, *backward)
    float64 = torch.float64 in {t.dtype for t in (x, *forward, *backward)}
    name, taps = resolve_backend(backend, x.device, float64=float64), forward[0].shape[1]
    if name == "triton" and taps in _TAPS and backward[0].shape[1] == taps:
        from .triton_backend import causal_conv_silu_both_triton  # only where there is a GPU for it

        return causal_conv_silu_both_triton(x, forward, backward)
    if name in ("torch", "reference"):
        return causal_conv_silu_both_torch(x, forward, backward)
    return (
        causal_conv_silu(x, *forward, backend=backend),
        causal_conv_silu(x, *backward, reverse=True, backend=backend),
    )


def _check_shapes(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    if x.ndim != 3 or weight.ndim != 2 or weight.shape[0] != x.shape[2] or bias.shape != x.shape[2:]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (x, weight, bias))
        raise ValueError(f"causal_conv_silu: expected x (R, T, D), weight (D, K), bias (D,), got {shapes}")
