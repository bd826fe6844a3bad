"""The metrics that the runs below some folders measured, and the runs that do not count, with the reason.

A run of a recipe is a folder with a `recipe.json` (recipe, scale, seed, whose weights) and an `eval_log.txt`. The
evaluation after the last epoch counts, because the best of several evaluations would be optimistic.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avion.engine.options import EgoSchemaOptions, TrainingOptions, ZeroShotOptions
from avion.engine.run_files import EPOCHS, EVALUATIONS
from avion.errors import UserError
from avion.json_lines import read_json_lines
from avion.reading import parse_json, read_text
from avion.remote import is_remote

from .launch import RECORD, RELEASED, TRAINED
from .recipe import BENCHMARKS, FULL, Recipe, scaled

RETRIEVAL = ("vis_map", "txt_map", "avg_map", "vis_ndcg", "txt_ndcg", "avg_ndcg")
ACTIONS = ("verb_top1", "noun_top1", "action_top1", "action_top5")
# The benchmark, and its metric in the lines of eval_log.txt that name it.
BEYOND_THE_PAPER = (
    "ek100_mir.avg_map", "ek100_mir.avg_ndcg", "charades_ego.map", "egtea.mean_class", "egomcq.intra", "egomcq.inter",
    "ek100_cls.top1",
)  # fmt: skip
# The metrics of a task that the tables show, and the metric that `checkpoint_best.pt` is chosen by. EgoSchema has one
# accuracy for each number of frames.
FIGURES = {
    "zero-shot retrieval": RETRIEVAL, "retrieval": RETRIEVAL, "actions": ACTIONS, BENCHMARKS: BEYOND_THE_PAPER,
}  # fmt: skip
BEST_BY = {"zero-shot retrieval": "avg_map", "retrieval": "avg_map", "actions": "action_top1"}

Key = str | int  # the name of a metric in eval_log.txt, or a number of frames
_LARGEST = 64 << 20  # longer logs, in bytes, are not read


@dataclass(frozen=True)
class Result:
    """One run that counts. Metrics are in percent."""

    path: Path
    recipe: Recipe
    scale: str
    seed: int
    evaluated: str  # TRAINED or RELEASED: whose weights
    figures: dict[Key, float]
    epoch: int | None = None  # of the evaluation that counts; None where nothing was trained
    best: tuple[int, float] | None = None  # epoch and metric of the best evaluation by BEST_BY
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Problem:
    """A folder that is in no table, and the reason in one line."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Runs:
    results: list[Result]
    problems: list[Problem]


class _Unusable(Exception):
    """Why a run is in no table."""


def read_runs(roots: Sequence[str | Path], recipes: Mapping[str, Recipe]) -> Runs:
    """Read all runs below these folders.

    Args:
        recipes: The known recipes, by key.

    Raises:
        UserError: A folder does not exist, or no folder holds a run.
    """
    results: list[Result] = []
    problems: list[Problem] = []
    for folder in find_runs(roots):
        try:
            results.append(read_run(folder, recipes))
        except _Unusable as e:
            problems.append(Problem(folder, str(e)))
    results, repeated = _newest(results)
    return Runs(results, problems + repeated)


def find_runs(roots: Sequence[str | Path]) -> list[Path]:
    """Return the folders that hold a recipe.json or an eval_log.txt, in the order of their names, each once."""
    found: dict[Path, Path] = {}
    for name in roots:
        if is_remote(name):
            raise UserError(
                f"{name}: is an address, and runs are read from folders of this machine; copy {RECORD}, {EVALUATIONS} "
                f"and {EPOCHS} of the runs here (aws s3 sync, for example)"
            )
        root = Path(name)
        if not root.is_dir():
            raise UserError(f"{root}: no such folder; give folders of runs, such as runs/")
        for path in sorted([*root.rglob(RECORD), *root.rglob(EVALUATIONS)]):
            found.setdefault(path.parent.resolve(), path.parent)
    if not found:
        raise UserError(
            f"{', '.join(map(str, roots))}: no run here (a folder with recipe.json and eval_log.txt); "
            "tools/reproduce.py --run makes them"
        )
    return list(found.values())


