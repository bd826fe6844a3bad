"""The paper's tables with measured metrics: lines, columns and marks. `report.py` turns them into a report."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from .recipe import Recipe, Reference
from .results import FIGURES, RELEASED, TRAINED, Key, Result
from .spread import Spread, beyond, given, signed, spread_of

NONE = "–"  # nothing to show
HEADLINES = ("avg_map", "avg_ndcg")  # of a retrieval table; the rest stands in `directions`
LABELS: dict[Key, str] = {
    "vis_map": "mAP, video to text", "txt_map": "mAP, text to video", "avg_map": "mAP, mean of both directions",
    "vis_ndcg": "nDCG, video to text", "txt_ndcg": "nDCG, text to video", "avg_ndcg": "nDCG, mean of both directions",
    "verb_top1": "verb, top 1", "noun_top1": "noun, top 1", "action_top1": "action, top 1",
    "action_top5": "action, top 5",
    "ek100_mir.avg_map": "EK-100 retrieval, mAP", "ek100_mir.avg_ndcg": "EK-100 retrieval, nDCG",
    "charades_ego.map": "Charades-Ego, mAP", "egtea.mean_class": "EGTEA, mean class accuracy",
    "egomcq.intra": "EgoMCQ, intra-video accuracy", "egomcq.inter": "EgoMCQ, inter-video accuracy",
    "ek100_cls.top1": "EK-100 actions, top 1",
}  # fmt: skip
# Rows of the tables that differ only in the temporal module: attention, Mamba.
PAIRS = ((4, 6), (5, 7))
# What distinguishes the rows of Table 8 beside their names: the residual, and the tokens that the time mixer sees.
VARIANTS = {
    1: "Frozen", 2: "Frozen", 3: "Frozen", 4: "vanilla", 5: "Frozen", 6: "vanilla", 7: "Frozen",
    8: "Frozen, space-time",
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        mark: "above" or "below", if the cell differs from the reference by more than the tolerance.
        muted: Whether the cell was not measured here.
        value: The number by which the best cell of a column is found and set in bold; None for cells that do not
            compete.
        spread: Text after the number: "± 0.21".
    """

    text: str = ""
    spread: str = ""
    value: float | None = None
    bold: bool = False
    muted: bool = False
    mark: str = ""


@dataclass(frozen=True)
class Column:
    header: str
    numeric: bool = True
    over: str = ""  # a heading that it shares with its neighbours
    whole: bool = False  # whether the cells of text stay on one line


@dataclass(frozen=True)
class Group:
    """Rows under a title of their own; without a title, the rows follow those of the group before."""

    title: str
    rows: list[list[Cell]]


@dataclass(frozen=True)
class Table:
    columns: list[Column]
    groups: list[Group]


@dataclass(frozen=True)
class Line:
    """A model in one of the paper's tables, and whose weights were measured ("" for none). Metrics are in percent."""

    row: int | None
    name: str
    weights: str
    paper: Mapping[Key, float]
    released: Mapping[Key, float]
    runs: tuple[Result, ...] = ()
    tolerance: float | None = None
    key: str = ""  # of its recipe

    @property
    def title(self) -> str:
        """The paper's number and name. Rows that are shown for comparison may have no number."""
        return self.name if self.row is None else f"{self.row} {self.name}"

    @property
    def full_title(self) -> str:
        return self.title + (", released weights" if self.weights == RELEASED else "")

    @cached_property
    def measured(self) -> dict[Key, Spread]:
        """The spread of each metric over the runs that have the metric."""
        keys = dict.fromkeys(key for run in self.runs for key in run.figures)
        return {key: spread_of(list(self.by_seed(key).values())) for key in keys}

    def by_seed(self, key: Key) -> dict[int, float]:
        return {run.seed: run.figures[key] for run in self.runs if key in run.figures}

    def difference(self, key: Key) -> float | None:
        """Measured minus the paper's metric.

        For released weights, minus the metric released with them, where there is one.
        """
        reference = self.paper.get(key)
        if self.weights == RELEASED:
            reference = self.released.get(key, reference)
        if reference is None or key not in self.measured:
            return None
        return self.measured[key].mean - reference


