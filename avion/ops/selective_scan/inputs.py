"""The scan's inputs of one direction, as one record."""

from typing import NamedTuple

from torch import Tensor


class ScanInputs(NamedTuple):
    """One direction's tensors: u, delta (R, T, D), A (D, N), B, C (R, T, N), D and delta_bias (D,).

    The package's docstring has the maths. The Triton kernels take such a record too, prepared for them.
    """

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    delta_bias: Tensor | None
