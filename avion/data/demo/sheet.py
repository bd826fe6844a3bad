"""The contact sheet: for each verb pair one row of frames in time, to be read in both directions."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from avion.data.demo.backdrop import draw_room
from avion.data.demo.canvas import HEIGHT, WIDTH
from avion.data.demo.film import film_take
from avion.data.demo.vocabulary import PAIRS, Label, training_sentence

FRAMES = 6
_SCALE = 2  # drawn at twice the videos' 128 × 96 …
_SHOWN = (176, 132)  # … and shown at this size
_GAP, _EDGE, _CAPTION, _ARROW = 6, 16, 30, 28
_INK, _RUST, _PAPER = (44, 40, 52), (196, 84, 52), (250, 248, 244)


def _arrow(draw: ImageDraw.ImageDraw, x: int, y: int, direction: int) -> None:
    """An arrow from x on, to the right (1) or to the left (-1)."""
    tip = x + 18 * direction
    draw.line((x, y, tip, y), fill=_RUST, width=2)
    draw.line((tip - 6 * direction, y - 5, tip, y, tip - 6 * direction, y + 5), fill=_RUST, width=2, joint="curve")


class _Always:
    """Stands in for a random generator where the most frequent wording is wanted."""

    def random(self) -> float:
        return 0.0


def _row_frames(index: int, seed: int) -> tuple[Label, list[Image.Image]]:
    pair = PAIRS[index]
    rng = np.random.default_rng((seed, index))
    label = Label(pair, pair.nouns[index % len(pair.nouns)], backward=False)
    take = film_take(label, draw_room(rng), rng, fps=24, scale=_SCALE)
    first, last = (round(s * 24) for s in (take.start, take.stop))
    picks = np.linspace(first + 3, last - 4, FRAMES).round().astype(int)
    return label, [Image.fromarray(take.frames[i]).resize(_SHOWN, Image.Resampling.LANCZOS) for i in picks]


def contact_sheet(path: Path, seed: int = 0) -> None:
    """Writes the sheet as PNG (palette of 255 colours)."""
    assert _SHOWN[0] * HEIGHT == _SHOWN[1] * WIDTH
    width = 2 * _EDGE + FRAMES * _SHOWN[0] + (FRAMES - 1) * _GAP
    row_height = _SHOWN[1] + _CAPTION
    sheet = Image.new("RGB", (width, 2 * _EDGE + len(PAIRS) * row_height - 8), _PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(16)
    for index in range(len(PAIRS)):
        label, frames = _row_frames(index, seed)
        top = _EDGE + index * row_height
        forward, backward = (training_sentence(x, _Always()) for x in (label, label.partner))
        draw.text((_EDGE + _ARROW, top + 2), forward, fill=_INK, font=font)
        draw.text((width - _EDGE - _ARROW, top + 2), backward, fill=_INK, font=font, anchor="ra")
        _arrow(draw, _EDGE + 1, top + 12, 1)
        _arrow(draw, width - _EDGE - 2, top + 12, -1)
        for i, frame in enumerate(frames):
            sheet.paste(frame, (_EDGE + i * (_SHOWN[0] + _GAP), top + _CAPTION - 6))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.quantize(255, kmeans=1, dither=Image.Dither.FLOYDSTEINBERG).save(path, optimize=True)
