"""Figures of several seeds as one: mean, spread, differences and whether they keep to a tolerance."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Spread:
    """The mean of `n` seeds in percent, and their sample standard deviation (None of a single one)."""

    mean: float
    sd: float | None
    n: int


def spread_of(values: Sequence[float]) -> Spread:
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def signed(value: float) -> str:
    """Two decimals, a sign unless it is nothing: +0.12, −1.30, 0.00."""
    rounded = round(value, 2)
    return "0.00" if rounded == 0 else f"{'+' if rounded > 0 else MINUS}{abs(rounded):.2f}"


def given(value: float) -> str:
    """A figure as it was published: one decimal, two where it has them."""
    return f"{value:.1f}" if abs(10 * value - round(10 * value)) < 1e-6 else f"{value:.2f}"


def beyond(difference: float, tolerance: float) -> str:
    """ "above" or "below" beyond the tolerance, else "". Decided on the two decimals that are shown."""
    if round(abs(difference), 2) <= round(tolerance, 2):
        return ""
    return "above" if difference > 0 else "below"
