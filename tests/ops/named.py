"""Comparing named tensors, and NaN in memory that nobody has written."""

import contextlib
from collections.abc import Iterator

import torch


def assert_close(name: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Same shape and dtype, and the largest difference within `tolerance` of the largest expected value (or 1)."""
    assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)} is not {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{name}: {actual.dtype} is not {expected.dtype}"
    if expected.numel() == 0:
        return
    scale = max(expected.abs().max().item(), 1.0)
    error = (actual.double() - expected.double()).abs().max().item() / scale
    assert error <= tolerance, f"{name}: relative error {error:.2e} above {tolerance:.0e}"  # NaN fails too


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Freshly allocated floating-point memory is full of NaN, so that reading before writing shows."""
    was_filling = torch.utils.deterministic.fill_uninitialized_memory
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.ones(()).new_empty(4).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(was_deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = was_filling
