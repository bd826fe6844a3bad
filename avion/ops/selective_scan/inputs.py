"""The scan's inputs of one direction, as one record."""

from typing import NamedTuple

from torch import Tensor


class ScanInputs(NamedTuple):
    """One direction's tensors; the package's docstring has the shapes and the maths.

    A field of the kernels' own arguments is called the same: they take the record itself, prepared for them.
    """

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    delta_bias: Tensor | None
