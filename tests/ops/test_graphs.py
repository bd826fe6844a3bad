"""The mark of functions whose results graphs keep."""

import torch

from avion.ops.graphs import constant_in_graphs


def test_the_mark_is_that_of_pytorch():
    def own():
        return 1

    def of_pytorch():
        return 1

    assert constant_in_graphs(own) is own
    assert vars(own) == vars(torch.compiler.assume_constant_result(of_pytorch)) != {}


def test_the_result_is_that_of_the_time_of_compiling():
    said = []

    @constant_in_graphs
    def answer() -> int:
        said.append("asked")
        return 3

    compiled = torch.compile(lambda x: x * answer(), backend="eager", fullgraph=True)
    x = torch.randn(4)
    for _ in range(3):
        torch.testing.assert_close(compiled(x), 3 * x, rtol=0, atol=0)
    assert said == ["asked"]
