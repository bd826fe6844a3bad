"""Metrics of several seeds combined: mean, spread, and whether a difference is within the tolerance."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Spread:
    """The mean over `n` seeds in percent, and the sample standard deviation (None for a single seed)."""

    mean: float
    sd: float | None
    n: int


def spread_of(values: Sequence[float]) -> Spread:
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def signed(value: float) -> str:
    """Format a number with two decimals and, unless it is zero, a sign: +0.12, −1.30, 0.00."""
    rounded = round(value, 2)
    return "0.00" if rounded == 0 else f"{'+' if rounded > 0 else MINUS}{abs(rounded):.2f}"


def given(value: float) -> str:
    """Format a metric as it was published: with one decimal, or two where it has two."""
    return f"{value:.1f}" if abs(10 * value - round(10 * value)) < 1e-6 else f"{value:.2f}"


def beyond(difference: float, tolerance: float) -> str:
    """Return "above" or "below" for a difference beyond the tolerance, else "".

    The two decimals that are shown decide.
    """
    if round(abs(difference), 2) <= round(tolerance, 2):
        return ""
    return "above" if difference > 0 else "below"
