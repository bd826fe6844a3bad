"""Numbers from outside: each flag, and each field of a configuration, states which numbers it takes. A leaf."""

import argparse
import math
import re
from dataclasses import dataclass

_WHOLE_WITH_EXPONENT = re.compile(r"[+-]?\d+[eE]\+?\d+")  # 1e3: YAML makes a text of it
_SHOWN_CHARACTERS = 40


@dataclass(frozen=True)
class Number:
    """A range of numbers that are allowed; NaN and infinities never are.

    An object of this class is a `type` for argparse: it makes a number of a word.

    Attributes:
        kind: The type of the number, int or float.
        low: The smallest number that is allowed.
        high: The largest number that is allowed.
        above: Whether `low` itself is not allowed.
        below: Whether `high` itself is not allowed.
        also: Numbers that are allowed outside of the range.
    """

    kind: type[int] | type[float]
    low: float
    high: float
    above: bool = False
    below: bool = False
    also: tuple[int, ...] = ()

    def __contains__(self, value: object) -> bool:
        """Whether a value is of the type (an int is a float too, a bool is no number) and in the range."""
        if isinstance(value, bool) or not isinstance(value, int if self.kind is int else (int, float)):
            return False
        if value in self.also:
            return True
        low = self.low < value if self.above else self.low <= value
        return low and (value < self.high if self.below else value <= self.high)  # NaN compares as False

    def read(self, text: str) -> int | float:
        """Read a number from a text: 3, 1e3, and for floats also .5 and 1e-3.

        Args:
            text: The text.

        Returns:
            The number.

        Raises:
            ValueError: The text says no number of the range. The message is one line: what was found, what is allowed.
        """
        try:
            value = self._parsed(text)
        except (ValueError, OverflowError):
            value = None
        if value is None or value not in self:
            raise ValueError(f"found {shown(text)}, expected {self}")
        return value

    def _parsed(self, text: str) -> int | float:
        if not text.isascii() or "_" in text:  # Python takes 1_0 for 10, and digits of every script
            raise ValueError
        if self.kind is int and _WHOLE_WITH_EXPONENT.fullmatch(text.strip()):
            return int(float(text))
        return self.kind(text)

    def __call__(self, text: str) -> int | float:
        """Read a number for argparse, as `read` does."""
        try:
            return self.read(text)
        except ValueError as e:
            raise argparse.ArgumentTypeError(str(e)) from e

    @property
    def range(self) -> str:
        """The range in words: "from 1 to 1000", "above 0, up to 1", "from 0 to below 1"."""
        low, high = _plain(self.low), _plain(self.high)
        top = f"below {high}" if self.below else high
        words = f"above {low}, {top if self.below else 'up to ' + high}" if self.above else f"from {low} to {top}"
        return " or ".join([words, *map(str, self.also)])

    def __str__(self) -> str:
        return f"a {'whole ' if self.kind is int else ''}number {self.range}"


def shown(value: object) -> str:
    """Return a value from outside as a message shows it: one line of a bounded length."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no int of more than 4300 digits
        text = f"an integer of {int(math.log10(abs(value)))} digits"
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 3]}..."


def _plain(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def whole(low: int, high: int, *, also: tuple[int, ...] = ()) -> Number:
    """Make the range of whole numbers from `low` to `high`, both included, and the numbers of `also`."""
    return Number(int, low, high, also=also)


# Ranges that several flags have in common.
COUNT = whole(1, 1_000_000)  # how many of something there are, or how often something happens
COUNT_OR_OFF = whole(0, 1_000_000)
WORKERS = whole(0, 1024)
SEED = whole(0, 2**31 - 1)
PROCESSES = whole(1, 65536)
RANK = whole(0, 65535)
PORT = whole(1, 65535)
SHARE = Number(float, 0, 1)
SHARE_BELOW_1 = Number(float, 0, 1, below=True)
SHARE_ABOVE_0 = Number(float, 0, 1, above=True)
