"""Fig. 5: EgoSchema's accuracy over the number of frames, with measured curves beside the paper's points."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from avion.evaluation.egoschema import OPTIONS

from .results import RELEASED
from .spread import spread_of
from .tables import Line

# By row of the paper; orange and blue that the colour-blind tell apart, on white and on black.
COLOURS = {4: "#d97706", 6: "#3b82f6"}
GREY = "#8a8a8a"
GUESSING = 100 / OPTIONS  # percent
_LEAST_SPAN = 15.0  # percentage points; on a narrower axis a question or two would look like a difference
_INK = {False: "#1f2328", True: "#e6e6e6"}  # by dark


@dataclass(frozen=True)
class Curve:
    """Points in the order of their numbers of frames.

    `spread` is the sample standard deviation, 0 for a single seed.
    """

    name: str
    colour: str
    frames: list[int]
    accuracy: list[float]
    spread: list[float] = field(default_factory=list)
    published: bool = False
    joined: bool = True
    released: bool = False  # of the authors' weights


def measured_curves(lines: Sequence[Line]) -> list[Curve]:
    """Return the measured curves, one for each model and kind of weights."""
    curves = []
    for line in lines:
        frames = sorted(n for n in line.measured if isinstance(n, int))
        if frames:
            spreads = [spread_of(list(line.by_seed(n).values())) for n in frames]
            name = line.name + (", released weights" if line.weights == RELEASED else "")
            means, errors = [s.mean for s in spreads], [s.sd or 0 for s in spreads]
            curves.append(
                Curve(name, COLOURS.get(line.row, GREY), frames, means, errors, released=line.weights == RELEASED)
            )
    return curves


def published_curves(lines: Sequence[Line]) -> list[Curve]:
    """Return the paper's points of the figure's models and of the models to which the table compares them."""
    curves = {}
    for line in lines:
        frames = sorted(line.paper)
        curve = Curve(
            line.name,
            COLOURS.get(line.row, GREY),
            frames,
            [line.paper[n] for n in frames],
            published=True,
            joined=line.row in COLOURS,
        )
        if frames:
            curves.setdefault(line.name, curve)
    return list(curves.values())


def draw(measured: Sequence[Curve], published: Sequence[Curve], *, demo: bool, dark: bool = False) -> Figure:
    """Draw the figure.

    demo: Whether to draw two panels, because measured and published points are of different videos.
    """
    ink = _INK[dark]
    with matplotlib.rc_context({"font.size": 9.5, "text.color": ink, "axes.labelcolor": ink, "axes.edgecolor": ink}):
        figure = Figure(figsize=(9.6, 3.9) if demo else (7.2, 4.2), layout="constrained", facecolor="none")
        FigureCanvasAgg(figure)
        if demo:
            left, right = figure.subplots(1, 2)
            _panel(left, measured, "measured: demo dataset, scaled-down models", ink, guessing=True)
            _panel(right, published, "the paper: EgoSchema, full models", ink)
        else:
            _panel(figure.subplots(), [*published, *measured], "EgoSchema, zero-shot", ink)
    return figure


def _panel(axes: Axes, curves: Sequence[Curve], title: str, ink: str, guessing: bool = False) -> None:
    for curve in curves:
        style = {"color": curve.colour, "label": curve.name}
        if curve.published:
            style |= {"marker": "o", "markerfacecolor": "none", "linestyle": ":" if curve.joined else "none"}
            style["label"] += ", paper"
            if not curve.joined:
                style["marker"] = "sd^v"[len(axes.lines) % 4]
            axes.plot(curve.frames, curve.accuracy, **style)
        else:
            some = any(curve.spread)
            style |= {"marker": "s", "linestyle": "--"} if curve.released else {"marker": "o"}
            axes.errorbar(curve.frames, curve.accuracy, yerr=curve.spread if some else None, capsize=2.5, **style)
    frames = sorted({n for curve in curves if curve.joined for n in curve.frames})
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(_ticks(frames)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
    axes.tick_params(colors=ink)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_facecolor("none")
    axes.set_title(title, loc="left", color=ink)
    axes.set(xlabel="frames per video (log₂)", ylabel="accuracy, %")
    if guessing:
        _beside_guessing(axes)
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 0.0), min(high, 100.0))
    if curves:
        axes.legend(frameon=False, fontsize=8.5)


def _beside_guessing(axes: Axes) -> None:
    """Add what guessing is worth, on an axis wide enough to see small differences as small."""
    axes.axhline(GUESSING, color=GREY, linestyle="-.", linewidth=1, label="guessing")
    low, high = axes.get_ylim()
    room = max(0.0, _LEAST_SPAN - (high - low)) / 2
    axes.set_ylim(low - room, high + room)


def _ticks(frames: Sequence[int]) -> list[int]:
    """Of these numbers, in ascending order, the ones that stand apart on a logarithmic axis."""
    apart = (frames[-1] / frames[0]) ** (1 / 11) if frames else 1
    kept: list[int] = []
    for n in frames:
        if not kept or n >= kept[-1] * apart * 0.999:
            kept.append(n)
    return kept


def image(figure: Figure, kind: str, *, opaque: bool = False) -> bytes:
    """Render a figure as "png" or "svg" (`kind`). opaque: on white. The same figure gives the same bytes."""
    content = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "avion"}):
        metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
        figure.savefig(content, format=kind, dpi=160, metadata=metadata, facecolor="white" if opaque else "none")
    return content.getvalue()
