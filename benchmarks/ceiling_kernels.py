"""Two kernels that only compute multiply-adds, or base-2 exponentials: they measure what a GPU computes per second."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

_CHAINS = 16  # independent ones per thread, so that no instruction waits for the one before


@triton.jit
def multiply_add_kernel(x, steps, CHAINS: tl.constexpr, LANES: tl.constexpr):
    place = x + tl.program_id(0) * CHAINS * LANES + tl.arange(0, CHAINS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    value = tl.load(place)
    for _ in range(steps):
        for _ in tl.static_range(16):
            value = value * 0.999 + 0.001
    tl.store(place, value)


@triton.jit
def exponential_kernel(x, steps, CHAINS: tl.constexpr, LANES: tl.constexpr):
    place = x + tl.program_id(0) * CHAINS * LANES + tl.arange(0, CHAINS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    value = tl.load(place)
    for _ in range(steps):
        for _ in tl.static_range(16):
            value = tl.exp2(-value)
    tl.store(place, value)


def issue_rates(device: str, rounds: int, toy: bool, medians: Callable) -> tuple[float, float]:
    """Return the multiply-adds and the exponentials per second."""
    programs, steps, lanes = (2, 2, 32) if toy else (132 * 64, 512, 128)
    x = torch.rand(programs * _CHAINS * lanes, device=device)
    work = {
        name: lambda kernel=kernel: kernel[(programs,)](
            x, steps, CHAINS=_CHAINS, LANES=lanes, num_warps=lanes // 32, enable_fp_fusion=True
        )
        for name, kernel in (("multiply-adds", multiply_add_kernel), ("exponentials", exponential_kernel))
    }
    found = medians(work, rounds, device)
    count = x.numel() * steps * 16
    return count / found["multiply-adds"] * 1e3, count / found["exponentials"] * 1e3
