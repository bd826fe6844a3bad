"""Recipes: what recipes/*.yaml state about the rows of the paper's tables, at full scale or scaled down."""

import dataclasses
import functools
from argparse import ArgumentParser
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from avion.engine.args import build_parser, flag_words
from avion.engine.options import (
    EgoSchemaOptions,
    FinetuneClassificationOptions,
    FinetuneRetrievalOptions,
    PretrainOptions,
    ZeroShotOptions,
)
from avion.engine.submit import ENTRY_POINTS
from avion.engine.yaml_files import read_yaml_mapping, recipe_flags, unknown_key
from avion.errors import UserError
from avion.resources import RECIPES as FOLDER
from avion.resources import resources

RECIPES = resources(FOLDER)
BENCHMARKS = "zero-shot benchmarks"  # of LaViLa, beyond the paper: the table "zeroshot"
TASKS = ("zero-shot retrieval", "retrieval", "actions", "egoschema", BENCHMARKS)
FULL = "full"
# The file from which later runs start: it holds the weights after the last epoch, as in the tables.
CHECKPOINT = "checkpoint.pt"

# The options of the entry points.
TaskOptions = (
    PretrainOptions | FinetuneRetrievalOptions | FinetuneClassificationOptions | EgoSchemaOptions | ZeroShotOptions
)
Figures = Mapping[str | int, float]


@dataclass(frozen=True)
class Recipe:
    """One run of a table's row.

    Metrics are in percent. Their keys are those of eval_log.txt, and numbers of frames for EgoSchema.
    """

    path: Path
    task: str
    name: str
    entry_point: str
    flags: Mapping[str, Any]
    model: str  # registered name; a scale may leave it to the checkpoint and take it out of the flags
    table: int | str | None = None  # of the paper; "avion": AVION's own baseline; "zeroshot": BENCHMARKS
    figure: int | None = None
    row: int | None = None
    gpus: int = 1
    hours: float | None = None
    hours_on: str | None = None
    starts_from: str | None = None  # key of the recipe whose checkpoint is the flag pretrain-model
    paper: Figures = field(default_factory=dict)
    released: Figures = field(default_factory=dict)
    tolerance: float = 0.5
    checkpoint: str | None = None
    scale: str = FULL
    seed: int | None = None  # of the training that this run is or starts from; None: the default, 0

    @property
    def key(self) -> str:
        """The name of the recipe's file without its ending."""
        return self.path.stem

    @property
    def options(self) -> type[TaskOptions]:
        """The dataclass of the entry point's flags."""
        return ENTRY_POINTS[self.entry_point]

    @property
    def output_dir(self) -> Path:
        """The folder of the run."""
        return Path(self.flags["output-dir"])

    @property
    def where(self) -> str:
        """The place in the paper, for people: "Table 8, row 7"."""
        part = f"Figure {self.figure}" if self.figure is not None else f"Table {self.table}"
        if self.table == "avion":
            return "AVION's baseline"
        if self.table == "zeroshot":
            part = "Zero-shot, beyond the paper"
        return part if self.row is None else f"{part}, row {self.row}"

    @property
    def global_batch(self) -> int | None:
        """The number of clips per optimizer step; None where nothing is trained."""
        batch = self.flags.get("batch-size")
        return None if batch is None else batch * self.flags.get("update-freq", 1) * self.gpus

    def words(self) -> list[str]:
        """Return the words that the entry point is called with."""
        return flag_words(f"recipe {self.path}", dict(self.flags), self.options)

    def args(self) -> TaskOptions:
        """Return the options as which the entry point reads these words; they do not know which flags were given."""
        return self.options(**vars(parser_of(self.entry_point).parse_args(self.words())))

    def with_flags(self, changes: Mapping[str, Any]) -> "Recipe":
        """Return the recipe with changed flags. None removes a flag; a mapping changes single entries of a mapping."""
        return dataclasses.replace(self, flags=merged(self.flags, changes))


def weights_of(options: TaskOptions) -> str | None:
    """Return the checkpoint that a run reads its first weights from; None or an empty text if there is none."""
    if isinstance(options, (EgoSchemaOptions, ZeroShotOptions)):
        return options.pretrain_model
    return options.pretrain_model or options.resume


