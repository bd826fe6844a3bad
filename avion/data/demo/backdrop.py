"""The room: wall, table, clutter and light. What belongs to a whole video is its Room."""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from avion.data.demo.canvas import HEIGHT, MARGIN, WIDTH, Canvas, Colour, Place, darker, lighter, mix
from avion.data.demo.hand import SKIN_TONES, SLEEVES
from avion.data.demo.objects import shadow, vessel

# Wall and table top.
PALETTES: tuple[tuple[Colour, Colour], ...] = (
    ((196, 214, 214), (198, 164, 124)),
    ((232, 220, 196), (160, 124, 92)),
    ((170, 188, 206), (222, 210, 192)),
    ((214, 196, 190), (132, 146, 150)),
    ((186, 204, 178), (212, 184, 146)),
    ((222, 214, 222), (176, 140, 116)),
)
_LEFT, _RIGHT = -MARGIN, WIDTH + MARGIN


@dataclass(frozen=True)
class Room:
    """What stays the same throughout a video: the place, the light and whose hand it is."""

    wall: Colour
    table: Colour
    tiled: bool
    horizon: float  # scene units from the top: where the table ends
    brightness: float
    warmth: float  # -1 (blue) … 1 (yellow)
    skin: Colour
    sleeve: Colour
    left_handed: bool


def draw_room(rng: np.random.Generator) -> Room:
    wall, table = PALETTES[int(rng.integers(len(PALETTES)))]
    shade = float(rng.uniform(-0.1, 0.1))
    return Room(
        wall=lighter(wall, shade) if shade > 0 else darker(wall, -shade),
        table=darker(table, shade) if shade > 0 else lighter(table, -shade),
        tiled=bool(rng.random() < 0.5),
        horizon=float(rng.uniform(13, 20)),
        brightness=float(rng.uniform(0.86, 1.0)),
        warmth=float(rng.uniform(-1, 1)),
        skin=SKIN_TONES[int(rng.integers(len(SKIN_TONES)))],
        sleeve=SLEEVES[int(rng.integers(len(SLEEVES)))],
        left_handed=bool(rng.random() < 0.3),
    )


def draw_backdrop(canvas: Canvas, room: Room, rng: np.random.Generator) -> None:
    """Wall, table and a few odds and ends along the edges."""
    bottom = HEIGHT + MARGIN
    canvas.polygon([(_LEFT, -MARGIN), (_RIGHT, -MARGIN), (_RIGHT, bottom), (_LEFT, bottom)], room.wall)
    line = darker(room.wall, 0.14)
    if room.tiled:
        for y in (room.horizon - 11, room.horizon - 22):
            canvas.line([(_LEFT, y), (_RIGHT, y)], line, 0.8)
        for x in range(int(rng.integers(-16, 0)), _RIGHT, 16):
            canvas.line([(x, -MARGIN), (x, room.horizon)], line, 0.8)
    else:
        canvas.polygon([(_LEFT, room.horizon - 6), (_RIGHT, room.horizon - 6), (_RIGHT, bottom), (_LEFT, bottom)], line)
    top = [(_LEFT, room.horizon), (_RIGHT, room.horizon), (_RIGHT, bottom), (_LEFT, bottom)]
    canvas.polygon(top, room.table)
    canvas.line(top[:2], lighter(room.table, 0.4), 1.6)
    _draw_planks(canvas, room, rng)
    _draw_clutter(canvas, room, rng)


def _draw_planks(canvas: Canvas, room: Room, rng: np.random.Generator) -> None:
    vanishing = np.array([64.0, -90.0])
    for x in np.arange(-150, 280, 34) + rng.uniform(0, 34):
        near = np.array([x, HEIGHT + MARGIN])
        far = near + (vanishing - near) * (near[1] - room.horizon - 1) / (near[1] - vanishing[1])
        canvas.line([far, near], darker(room.table, 0.16), 0.9)
        for _ in range(2):  # grain between the seams
            a, b = sorted(rng.uniform(0.05, 0.95, 2))
            aside = np.array([rng.uniform(5, 29), 0.0])
            start, stop = far + (near - far) * a + aside * (0.4 + 0.6 * a), near + (far - near) * (1 - b)
            stop = stop + aside * (0.4 + 0.6 * b)
            canvas.line([start, stop], darker(room.table, 0.07), 0.8)


