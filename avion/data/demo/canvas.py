"""A small vector canvas on Pillow: shapes in scene units, drawn enlarged and box-filtered down.

Scene units are pixels of the finished 128 × 96 frame, x to the right and y down. The canvas is wider than
the frame by a margin on every side, so that the camera may shake.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

WIDTH, HEIGHT = 128, 96
MARGIN = 6

Colour = tuple[int, int, int] | tuple[int, int, int, int]
Points = np.ndarray | Sequence[tuple[float, float]]

_TURN = np.linspace(0.0, 2.0 * math.pi, 28, endpoint=False)
CIRCLE = np.stack([np.cos(_TURN), np.sin(_TURN)], axis=1)  # (28, 2)


def mix(a: Colour, b: Colour, t: float) -> Colour:
    """The colour at t on the way from a (t = 0) to b (t = 1)."""
    return tuple(round(x + (y - x) * t) for x, y in zip(a[:3], b[:3], strict=True))


def darker(colour: Colour, by: float = 0.35) -> Colour:
    return mix(colour, (20, 14, 24), by)


def lighter(colour: Colour, by: float = 0.35) -> Colour:
    return mix(colour, (255, 252, 244), by)


@dataclass(frozen=True)
class Place:
    """Where an object stands: its origin in scene units, its size and its turn (radians, clockwise)."""

    x: float
    y: float
    size: float = 1.0
    turn: float = 0.0

    def at(self, points: Points) -> np.ndarray:
        """Object coordinates (n, 2) to scene coordinates (n, 2)."""
        points = np.asarray(points, dtype=np.float64) * self.size
        if self.turn:
            c, s = math.cos(self.turn), math.sin(self.turn)
            points = points @ np.array([[c, s], [-s, c]])
        return points + (self.x, self.y)

    def point(self, x: float, y: float) -> tuple[float, float]:
        px, py = self.at([(x, y)])[0]
        return float(px), float(py)


class Canvas:
    """Draws on an RGB image of (WIDTH + 2·MARGIN) × (HEIGHT + 2·MARGIN) units, `density` pixels to the unit.

    Colours of four components are blended with what lies below.
    """

    def __init__(self, density: int, image: Image.Image | None = None) -> None:
        size = ((WIDTH + 2 * MARGIN) * density, (HEIGHT + 2 * MARGIN) * density)
        self.density = density
        self.image = Image.new("RGB", size) if image is None else image
        self._draw = ImageDraw.Draw(self.image, "RGBA")

    def copy(self) -> "Canvas":
        return Canvas(self.density, self.image.copy())

    def _flat(self, points: Points) -> list[float]:
        return ((np.asarray(points, dtype=np.float64) + MARGIN) * self.density).ravel().tolist()

    def polygon(self, points: Points, fill: Colour, outline: Colour | None = None, width: float = 0.9) -> None:
        flat = self._flat(points)
        self._draw.polygon(flat, fill=fill)
        if outline is not None:
            self._draw.line(flat + flat[:4], fill=outline, width=self._pixels(width), joint="curve")

    def ellipse(
        self,
        center: tuple[float, float],
        radii: tuple[float, float],
        fill: Colour | None,
        outline: Colour | None = None,
        width: float = 0.9,
    ) -> None:
        (x, y), (rx, ry) = center, radii
        box = self._flat([(x - rx, y - ry), (x + rx, y + ry)])
        self._draw.ellipse(box, fill=fill, outline=outline, width=self._pixels(width) if outline else 0)

    def line(self, points: Points, fill: Colour, width: float = 1.0) -> None:
        """A line with round ends."""
        flat = self._flat(points)
        self._draw.line(flat, fill=fill, width=self._pixels(width), joint="curve")
        radius = width * self.density / 2
        if radius >= 1.5:
            for x, y in (flat[:2], flat[-2:]):
                self._draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)

    def outlined_line(self, points: Points, fill: Colour, outline: Colour, width: float) -> None:
        self.line(points, outline, width + 1.5)
        self.line(points, fill, width)

    def _pixels(self, width: float) -> int:
        return max(1, round(width * self.density))

    def frame(self, shake: tuple[float, float], reduce_by: int) -> Image.Image:
        """The picture that a camera displaced by `shake` (units, at most MARGIN) takes, `reduce_by` smaller."""
        k = self.density
        left, top = (round((MARGIN + s) * k) for s in shake)
        box = (left, top, left + WIDTH * k, top + HEIGHT * k)
        return self.image.reduce(reduce_by, box)
