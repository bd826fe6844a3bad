"""Draw curves of one or several runs as a picture: loss, learning rate, gradient norm, time gates, speed, evaluations.

Several runs lie over each other, a colour each. Losses of different kinds, such as a contrastive loss and a cross
entropy, get a panel each.

Examples:
    python tools/plot_run.py runs/id6 --output id6.png
    python tools/plot_run.py runs/id4 runs/id6 runs/id7 --output compare.png
    python tools/plot_run.py s3://bucket/runs/id6 --output id6.png

RUN is what the training run was given as --output-dir: a folder, or an address in an object store. The run may be
resumed or still going on. Exit status: 0, or 2 after an error message of one line.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from avion.engine.args import ToolParser
from avion.engine.run_files import EPOCHS, PROGRESS
from avion.errors import UserError, exit_status, say
from avion.files import written_whole
from avion.json_lines import read_json_lines
from avion.reading import file_exists
from avion.remote import is_remote, joined
from avion.targets import check_target

if TYPE_CHECKING:  # matplotlib is imported where it draws: `--help` does not wait for it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

_CURE = "name the --output-dir of a training"

# Okabe and Ito's colours, which colour-blind readers can tell apart too; their yellow is too pale for a line.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", ":", "-.")
WIDTH = 1.5  # of every curve, in points
DASH = 5.0  # length of the dashes of curves that lie on each other, in widths of the curve
COLUMNS = 3
# Where there are more points than this, they are drawn pale under their moving average.
SMOOTHED_ABOVE = 150
# Where there are more blocks than this, a colour bar takes the place of the legend.
LEGEND_BLOCKS = 6
# The kind of a run's loss, by the metric that training writes beside a loss of this kind.
LOSSES = {"clip_acc": "contrastive", "max_margin_loss": "max-margin", "acc1": "cross entropy"}
# What every training writes; other metrics belong to the loss.
_COMMON = {
    "epoch", "step", "global_step", "loss", "lr", "grad_norm", "alpha", "clips_per_s", "wait", "memory_gb",
    "skipped_steps",
}  # fmt: skip
# The metrics of the evaluations that get a panel; where a task has none of them, every metric gets a panel.
HEADLINES = {
    "avg_map": "mAP, mean of V2T and T2V", "avg_ndcg": "nDCG, mean of V2T and T2V", "verb_top1": "verb top-1",
    "noun_top1": "noun top-1", "action_top1": "action top-1",
}  # fmt: skip


@dataclass
class Run:
    """The rows that a run has written until now, in the order of their global steps, which differ from row to row."""

    name: str
    steps: list[dict[str, Any]]
    epochs: list[dict[str, Any]]

    @property
    def blocks(self) -> int:
        """The number of time gates of the model."""
        return len(self.steps[-1].get("alpha", []))

    @property
    def loss(self) -> str | frozenset[str]:
        """The kind of the loss: a name of `LOSSES`, or else the metrics that belong to the loss."""
        own = frozenset(key for row in self.steps for key in row) - _COMMON
        return next((name for key, name in LOSSES.items() if key in own), own)

    def evaluated(self) -> set[str]:
        """The names of the metrics of the evaluations."""
        return {key.removeprefix("test_") for row in self.epochs for key in row if key.startswith("test_")}


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """Read the rows of a JSON-lines log.

    A last line without a line end is left out: it is being written, or the process that wrote it was killed. A resumed
    run does the steps since its checkpoint again; its lines take the place of those written before.

    Args:
        path: The log.

    Returns:
        The rows, in the order of their global steps.

    Raises:
        UserError: A line holds anything but a row of metrics. The message names file and line.
    """
    if not _exists(path):
        raise UserError(f"{path}: cannot be read (No such file or directory); {_CURE}")
    lines = read_json_lines(path, cure=_CURE)
    if lines.damaged:
        raise UserError(f"{path} line {lines.damaged[0]}: no JSON object; correct or remove the line")
    rows: list[dict[str, Any]] = []
    for number, row in lines.rows:
        _check_row(row, f"{path} line {number}")
        while rows and rows[-1]["global_step"] >= row["global_step"]:
            rows.pop()
        rows.append(row)
    return rows


def _check_row(row: dict[str, Any], where: str) -> None:
    if type(row.get("global_step")) is not int:
        raise UserError(f"{where}: has no whole number `global_step`; correct or remove the line")
    for key, value in row.items():
        values = value if key in ("alpha", "train_alpha") and isinstance(value, list) else [value]
        if not all(type(v) is float or type(v) is int and abs(v) < 2**63 for v in values):
            raise UserError(f"{where}: {key} must be a number, found {value!r}; correct or remove the line")


def _exists(path: str | Path) -> bool:
    try:
        return file_exists(path)
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); {_CURE}") from e


def read_run(folder: str | Path, name: str) -> Run:
    """Read the logs of a run."""
    if not is_remote(folder) and not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder; {_CURE}")
    progress, epochs = joined(folder, PROGRESS), joined(folder, EPOCHS)
    steps = read_log(progress)
    if not steps:
        raise UserError(f"{progress}: holds no progress line yet; wait for the first (--print-freq)")
    return Run(name, steps, read_log(epochs) if _exists(epochs) else [])


def short_names(folders: Sequence[str | Path]) -> list[str]:
    """Name folders by the last parts of their paths, as many parts as are needed to tell the folders apart.

    Args:
        folders: The folders, here or in remote places.

    Returns:
        A name for each folder.

    Raises:
        UserError: A folder is named twice.
    """
    whole = [
        tuple(str(folder).rstrip("/").split("/")) if is_remote(folder) else Path(folder).resolve().parts
        for folder in folders
    ]
    for count in range(1, max(map(len, whole)) + 1):
        names = ["/".join(parts[-count:]) for parts in whole]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"{folders[0]}: a run is named twice; name each once")


# --- panels ----------------------------------------------------------------------------------


def points(rows: list[dict[str, Any]], key: str, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps and the values of the rows that have a metric."""
    found = [(row["global_step"], row[key]) for row in rows if key in row and math.isfinite(row[key])]
    x, y = np.array(found, dtype=float).reshape(-1, 2).T
    return x, scale * y


def moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Return the centred moving average; at both ends, the average of the values that exist."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    start, stop = np.maximum(at - window // 2, 0), np.minimum(at + window // 2 + 1, len(values))
    return (total[stop] - total[start]) / (stop - start)


def label(axes: "Axes", title: str, unit: str = "") -> None:
    """Label a panel with its title and its unit."""
    axes.set_title(title, fontsize="medium", loc="left")
    axes.set_ylabel(unit)


def look(index: int) -> dict[str, Any]:
    """Return the colour and the line of the run with this number."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": STYLES[index // len(COLOURS) % len(STYLES)]}


def curve(axes: "Axes", x: np.ndarray, y: np.ndarray, style: dict[str, Any], smooth: bool) -> None:
    """Draw the line of one run."""
    if smooth and len(x) > SMOOTHED_ABOVE:
        axes.plot(x, y, **style, linewidth=0.6, alpha=0.25)
        y = moving_average(y, len(x) // 40)
    axes.plot(x, y, **style, linewidth=WIDTH, marker="o" if len(x) == 1 else None, markersize=4, clip_on=len(x) != 1)


def styles(curves: Sequence[tuple[int, np.ndarray, np.ndarray]]) -> list[dict[str, Any]]:
    """Return the looks of the curves of a panel, given as (number of the run, x, y).

    Where curves lie on each other over their whole length, their dashes take turns, so that all of them can be seen.
    """
    groups: dict[bytes, list[int]] = {}
    for place, (_, x, y) in enumerate(curves):
        groups.setdefault(np.stack([x, y]).tobytes(), []).append(place)
    found = [look(index) for index, _, _ in curves]
    for places in groups.values():
        for turn, place in enumerate(places if len(places) > 1 else []):
            found[place]["linestyle"] = (DASH * turn, (DASH, DASH * (len(places) - 1)))
    return found


def end_at(axes: "Axes", least: float = -math.inf, most: float = math.inf) -> None:
    """End the y axis at the largest and the smallest value that is possible."""
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, least), min(high, most))


def training_panel(
    key: str,
    title: str,
    unit: str,
    *,
    scale: float = 1.0,
    smooth: bool = True,
    from_zero: bool = False,
    most: float = math.inf,
    loss: str | frozenset[str] | None = None,
) -> "Callable[[Axes, list[Run]], None]":
    """Make a function that draws one metric of the progress lines, with all runs in one panel."""

    def draw(axes: "Axes", runs: list[Run]) -> None:
        curves = []
        for index, run in enumerate(runs):
            if loss is None or run.loss == loss:
                x, y = points(run.steps, key, scale)
                curves.append((index, x, np.cumsum(y) if key == "skipped_steps" else y))
        for (_, x, y), style in zip(curves, styles(curves), strict=True):
            curve(axes, x, y, style, smooth)
        lowest = min((y.min() for _, _, y in curves if len(y)), default=math.inf)
        highest = max((y.max() for _, _, y in curves if len(y)), default=0.0)
        if key == "grad_norm" and lowest > 0 and highest > 20 * lowest:
            axes.set_yscale("log")
        elif lowest >= 0:
            end_at(axes, 0.0, most)
            if from_zero:
                axes.set_ylim(0.0, None)
        if key == "lr":
            from matplotlib.ticker import FuncFormatter

            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        if key == "skipped_steps":
            from matplotlib.ticker import MaxNLocator

            axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        label(axes, title, unit)

    return draw


def loss_panels(runs: list[Run]) -> "list[Callable[[Axes, list[Run]], None]]":
    """Return a panel for every kind of loss, since values of two kinds cannot be compared."""
    kinds = dict.fromkeys(run.loss for run in runs if any("loss" in row for row in run.steps))
    found = []
    for kind in kinds:
        title = "training loss"
        if isinstance(kind, str):
            title += f", {kind}"
        elif len(kinds) > 1:
            title += ": " + ", ".join(run.name for run in runs if run.loss == kind)
        found.append(training_panel("loss", title, "", loss=kind))
    return found


def evaluation_panel(key: str, title: str, percent: bool) -> "Callable[[Axes, list[Run]], None]":
    """Make a function that draws one metric of the evaluations, with all runs in one panel."""

    def draw(axes: "Axes", runs: list[Run]) -> None:
        curves = [
            (index, *points(run.epochs, f"test_{key}", 100.0 if percent else 1.0)) for index, run in enumerate(runs)
        ]
        for (_, x, y), style in zip(curves, styles(curves), strict=True):
            curve(axes, x, y, style, smooth=False)
            axes.plot(x, y, ".", color=style["color"], markersize=7, clip_on=not len(x))
        if percent:
            end_at(axes, 0.0, 100.0)
        elif all(y.min() >= 0 for _, _, y in curves if len(y)):
            end_at(axes, 0.0)
        label(axes, f"evaluation: {title}", "%" if percent else "")

    return draw


def gates_panel(run: Run, title: str, limits: tuple[float, float]) -> "Callable[[Axes, list[Run]], None]":
    """Make a function that draws α of every block of one run."""

    def draw(axes: "Axes", runs: list[Run]) -> None:
        import matplotlib
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import ListedColormap, Normalize
        from matplotlib.ticker import MaxNLocator

        colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.88, run.blocks))
        rows = [row for row in run.steps if len(row.get("alpha", [])) == run.blocks]
        x = [row["global_step"] for row in rows]
        for block in range(run.blocks):
            y = [row["alpha"][block] for row in rows]
            look = {"color": colours[block], "linewidth": WIDTH, "marker": "o" if len(x) == 1 else None}
            axes.plot(x, y, **look, clip_on=len(x) != 1, label=str(block))
        axes.set_ylim(limits)
        label(axes, title, "α, mixing is times tanh α")
        if run.blocks <= LEGEND_BLOCKS:
            axes.legend(title="block", fontsize="small", title_fontsize="small", ncols=2, frameon=False)
        else:
            scale = ScalarMappable(Normalize(-0.5, run.blocks - 0.5), ListedColormap(colours))
            axes.figure.colorbar(scale, ax=axes, label="block", ticks=MaxNLocator(6, integer=True), pad=0.02)

    return draw


def gate_limits(runs: list[Run]) -> tuple[float, float]:
    """Return one range of the vertical axis for the gates of all runs."""
    values = [v for run in runs for row in run.steps for v in row.get("alpha", []) if math.isfinite(v)]
    low, high = min(values, default=0.0), max(values, default=0.0)
    margin = 0.06 * (high - low) or 0.01
    return low - margin, high + margin


def panels(runs: list[Run]) -> "list[Callable[[Axes, list[Run]], None]]":
    """Return the functions that draw the panels for which these runs have values."""
    has = {key for run in runs for row in run.steps for key in row}
    found = loss_panels(runs) + [
        training_panel(key, title, unit, **more)
        for key, title, unit, more in (
            ("lr", "learning rate", "", {"smooth": False, "from_zero": True}),
            ("grad_norm", "gradient norm, before clipping", "", {}),
            ("clips_per_s", "speed, all processes", "clips/s", {"from_zero": True}),
            ("wait", "waiting for data", "% of the time", {"scale": 100.0, "from_zero": True, "most": 100.0}),
        )
        if key in has
    ]
    if any(row.get("skipped_steps") for run in runs for row in run.steps):
        found.append(training_panel("skipped_steps", "skipped steps so far", "", smooth=False, from_zero=True))
    metrics = {name for run in runs for name in run.evaluated()}
    named = [name for name in HEADLINES if name in metrics]
    found += [evaluation_panel(name, HEADLINES[name], percent=True) for name in named]
    if not named:
        found += [evaluation_panel(name, name, percent=False) for name in sorted(metrics)]
    gated = [run for run in runs if run.blocks]
    for run in gated:
        title = "time gates" + (f": {run.name}" if len(runs) > 1 else "")
        found.append(gates_panel(run, title, gate_limits(gated)))
    return found


def _steps(line: "Line2D") -> np.ndarray:
    return np.asarray(line.get_xdata())


def draw(runs: list[Run]) -> "Figure":
    """Draw all panels of the runs into one figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter, MaxNLocator

    todo = panels(runs)
    columns = min(COLUMNS, len(todo))
    rows = math.ceil(len(todo) / columns)
    last = max(row["global_step"] for run in runs for row in run.steps + run.epochs)
    # Without pyplot, whose backend is that of the caller: a notebook's, or a window's.
    figure = Figure(figsize=(4.4 * columns, 3.0 * rows + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, panel in zip(grid.flat, todo, strict=False):
        panel(axes, runs)
        axes.set_xlim(0, max((float(x[-1]) for x in map(_steps, axes.lines) if len(x)), default=last))
        axes.set_xlabel("optimizer step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid.flat[len(todo) :]:
        axes.set_visible(False)
    if len(runs) == 1:
        figure.suptitle(runs[0].name, fontweight="bold")
    else:
        handles = [Line2D([], [], **look(index)) for index in range(len(runs))]
        names = [run.name for run in runs]
        figure.legend(handles, names, loc="outside upper center", ncols=min(len(runs), 4), frameon=False)
    return figure


def plot(folders: Sequence[str | Path], output: Path) -> None:
    """Draw the runs in these folders into a PNG file.

    Args:
        folders: The `--output-dir`s of the runs, here or in remote places.
        output: The PNG file.

    Raises:
        UserError: A log cannot be read, or the file cannot be written.
    """
    if output.suffix.lower() != ".png":
        raise UserError(f"--output {output}: a name that ends with .png is required")
    runs = [read_run(folder, name) for folder, name in zip(folders, short_names(folders), strict=True)]
    figure = draw(runs)
    with written_whole(output, flag="--output", cure="choose another place") as file:
        figure.savefig(file, format="png", dpi=110)


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these command-line words (None: `sys.argv`); returns the exit status."""
    parser = ToolParser(prog="tools/plot_run.py", doc=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder or address of a training run")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE.png", help="PNG file that is written")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --output")
    given = parser.parse_args(argv)

    def body() -> None:
        check_target(given.output, "--output", overwrite=given.overwrite)
        plot(given.runs, given.output)
        say(str(given.output))

    return exit_status("tools/plot_run.py", body)
