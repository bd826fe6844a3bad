"""A step of a plan as people read it: the command, the paper's metrics and what is missing."""

from collections.abc import Mapping, Sequence

from .commands import shell_text
from .launch import RELEASED
from .plan import Step
from .recipe import FULL, Figures, Recipe

# Metrics that are shown together: their name, the meaning of each number, and their keys in eval_log.txt.
_GROUPS = (
    ("mAP", "V2T/T2V/avg", ("vis_map", "txt_map", "avg_map")),
    ("nDCG", "V2T/T2V/avg", ("vis_ndcg", "txt_ndcg", "avg_ndcg")),
    ("top-1", "verb/noun/action", ("verb_top1", "noun_top1", "action_top1")),
    ("top-5", "action", ("action_top5",)),
    ("EK-100", "mAP/nDCG", ("ek100_mir.avg_map", "ek100_mir.avg_ndcg")),
)


def figures_text(figures: Figures, *, explained: bool = True) -> str:
    """Format {"avg_map": 26.2, ...} in one line, EgoSchema's by number of frames.

    A dash stands for a missing metric.
    """
    parts = []
    for name, columns, keys in _GROUPS:
        if any(key in figures for key in keys):
            values = "/".join(_percent(figures[key]) if key in figures else "–" for key in keys)
            parts.append(f"{name} {columns} {values}" if explained else f"{name} {values}")
    counts = sorted(key for key in figures if isinstance(key, int))
    return ", ".join([*parts, *(f"{_percent(figures[n])} @{n}{' frames' * explained}" for n in counts)])


def _percent(value: float) -> str:
    """One digit, or two where one would round it."""
    return f"{value:.1f}" if abs(value - round(value, 1)) < 1e-9 else f"{value:.2f}"


def described(step: Step) -> str:
    """Describe a step in several lines; the command among them can be copied."""
    recipe = step.run.recipe
    lines = [_title(step), "", shell_text(step.run.words), ""]
    for name, figures in (("paper", recipe.paper), ("released", recipe.released)):
        if figures:
            lines.append(f"  {name + ':':<10}{figures_text(figures)}")
    lines.append(f"  {'run in:':<10}{step.run.folder}")
    if step.done:
        lines.append(f"  {'done:':<10}its figures are there; --again runs it anew")
    elif recipe.scale == FULL and step.run.evaluated != RELEASED:
        lines.append(f"  {'expect:':<10}{_expected(step)}")
    for before in step.needs:
        lines.append(f"  {'after:':<10}{before.run.recipe.key}")
    for number, problem in enumerate(step.missing):
        lines.append(f"  {'missing:' if number == 0 else '':<10}{problem}")
    return "\n".join(lines)


def recipes_table(recipes: Sequence[Recipe]) -> str:
    """Return all recipes as a Markdown table, as in docs/recipes.md."""
    rows = [("recipe", "what", "expected", "paper", "released")]
    for recipe in recipes:
        hours = "" if recipe.hours is None else f"{recipe.hours:g} h, {recipe.hours_on}"
        figures = (figures_text(f, explained=False) for f in (recipe.paper, recipe.released))
        rows.append((f"`{recipe.key}`", f"{recipe.name}, {recipe.task}", hours, *figures))
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|-" * len(rows[0]) + "|", *lines[1:]])


def _title(step: Step) -> str:
    recipe = step.run.recipe
    notes: Mapping[str, bool] = {
        "from released weights": step.run.evaluated == RELEASED,
        f"scale {recipe.scale}": recipe.scale != FULL,
        f"seed {recipe.seed}": recipe.seed is not None,
    }
    more = "".join(f", {note}" for note, holds in notes.items() if holds)
    return f"{recipe.where}: {recipe.name}, {recipe.task} ({recipe.key}{more})"


def _expected(step: Step) -> str:
    recipe, hours = step.run.recipe, step.run.hours
    if recipe.hours is None or hours is None:
        return "nobody has measured how long it takes"
    measured = f"about {recipe.hours:g} hours on {recipe.hours_on} (docs/recipes.md says where this comes from)"
    if hours == recipe.hours:
        return measured
    return f"at least {hours:.2g} hours with {recipe.gpus} processes, if the speed grows with their number; {measured}"
