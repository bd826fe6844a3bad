"""A run of a recipe: whether it is done, the file that marks it, and running it in a child process."""

import json
import logging
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avion.engine.options import EgoSchemaOptions, TrainingOptions, ZeroShotOptions
from avion.engine.run_files import EVALUATIONS
from avion.errors import UserError
from avion.files import write_text
from avion.json_lines import read_json_lines
from avion.reading import parse_json, read_text

from .commands import command, executable
from .recipe import CHECKPOINT, Recipe, weights_of

logger = logging.getLogger(__name__)

RECORD = "recipe.json"
TRAINED, RELEASED = "trained", "released"


@dataclass(frozen=True)
class Run:
    """A recipe as it will be run.

    Attributes:
        evaluated: Whose weights are evaluated.
        nodes: The number of nodes that share the processes.
        hours: How long the recipe takes on its own number of processes, scaled to the number of this run.
    """

    recipe: Recipe
    evaluated: str = TRAINED
    nodes: int = 1
    hours: float | None = None

    @property
    def folder(self) -> Path:
        return self.recipe.output_dir

    @property
    def words(self) -> list[str]:
        return command(self.recipe, self.nodes)

    def record(self) -> dict[str, Any]:
        """Return the content of recipe.json, by which the tables know what a folder holds."""
        recipe, options = self.recipe, self.recipe.args()
        record: dict[str, Any] = {"recipe": recipe.key, "scale": recipe.scale, "seed": recipe.seed or 0}
        record["evaluated"] = self.evaluated
        if isinstance(options, TrainingOptions) and self.evaluated == TRAINED:
            return {**record, "checkpoint": str(self.folder / CHECKPOINT), "epochs": options.epochs}
        return {**record, "checkpoint": weights_of(options) or ""}

    def finished(self) -> bool:
        """Return whether the run's metrics exist.

        A folder without recipe.json counts as a folder of this run, which was then started by hand.
        """
        if self._found() not in (None, self.record()):
            return False
        rows, options = read_json_lines(self.folder / EVALUATIONS).objects, self.recipe.args()
        if isinstance(options, EgoSchemaOptions):
            return set(options.frames) <= {row.get("frames") for row in rows}
        if isinstance(options, ZeroShotOptions):
            return set(options.dataset) <= {row.get("dataset") for row in rows}
        if self.evaluated == RELEASED:
            return any("epoch" not in row for row in rows)
        return any(row.get("epoch") == options.epochs - 1 for row in rows)

    def check_folder(self) -> None:
        """Raise UserError if the folder holds another run, which this run would take for its own beginning."""
        found, own = self._found(), self.record()
        if found is None:
            return
        differs = [f"{key} {found.get(key)!r}, not {value!r}" for key, value in own.items() if found.get(key) != value]
        if differs:
            raise UserError(
                f"{self.folder}: holds another run ({'; '.join(differs)}); give another folder with --runs, or "
                "--again to put that run aside"
            )

    def _found(self) -> dict[str, Any] | None:
        try:
            found = parse_json(read_text(self.folder / RECORD))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as e:
            raise UserError(f"{self.folder / RECORD}: cannot be read ({e}); remove it") from e
        return found if isinstance(found, dict) else {}

    def mark(self) -> None:
        """Write recipe.json."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(self.folder / RECORD, json.dumps(self.record(), indent=1) + "\n")
        except OSError as e:
            raise UserError(f"{self.folder}: cannot be written ({e.strerror}); give another folder with --runs") from e

    def put_aside(self) -> None:
        """Move the files of an earlier run in this folder into before1, before2, …, where nothing looks for runs."""
        files = [path for path in self.folder.glob("*") if path.is_file()]
        if not files:
            return
        number = 1
        while (target := self.folder / f"before{number}").exists():
            number += 1
        target.mkdir()
        for path in files:
            path.rename(target / f"{path.name}.old")
        logger.info("%s: the earlier run's files are in %s now", self.folder, target)

    def execute(self) -> int:
        """Run the command in a child process whose output is passed through.

        Returns:
            The exit status; 128 + n after signal n.
        """
        self.mark()
        return run_child(executable(self.words))


def run_child(words: Sequence[str]) -> int:
    """Run a command and return its exit status. Signals that ask this process to stop are passed on to the command."""
    with subprocess.Popen(list(words)) as child:
        handlers = {n: signal.signal(n, lambda number, _: child.send_signal(number)) for n in _HANDED_ON}
        try:
            status = child.wait()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return status if status >= 0 else 128 - status


# A terminal sends its Ctrl-C to both processes: the command hears it twice, as one request.
_HANDED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
