"""Every recipe on the demo dataset, as jobs that start from each other's checkpoints: what `make tables-demo` runs."""

import csv
import json
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from avion.constants import NORM_STYLES
from avion.data.demo import DemoPaths
from avion.engine.options import PretrainOptions
from avion.engine.submit import program_words
from avion.errors import UserError
from avion.files import write_text
from avion.safe_pickle import load_pickle
from avion.weights import model_from_checkpoint, save_weights

from .commands import EGOSCHEMA, ZERO_SHOT, executable
from .jobs import Job
from .plan import Request
from .recipe import CHECKPOINT, RECIPES, Recipe, load_recipes
from .results import evaluated_epochs

SCALE = "demo"
# The training before EgoSchema: its questions are about two actions in a row, which no pretraining narration describes.
LONGER = RECIPES / "demo_pretrain_long.yaml"
LONGER_EPOCHS = 5
REMARK = (
    "Before EgoSchema both models were trained for five more epochs, with 8 frames and narrations of two actions in a "
    "row (recipes/demo_pretrain_long.yaml): its questions ask for an order that shorter narrations do not tell of. A "
    "single seed says little about which model is the better one; several (--seeds) say more."
)
# Each process decodes its own videos: two jobs on two cores then share the cores more evenly.
_WORDS = ("--workers", "0")
_SHORT_WORDS = ("--epochs", "1", "--warmup-epochs", "0")
_SHORT_CLIPS = 64
_RECORD = "jobs.json"