@dataclass(frozen=True)
class Reference:
    """A row that a table only shows for comparison: metrics without a recipe."""

    task: str
    name: str
    paper: Figures
    table: int | str | None = None
    figure: int | None = None
    row: int | None = None


@functools.lru_cache
def parser_of(entry_point: str) -> ArgumentParser:
    return build_parser(ENTRY_POINTS[entry_point], entry_point, "")


def merged(flags: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Merge changes into flags, as `Recipe.with_flags` says."""
    result = dict(flags)
    for key, value in changes.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, Mapping):
            before = result.get(key)
            result[key] = merged(before if isinstance(before, Mapping) else {}, value)
        else:
            result[key] = value
    return result


# ---- reading ---------------------------------------------------------------------------------


def load_recipe(path: str | Path) -> Recipe:
    """Read the recipe in a file; the parser of the entry point checks the flags.

    Raises:
        UserError: Anything in the file is wrong. The message has one line.
    """
    path = Path(path)
    where = f"recipe {path}"
    content = read_yaml_mapping(path, "recipe")
    flags = recipe_flags(where, content)
    if content["entry-point"] not in ENTRY_POINTS:
        raise UserError(f"{where}: entry-point {content['entry-point']!r} is not one of {', '.join(ENTRY_POINTS)}")
    fields = {key.replace("-", "_"): value for key, value in content.items()}
    _check_kinds(where, fields)
    if ("table" in fields) == ("figure" in fields):
        raise UserError(f"{where}: give one of the keys table and figure, which say where its figures stand")
    for key in ("model", "output-dir"):
        if not isinstance(flags.get(key), str):
            raise UserError(f"{where}: its flags lack {key!r}, a text")
    recipe = Recipe(path=path, model=flags["model"], **fields)
    try:
        recipe.args()
    except UserError as e:
        raise UserError(f"{where}: {str(e).removeprefix(recipe.entry_point + ': ').removeprefix(where + ': ')}") from e
    return recipe


def load_recipes(
    table: int | str | None = None, row: int | None = None, figure: int | None = None, folder: str | Path = RECIPES
) -> list[Recipe]:
    """Read the recipes of a folder, a table, a row or a figure: first tables in order, then figures, then AVION's."""
    found = [load_recipe(path) for path in sorted(Path(folder).glob("*.yaml")) if _is_recipe(path)]
    found.sort(key=lambda r: (isinstance(r.table, str), r.figure or 0, str(r.table).zfill(3), r.row or 0, r.key))
    wanted = {"table": table, "row": row, "figure": figure}
    return [r for r in found if all(value is None or getattr(r, name) == value for name, value in wanted.items())]


def load_references(path: str | Path = RECIPES / "references.yaml") -> list[Reference]:
    """Read the rows that are shown for comparison only, in the order of the file."""
    where = f"references {path}"
    rows = read_yaml_mapping(path, "references").get("references")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{where}: expected `references:` and a list of mappings")
    known = [f.name for f in dataclasses.fields(Reference)]
    for number, row in enumerate(rows):
        for key in row:
            if key not in known:
                raise unknown_key(f"{where}: row {number}", key, known, f"keys are {', '.join(known)}")
        _check_kinds(f"{where}: row {number}", row, ("task", "name", "paper"))
    return [Reference(**row) for row in rows]


def _is_recipe(path: Path) -> bool:
    """Whether a file is a recipe rather than plain flags or the references."""
    return "entry-point" in (content := read_yaml_mapping(path, "recipe")) or "flags" in content


_KINDS: dict[str, tuple[type, ...]] = {
    "table": (int, str), "figure": (int,), "row": (int,), "task": (str,), "name": (str,), "gpus": (int,),
    "hours": (int, float), "hours_on": (str,), "starts_from": (str,), "paper": (dict,), "released": (dict,),
    "tolerance": (int, float), "checkpoint": (str,),
}  # fmt: skip

_KIND_NAMES = {int: "a whole number", float: "a number", str: "a text", dict: "a mapping"}


def _check_kinds(where: str, fields: Mapping[str, Any], due: tuple[str, ...] = ("task", "name", "gpus")) -> None:
    for key in due:
        if key not in fields:
            raise UserError(f"{where}: key {key!r} is missing")
    for key, kinds in _KINDS.items():
        value = fields.get(key)
        if key in fields and (not isinstance(value, kinds) or isinstance(value, bool)):
            expected = " or ".join(_KIND_NAMES[kind] for kind in kinds)
            raise UserError(f"{where}: key {key.replace('_', '-')!r}: expected {expected}, found {value!r}")
    if fields["task"] not in TASKS:
        raise UserError(f"{where}: task {fields['task']!r} is not one of {', '.join(TASKS)}")
    if fields.get("gpus", 1) < 1:
        raise UserError(f"{where}: gpus {fields['gpus']}: at least 1 is required")
    for key in ("paper", "released"):
        for name, value in fields.get(key, {}).items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 100:
                raise UserError(f"{where}: {key}: {name}: a number in percent is required, found {value!r}")


# ---- scaling ---------------------------------------------------------------------------------


def scaled(recipe: Recipe, scale: str = FULL, output_root: str | Path = "runs", seed: int | None = None) -> Recipe:
    """Return the recipe as it is run: below `output_root`, with a seed, at a scale.

    Args:
        scale: "full", the name of a file in recipes/scales, or the path of such a file. The file holds, per entry
            point, `gpus`, `flags` (changes as in `Recipe.with_flags`), and under `models` and `recipes` the same for
            one model or one recipe.
    """
    changes: dict[str, Any] = {}
    gpus, name = recipe.gpus, FULL
    if scale != FULL:
        content, name = _read_scale(scale, recipe.entry_point)
        gpus = content.get("gpus", gpus)
        for part in (content, content["models"].get(recipe.model, {}), content["recipes"].get(recipe.key, {})):
            changes = _joined(changes, part.get("flags", {}))
    folder = run_folder(recipe.key, output_root, seed)
    changes["output-dir"] = str(folder)
    if recipe.starts_from is not None:
        changes["pretrain-model"] = str(run_folder(recipe.starts_from, output_root, seed) / CHECKPOINT)
    if seed is not None and any(f.name == "seed" for f in dataclasses.fields(recipe.options)):
        changes["seed"] = seed
    return dataclasses.replace(recipe.with_flags(changes), gpus=gpus, scale=name, seed=seed)


def run_folder(key: str, output_root: str | Path, seed: int | None) -> Path:
    folder = Path(output_root) / key
    return folder if seed is None else folder / f"seed{seed}"


def _joined(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Two sets of changes, one after the other, as one."""
    result = dict(first)
    for key, value in second.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = _joined(result[key], value) if both else value
    return result


def _read_scale(scale: str, entry_point: str) -> tuple[dict[str, Any], str]:
    """What a scale says of an entry point, and the scale's name."""
    path = Path(scale) if scale.endswith((".yaml", ".yml")) else RECIPES / "scales" / f"{scale}.yaml"
    if not path.is_file():
        known = [FULL, *sorted(p.stem for p in (RECIPES / "scales").glob("*.yaml"))]
        raise UserError(f"--scale {scale}: no such scale; there are {', '.join(known)}, or give a YAML file")
    content = read_yaml_mapping(path, "scale")
    where = f"scale {path}"
    for key in content:
        if key not in ENTRY_POINTS:
            raise unknown_key(where, key, ENTRY_POINTS, f"keys are entry points: {', '.join(ENTRY_POINTS)}")
    own = content.get(entry_point)
    if own is None:
        raise UserError(f"{where}: says nothing of {entry_point}")
    _check_part(f"{where}: {entry_point}", own, ("gpus", "flags", "models", "recipes"))
    for group in ("models", "recipes"):
        own = {**own, group: own.get(group) or {}}
        for name, part in own[group].items():
            _check_part(f"{where}: {entry_point}: {group}: {name}", part, ("flags",))
    return own, path.stem


def _check_part(where: str, part: Any, known: tuple[str, ...]) -> None:
    if not isinstance(part, dict):
        raise UserError(f"{where}: expected a mapping with {', '.join(known)}, found {type(part).__name__}")
    for key, value in part.items():
        if key not in known:
            raise unknown_key(where, key, known, f"keys are {', '.join(known)}")
        if key == "gpus" and (type(value) is not int or value < 1):
            raise UserError(f"{where}: gpus: a number of at least 1 is required, found {value!r}")
        if key != "gpus" and not isinstance(value, dict):
            raise UserError(f"{where}: {key}: expected a mapping, found {type(value).__name__}")
