"""The tensors of a scan in one direction of time, and how the scan walks through time: one record each."""

from typing import NamedTuple

import torch
from torch import Tensor


class ScanInputs(NamedTuple):
    """The tensors of one direction. The docstring of the package `avion.ops.selective_scan` has the maths.

    The functions of this package, all backends and the Triton kernels take this record. The Triton kernels take it
    prepared: `triton_launch.prepared` says how.

    Attributes:
        u: the input, (R, T, D).
        delta: the step size before bias and softplus, (R, T, D).
        A: negative decay rates, (D, N).
        B: input vectors, (R, T, N).
        C: output vectors, (R, T, N).
        D: skip weights, (D,).
        delta_bias: what is added to delta before the softplus, (D,); None adds nothing.
    """

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    delta_bias: Tensor | None

    @property
    def states(self) -> int:
        """N, the number of states per channel."""
        return self.A.shape[1]

    def given(self) -> list[Tensor]:
        """All tensors of the record, without the bias where there is none."""
        return [tensor for tensor in self if tensor is not None]

    @property
    def compute_dtype(self) -> torch.dtype:
        """float64 where a tensor is float64, else float32."""
        return compute_dtype(*self.given())


class Time(NamedTuple):
    """How a scan walks through its steps.

    Attributes:
        softplus: whether the step size is the softplus of delta and its bias, or their plain sum.
        reverse: whether time is walked from the last step to the first.
    """

    softplus: bool = True
    reverse: bool = False


# The gradients of u, delta, A, B, C, D and delta_bias; the last one has the shape (0,) where there is no bias.
ScanGradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype in which step sizes, states and sums are computed.

    Args:
        *tensors: all inputs.

    Returns:
        float64 where an input is float64, else float32.
    """
    return torch.float64 if torch.float64 in {t.dtype for t in tensors} else torch.float32
