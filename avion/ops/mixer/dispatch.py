"""Which of the ways to compute a mixer takes a case."""

import torch
from torch import Tensor

from avion.ops.exporting import exporting
from avion.ops.graphs import constant_in_graphs
from avion.ops.selective_scan import resolve_backend
from avion.ops.selective_scan.torch_blocks import MAX_STEPS

from .c_functions import native
from .native_backend import mixer_in_c
from .torch_backend import mixer_of_operators
from .weights import MixerWeights


def runs_whole(xz: Tensor, backend: str) -> bool:
    """Return whether `mixer_of_whole_rows` is for this case: the torch backend on a CPU, rows of one block of time."""
    if exporting():
        return False
    float64 = xz.dtype == torch.float64
    on_cpu = xz.device.type == "cpu" and xz.shape[1] <= MAX_STEPS
    return on_cpu and resolve_backend(backend, xz.device, float64=float64) == "torch"


def mixer_of_whole_rows(xz: Tensor, forward: MixerWeights, backward: MixerWeights, *, backend: str = "auto") -> Tensor:
    """Compute a bidirectional mixer between its projections. The package's docstring has the maths.

    Args:
        xz: the output of the input projection, (R, T, 2I), of any strides; T is at most 32.
        forward: the parameters of the direction along time.
        backward: the parameters of the direction from the end of time.
        backend: `auto` takes the C code where it is compiled and no tensor is float64; `torch` takes PyTorch's
            operators.

    Returns:
        The input of the output projection, (R, T, I) in xz's dtype. Gradients flow to xz and every parameter.

    Raises:
        ValueError: T is 0, or more than 32; or the shapes or devices of the tensors do not belong together.
    """
    _check(xz, forward, backward)
    float64 = any(t.dtype == torch.float64 for t in (xz, *forward, *backward))
    in_c = backend == "auto" and not float64 and xz.device.type == "cpu" and _compiled()
    return (mixer_in_c if in_c else mixer_of_operators)(xz, forward, backward)


def _check(xz: Tensor, *directions: MixerWeights) -> None:
    """Refuse tensors that do not belong together: the C code would read and write beyond them."""
    if xz.ndim != 3 or xz.shape[2] < 2 or xz.shape[2] % 2:
        raise ValueError(f"mixer_of_whole_rows: xz must be (R, T, 2I), got {tuple(xz.shape)}")
    if not 1 <= xz.shape[1] <= MAX_STEPS:
        raise ValueError(f"mixer_of_whole_rows: T must be 1 to {MAX_STEPS}, got {xz.shape[1]}")
    channels = xz.shape[2] // 2
    for p in directions:
        taps, rank, states = (t.shape[-1] for t in (p.conv, p.dt_proj, p.A))
        wide, in_all = (channels,), rank + 2 * states
        shapes = ((channels, taps), wide, (in_all, channels), (channels, rank), (channels, states), wide, wide)
        for name, tensor, shape in zip(MixerWeights._fields, p, shapes, strict=True):
            if tensor.shape != shape or tensor.device != xz.device:
                found = f"{tuple(tensor.shape)} on {tensor.device}"
                raise ValueError(f"mixer_of_whole_rows: {name} must be {shape} on {xz.device}, got {found}")


# The library is looked for when a graph is compiled, not when the graph runs.
@constant_in_graphs
def _compiled() -> bool:
    return native().library is not None
