"""What graphs of `torch.compile` have to know of this project's functions."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def constant_in_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """Mark a function that is called when a graph is compiled, and whose result the graph keeps as a constant.

    `torch.compiler.assume_constant_result` sets the same mark, but it imports the compiler first, which takes more
    than a second in every process, whether it compiles anything or not.

    Args:
        function: A function whose result stays the same in a process.

    Returns:
        The same function.
    """
    vars(function)["_dynamo_marked_constant"] = True
    return function
