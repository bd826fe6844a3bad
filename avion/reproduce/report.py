"""The report on some runs, as Markdown and as one HTML page: its tables and the text around them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from avion.errors import UserError
from avion.files import written_whole

from .recipe import BENCHMARKS, FULL, Recipe, Reference, load_recipes, load_references
from .render import Picture, Section, to_html, to_markdown
from .results import RELEASED, Problem, Result, Runs, read_runs
from .spread import given
from .tables import Cell, Column, Group, Line, Table, comparison, directions, lines_of, temporal_modules

TITLE = "Mamba as a video temporal adapter: what the paper says and what was measured"
DEMO_TITLE = "Demo dataset, scaled-down models: not comparable with the paper"
_DATA = {
    "zero-shot retrieval": "EPIC-KITCHENS-100 multi-instance retrieval after pretraining alone, 4 frames; percent.",
    "retrieval": "EPIC-KITCHENS-100 multi-instance retrieval, 16 frames; percent.",
    "actions": "EPIC-KITCHENS-100 action recognition, 16 frames; accuracy in percent.",
    "egoschema": "EgoSchema's multiple-choice questions; accuracy in percent by number of frames. The paper's figures "
    "are of all 5,031 questions, measured ones of those whose answers are public.",
    BENCHMARKS: "Benchmarks of which the paper has no metrics, by LaViLa's protocols (docs/zeroshot.md); percent. The "
    "column paper holds the metrics that EgoVLP, LaViLa and AVION published.",
}
_TITLES = {
    "zero-shot retrieval": "zero-shot retrieval", "retrieval": "retrieval, fine-tuned",
    "actions": "action recognition, fine-tuned", "egoschema": "EgoSchema, zero-shot",
}  # fmt: skip
_BEYOND = "Zero-shot, beyond the paper"
_DEMO_NOTE = (
    "All runs below are of recipes shrunk to the demo dataset: small models, few epochs, drawn videos. They show that "
    "every step works and what a report looks like. Figures under “real data” are the paper's, of other models on "
    "other videos; they are reminders, not targets, and no difference is taken from them."
)
_PAIRS_NOTE = (
    "Both models trained with the same settings, data and seed. The difference is the mean over the seeds that both "
    "have, ± its sample standard deviation from seed to seed; of a single seed there is no spread."
)


@dataclass(frozen=True)
class Known:
    """The content of the recipes and references."""

    recipes: Sequence[Recipe]
    references: Sequence[Reference]


def make_report(
    roots: Sequence[str | Path], output: str | Path, remarks: Sequence[str] = ()
) -> tuple[Runs, list[Path]]:
    """Write the report on the runs below these folders.

    Args:
        remarks: Paragraphs at the head of the part on scaled-down runs.

    Returns:
        The runs, and the files that were written.

    Raises:
        UserError: A folder holds no runs.
    """
    known = Known(load_recipes(), load_references())
    runs = read_runs(roots, {recipe.key: recipe for recipe in known.recipes})
    return runs, write(build(runs, known, remarks), Path(output), TITLE)


def build(runs: Runs, known: Known, remarks: Sequence[str] = ()) -> list[Section]:
    """Return all sections: those of full runs, those of each smaller scale, and the list of runs."""
    sections: list[Section] = []
    scales = {r.scale for r in runs.results}
    for scale in sorted(scales, key=lambda scale: (scale != FULL, scale)):
        results = [r for r in runs.results if r.scale == scale]
        if scale != FULL:
            title = DEMO_TITLE if scale == "demo" else f"Scale {scale}: not comparable with the paper"
            sections.append(Section(title, [_DEMO_NOTE, *remarks], level=1))
        sections += _of_scale(results, known, demo=scale != FULL)
    return [*sections, *_about_runs(runs)]


def _of_scale(results: Sequence[Result], known: Known, *, demo: bool) -> list[Section]:
    sections = []
    lines = _tables(results, known)
    for (title, task), own in lines.items():
        table = comparison(own, task, demo=demo)
        parts: list = [] if demo else [_DATA[task]]
        parts.append(table)
        if task.endswith("retrieval"):
            parts += ["Both directions: V2T, video to text; T2V, text to video.", directions(own, demo=demo)]
        sections.append(Section(title, [*parts, *_explained(own, task, demo)]))
    sections += _figure(results, known, demo=demo)
    modules = temporal_modules(lines, demo=demo)
    if modules.groups:
        sections.append(Section("TimeMamba minus TimeSformer", [_PAIRS_NOTE, modules]))
    missing = _without_runs(results, known)
    return [*sections, *([Section("No runs yet", [", ".join(missing) + "."])] if missing else [])]


def _tables(results: Sequence[Result], known: Known) -> dict[tuple[str, str], list[Line]]:
    """The lines of every table with a run, by title and task; the paper's tables in order, then AVION's baseline."""
    measured = {(r.recipe.table, r.recipe.task) for r in results if r.recipe.table is not None}
    lines = {}
    for table, task in sorted(
        measured, key=lambda t: (isinstance(t[0], str), str(t[0]).zfill(3), list(_DATA).index(t[1]))
    ):
        recipes = [r for r in known.recipes if (r.table, r.task) == (table, task)]
        references = [r for r in known.references if (r.table, r.task) == (table, task)]
        name = "AVION's baseline" if table == "avion" else f"Table {table}"
        title = _BEYOND if table == "zeroshot" else f"{name}: {_TITLES[task]}"
        lines[title, task] = lines_of(recipes, references, results)
    return lines


def _figure(results: Sequence[Result], known: Known, *, demo: bool) -> list[Section]:
    """Fig. 5 where a run of it is there."""
    own = [r for r in known.recipes if r.figure == 5]
    if not any(r.recipe.figure == 5 for r in results):
        return []
    from . import figure  # and with it matplotlib, for which `--help` does not wait

    lines = lines_of(own, [], results)
    references = [r for r in known.references if r.table == 10]
    published = figure.published_curves([*lines, *lines_of([], references, [])])
    measured = figure.measured_curves(lines)
    images = {
        dark: figure.image(figure.draw(measured, published, demo=demo, dark=dark), "svg") for dark in (False, True)
    }
    png = figure.image(figure.draw(measured, published, demo=demo), "png", opaque=True)
    name = "figure5_demo.png" if demo else "figure5.png"
    text = "; ".join(
        f"{c.name}: " + ", ".join(f"{n} frames {a:.2f} %" for n, a in zip(c.frames, c.accuracy, strict=True))
        for c in measured
    )
    picture = Picture(name, png, images[False], images[True], f"EgoSchema accuracy by number of frames. {text}")
    parts = ["Accuracy on EgoSchema against the number of frames that a model is shown.", picture]
    parts += [comparison(lines, "egoschema", demo=demo), *_explained(lines, "egoschema", demo)]
    return [Section("Figure 5: more frames", parts)]


def _explained(lines: Sequence[Line], task: str, demo: bool) -> list[str]:
    """What stands in the table above, as far as it does."""
    notes = []
    if any(len(line.runs) > 1 for line in lines):
        notes.append("a ± b: mean and sample standard deviation over the seeds that are listed.")
    if not demo:
        tolerances = {line.tolerance: [] for line in lines if line.runs}
        for line in lines:
            if line.runs:
                tolerances[line.tolerance].append(line.title)
        listed = "; ".join(
            f"{given(t)} percentage points" + (f" ({', '.join(dict.fromkeys(who))})" if len(tolerances) > 1 else "")
            for t, who in tolerances.items()
        )
        notes.append(
            f"Difference: measured minus paper, in percentage points. ▲ ▼: above or below by more than the tolerance "
            f"that the recipe states, {listed}."
        )
        if any(line.weights == RELEASED for line in lines):
            notes.append(
                "Weights: trained here, or released by the authors and only evaluated here; the latter's difference is "
                "from the figure released with them, or from the paper's where there is none."
            )
    notes += [f"{run.path}: {note}." for line in lines for run in line.runs for note in run.notes]
    if any(not line.runs for line in lines):
        notes.append("–: not measured, or not published.")
    return notes


def _without_runs(results: Sequence[Result], known: Known) -> list[str]:
    """Recipes that no run is of, in words."""
    done = {r.recipe.key for r in results}
    return [f"{r.where} ({r.task}, {r.key})" for r in known.recipes if r.key not in done]


def _about_runs(runs: Runs) -> list[Section]:
    columns = [Column("run", numeric=False), Column("recipe", numeric=False), Column("scale", numeric=False)]
    columns += [
        Column("weights", numeric=False),
        Column("seed"),
        Column("epochs"),
        Column("best epoch"),
        Column("its figure"),
    ]
    rows = []
    for r in runs.results:
        best = ("", "") if r.best is None else (str(r.best[0] + 1), f"{r.best[1]:.2f}")
        epochs = "" if r.epoch is None else str(r.epoch + 1)
        texts = (str(r.path), r.recipe.key, r.scale, r.evaluated, str(r.seed), epochs, *best)
        rows.append([Cell(text) for text in texts])
    note = (
        "Tables hold the evaluation after the last epoch. The best evaluation of a run, by mean mAP or top-1 action "
        "accuracy, is listed here only: it was chosen with the test clips in sight."
    )
    sections = [Section("Runs", [note, Table(columns, [Group("", rows)])], level=1)] if rows else []
    if runs.problems:
        sections.append(Section("In no table", [_problems(runs.problems)], level=1))
    return sections


def _problems(problems: Iterable[Problem]) -> Table:
    rows = [[Cell(str(p.path)), Cell(p.reason)] for p in problems]
    return Table([Column("folder", numeric=False), Column("why", numeric=False)], [Group("", rows)])


def write(sections: Sequence[Section], folder: Path, title: str) -> list[Path]:
    """Write tables.md, tables.html and the pictures of tables.md; files of an earlier report are replaced."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--output {folder}: cannot be made ({e.strerror}); give another folder") from e
    files = {p.name: p.png for s in sections for p in s.parts if isinstance(p, Picture)}
    files |= {"tables.md": to_markdown(sections, title).encode(), "tables.html": to_html(sections, title).encode()}
    for name, content in files.items():
        with written_whole(folder / name, cure="change --output") as file:
            file.write(content)
    return [folder / name for name in files]