def read_run(folder: Path, recipes: Mapping[str, Recipe]) -> Result:
    record = _record(folder)
    recipe = recipes.get(record["recipe"])
    if recipe is None:
        raise _Unusable(f"recipe.json: no recipe is called {record['recipe']!r}")
    rows, notes = _json_lines(folder / EVALUATIONS)
    common = {name: record[name] for name in ("scale", "seed", "evaluated")}
    options = _scaled(recipe, record["scale"]).args() if recipe.task in ("egoschema", BENCHMARKS) else None
    if isinstance(options, ZeroShotOptions):
        figures, more = _benchmarks(rows, options.dataset)
        return Result(folder, recipe, **common, figures=figures, notes=(*notes, *more))
    if isinstance(options, EgoSchemaOptions):
        rows, others = _of_sampling(rows, options.sampling)
        figures, more = _accuracies(rows, options.frames)
        notes += others
        return Result(folder, recipe, **common, figures=figures, notes=(*notes, *more))
    if record["evaluated"] == RELEASED:
        rows = [row for row in rows if "epoch" not in row]
        if not rows:
            raise _Unusable("eval_log.txt: no evaluation of released weights in it")
        epoch = best = None
    else:
        rows = [row for row in rows if "epoch" in row]
        epoch, best = _finished(folder, recipe, record["scale"], rows, record.get("epochs"))
    figures, more = _checked(rows[-1], FIGURES[recipe.task])
    return Result(folder, recipe, **common, figures=figures, epoch=epoch, best=best, notes=(*notes, *more))


def evaluated_epochs(folder: Path) -> int:
    """Return after how many epochs the latest evaluation in a folder was made; 0 without an evaluation."""
    try:
        rows, _ = _json_lines(folder / EVALUATIONS)
    except _Unusable:
        return 0
    return max((row["epoch"] + 1 for row in rows if _is_whole(row.get("epoch"))), default=0)


def _record(folder: Path) -> dict[str, Any]:
    path = folder / RECORD
    if not path.exists():
        raise _Unusable("not a run of a recipe: it has no recipe.json")
    try:
        record = parse_json(_read(path))
    except ValueError:
        raise _Unusable("recipe.json: not valid JSON") from None
    if not isinstance(record, dict) or not isinstance(record.get("recipe"), str):
        raise _Unusable("recipe.json: does not name a recipe")
    record = {"scale": FULL, "seed": 0, "evaluated": TRAINED, **record}
    if not isinstance(record["scale"], str) or not re.fullmatch(r"[\w-]+", record["scale"]):
        raise _Unusable(f"recipe.json: scale is {record['scale']!r}, expected {FULL} or the name of a scale")
    if record["evaluated"] not in (TRAINED, RELEASED):
        raise _Unusable(f"recipe.json: evaluated is {record['evaluated']!r}, expected {TRAINED} or {RELEASED}")
    if not _is_whole(record["seed"]):
        raise _Unusable(f"recipe.json: seed is {record['seed']!r}, expected a whole number")
    return record


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > _LARGEST:
            raise _Unusable(f"{path.name}: {path.stat().st_size / 1e6:.0f} MB is no log of a run")
        return read_text(path, errors="replace")
    except OSError as e:
        raise _Unusable(f"{path.name}: cannot be read ({e.strerror})") from None