def lines_of(recipes: Iterable[Recipe], references: Iterable[Reference], results: Sequence[Result]) -> list[Line]:
    """Return the lines of one table and task in the paper's order, one each for trained and for released weights."""
    lines = [Line(r.row, _name(r), "", r.paper, {}) for r in references]
    for recipe in recipes:
        own = [r for r in results if r.recipe.key == recipe.key]
        for weights in [w for w in (TRAINED, RELEASED) if any(r.evaluated == w for r in own)] or [""]:
            runs = sorted((r for r in own if r.evaluated == weights), key=lambda r: r.seed)
            about = (recipe.row, _name(recipe), weights, recipe.paper, recipe.released)
            lines.append(Line(*about, tuple(runs), recipe.tolerance, recipe.key))
    return sorted(lines, key=lambda line: -1 if line.row is None else line.row)


def _name(row: Recipe | Reference) -> str:
    return f"{row.name}, {VARIANTS[row.row]}" if row.table in (8, "zeroshot") and row.row in VARIANTS else row.name


def comparison(lines: Sequence[Line], task: str, *, demo: bool) -> Table:
    """Return a table with the columns measured, paper, released, difference and runs.

    The measured column stands first, so that a narrow screen shows it beside the model. There is a group for every
    metric, or for every model of EgoSchema. demo: The paper's columns are muted reminders, and nothing is compared with
    them.
    """
    weights = any(line.weights == RELEASED for line in lines)
    released = any(line.released for line in lines)
    columns = [Column("frames") if task == "egoschema" else Column("model", numeric=False)]
    columns += [Column("weights", numeric=False)] if weights else []
    columns += [Column("measured"), Column("paper, real data" if demo else "paper")]
    columns += [Column("released, real data" if demo else "released")] if released else []
    columns += [*([] if demo else [Column("difference")]), Column("runs", numeric=False, whole=True)]

    def row(line: Line, key: Key, name: str) -> list[Cell]:
        cells = [Cell(name), *([Cell(line.weights)] if weights else [])]
        cells += [_measured(line, key), _given(line.paper, key, demo)]
        cells += [_given(line.released, key, demo)] if released else []
        return [*cells, *([] if demo else [_difference(line, key)]), Cell(_runs(list(line.by_seed(key))))]

    if task == "egoschema":
        groups = [Group(line.full_title, [row(line, n, str(n)) for n in _frames(line)]) for line in lines]
        return Table(columns, bold_best(groups, together=True))
    keys = [key for key in FIGURES[task] if key in HEADLINES] or FIGURES[task]
    return Table(
        columns, bold_best([Group(LABELS[key], [row(line, key, line.title) for line in lines]) for key in keys])
    )


def directions(lines: Sequence[Line], *, demo: bool) -> Table:
    """Return a retrieval table as the paper has it: V2T, T2V and their mean, of mAP and of nDCG.

    There is a group for every model, with rows for paper, released, measured and difference. demo: Only the measured
    rows.
    """
    keys = FIGURES["retrieval"]
    columns = [Column("model" if demo else "", numeric=False)]
    columns += [Column(name, over=over) for over in ("mAP", "nDCG") for name in ("V2T", "T2V", "Avg")]
    if demo:
        rows = [[Cell(line.title), *(_measured(line, key) for key in keys)] for line in lines if line.measured]
        return Table(columns, bold_best([Group("", rows)]))
    groups = []
    for line in lines:
        again = line.weights == RELEASED and any(x.key == line.key and x.weights == TRAINED for x in lines)
        rows = [[Cell("paper"), *(_given(line.paper, key) for key in keys)]] if line.paper and not again else []
        rows += (
            [[Cell("released"), *(_given(line.released, key) for key in keys)]] if line.released and not again else []
        )
        if line.measured:
            rows.append([Cell("measured"), *(_measured(line, key) for key in keys)])
            rows.append([Cell("difference"), *(_difference(line, key) for key in keys)])
        groups.append(Group(line.full_title, rows))
    return Table(columns, bold_best(groups, together=True, alike=True))


