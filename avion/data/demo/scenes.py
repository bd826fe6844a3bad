"""Motions: what moves how when the phase runs from 0 (before a pair's first verb) to 1 (after it).

A Motion draws what stands still, then, for a phase, what moves, and says where the hand touches it. It knows
nothing of time: the second verb of a pair is the same motion with the phase running down.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np

from avion.data.demo import objects
from avion.data.demo.canvas import Canvas, Colour, Place, mix
from avion.data.demo.hand import FLAT, GRASP, PINCH, Grip

Contact = tuple[float, float]
WOOD: tuple[Colour, ...] = ((176, 122, 74), (142, 96, 66), (196, 150, 100), (110, 84, 74))


class Motion(ABC):
    """One action on one object at one spot; `rng` draws the spot, the sizes and the colours."""

    grip: Grip = GRASP

    def __init__(self, noun: str, rng: np.random.Generator) -> None:
        self.noun = noun
        self.size = float(rng.uniform(1.0, 1.2))
        self.dx = float(rng.uniform(-9, 9))
        self.dy = float(rng.uniform(-4, 4))
        tint = tuple(int(c) for c in rng.integers(0, 256, 3))
        self.colour = mix(objects.COLOURS[noun], tint, float(rng.uniform(0.0, 0.14)))
        self.wood = WOOD[int(rng.integers(len(WOOD)))]

    def draw_still(self, canvas: Canvas) -> None:  # noqa: B027 (most motions have nothing that stands still)
        """Draws what never moves."""

    @abstractmethod
    def draw_moving(self, canvas: Canvas, phase: float) -> Contact:
        """Draws the rest at `phase` (0 … 1) and returns the point that the hand touches."""

    def _spot(self, x: float, y: float, size: float = 1.0) -> Place:
        return Place(x + self.dx, y + self.dy, self.size * size)


# How an object is drawn when it is carried or slid, and where it is then held.
_CARRIED: dict[str, tuple[Callable[[Canvas, Place, Colour], None], tuple[float, float], float]] = {
    "mug": (objects.mug, (12.0, -13.0), 12.0),
    "bowl": (objects.bowl, (17.0, -9.0), 14.0),
    "jar": (objects.jar, (11.0, -17.0), 12.0),
    "book": (objects.lying_book, (14.0, -8.0), 16.0),
    "plate": (objects.plate, (17.0, 0.0), 17.0),
    "pan": (objects.pan, (29.0, 4.0), 17.0),
    "box": (objects.box, (15.0, -12.0), 20.0),
}


class _Carrying(Motion):
    def _draw_carried(self, canvas: Canvas, place: Place, height: float) -> Contact:
        draw, held, width = _CARRIED[self.noun]
        fade = 1.0 / (1.0 + 0.03 * height)
        objects.shadow(canvas, place.x + 2, place.y + height + 1, width * place.size * fade, 6 * place.size * fade)
        draw(canvas, place, self.colour)
        return place.point(*held)


class PutOnTray(_Carrying):
    """From the table's near corner over to the tray."""

    def __init__(self, noun: str, rng: np.random.Generator) -> None:
        super().__init__(noun, rng)
        self.tray = Place(48 + self.dx, 42 + self.dy, self.size * 0.92)
        self.tray_colour = ((92, 62, 52), (60, 92, 110), (150, 70, 60))[int(rng.integers(3))]

    def draw_still(self, canvas: Canvas) -> None:
        objects.tray(canvas, self.tray, self.tray_colour)

    def draw_moving(self, canvas: Canvas, phase: float) -> Contact:
        hop = 15.0 * math.sin(math.pi * phase)
        x = 82 + self.dx + (self.tray.x - 82 - self.dx) * phase
        y = 84 + self.dy + (self.tray.y + 1 - 84 - self.dy) * phase
        place = Place(x, y - hop, self.size * (1.08 - 0.22 * phase))
        return self._draw_carried(canvas, place, hop)


class Open(Motion):
    """A carton's lid, a book's cover, a jar's lid or a drawer."""

    grip = PINCH

    def draw_moving(self, canvas: Canvas, phase: float) -> Contact:
        if self.noun == "box":
            place = self._spot(62, 82, 1.05)
            objects.shadow(canvas, place.x + 3, place.y, 25 * place.size, 6)
            angle = math.radians(125) * phase
            objects.box(canvas, place, self.colour, angle)
            return place.point(objects.box_lid_edge(angle)[0] + 11, objects.box_lid_edge(angle)[1])
        if self.noun == "book":
            place = self._spot(66, 68, 1.25)
            objects.shadow(canvas, place.x + 2, place.y, 21 * place.size, 5)
            angle = math.radians(168) * phase
            objects.lying_book(canvas, place, self.colour, angle)
            return place.point(*objects.lying_book_edge(angle))
        if self.noun == "drawer":
            place = self._spot(64, 64, 1.05)
            objects.shadow(canvas, place.x + 2, place.y + 2, 28 * place.size, 6)
            objects.drawer(canvas, place, self.colour, phase)
            return place.point(*objects.drawer_front(phase)[:2])
        place = self._spot(52, 70, 1.2)
        objects.shadow(canvas, place.x + 3, place.y, 14 * place.size, 5)
        objects.jar(canvas, place, self.colour, lid=False)
        x = 36.0 * phase
        y = -25.0 - 12.0 * math.sin(math.pi * phase) + 25.0 * phase**2
        lid = Place(*place.point(x, y), place.size)
        objects.jar_lid(canvas, lid)
        return lid.point(8, -3)