def _json_lines(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows, and a note where lines were passed over: a process that is killed may leave half a line."""
    if not path.exists():
        raise _Unusable(f"{path.name}: missing; the run was not evaluated yet")
    try:
        lines = read_json_lines(path)
    except UserError as e:
        raise _Unusable(str(e)) from None
    rows, damaged = lines.objects, ", ".join(map(str, lines.damaged))
    notes = [f"{path.name}: line {damaged} is damaged and passed over"] if damaged else []
    if not rows:
        raise _Unusable(f"{path.name}: no evaluation in it")
    return rows, notes


def _finished(
    folder: Path, recipe: Recipe, scale: str, rows: list[dict[str, Any]], epochs: int | None
) -> tuple[int, tuple[int, float] | None]:
    """The last epoch and the best evaluation of a run that has trained all of its epochs."""
    if not rows:
        raise _Unusable("eval_log.txt: no evaluation of a training run in it")
    due = _epochs(_scaled(recipe, scale)) if epochs is None else epochs
    if not _is_whole(due) or due < 1:
        raise _Unusable(f"recipe.json: epochs is {due!r}, expected a positive number")
    last = rows[-1]["epoch"]
    if not _is_whole(last):
        raise _Unusable(f"eval_log.txt: epoch is {last!r}, expected a whole number")
    if last + 1 < due:
        raise _Unusable(f"unfinished: evaluated after {_trained(folder, last + 1)} of {due} epochs")
    metric = BEST_BY[recipe.task]
    scores = [(row["epoch"], row.get(metric)) for row in rows if _is_whole(row["epoch"])]
    scores = [(epoch, 100 * score) for epoch, score in scores if _is_fraction(score)]
    return last, max(scores, key=lambda pair: pair[1], default=None)


def _epochs(recipe: Recipe) -> int | None:
    options = recipe.args()
    return options.epochs if isinstance(options, TrainingOptions) else None


def _scaled(recipe: Recipe, scale: str) -> Recipe:
    try:
        return scaled(recipe, scale)
    except UserError as e:  # of a YAML file elsewhere: its name alone is known here
        raise _Unusable(f"recipe.json: {e}") from None


def _trained(folder: Path, evaluated: int) -> str:
    """How far log.txt says that the training came, where that is further than the last evaluation."""
    path = folder / EPOCHS
    epochs = [row.get("epoch") for row in _json_lines(path)[0]] if path.exists() else []
    done = max((epoch + 1 for epoch in epochs if _is_whole(epoch)), default=evaluated)
    return f"{evaluated} (trained: {done})" if done > evaluated else str(evaluated)


def _checked(row: Mapping[str, Any], names: Iterable[str]) -> tuple[dict[Key, float], list[str]]:
    figures: dict[Key, float] = {}
    for name in names:
        if not _is_fraction(row.get(name)):
            found = f"{name} is {row[name]!r}" if name in row else f"{name} is missing"
            raise _Unusable(f"eval_log.txt: {found} in the evaluation that counts, expected a fraction from 0 to 1")
        figures[name] = 100 * row[name]
    return figures, _unreadable(row, "clips")


def _of_sampling(rows: list[dict[str, Any]], sampling: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The evaluations with this frame sampling, and a note on those with another one.

    Earlier versions did not write the sampling down; their `prefix` was what `prefix-hold` is now.
    """
    unsaid = "uniform" if sampling == "uniform" else "an earlier version's"
    found = [row.get("sampling", unsaid) for row in rows]
    own = [row for row, name in zip(rows, found, strict=True) if name == sampling]
    others = sorted({str(name)[:40] for name in found if name != sampling})
    if not others:
        return own, []
    reason = f"{len(rows) - len(own)} evaluations are not of --sampling {sampling} (found: {', '.join(others)})"
    if not own:
        raise _Unusable(f"eval_log.txt: {reason}; run it again")
    return own, [f"{reason} and are passed over"]


def _accuracies(rows: Sequence[Mapping[str, Any]], due: Sequence[int]) -> tuple[dict[Key, float], list[str]]:
    """The latest accuracy at every number of frames."""
    figures: dict[Key, float] = {}
    notes: list[str] = []
    for row in rows:
        frames = row.get("frames")
        if not _is_whole(frames) or not _is_fraction(row.get("accuracy")):
            raise _Unusable("eval_log.txt: expected lines with frames and accuracy, a fraction from 0 to 1")
        figures[frames] = 100 * row["accuracy"]
    latest = {row["frames"]: row for row in rows}
    for frames, row in latest.items():
        notes += [f"{frames} frames: {note}" for note in _unreadable(row, "videos")]
    missing = sorted(set(due) - set(figures))
    if missing:
        notes.append(f"not measured yet at {', '.join(map(str, missing))} frames")
    return dict(sorted(figures.items())), notes


def _benchmarks(rows: Sequence[Mapping[str, Any]], due: Sequence[str]) -> tuple[dict[Key, float], list[str]]:
    """The latest metrics of every zero-shot benchmark."""
    latest = {row.get("dataset"): row for row in rows}
    figures: dict[Key, float] = {}
    notes: list[str] = []
    for key in BEYOND_THE_PAPER:
        name, metric = key.split(".")
        if name in latest:
            if not _is_fraction(latest[name].get(metric)):
                raise _Unusable(f"eval_log.txt: {name}: expected {metric}, a fraction from 0 to 1")
            figures[key] = 100 * latest[name][metric]
    for name in due:
        notes += [f"{name}: {note}" for note in _unreadable(latest.get(name, {}), "clips")]
    missing = [name for name in due if name not in latest]
    return figures, [*notes, *([f"not measured yet: {', '.join(missing)}"] if missing else [])]


def _unreadable(row: Mapping[str, Any], what: str) -> list[str]:
    count = row.get("unreadable", 0)
    return [f"{count} {what} could not be read and are in no figure"] if count else []


def _newest(results: Sequence[Result]) -> tuple[list[Result], list[Problem]]:
    """One run per recipe, scale, seed and weights: the one evaluated last. The others are named."""
    kept: dict[tuple, Result] = {}
    repeated = []
    for result in sorted(results, key=lambda r: (r.path / EVALUATIONS).stat().st_mtime_ns, reverse=True):
        key = (result.recipe.key, result.scale, result.seed, result.evaluated)
        if key in kept:
            reason = f"the same recipe, seed and weights as {kept[key].path}, which was evaluated later"
            repeated.append(Problem(result.path, reason))
        else:
            kept[key] = result
    order = {id(result): i for i, result in enumerate(results)}
    return sorted(kept.values(), key=lambda r: order[id(r)]), repeated


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_fraction(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value) and 0 <= value <= 1