def _draw_clutter(canvas: Canvas, room: Room, rng: np.random.Generator) -> None:
    back = room.horizon + 5
    spots = [(rng.uniform(2, 24), back + rng.uniform(0, 4)), (rng.uniform(104, 126), back + rng.uniform(0, 4))]
    spots.append((rng.uniform(0, 10), rng.uniform(42, 84)))
    spots.append((rng.uniform(118, 128), rng.uniform(40, 60)))
    things = [_fruit, _plant, _shaker, _sponge, _pencil, _fruit]
    for index, spot in zip(rng.permutation(len(things)), spots, strict=False):
        if rng.random() < 0.85:
            things[index](canvas, Place(float(spot[0]), float(spot[1]), float(rng.uniform(0.8, 1.1))), rng)


def _fruit(canvas: Canvas, place: Place, rng: np.random.Generator) -> None:
    colour = ((214, 66, 54), (240, 154, 48), (150, 184, 70))[int(rng.integers(3))]
    radius = 6.0 * place.size
    shadow(canvas, place.x + 2, place.y, radius, radius * 0.4)
    center = (place.x, place.y - radius * 0.8)
    canvas.ellipse(center, (radius, radius * 0.95), colour, darker(colour, 0.4))
    canvas.ellipse((center[0] - 2, center[1] - 2), (1.8, 1.5), lighter(colour, 0.6))
    canvas.line([(center[0], center[1] - radius + 1), (center[0] + 1.5, center[1] - radius - 2)], (90, 62, 40))


def _plant(canvas: Canvas, place: Place, rng: np.random.Generator) -> None:
    for turn in rng.uniform(-0.9, 0.9, 5):
        leaf = [(0, -9), (-3, -17), (0, -25), (3, -17)]
        green = mix((70, 138, 74), (120, 176, 84), float(rng.random()))
        canvas.polygon(Place(place.x, place.y, place.size, float(turn)).at(leaf), green, darker(green, 0.4), 0.7)
    shadow(canvas, place.x + 2, place.y, 8, 3)
    vessel(canvas, place, 6.5, 5.0, 9.0, (202, 118, 84), inside=(92, 64, 50))


def _shaker(canvas: Canvas, place: Place, rng: np.random.Generator) -> None:
    shadow(canvas, place.x + 2, place.y, 6, 2.5)
    vessel(canvas, place, 3.4, 4.6, 13.0, (232, 232, 228), inside=(150, 150, 156))


def _sponge(canvas: Canvas, place: Place, rng: np.random.Generator) -> None:
    shadow(canvas, place.x + 1, place.y, 10, 3.5)
    for y, colour in ((0.0, (96, 150, 92)), (-3.0, (240, 208, 92))):
        quad = Place(place.x, place.y + y, place.size).at([(-8, -6), (8, -6), (9, 0), (-9, 0)])
        canvas.polygon(quad, colour, darker(colour, 0.4), 0.7)


def _pencil(canvas: Canvas, place: Place, rng: np.random.Generator) -> None:
    turn = float(rng.uniform(0, math.pi))
    end = (place.x + 13 * math.cos(turn), place.y - 6 * math.sin(turn))
    canvas.outlined_line([(place.x, place.y), end], (240, 180, 60), (120, 80, 30), 1.8)


def light_map(room: Room, rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """An RGB picture of `size` (width, height) to multiply frames with: brightness, tint, a window's slope."""
    width, height = size
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    x, y = x / width - 0.5, y / height - 0.5
    turn = rng.uniform(0, 2 * math.pi)
    slope = rng.uniform(0.1, 0.3) * (x * math.cos(turn) + y * math.sin(turn))
    level = np.clip(room.brightness + slope - 0.35 * (x * x + y * y), 0, 1)
    tint = 1.0 - 0.07 * np.array([max(0.0, -room.warmth), 0.2, max(0.0, room.warmth)], dtype=np.float32)
    return Image.fromarray((level[..., None] * tint * 255).round().astype(np.uint8), "RGB")
