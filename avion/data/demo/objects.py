"""The things on the table. Each is drawn at a Place whose origin is where it touches the table.

Coordinates inside an object are scene units at size 1, y upwards negative, as on the screen. Flat circles
are seen at a slant: their height is SLANT times their width.
"""

import math

import numpy as np

from avion.data.demo.canvas import CIRCLE, Canvas, Colour, Place, darker, lighter, mix

SLANT = 0.42

# The base colour of every noun; a scene varies it a little.
COLOURS: dict[str, Colour] = {
    "mug": (206, 62, 58),
    "bowl": (74, 158, 98),
    "jar": (156, 206, 214),
    "book": (104, 74, 160),
    "box": (196, 148, 92),
    "drawer": (158, 98, 58),
    "plate": (238, 240, 246),
    "pan": (62, 64, 74),
    "knife": (200, 206, 216),
    "cloth": (226, 84, 96),
    "towel": (52, 142, 160),
    "lamp": (88, 108, 150),
    "tap": (176, 186, 198),
}
LIQUIDS: tuple[Colour, ...] = ((62, 150, 230), (240, 150, 40), (150, 84, 190))
PAPER = (248, 242, 226)


def shadow(canvas: Canvas, x: float, y: float, rx: float, ry: float, strength: int = 70) -> None:
    canvas.ellipse((x, y), (rx, ry), (20, 12, 24, strength))
    canvas.ellipse((x, y), (rx * 0.75, ry * 0.75), (20, 12, 24, strength // 2))


def _arc(radius: float, y: float, first: float, last: float) -> list[tuple[float, float]]:
    """Points of a slanted circle at height y; angles in half turns, 0 at the right, 0.5 in front."""
    angles = np.linspace(first * math.pi, last * math.pi, 15)
    return [(radius * math.cos(a), y + SLANT * radius * math.sin(a)) for a in angles]


def _ring(canvas: Canvas, place: Place, radius: float, y: float, fill: Colour, edge: Colour | None) -> None:
    canvas.ellipse(place.point(0, y), (radius * place.size, radius * SLANT * place.size), fill, edge, width=0.9)


def vessel(
    canvas: Canvas,
    place: Place,
    top: float,
    bottom: float,
    height: float,
    colour: Colour,
    *,
    belly: float = 0.0,
    inside: Colour | None = None,
) -> None:
    """A round vessel: radii at the rim and at the foot, and how far its wall bulges."""
    edge = darker(colour, 0.5)
    bend = [(bottom + (top - bottom) * t + belly * 4 * t * (1 - t), -height * t) for t in (0.25, 0.5, 0.75)]
    right = [(top, -height)] + bend[::-1]
    left = [(-x, y) for x, y in bend] + [(-top, -height)]
    body = right + _arc(bottom, 0.0, 0.0, 1.0) + left
    canvas.polygon(place.at(body), colour, edge)
    # Light falls from the left: one bright band, one dark.
    for first, last, tone in ((-0.78, -0.5, lighter(colour, 0.45)), (0.55, 0.94, darker(colour, 0.18))):
        band = [(first * x, y * 0.94 + 0.5) for x, y in right] + [(first * bottom, 1.5), (last * bottom, 1.5)]
        band += [(last * x, y * 0.94 + 0.5) for x, y in reversed(right)]
        canvas.polygon(place.at(band), tone)
    _ring(canvas, place, top, -height, lighter(colour, 0.25), edge)
    _ring(canvas, place, top * 0.84, -height + 0.3, inside or darker(colour, 0.3), None)


def mug(canvas: Canvas, place: Place, colour: Colour) -> None:
    edge = darker(colour, 0.5)
    handle = place.at([(-10, -19), (-16, -18.5), (-18, -12), (-15.5, -6), (-9.5, -5)])
    canvas.line(handle, edge, 4.6 * place.size)
    canvas.line(handle, colour, 3.0 * place.size)
    vessel(canvas, place, 12.0, 10.5, 24.0, colour)


def bowl(canvas: Canvas, place: Place, colour: Colour) -> None:
    vessel(canvas, place, 20.0, 9.0, 14.0, colour, belly=3.0)


def plate(canvas: Canvas, place: Place, colour: Colour) -> None:
    vessel(canvas, place, 21.0, 12.0, 4.0, colour, inside=mix(colour, (70, 110, 190), 0.55))
    _ring(canvas, place, 14.0, -3.4, lighter(colour, 0.3), None)


def pan(canvas: Canvas, place: Place, colour: Colour) -> None:
    handle = place.at([(15, -4), (33, 5)])
    canvas.outlined_line(handle, (130, 84, 54), (52, 30, 22), 4.4 * place.size)
    vessel(canvas, place, 18.0, 15.5, 8.5, colour, inside=(96, 98, 108))


def jar_lid(canvas: Canvas, place: Place) -> None:
    vessel(canvas, place, 11.0, 11.0, 5.0, (222, 112, 52), inside=(236, 148, 84))


def jar(canvas: Canvas, place: Place, colour: Colour, *, lid: bool = True) -> None:
    vessel(canvas, place, 10.5, 11.5, 25.0, colour, inside=darker(colour, 0.45))
    label = [(-8.5, -15), (8.5, -15), (8.5, -5), (-8.5, -5)]
    canvas.polygon(place.at(label), PAPER, darker(PAPER, 0.3))
    for y in (-12, -8):
        canvas.line(place.at([(-5, y), (5, y)]), (176, 120, 90), 1.2)
    if lid:
        x, y = place.point(0, -25)
        jar_lid(canvas, Place(x, y, place.size))


def glass(canvas: Canvas, place: Place, kind: str, level: float, liquid: Colour, tint: Colour) -> None:
    """A see-through vessel (mug, bowl or jar) filled up to `level` (0 … 1)."""
    top, bottom, height = {"mug": (15.0, 13.0, 28.0), "bowl": (24.0, 13.0, 20.0), "jar": (12.5, 12.5, 34.0)}[kind]
    wall, edge = lighter(tint, 0.72), darker(tint, 0.45)
    if kind == "mug":
        handle = place.at([(-13, -22), (-20, -21), (-22, -14), (-19, -7), (-12, -6)])
        canvas.line(handle, edge, 4.6 * place.size)
        canvas.line(handle, wall, 2.8 * place.size)
    body = [(top, -height)] + _arc(bottom, 0.0, 0.0, 1.0) + [(-top, -height)]
    canvas.polygon(place.at(body), wall, edge)
    _ring(canvas, place, top, -height, lighter(wall, 0.4), edge)
    depth = level * (height - 3.0)
    radius = (bottom + (top - bottom) * level) * 0.9
    filled = [(radius, -depth - 1)] + _arc(bottom * 0.9, -1.0, 0.0, 1.0) + [(-radius, -depth - 1)]
    canvas.polygon(place.at(filled), liquid)
    _ring(canvas, place, radius, -depth - 1, lighter(liquid, 0.35), darker(liquid, 0.2))
    shine = [(-0.72 * top, -height + 4), (-0.5 * top, -height + 5), (-0.5 * bottom, -2), (-0.7 * bottom, -3)]
    canvas.polygon(place.at(shine), (255, 255, 255, 120))
    front = place.at(_arc(top, -height, 0.0, 1.0))
    canvas.line(front, edge, 0.8)


def _slab(canvas: Canvas, place: Place, corners: list[tuple[float, float]], fill: Colour) -> None:
    canvas.polygon(place.at(corners), fill, darker(fill, 0.5))


def box_lid_edge(angle: float) -> tuple[float, float]:
    """Middle of the lid's free edge when the lid is turned open by `angle` radians, in box coordinates."""
    return 0.0, -31.0 + 13.0 * math.cos(angle) - 23.0 * math.sin(angle)


def box(canvas: Canvas, place: Place, colour: Colour, angle: float = 0.0) -> None:
    """A carton, its lid hinged at the back."""
    front, back = 19.0, 16.0
    if angle > 0.02:
        _slab(canvas, place, [(-front, -18), (front, -18), (back, -31), (-back, -31)], darker(colour, 0.62))
        inner = [(-back, -31), (back, -31), (back + 0.6, -27), (-back - 0.6, -27)]
        canvas.polygon(place.at(inner), darker(colour, 0.4))
    _slab(canvas, place, [(-front, -18), (front, -18), (front, 0), (-front, 0)], colour)
    canvas.polygon(place.at([(-3, -18), (3, -18), (3, -9), (-3, -9)]), lighter(colour, 0.5))
    canvas.polygon(place.at([(8, -6), (15, -6), (15, -2.5), (8, -2.5)]), darker(colour, 0.3))
    _, free = box_lid_edge(angle)
    half = front + 2.0 * math.sin(angle)
    lid = [(-back, -31), (back, -31), (half, free), (-half, free)]
    _slab(canvas, place, lid, lighter(colour, 0.28) if angle < 1.5 else mix(colour, (120, 84, 50), 0.35))
    canvas.polygon(
        place.at([(-3, -31), (3, -31), (3, free), (-3, free)]), lighter(colour, 0.55 if angle < 1.5 else 0.2)
    )


def standing_book(canvas: Canvas, place: Place, colour: Colour) -> None:
    """A closed book held upright, its cover to us."""
    _slab(canvas, place, [(-13, -36), (15, -36), (15, 0), (-13, 0)], PAPER)
    _slab(canvas, place, [(-15, -37), (12, -37), (12, 0), (-15, 0)], colour)
    canvas.polygon(place.at([(-15, -37), (-11, -37), (-11, 0), (-15, 0)]), darker(colour, 0.3))
    canvas.polygon(place.at([(-7, -30), (8, -30), (8, -21), (-7, -21)]), (246, 206, 98))
    canvas.line(place.at([(-5, -14), (6, -14)]), lighter(colour, 0.45), 1.4)


def lying_book_edge(angle: float) -> tuple[float, float]:
    """Middle of the cover's free edge when the cover is turned by `angle` radians (π: wide open)."""
    return -14.0 + 28.0 * math.cos(angle), -13.0 - 20.0 * math.sin(angle)


def lying_book(canvas: Canvas, place: Place, colour: Colour, angle: float = 0.0) -> None:
    """A book on its back; the cover turns about the spine at the left."""
    _slab(canvas, place, [(-14, -23), (15, -23), (18, 0), (-15, 0)], darker(colour, 0.15))
    pages = [(-13, -25), (13, -25), (15.5, -3), (-14, -3)]
    _slab(canvas, place, pages, PAPER)
    for y in (-20, -15, -10):
        canvas.line(place.at([(-8, y), (9, y)]), (170, 160, 150), 1.0)
    x, y = lying_book_edge(angle)
    lift = y + 13.0
    far, near = (x * 0.94, -26.0 + lift * 0.9), (x * 1.08, -3.0 + lift)
    cover = [(-14, -26), far, near, (-15, -3)]
    outside = angle < math.pi / 2
    _slab(canvas, place, cover, colour if outside else lighter(colour, 0.55))
    center = np.mean(cover, axis=0)
    patch = center + (np.array(cover) - center) * 0.5
    canvas.polygon(place.at(patch), (246, 206, 98) if outside else PAPER)


def drawer_front(pull: float) -> tuple[float, float, float]:
    """Middle (x, y) and half width of the drawer's front, drawn out by `pull` (0 … 1)."""
    return 0.0, -16.0 + 25.0 * pull, 19.0 + 3.5 * pull


def drawer(canvas: Canvas, place: Place, colour: Colour, pull: float) -> None:
    """A small chest with one drawer that comes towards us."""
    _slab(canvas, place, [(-25, -31), (25, -31), (22, -41), (-22, -41)], lighter(colour, 0.35))
    _slab(canvas, place, [(-25, -31), (25, -31), (25, 0), (-25, 0)], colour)
    canvas.polygon(place.at([(-20, -26), (20, -26), (20, -5), (-20, -5)]), darker(colour, 0.68))
    _, y, half = drawer_front(pull)
    if pull > 0.03:
        floor = [(-19, -22), (19, -22), (half, y - 9), (-half, y - 9)]
        canvas.polygon(place.at(floor), lighter(colour, 0.55), darker(colour, 0.5))
        if pull > 0.35:
            spot = place.point(-7, -19 + 9 * pull)
            canvas.ellipse(spot, (5.0, 2.6), (240, 196, 70), darker(colour, 0.5))
            spot = place.point(8, -18 + 8 * pull)
            canvas.ellipse(spot, (4.0, 2.4), (94, 170, 216), darker(colour, 0.5))
    _slab(canvas, place, [(-half, y - 10), (half, y - 10), (half, y + 10), (-half, y + 10)], lighter(colour))
    canvas.outlined_line(place.at([(-5, y), (5, y)]), (238, 200, 96), darker(colour, 0.6), 2.4)


def rack(canvas: Canvas, place: Place, colour: Colour, part: str) -> None:
    """A wooden stand with a slot; its "back" is drawn behind what it holds, its "front" before."""
    if part == "back":
        _slab(canvas, place, [(-26, -20), (26, -20), (24, -27), (-24, -27)], darker(colour, 0.25))
        _slab(canvas, place, [(-26, -8), (26, -8), (26, -20), (-26, -20)], darker(colour, 0.5))
        return
    _slab(canvas, place, [(-28, -14), (28, -14), (28, 6), (-28, 6)], colour)
    for y in (-8, -1):
        canvas.line(place.at([(-25, y), (25, y)]), darker(colour, 0.2), 0.9)


def standing_plate(canvas: Canvas, place: Place, colour: Colour) -> None:
    x, y = place.point(0, -18)
    s = place.size
    canvas.ellipse((x, y), (17 * s, 18 * s), colour, darker(colour, 0.5))
    canvas.ellipse((x, y), (12.5 * s, 13.5 * s), mix(colour, (70, 110, 190), 0.55))
    canvas.ellipse((x, y), (10.5 * s, 11.5 * s), lighter(colour, 0.2))


def knife(canvas: Canvas, place: Place, colour: Colour) -> None:
    """A knife held point down."""
    blade = [(-5, -20), (5, -20), (5, -8), (1, 4), (-5, -4)]
    canvas.polygon(place.at(blade), colour, darker(colour, 0.55))
    canvas.polygon(place.at([(2, -20), (5, -20), (5, -8), (2, -3)]), lighter(colour, 0.6))
    grip = [(-4.5, -38), (4.5, -38), (5, -20), (-5, -20)]
    canvas.polygon(place.at(grip), (64, 48, 52), (24, 16, 20))
    for y in (-33, -26):
        canvas.ellipse(place.point(0, y), (1.2, 1.2), (200, 190, 180))


def tray(canvas: Canvas, place: Place, colour: Colour) -> None:
    shadow(canvas, place.x + 2, place.y + 4, 34 * place.size, 13 * place.size, 50)
    outer = place.at(np.sign(CIRCLE) * np.abs(CIRCLE) ** 0.55 * (33, 12.5))
    inner = place.at(np.sign(CIRCLE) * np.abs(CIRCLE) ** 0.55 * (29, 9.5))
    canvas.polygon(outer, colour, darker(colour, 0.5))
    canvas.polygon(inner, lighter(colour, 0.35), darker(colour, 0.25))


def folded(canvas: Canvas, place: Place, kind: str, colour: Colour, angle: float) -> tuple[float, float]:
    """A cloth (turned over sideways) or a towel (turned over away from us), one half raised by `angle`.

    Returns the middle of the free edge in scene coordinates.
    """
    trim, back = PAPER, mix(colour, PAPER, 0.72)
    sideways = kind == "cloth"
    reach, half, steps = (28.0, 21.0, 4) if sideways else (22.0, 27.0, 3)

    def corner(along: float, across: float) -> tuple[float, float]:
        """along: from the crease, in the direction of the free edge; height makes it rise on the screen."""
        flat, height = along, 0.0
        if along > 0:
            flat, height = along * math.cos(angle), along * math.sin(angle)
        x, depth = (flat, across) if sideways else (across, flat)
        return x * (1 + 0.006 * depth), 0.85 * depth - 0.95 * height

    def strip(start: float, stop: float, fill: Colour) -> None:
        quad = [corner(start, -half), corner(stop, -half), corner(stop, half), corner(start, half)]
        canvas.polygon(place.at(quad), fill, darker(colour, 0.4), 0.7)

    cast = [(-reach, -half), (max(0.0, reach * math.cos(angle)), -half)]
    cast += [(x, half) for x, _ in reversed(cast)]
    ground = [(x * (1 + 0.006 * y), 0.85 * y) if sideways else (y * (1 + 0.006 * x), 0.85 * x) for x, y in cast]
    canvas.polygon(place.at(ground) + (2.5, 3.0), (20, 12, 24, 70))
    for i in range(steps):
        strip(-reach * (i + 1) / steps, -reach * i / steps, colour if i % 2 == 0 else trim)
    under = angle > math.pi / 2
    for i in range(steps):
        plain = back if under else colour
        strip(reach * i / steps, reach * (i + 1) / steps, plain if i % 2 == 0 else mix(trim, plain, 0.3 * under))
    return place.point(*corner(reach, 0.0))


def lamp(canvas: Canvas, place: Place, colour: Colour, glow: float) -> None:
    """A table lamp; glow 0 … 1."""
    x, y = place.point(0, 2)
    for spread, alpha in ((46, 30), (38, 30), (30, 36), (22, 50)):
        canvas.ellipse((x, y), (spread, spread * SLANT), (255, 226, 120, round(alpha * glow)))
    edge = darker(colour, 0.5)
    canvas.line(place.at([(0, -2), (0, -30)]), edge, 4.2)
    canvas.line(place.at([(0, -2), (0, -30)]), lighter(colour, 0.2), 2.6)
    vessel(canvas, place, 10.0, 12.0, 4.0, colour)
    shade = mix((112, 104, 112), (255, 236, 130), glow)
    canvas.polygon(place.at([(-11, -48), (11, -48), (20, -25), (-20, -25)]), shade, darker(shade, 0.45))
    canvas.ellipse(place.point(0, -25), (20, 4), lighter(shade, 0.5 * glow), darker(shade, 0.45))
    for spread, alpha in ((36, 22), (31, 26), (26, 34)):
        canvas.ellipse(place.point(0, -36), (spread, spread * 0.85), (255, 240, 160, round(alpha * glow)))


def tap(canvas: Canvas, place: Place, colour: Colour, flow: float, wobble: float) -> tuple[float, float]:
    """A tap over a basin; flow 0 … 1, wobble sways the stream. Returns the end of its lever."""
    edge = darker(colour, 0.5)
    _ring(canvas, place, 27.0, 4.0, lighter(colour, 0.4), edge)
    _ring(canvas, place, 23.0, 4.0, darker(colour, 0.25), None)
    if flow > 0.02:
        _ring(canvas, place, 4.0 + 17.0 * flow, 5.0, (110, 186, 240), None)
        _ring(canvas, place, 2.0 + 9.0 * flow, 5.0, (206, 234, 252), None)
        w = 1.0 + 4.2 * flow
        stream = [(-w, -23), (w, -23), (w * 0.8 + wobble, 5), (-w * 0.8 + wobble, 5)]
        canvas.polygon(place.at(stream), (120, 196, 246), (60, 120, 190), 0.7)
        canvas.line(place.at([(-0.3 * w, -21), (-0.2 * w + wobble, 4)]), (226, 244, 255), 1.0)
    pipe = place.at([(-20, -6), (-20, -30), (-15, -38), (-6, -39), (0, -34), (0, -25)])
    canvas.line(pipe, edge, 8.0)
    canvas.line(pipe, colour, 6.2)
    canvas.line(pipe[1:4] - (1.2, 1.2), lighter(colour, 0.6), 1.4)
    angle = math.radians(-100 + 115 * flow)
    root = place.point(-12, -40)
    end = (root[0] + 24 * math.cos(angle), root[1] + 24 * math.sin(angle))
    canvas.outlined_line([root, end], (214, 70, 66), (90, 24, 30), 4.4)
    return end
