"""The `mamba_ssm` backend: the CUDA kernels of the packages mamba-ssm (scan) and causal-conv1d (convolution).

They want time contiguous, (R, D, T), know one direction only, and keep a float32 buffer of (R, D, 2N) per 2,048 steps
for backward: what is here turns and flips tensors, and splits rows so that their 32-bit offsets never overflow.
"""

import importlib
import importlib.metadata
import re

import torch
from torch import Tensor

from .torch_backend import selective_scan_torch

# Older ones call the convolution's kernel with other arguments (TypeError: causal_conv1d_fwd), and the releases of
# mamba-ssm numbered 1.x include the forks with `bimamba_type`, which replace the stock functions.
_MINIMUM = {"mamba-ssm": (2, 2), "causal-conv1d": (1, 4)}
_INSTALL = "pip install --no-build-isolation -r requirements-cuda.txt (it needs nvcc)"

_MAX_ELEMENTS = 2**31 - 1
_STEPS_PER_CHUNK = 2048  # of the kernel's buffer
_MAX_STATES = 256


def unavailable(device: torch.device) -> str | None:
    """Why the kernels cannot run on `device`; None where they can. The compiled extensions are loaded to find out: that
    the packages are importable says nothing."""
    if device.type != "cuda":
        return "its kernels are for NVIDIA GPUs"
    for package, minimum in _MINIMUM.items():
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return f"the package {package} is not installed: {_INSTALL}"
        if tuple(int(number) for number in re.findall(r"\d+", version)[:2]) < minimum:
            working = ".".join(map(str, minimum))
            return f"{package} {version} is known not to work, {working} or newer does: {_INSTALL}"
        try:
            _load_extension(package)
        except ImportError as error:
            reason = str(error).splitlines()[0]
            return f"the compiled extension of {package} {version} does not load ({reason}): {_INSTALL}"
    return None


def _load_extension(package: str) -> None:
    if package == "mamba-ssm":
        importlib.import_module("selective_scan_cuda")
    else:
        importlib.import_module("causal_conv1d_cuda")


def rows_per_call(channels: int, steps: int, states: int) -> int:
    """How many rows a call may take: neither the tensors nor the kernel's buffer reach 2^31 elements."""
    chunks = -(-steps // _STEPS_PER_CHUNK)
    return max(1, _MAX_ELEMENTS // (channels * max(steps, 2 * states * chunks)))


def selective_scan_mamba_ssm(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
    reverse: bool = False,
) -> Tensor:
    """See the package's docstring for shapes and maths; y (R, T, D) in u's dtype. N up to 256."""
    rows, steps, channels = u.shape
    states = A.shape[1]
    if states > _MAX_STATES:
        raise ValueError(f"selective_scan: mamba_ssm takes up to {_MAX_STATES} states, got {states}")
    if rows == 0:
        return selective_scan_torch(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse)
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    # The kernel wants one dtype for all that varies in time, and float32 for the rest.
    varying = [_time_last(x.to(u.dtype), reverse) for x in (u, delta, B, C)]
    A, D = A.float(), D.float()
    bias = None if delta_bias is None else delta_bias.float()
    size = rows_per_call(channels, steps, states)
    parts = [
        selective_scan_fn(u_, delta_, A, B_, C_, D, None, bias, delta_softplus)
        for u_, delta_, B_, C_ in zip(*(x.split(size) for x in varying), strict=True)
    ]
    y = (parts[0] if len(parts) == 1 else torch.cat(parts)).transpose(1, 2)  # (R, T, D)
    return y.flip(1) if reverse else y


def causal_conv_silu_mamba_ssm(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
    """`avion.ops.causal_conv.causal_conv_silu` by causal-conv1d; K from 2 to 4."""
    from causal_conv1d import causal_conv1d_fn

    size = max(1, _MAX_ELEMENTS // (x.shape[1] * x.shape[2]))
    parts = [causal_conv1d_fn(part, weight, bias, activation="silu") for part in _time_last(x, reverse).split(size)]
    y = (parts[0] if len(parts) == 1 else torch.cat(parts)).transpose(1, 2)
    return y.flip(1) if reverse else y


def _time_last(x: Tensor, reverse: bool) -> Tensor:
    """(R, T, X) -> (R, X, T) contiguous, in walking order."""
    return (x.flip(1) if reverse else x).transpose(1, 2).contiguous()
