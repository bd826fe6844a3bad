"""The operators as `torch.export` takes them, against the reference, at other sizes than they are traced with."""

import pytest
import torch
from torch import nn

from avion.ops.causal_conv import causal_conv_silu, causal_conv_silu_both
from avion.ops.exporting import exporting
from avion.ops.gated_scan import ScanInputs, gated_bidirectional_scan
from avion.ops.selective_scan import selective_scan

D, N, K = 6, 3, 4
ROWS, STEPS = torch.export.Dim("rows", min=1), torch.export.Dim("steps", min=1)
SIZES = [(1, 1), (3, 1), (1, 9), (4, 40), (2, 5)]


class Call(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, *inputs):
        return self.f(*inputs)


def traced(f, inputs, shapes):
    with torch.no_grad():
        return torch.export.export(Call(f), inputs, dynamic_shapes=(shapes,), strict=False).module()


def scan_inputs(rows, steps, dtype=torch.float64):
    def draw(*shape):
        return torch.randn(*shape, dtype=dtype)

    A = -torch.rand(D, N, dtype=dtype) - 0.1
    sequence = (rows, steps)
    return draw(*sequence, D), draw(*sequence, D), A, draw(*sequence, N), draw(*sequence, N), draw(D), draw(D)


IN_TIME = {0: ROWS, 1: STEPS}
SHAPES = (IN_TIME, IN_TIME, None, IN_TIME, IN_TIME, None, None)


@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("reverse", [True, False])
def test_the_scan(reverse, softplus):
    def f(u, delta, A, B, C, skip, bias, backend="triton"):  # which could not run here
        own = {"delta_bias": bias, "delta_softplus": softplus, "reverse": reverse, "backend": backend}
        return selective_scan(u, delta, A, B, C, skip, **own)

    program = traced(f, scan_inputs(2, 3), SHAPES)
    for rows, steps in SIZES:
        inputs = scan_inputs(rows, steps)
        if not softplus:  # steps are positive
            inputs = (inputs[0], inputs[1].abs(), *inputs[2:6], inputs[6].abs())
        wanted = f(*inputs, backend="reference")
        torch.testing.assert_close(program(*inputs), wanted, rtol=1e-10, atol=1e-10)


def test_without_a_bias_and_in_half_precision():
    def f(u, delta, A, B, C, skip, bias, backend="auto"):
        return selective_scan(u, delta, A, B, C, skip, backend=backend)

    program = traced(f, scan_inputs(2, 3, torch.bfloat16), SHAPES)
    inputs = scan_inputs(3, 6, torch.bfloat16)
    found, wanted = program(*inputs), f(*inputs, backend="reference")
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)


def test_the_gated_scan_of_both_directions():
    def f(*inputs, backend="auto"):
        *both, z = inputs
        return gated_bidirectional_scan(ScanInputs(*both[:7]), ScanInputs(*both[7:]), z, backend=backend)

    def draw(rows, steps):
        return *scan_inputs(rows, steps), *scan_inputs(rows, steps), torch.randn(rows, steps, D, dtype=torch.float64)

    program = traced(f, draw(2, 3), (*SHAPES, *SHAPES, IN_TIME))
    for rows, steps in SIZES:
        inputs = draw(rows, steps)
        torch.testing.assert_close(program(*inputs), f(*inputs, backend="reference"), rtol=1e-10, atol=1e-10)


def test_the_convolution():
    def f(x, weight, bias, weight_b, bias_b):
        both = causal_conv_silu_both(x, (weight, bias), (weight_b, bias_b))
        return (*both, causal_conv_silu(x, weight, bias, reverse=True))

    def draw(rows, steps):
        taps = [torch.randn(D, K), torch.randn(D), torch.randn(D, K), torch.randn(D)]
        return [torch.randn(rows, steps, D).double(), *(t.double() for t in taps)]

    program = traced(f, tuple(draw(2, 3)), (IN_TIME, None, None, None, None))
    for rows, steps in SIZES:
        inputs = draw(rows, steps)
        for found, wanted in zip(program(*inputs), f(*inputs), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_only_a_trace_takes_these_forms():
    assert not exporting()
    seen = []
    traced(lambda x: seen.append(exporting()) or x + 1, (torch.ones(2),), (None,))
    assert seen[0] is True and not exporting()
