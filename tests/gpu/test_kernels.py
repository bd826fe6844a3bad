"""All kernels against float64 on the GPU, at training's widths."""

import pytest
import torch

from tests.gpu import kernels

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: PyTorch sees none")

CHECKS = {check.name: check for check in kernels.checks("cuda", "triton")}


@pytest.mark.parametrize("name", CHECKS)
def test_it_equals_float64(name, monkeypatch):
    monkeypatch.setenv("AVION_TUNE", "0")  # measuring every plan of every shape would take most of the time
    error, tensor = CHECKS[name].run()
    assert error <= CHECKS[name].tolerance, tensor