class Push(_Carrying):
    """Straight away over the table."""

    grip = FLAT

    def draw_moving(self, canvas: Canvas, phase: float) -> Contact:
        place = self._spot(62 - 4 * phase, 88 - 46 * phase, 1.15 - 0.32 * phase)
        self._draw_carried(canvas, place, 0.0)
        return place.point(6, 1)


class Lift(_Carrying):
    """Straight up."""

    def draw_moving(self, canvas: Canvas, phase: float) -> Contact:
        height = 32.0 * phase
        place = self._spot(60, 84 - height, 1.0 + 0.1 * phase)
        return self._draw_carried(canvas, place, height)


class InsertInRack(Motion):
    """Over, then down into the slot of a wooden rack."""

    def draw_still(self, canvas: Canvas) -> None:
        place = self._spot(52, 76)
        objects.shadow(canvas, place.x + 3, place.y + 6, 30 * place.size, 6)
        objects.rack(canvas, place, self.wood, "back")

    def draw_moving(self, canvas: Canvas, phase: float) -> Contact:
        rack = self._spot(52, 76)
        across, down = max(0.0, 1.0 - phase / 0.55), max(0.0, (phase - 0.4) / 0.6)
        across, down = across * across, down * (2 - down)
        place = Place(rack.x + 34 * across, rack.y - 26 + 22 * down + 14 * across, self.size)
        draw, held = {
            "plate": (objects.standing_plate, (13.0, -25.0)),
            "book": (objects.standing_book, (11.0, -28.0)),
            "knife": (objects.knife, (2.0, -29.0)),
        }[self.noun]
        draw(canvas, place, self.colour)
        objects.rack(canvas, rack, self.wood, "front")
        return place.point(*held)


class Fold(Motion):
    grip = PINCH

    def draw_moving(self, canvas: Canvas, phase: float) -> Contact:
        place = self._spot(62, 62 if self.noun == "towel" else 64, 1.05)
        return objects.folded(canvas, place, self.noun, self.colour, math.radians(172) * phase)


class Fill(Motion):
    """The hand holds a hose that lets the liquid in, or draws it out."""

    grip = PINCH

    def __init__(self, noun: str, rng: np.random.Generator) -> None:
        super().__init__(noun, rng)
        self.liquid = objects.LIQUIDS[int(rng.integers(len(objects.LIQUIDS)))]

    def draw_moving(self, canvas: Canvas, phase: float) -> Contact:
        place = self._spot(58, 76, 1.15)
        objects.shadow(canvas, place.x + 3, place.y + 1, 20 * place.size, 7)
        objects.glass(canvas, place, self.noun, 0.06 + 0.9 * phase, self.liquid, self.colour)
        rim = {"mug": -28, "bowl": -20, "jar": -34}[self.noun]
        mouth, held = place.point(0, rim + 7), place.point(6, rim - 4)
        bends = np.array([mouth, (held[0] - 4, held[1] - 10), (held[0] + 34, held[1] - 6), (142, 74)])
        t = np.linspace(0, 1, 14)[:, None]  # a cubic Bézier curve
        weights = np.hstack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3])
        hose = weights @ bends
        held = (float(hose[4, 0]), float(hose[4, 1]))
        canvas.outlined_line(hose, (236, 236, 228), (92, 96, 104), 3.4)
        return held


class TurnOn(Motion):
    """A lamp's switch or a tap's lever; light and water come gradually."""

    grip = PINCH

    def draw_moving(self, canvas: Canvas, phase: float) -> Contact:
        if self.noun == "lamp":
            place = self._spot(54, 74, 1.1)
            objects.shadow(canvas, place.x + 3, place.y, 17 * place.size, 6)
            objects.lamp(canvas, place, self.colour, phase)
            knob = place.point(14, -1)
            angle = math.radians(-70 + 140 * phase)
            canvas.ellipse(knob, (4.2, 4.2), (214, 70, 66), (80, 20, 28))
            return knob[0] + 3 * math.sin(angle), knob[1] - 3 * math.cos(angle)
        place = self._spot(60, 72, 1.1)
        objects.shadow(canvas, place.x + 2, place.y + 8, 30 * place.size, 13 * place.size, 50)
        return objects.tap(canvas, place, self.colour, phase, wobble=math.sin(17 * phase))


MOTIONS: dict[str, type[Motion]] = {
    "put": PutOnTray,
    "open": Open,
    "push": Push,
    "lift": Lift,
    "insert": InsertInRack,
    "fold": Fold,
    "fill": Fill,
    "turn on": TurnOn,
}
