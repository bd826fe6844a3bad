"""Functions that Triton kernels call.

A kernel and the functions it calls are compiled together. In Triton's interpreter the call of a jit function takes
about 1 ms, longer than most of them compute, and that holds for Triton's own, such as `tl.zeros`, as well. So there all
of them are plain Python functions.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import triton
import triton.language as tl
from triton import knobs

from avion.ops.kernel_types import Block, Dtype, Flag, Int, Scalar, Shape

LOG2_E = tl.constexpr(1.4426950408889634)
Function = TypeVar("Function", bound=Callable[..., object])


def piece(function: Function) -> Function:
    """Make a function that kernels call, and that is compiled with them."""
    jitted: Any = triton.jit(function)
    return function if knobs.runtime.interpret else jitted


@piece
def cdiv(x: Scalar, size: Scalar) -> Scalar:
    """Return x / size, rounded up."""
    return (x + size - 1) // size


@piece
def zeros_in(shape: Shape, dtype: Dtype) -> Block:
    """Return zeros of a shape."""
    return tl.full(shape, 0, dtype)


@piece
def sigmoid(x: tl.tensor) -> tl.tensor:
    """Compute 1 / (1 + exp(-x)). The reciprocal square root is one instruction, and a division would be ten."""
    root = tl.rsqrt(1.0 + tl.exp2(x * -LOG2_E))
    return root * root


def _interpreted_sum(x: tl.tensor, axis: Int, keep_dims: Flag = False) -> Block:
    return tl.reduce(x, axis, tl.standard._sum_combine, keep_dims=keep_dims)


# The sum along an axis. The interpreter knows Triton's own way of adding; any other one it takes number by number.
sum_along: Any = _interpreted_sum if knobs.runtime.interpret else tl.sum
