"""The list of models: `register_model`, `register_mixer`, `create_model`, `list_models`.

A model is a flat `ModelConfig` and a function that builds the model. Every field of the configuration can be overridden
when the model is created. A name or a field that does not exist is an error that lists similar ones, so that a
misspelling never passes silently.
"""

import dataclasses
import difflib
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from torch import nn

from avion.elsewhere import model_elsewhere
from avion.errors import UserError
from avion.plugins import HINT

from .config import CHOICES, MIXERS, FieldValue, Kind, ModelConfig, field_kinds
from .tower import find_tower, towers

if TYPE_CHECKING:
    from .clip import CLIP

__all__ = [
    "FieldValue",
    "ModelConfig",
    "build_mixer",
    "check_config",
    "create_model",
    "list_models",
    "model_aliases",
    "model_config",
    "read_field",
    "register_mixer",
    "register_model",
    "resolve_name",
]


def check_config(config: ModelConfig) -> None:
    """Refuse a choice that the model would ignore, so that an accepted field always does what its description says.

    The file of a tower states what the tower ignores.

    Raises:
        UserError: The model would ignore a field. The message is one line with the field, the value and what to do.
    """
    tower = find_tower(config.tower)
    if tower is None:  # a model with a build function of its own
        return
    every_choice = {name for known in towers() for name in known.choices}
    ignored = dict.fromkeys(every_choice - set(tower.choices), "only a divided tower has this choice")
    ignored |= tower.ignored(config)
    for field in dataclasses.fields(config):
        if field.name in ignored and getattr(config, field.name) != field.default:
            raise UserError(
                f"{config.name}: {field.name}={getattr(config, field.name)!r} would have no effect: "
                f"{ignored[field.name]}; leave it at {field.default!r}"
            )


# ----------------------------------------------------------------------------------------------


class _Entry(NamedTuple):
    config: ModelConfig
    build: Callable[[ModelConfig], nn.Module]


MODELS: dict[str, _Entry] = {}
ALIASES: dict[str, str] = {}


def _models() -> dict[str, _Entry]:
    """Return all models by their canonical names, after the towers of this project have been registered."""
    towers()
    return MODELS


def register_model(
    config: ModelConfig, build: Callable[[ModelConfig], nn.Module] | None = None, aliases: tuple[str, ...] = ()
) -> None:
    """Add a model to the list under `config.name`, and under `aliases` too.

    Args:
        config: The model's configuration, with a name that is not taken.
        build: Makes the module from a config, with the methods of `avion.models.clip.CLIP`; by default as the
            config's tower is built.
        aliases: Further names, such as those of other programs.

    Raises:
        UserError: A name is taken, or the tower is not registered and no `build` is given.
    """
    check_config(config)
    if build is None:
        tower = find_tower(config.tower)
        if tower is None:
            raise UserError(f"{config.name}: tower {config.tower!r} is not registered: give build=, or register_tower")
        build = tower.build
    for name in (config.name, *aliases):
        if name in MODELS or name in ALIASES:
            raise UserError(f"model name {name!r} is already taken; choose another one")
    MODELS[config.name] = _Entry(config, build)
    ALIASES.update(dict.fromkeys(aliases, config.name))


def register_mixer(name: str, build: Callable[[ModelConfig], nn.Module]) -> None:
    """Make `mixer=name` a choice of the divided towers.

    Args:
        name: The name of the mixer.
        build: Makes the module from the model's configuration. The module takes the T frames of each patch as a row,
            (R, T, D), for any T, and returns the same shape.

    Raises:
        UserError: The name is taken.
    """
    if name in CHOICES["mixer"] or name in MIXERS:
        raise UserError(f"mixer {name!r} is already taken; choose another name")
    MIXERS[name] = build


def build_mixer(config: ModelConfig) -> nn.Module:
    """Build the module of a mixer that `register_mixer` added."""
    return MIXERS[config.mixer](config)


def list_models(pattern: str = "*") -> list[str]:
    """Return the canonical names that match a shell pattern, sorted."""
    return sorted(name for name in _models() if fnmatchcase(name, pattern))


def resolve_name(name: str) -> str:
    """Return the canonical name of a model.

    Args:
        name: The canonical name or an upstream name.

    Raises:
        UserError: No model has this name. The message lists similar names.
    """
    if name in _models():
        return name
    if name in ALIASES:
        return ALIASES[name]
    if elsewhere := model_elsewhere(name):
        raise UserError(f"unknown model {name!r}: {elsewhere}")
    hint = _near(name, [*MODELS, *ALIASES]) or "`python -m avion.models` lists all"
    raise UserError(f"unknown model {name!r}; {hint}; {HINT}")


def model_aliases(name: str) -> list[str]:
    """Return the upstream names of a model."""
    name = resolve_name(name)
    return sorted(alias for alias, target in ALIASES.items() if target == name)


def model_config(name: str) -> ModelConfig:
    """Return the registered configuration of a model, before any override."""
    return MODELS[resolve_name(name)].config


def read_field(field: str, text: str, model: str | None = None) -> FieldValue:
    """Return the value of a field that a word stands for: "1e-3", ".5", "true", "none", "quick_gelu".

    Args:
        field: The name of a field.
        text: The word.
        model: The model whose configuration has the field; without it, the fields of all registered models are known.

    Raises:
        UserError: The field does not exist, or the word is not of the field's type and range.
    """
    own = [] if model is None else [type(model_config(model))]
    kinds: dict[str, Kind] = {}
    for config in (*own, ModelConfig, *(() if own else (type(entry.config) for entry in _models().values()))):
        kinds = {**field_kinds(config), **kinds}
    known = [name for name in kinds if name not in ("name", "tower")]
    if field not in known:
        raise UserError(f"unknown field {field!r}; {_near(field, known) or 'fields are ' + ', '.join(known)}")
    try:
        return kinds[field].read(text)
    except ValueError as e:
        hint = f"; {HINT}" if field == "mixer" else ""
        raise UserError(" ".join(str(e).split()) + hint) from e


def create_model(name: str, /, **overrides: Any) -> "CLIP":
    """Build a registered model with newly initialised weights.

    Build it under `torch.device("meta")` to look at shapes without spending memory.

    Args:
        name: The canonical name or an upstream name.
        **overrides: Fields of the model's configuration and their values.

    Raises:
        UserError: A name or a field does not exist, or the model cannot honour a value.
    """
    entry = MODELS[resolve_name(name)]
    known = [field.name for field in dataclasses.fields(entry.config) if field.name not in ("name", "tower")]
    for field in overrides:
        if field == "tower":
            raise UserError(f"{entry.config.name}: tower cannot be overridden; register a model of your own")
        if field not in known:
            hint = _near(field, known) or f"fields are {', '.join(known)}"
            raise UserError(f"{entry.config.name}: unknown field {field!r}; {hint}")
    config = dataclasses.replace(entry.config, **overrides)
    check_config(config)
    return cast("CLIP", entry.build(config))  # `register_model` asks for the methods of CLIP


def _near(word: str, candidates: list[str]) -> str:
    """Return "did you mean …", or nothing. Upper and lower case count as the same."""
    by_fold = {candidate.lower(): candidate for candidate in candidates}
    matches = difflib.get_close_matches(word.lower(), by_fold, n=4, cutoff=0.6)
    return f"did you mean {', '.join(by_fold[match] for match in matches)}?" if matches else ""
