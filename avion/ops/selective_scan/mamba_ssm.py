"""The `mamba_ssm` backend: the CUDA kernels of the packages mamba-ssm (scan) and causal-conv1d (convolution).

These kernels expect time to be contiguous, (R, D, T), know one direction only, and keep a float32 buffer of (R, D, 2N)
per 2,048 steps for the backward pass. The functions here transpose and flip tensors, and split rows so that the 32-bit
offsets of the kernels never overflow.
"""

import importlib
import importlib.metadata
import re

import torch
from torch import Tensor

from .inputs import ScanInputs, Time
from .torch_backend import selective_scan_torch

# Older versions call the kernel of the convolution with other arguments (TypeError: causal_conv1d_fwd), and the
# releases of mamba-ssm numbered 1.x include the forks with `bimamba_type`, which replace the stock functions.
_MINIMUM = {"mamba-ssm": (2, 2), "causal-conv1d": (1, 4)}
_INSTALL = "pip install --no-build-isolation -r requirements-cuda.txt (it needs nvcc)"

_MAX_ELEMENTS = 2**31 - 1
_STEPS_PER_CHUNK = 2048  # of the kernel's buffer
_MAX_STATES = 256


def unavailable(device: torch.device) -> str | None:
    """Say why the kernels cannot run on a device.

    The compiled extensions are loaded to find out, because a package can be importable without a working extension.

    Returns:
        The reason; None where the kernels can run.
    """
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
    """Return how many rows one call may take: neither a tensor nor the kernel's buffer reaches 2^31 elements."""
    chunks = -(-steps // _STEPS_PER_CHUNK)
    return max(1, _MAX_ELEMENTS // (channels * max(steps, 2 * states * chunks)))


def selective_scan_mamba_ssm(inputs: ScanInputs, time: Time) -> Tensor:
    """Compute y, (R, T, D) in u's dtype. The package's docstring has the maths.

    Raises:
        ValueError: N is above 256.
    """
    u = inputs.u
    rows, steps, channels = u.shape
    if inputs.states > _MAX_STATES:
        raise ValueError(f"selective_scan: mamba_ssm takes up to {_MAX_STATES} states, got {inputs.states}")
    if rows == 0:
        return selective_scan_torch(inputs, time)
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    # The kernel requires one dtype for all that varies in time, and float32 for the rest.
    varying = [_time_last(x.to(u.dtype), time.reverse) for x in (u, inputs.delta, inputs.B, inputs.C)]
    A, D = inputs.A.float(), inputs.D.float()
    bias = None if inputs.delta_bias is None else inputs.delta_bias.float()
    size = rows_per_call(channels, steps, inputs.states)
    parts = [
        selective_scan_fn(u_, delta_, A, B_, C_, D, None, bias, time.softplus)
        for u_, delta_, B_, C_ in zip(*(x.split(size) for x in varying), strict=True)
    ]
    y = (parts[0] if len(parts) == 1 else torch.cat(parts)).transpose(1, 2)  # (R, T, D)
    return y.flip(1) if time.reverse else y


def causal_conv_silu_mamba_ssm(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
    """Compute `avion.ops.causal_conv.causal_conv_silu` with causal-conv1d, for K from 2 to 4."""
    from causal_conv1d import causal_conv1d_fn

    size = max(1, _MAX_ELEMENTS // (x.shape[1] * x.shape[2]))
    parts = [causal_conv1d_fn(part, weight, bias, activation="silu") for part in _time_last(x, reverse).split(size)]
    y = (parts[0] if len(parts) == 1 else torch.cat(parts)).transpose(1, 2)
    return y.flip(1) if reverse else y


def _time_last(x: Tensor, reverse: bool) -> Tensor:
    """(R, T, X) → (R, X, T), contiguous, in walking order."""
    return (x.flip(1) if reverse else x).transpose(1, 2).contiguous()
