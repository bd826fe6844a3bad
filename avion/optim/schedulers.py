"""Learning-rate schedules: one value for every optimizer step of a run."""

import numpy as np


def cosine_scheduler(
    base_value: float,
    final_value: float,
    epochs: int,
    niter_per_ep: int,
    warmup_epochs: int = 0,
    start_warmup_value: float = 0.0,
) -> np.ndarray:
    """Return a linear warm-up and then half a cosine, (epochs · niter_per_ep,) float64.

    The warm-up runs from `start_warmup_value` to `base_value`, both ends included, over warmup_epochs · niter_per_ep
    points. Point i of the n points that remain is final + (base - final) · (1 + cos(π i / n)) / 2, so that the last
    point is just above `final_value`.
    """
    total = epochs * niter_per_ep
    warmup = min(warmup_epochs * niter_per_ep, total)
    rising = np.linspace(start_warmup_value, base_value, warmup)
    remaining = total - warmup
    phase = np.pi * np.arange(remaining) / max(remaining, 1)
    falling = final_value + 0.5 * (base_value - final_value) * (1 + np.cos(phase))
    return np.concatenate([rising, falling])


def constant_scheduler(value: float, epochs: int, niter_per_ep: int) -> np.ndarray:
    """Return the same value for every optimizer step, (epochs · niter_per_ep,) float64."""
    return np.full(epochs * niter_per_ep, value)
