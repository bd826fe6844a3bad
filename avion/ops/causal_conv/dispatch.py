"""`causal_conv_silu`, which runs on the backend that the selective scan would run on."""

import torch
from torch import Tensor

from avion.ops.exporting import exported_conv_silu, exporting
from avion.ops.selective_scan import resolve_backend
from avion.ops.selective_scan.mamba_ssm import causal_conv_silu_mamba_ssm

from .autograd import Taps
from .torch_backend import causal_conv_silu_both_torch, causal_conv_silu_torch

# The numbers of taps for which there are kernels; plain PyTorch takes any.
_TAPS = range(2, 5)


def causal_conv_silu(
    x: Tensor, weight: Tensor, bias: Tensor, *, reverse: bool = False, backend: str = "auto"
) -> Tensor:
    """Convolve over time, causally and per channel, and apply the SiLU. Gradients flow to every tensor.

    Args:
        x: the input, (R, T, D), of any strides.
        weight: the taps, (D, K).
        bias: (D,).
        reverse: whether time runs from the last step to the first.
        backend: the name of a backend of the selective scan, or `auto`. "triton" and "mamba_ssm" have kernels for K
            from 2 to 4; in all other cases plain operators compute the result.

    Returns:
        y, (R, T, D) in x's dtype. The sums are computed in float32, or in float64 where an argument is float64.

    Raises:
        UserError: the backend does not exist or cannot run.
        ValueError: the shapes do not fit.
    """
    _check_shapes(x, weight, bias)
    if exporting():
        return exported_conv_silu(x, weight, bias, reverse)
    float64 = torch.float64 in (x.dtype, weight.dtype, bias.dtype)
    name = resolve_backend(backend, x.device, float64=float64)
    if name == "mamba_ssm" and weight.shape[1] in _TAPS and len(x) > 0:
        return causal_conv_silu_mamba_ssm(x, weight, bias, reverse)
    if name == "triton" and weight.shape[1] in _TAPS:
        from .triton_backend import causal_conv_silu_triton  # only where there is a GPU for it

        return causal_conv_silu_triton(x, weight, bias, reverse)
    return causal_conv_silu_torch(x, weight, bias, reverse)


def causal_conv_silu_both(x: Tensor, forward: Taps, backward: Taps, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Compute `causal_conv_silu` of x in both directions of time.

    Args:
        x: the input, (R, T, D), of any strides.
        forward: weight (D, K) and bias (D,) of the direction along time.
        backward: weight and bias of the direction from the end of time.
        backend: as in `causal_conv_silu`.

    Returns:
        y of each direction, (R, T, D) in x's dtype.

    Raises:
        UserError: the backend does not exist or cannot run.
        ValueError: the shapes do not fit.
    """
    _check_shapes(x, *forward)
    _check_shapes(x, *backward)
    if exporting():
        return exported_conv_silu(x, *forward, False), exported_conv_silu(x, *backward, True)
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