def bold_best(groups: Sequence[Group], *, together: bool = False, alike: bool = False) -> list[Group]:
    """Set the largest value of every column in bold if not all values are equal: within each group, or `together`.

    alike: Only rows with the same first cell compete.
    """
    columns: dict[tuple, list[float]] = {}

    def place(group: int, row: list[Cell], column: int) -> tuple:
        return (None if together else group, row[0].text if alike else None, column)

    for g, group in enumerate(groups):
        for row in group.rows:
            for c, cell in enumerate(row):
                if cell.value is not None:
                    columns.setdefault(place(g, row, c), []).append(round(cell.value, 2))

    def best(g: int, row: list[Cell], c: int) -> Cell:
        cell, values = row[c], columns.get(place(g, row, c), [])
        wins = cell.value is not None and round(cell.value, 2) == max(values) > min(values)
        return replace(cell, bold=wins)

    return [
        Group(group.title, [[best(g, row, c) for c in range(len(row))] for row in group.rows])
        for g, group in enumerate(groups)
    ]


def temporal_modules(lines: Mapping[tuple[str, str], Sequence[Line]], *, demo: bool) -> Table:
    """Return TimeMamba minus TimeSformer, where both were measured from trained weights.

    The difference is the mean, over the seeds that both models have, of the differences seed by seed. If they share no
    seed, it is the difference of the means, without a spread.

    lines: The lines by the title of the table and task.
    """
    columns = [Column("figure", numeric=False), Column("TimeSformer"), Column("TimeMamba"), Column("difference")]
    columns += [
        Column("paper's difference" + (", real data" if demo else "")),
        Column("runs of each", numeric=False, whole=True),
    ]
    groups = []
    for (title, task), own in lines.items():
        for attention, mamba in _pairs(own):
            keys = FIGURES.get(task) or [n for n in attention.measured if n in mamba.measured]
            keys = [key for key in keys if key in attention.measured and key in mamba.measured]
            rows = [_module_row(attention, mamba, key, task) for key in keys]
            groups.append(Group(f"{title}: {mamba.title} minus {attention.title}", rows))
    return Table(columns, groups)


def _pairs(lines: Sequence[Line]) -> list[tuple[Line, Line]]:
    """Of PAIRS, the lines whose recipes' names differ in the row alone."""
    trained = {line.key: line for line in lines if line.weights == TRAINED}
    twins = [
        (line, trained.get(line.key.replace(f"row{attention}", f"row{mamba}")))
        for attention, mamba in PAIRS
        for line in trained.values()
        if line.row == attention
    ]
    return [(attention, mamba) for attention, mamba in twins if mamba is not None]


def _module_row(attention: Line, mamba: Line, key: Key, task: str) -> list[Cell]:
    name = f"{key} frames" if task == "egoschema" else LABELS[key]
    by_seed = [attention.by_seed(key), mamba.by_seed(key)]
    common = sorted(by_seed[0].keys() & by_seed[1].keys())
    pairs = [by_seed[1][seed] - by_seed[0][seed] for seed in common]
    difference = spread_of(pairs or [mamba.measured[key].mean - attention.measured[key].mean])
    paper = signed(mamba.paper[key] - attention.paper[key]) if key in mamba.paper and key in attention.paper else NONE
    cells = [Cell(name), *(replace(_measured(line, key), value=None) for line in (attention, mamba))]
    cells.append(_spread_cell(difference, difference=True))
    return [*cells, Cell(paper, muted=True), Cell(_runs(common) or "no seed in common")]


def _runs(seeds: Sequence[int]) -> str:
    """How many runs there are, and their seeds: a lone `0` would read as no run at all."""
    if not seeds:
        return ""
    return f"{len(seeds)} ({'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))})"


def _spread_cell(spread: Spread, *, difference: bool = False) -> Cell:
    text = signed(spread.mean) if difference else f"{spread.mean:.2f}"
    deviation = "" if spread.sd is None else f"± {spread.sd:.2f}"
    return Cell(text, deviation, value=None if difference else spread.mean)


def _frames(line: Line) -> list[int]:
    return sorted({*line.paper, *line.released, *line.measured})


def _given(figures: Mapping[Key, float], key: Key, demo: bool = False) -> Cell:
    if key not in figures:
        return Cell(NONE, muted=True)
    return Cell(given(figures[key]), value=None if demo else figures[key], muted=demo)


def _measured(line: Line, key: Key) -> Cell:
    if key not in line.measured:
        return Cell(NONE, muted=True)
    return _spread_cell(line.measured[key])


def _difference(line: Line, key: Key) -> Cell:
    difference = line.difference(key)
    if difference is None:
        return Cell(NONE, muted=True)
    return Cell(signed(difference), mark="" if line.tolerance is None else beyond(difference, line.tolerance))
