"""Types for the parameters of Triton kernels and of the functions that kernels call.

A kernel is launched with PyTorch's tensors and with numbers. In their place the kernel sees addresses (`Pointer`) and
scalars (`Scalar`). A value that is known when the kernel is compiled is a `constexpr` for Triton, and the names `Int`,
`Flag`, `Dtype` and `Shape` tell the type checker what the value is.

Triton itself reads annotations of the kernels that are launched, and of no other functions: there, what is known when
the kernel is compiled must be annotated with the very name `constexpr`, and `int` would mean a number of 32 bits.
"""

from typing import TYPE_CHECKING, Any, TypeAlias

import triton.language as tl

if TYPE_CHECKING:
    Pointer: TypeAlias = Any
    Scalar: TypeAlias = int
    Values: TypeAlias = tuple[tl.tensor, ...]  # one tensor for each of several states, or of several steps
    Block: TypeAlias = Any  # a tensor of whose shape Triton's own types know nothing
    constexpr: TypeAlias = Any
    Int: TypeAlias = int
    Flag: TypeAlias = bool
    Dtype: TypeAlias = Any
    Shape: TypeAlias = Any
else:
    # Triton looks up the names in a function's annotations, and takes no others than classes.
    Pointer = Scalar = Values = Block = tl.tensor
    constexpr = Int = Flag = Dtype = Shape = tl.constexpr
