"""The hand that acts: forearm in a sleeve, palm, four fingers and a thumb, seen from above."""

import math
from dataclasses import dataclass

import numpy as np

from avion.data.demo.canvas import Canvas, Colour, darker, lighter

SKIN_TONES: tuple[Colour, ...] = (
    (244, 208, 180),
    (232, 184, 148),
    (206, 150, 112),
    (164, 110, 78),
    (118, 78, 56),
)
SLEEVES: tuple[Colour, ...] = ((58, 84, 140), (176, 62, 66), (70, 120, 92), (92, 76, 120), (66, 70, 80))

# Hand coordinates: the contact point is the origin, x runs towards the finger tips, y to the little finger.
_PALM = np.array([(-23, -5.6), (-17, -7.4), (-10, -8), (-7, -6), (-7, 6), (-10, 7.6), (-17, 7), (-23, 5.6)])
_THUMB_ROOT = (-17.0, -6.0)
_KNUCKLES = ((-8.5, -6.0), (-7.2, -2.1), (-7.4, 1.9), (-8.6, 5.6))


@dataclass(frozen=True)
class Grip:
    """Where the finger tips and the thumb (joint, tip) are, in hand coordinates."""

    tips: tuple[tuple[float, float], ...]
    thumb: tuple[tuple[float, float], tuple[float, float]]


FLAT = Grip(((5, -7.2), (8, -2.4), (7.5, 2.4), (4, 7)), ((-11, -11.5), (-4, -13)))
GRASP = Grip(((4, -6.4), (5.5, -2.2), (5, 2.2), (3, 6)), ((-9, -12), (0, -11.5)))
PINCH = Grip(((2, -3), (3, -0.8), (1.5, 2.4), (-1, 5.4)), ((-9, -10), (1, -4.6)))


@dataclass(frozen=True)
class HandStyle:
    skin: Colour
    sleeve: Colour
    size: float
    shoulder: tuple[float, float]  # scene units, below the frame


def draw_hand(canvas: Canvas, style: HandStyle, contact: tuple[float, float], grip: Grip) -> None:
    """Draws the hand touching `contact` (scene units), its arm coming from the style's shoulder."""
    tip = np.array(contact)
    # The elbow gives way: the arm's visible end follows the hand sideways a little.
    root = np.array([style.shoulder[0] + 0.35 * (tip[0] - 64.0), max(style.shoulder[1], tip[1] + 45.0)])
    axis = (tip - root) / np.linalg.norm(tip - root)
    frame = np.stack([axis, [-axis[1], axis[0]]]) * style.size  # rows: along the arm, across it

    def at(points) -> np.ndarray:
        return np.asarray(points, dtype=np.float64) @ frame + tip

    reach = -math.dist(tip, root) / style.size
    skin, edge = style.skin, darker(style.skin, 0.45)
    forearm = at([(reach, -10), (-21, -5.4), (-21, 5.4), (reach, 10)])
    shadow = np.array([3.0, 4.5])
    canvas.polygon(forearm + shadow, (16, 10, 20, 50))
    canvas.polygon(at(_PALM) + shadow, (16, 10, 20, 50))
    canvas.polygon(forearm, skin, edge)
    cuff = -37.0
    canvas.polygon(at([(reach, -13), (cuff, -9), (cuff, 9), (reach, 13)]), style.sleeve, darker(style.sleeve, 0.5))
    canvas.line(at([(cuff - 2.5, -8.6), (cuff - 2.5, 8.6)]), lighter(style.sleeve, 0.3), 1.2)

    thumb_joint, thumb_tip = grip.thumb
    canvas.outlined_line(at([_THUMB_ROOT, thumb_joint, thumb_tip]), skin, edge, 4.2 * style.size)
    canvas.polygon(at(_PALM), skin, edge)
    canvas.polygon(at(_PALM * 0.86 + (-2.0, 0.0)), skin)
    for knuckle, finger_tip in zip(_KNUCKLES, grip.tips, strict=True):
        canvas.outlined_line(at([knuckle, finger_tip]), skin, edge, 3.6 * style.size)
    for x, y in _KNUCKLES:  # the palm flows into the fingers
        canvas.line(at([(x - 5.0, y * 0.9), (x + 1.0, y)]), skin, 3.4 * style.size)
    for x, y in grip.tips:
        canvas.line(at([(x - 0.4, y), (x + 0.8, y)]), lighter(skin, 0.55), 1.5 * style.size)
