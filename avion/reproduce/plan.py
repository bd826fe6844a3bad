"""The runs that a request consists of, in their order, and what each of them lacks."""

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from avion.errors import UserError

from .commands import from_released, with_processes, with_words
from .launch import RELEASED, TRAINED, Run
from .prerequisites import Missing, missing
from .recipe import CHECKPOINT, FULL, Recipe, load_recipe, scaled

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """How recipes are to be run.

    Attributes:
        words: More flags of the entry points.
        plugins: Modules that every run imports, and that this process has imported.
        here: Whether they run on this machine, not on a cluster.
        nodes: The number of nodes of a job. Without `gpus`, each node has as many processes as the recipe.
    """

    runs: str = "runs"
    scale: str = FULL
    seeds: tuple[int | None, ...] = (None,)
    gpus: int | None = None
    device: str = "auto"
    released: bool = False
    checkpoint: str | None = None
    words: tuple[str, ...] = ()
    plugins: tuple[str, ...] = ()
    with_prerequisites: bool = False
    again: bool = False
    here: bool = True
    nodes: int = 1

    def run(self, recipe: Recipe, seed: int | None, words: Sequence[str] = ()) -> Run:
        """Return the run of a recipe under this request."""
        recipe = scaled(recipe, self.scale, self.runs, seed)
        if self.device != "auto":
            recipe = recipe.with_flags({"device": self.device})
        if self.released:
            recipe = from_released(recipe, self.checkpoint)
        before = recipe.gpus
        if self.gpus is not None or self.nodes > 1:
            try:
                recipe = with_processes(recipe, self.gpus or before * self.nodes)
            except UserError as e:
                raise e if self.gpus else UserError(f"--nodes {self.nodes} with {before} processes each: {e}") from e
        hours = None if recipe.hours is None else recipe.hours * before / recipe.gpus
        if self.plugins:
            words = ["--import", *self.plugins, *words]
        evaluated = RELEASED if self.released else TRAINED
        return Run(with_words(recipe, words), evaluated, self.nodes, hours)


@dataclass(frozen=True)
class Step:
    """One run of a plan. `needs` holds the earlier steps from whose checkpoints the run starts."""

    run: Run
    done: bool
    missing: tuple[Missing, ...] = ()
    needs: tuple["Step", ...] = ()


def plan(recipes: Sequence[Recipe], request: Request) -> list[Step]:
    """Return the runs of some recipes, in their order.

    With `with_prerequisites`, each run comes after the unfinished run from whose checkpoint it starts.

    Raises:
        UserError: The request contradicts itself, or a folder holds another run.
    """
    recipes = _released_ones(recipes, request) if request.released else recipes
    if request.checkpoint and len(recipes) > 1:
        names = ", ".join(recipe.key for recipe in recipes)
        raise UserError(f"--checkpoint: is of one recipe, and this asks for {names}; choose with --recipe")
    if request.released and request.seeds != (None,):
        raise UserError("--seed: an evaluation of released weights draws nothing; leave it out")
    steps: dict[Path, Step] = {}
    for seed in request.seeds:
        for recipe in sorted(recipes, key=lambda r: r.starts_from is not None):
            _add(steps, recipe, request, seed)
    return list(steps.values())


def _released_ones(recipes: Sequence[Recipe], request: Request) -> list[Recipe]:
    """Those with released weights; the only one stays, to be refused with its reason."""
    if request.checkpoint or len(recipes) == 1:
        return list(recipes)
    without = [recipe.key for recipe in recipes if recipe.checkpoint is None]
    if without:
        logger.info("left out, since no checkpoint of it was released: %s", ", ".join(without))
    return [recipe for recipe in recipes if recipe.checkpoint is not None]


def _add(steps: dict[Path, Step], recipe: Recipe, request: Request, seed: int | None) -> None:
    run = request.run(recipe, seed, request.words)
    if run.folder in steps:
        return
    if not request.again:
        run.check_folder()
    done = run.finished() and not request.again
    lacks, needs = [], []
    if not done and run.recipe.starts_from is not None:
        before, problem = _parent(steps, run, request, seed)
        needs = [before] if before is not None else []
        lacks = [problem] if problem is not None else []
    if not done:
        lacks += missing(run.recipe, request.device, here=request.here)
    steps[run.folder] = Step(run, done, tuple(lacks), tuple(needs))


def _parent(
    steps: dict[Path, Step], run: Run, request: Request, seed: int | None
) -> tuple[Step | None, Missing | None]:
    """The planned step that this run starts from; else what is missing of it (nothing, if it is finished)."""
    parent = load_recipe(run.recipe.path.with_name(f"{run.recipe.starts_from}.yaml"))
    request = dataclasses.replace(request, again=False)
    before = request.run(parent, seed)
    if before.folder not in steps and request.with_prerequisites and not before.finished():
        _add(steps, parent, dataclasses.replace(request, words=()), seed)
    if before.folder in steps:
        return steps[before.folder], None
    if before.finished():
        return None, None
    where = f"--table {parent.table} --row {parent.row}"
    return None, Missing(
        f"weights {before.folder / CHECKPOINT}, after the last epoch of {parent.where}",
        f"run it first (`python tools/reproduce.py {where} --run`, with the same other flags), or "
        "--with-prerequisites; weights from elsewhere: `-- --pretrain-model FILE`",
    )