@dataclass(frozen=True)
class Chain:
    """All recipes on the demo dataset.

    output: The folder that everything is written to. short: Whether to train only one epoch of 64 clips each, to see
    that everything runs. plugins: Modules that every run imports.
    """

    paths: DemoPaths
    output: Path
    seeds: Sequence[int] = (0,)
    short: bool = False
    plugins: tuple[str, ...] = ()

    @property
    def runs(self) -> Path:
        """The folder of the recipes' runs, and of nothing else."""
        return self.output / "runs"

    def jobs(self) -> list[Job]:
        """All jobs, the longest first among those that may start at once. UserError for a folder of other settings."""
        recipes = load_recipes()
        pretraining = sorted((r for r in recipes if r.starts_from is None), key=_models_of_others_first)
        questions = [r for r in recipes if r.entry_point == EGOSCHEMA]
        tuning = [r for r in recipes if r not in pretraining and r not in questions]
        parents = sorted({r.starts_from for r in questions})
        jobs = [self._run(r, seed) for seed in self.seeds for r in pretraining]
        jobs += [self._longer(parent, seed) for seed in self.seeds for parent in parents]
        jobs += [self._run(r, seed, (_name(r.starts_from, seed),)) for seed in self.seeds for r in tuning]
        for seed in self.seeds:
            jobs += [self._run(r, seed, (_name(f"longer_{r.starts_from}", seed),)) for r in questions]
        self._check(jobs)
        return jobs

    def _run(self, recipe: Recipe, seed: int, after: tuple[str, ...] = ()) -> Job:
        words = [*_WORDS, "--demo-root" if recipe.entry_point == ZERO_SHOT else "--root", str(self.paths.root)]
        if recipe.entry_point == EGOSCHEMA:
            words += ["--pretrain-model", str(self._longer_folder(recipe.starts_from, seed) / CHECKPOINT)]
        elif self.short and recipe.entry_point != ZERO_SHOT:
            words += [*_SHORT_WORDS, *self._few_clips(recipe)]
        run = Request(runs=str(self.runs), scale=SCALE, device="cpu", plugins=self.plugins).run(recipe, seed, words)
        try:
            run.check_folder()
        except UserError as e:
            raise UserError(f"{run.folder}: holds a run of other settings; {self._cure()}") from e
        return self._job(_name(recipe.key, seed), executable(run.words), after, run.finished(), run.mark)

    def _longer(self, parent: str, seed: int) -> Job:
        """Training of a pretrained model that goes on from its weights alone."""
        folder = self._longer_folder(parent, seed)
        weights = folder / "weights.safetensors"
        train, aux = self.paths.train_pickle, self.paths.long_train_pickle
        if self.short:
            train = aux = self._few / "ego4d_train.pkl"
        words = ["--config", str(LONGER), "--resume", str(weights)]
        words += ["--root", str(self.paths.root), "--train-metadata", str(train), "--train-metadata-aux", str(aux)]
        words += ["--output-dir", str(folder), "--seed", str(seed), "--device", "cpu", *_WORDS]
        words += _SHORT_WORDS if self.short else ["--epochs", str(LONGER_EPOCHS)]
        words += ["--import", *self.plugins] if self.plugins else []
        done = evaluated_epochs(folder) >= (1 if self.short else LONGER_EPOCHS)

        def begin() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            model = model_from_checkpoint(str(self.runs / parent / f"seed{seed}" / CHECKPOINT))
            save_weights(model, weights, {"norm_style": "openai", **NORM_STYLES["openai"]._asdict()})

        words = executable(program_words("main_pretrain.py", words))
        return self._job(_name(f"longer_{parent}", seed), words, (_name(parent, seed),), done, begin)

    def _job(
        self, name: str, words: Sequence[str], after: tuple[str, ...], done: bool, prepare: Callable[[], None]
    ) -> Job:
        def begin() -> None:
            self._remember(name, words)
            prepare()

        return Job(name, words, self.output / "logs" / f"{name.replace('/', '_')}.log", after, done, begin)

    def _longer_folder(self, parent: str, seed: int) -> Path:
        return self.output / "longer" / parent / f"seed{seed}"

    # ---- what was begun with which words ------------------------------------------------------

    def _begun(self) -> dict[str, list[str]]:
        path = self.output / _RECORD
        try:
            begun = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        except (OSError, ValueError) as e:
            raise UserError(f"{path}: cannot be read ({e}); remove it and what lies beside it") from e
        return begun if isinstance(begun, dict) else {}

    def _remember(self, name: str, words: Sequence[str]) -> None:
        self.output.mkdir(parents=True, exist_ok=True)
        write_text(self.output / _RECORD, json.dumps({**self._begun(), name: list(words)}, indent=1))

    def _cure(self) -> str:
        return f"remove {self.output} or give another --output-dir"

    def _check(self, jobs: Sequence[Job]) -> None:
        """A run that was begun under other settings must not go on, or stand, as one of these."""
        begun = self._begun()
        others = [job.name for job in jobs if begun.get(job.name, list(job.words)) != list(job.words)]
        if others:
            raise UserError(
                f"{self.output}: {', '.join(others)} was begun with other settings (see {_RECORD}); {self._cure()}"
            )

    # ---- a few clips --------------------------------------------------------------------------

    @property
    def _few(self) -> Path:
        return self.output / "few"

    def _few_clips(self, recipe: Recipe) -> list[str]:
        """Flags for training on the first clips only."""
        if recipe.options is PretrainOptions:
            return ["--train-metadata", str(self._few / "ego4d_train.pkl")]
        words = ["--train-metadata", str(self._few / self.paths.train_csv.name)]
        if recipe.task == "retrieval":
            words += ["--train-relevancy-path", str(self._few / "relevancy.pkl")]
        return words

    def write_few_clips(self) -> None:
        """The files that these flags name."""
        self._few.mkdir(parents=True, exist_ok=True)
        narrations = load_pickle(str(self.paths.train_pickle), "narrations")[:_SHORT_CLIPS]
        (self._few / "ego4d_train.pkl").write_bytes(pickle.dumps(narrations))
        for path, count in ((self.paths.train_csv, _SHORT_CLIPS), (self.paths.train_sentences, None)):
            with open(path, newline="", encoding="utf-8") as file:
                rows = list(csv.reader(file))
            with open(self._few / path.name, "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(rows if count is None else rows[: 1 + count])
        relevancy = np.asarray(load_pickle(str(self.paths.train_relevancy), "relevancy"))
        (self._few / "relevancy.pkl").write_bytes(pickle.dumps(relevancy[:_SHORT_CLIPS]))


def _name(key: str, seed: int) -> str:
    return f"{key}/seed{seed}"


def _models_of_others_first(recipe: Recipe) -> tuple[bool, str]:
    """Rows 4 and 6, which everything else starts from, before the others."""
    return recipe.row not in (4, 6), recipe.key
