"""The demo's pretraining on the GPU, in every way in which it can be run, beside the CPU's losses in fp32."""

import pytest
import torch

from tests.gpu import pretraining

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: PyTorch sees none")


@pytest.fixture(scope="module")
def of_cpu(tmp_path_factory) -> list[float]:
    return pretraining.losses("fp32", "cpu", tmp_path_factory.mktemp("cpu"))


@pytest.mark.parametrize("mode", pretraining.MODES)
def test_the_losses_are_the_cpus(mode, of_cpu, tmp_path):
    assert pretraining.far_off(mode, pretraining.losses(mode, "cuda", tmp_path), of_cpu) is None
