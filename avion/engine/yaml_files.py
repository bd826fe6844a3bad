"""YAML files that hold a mapping: the files of `--config`, and recipes."""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from avion.errors import UserError
from avion.reading import parse_yaml, read_text
from avion.resources import config_path

# The keys of a recipe (recipes/*.yaml). A recipe describes the run of a row of a table; `--config` takes its `flags`.
RECIPE_KEYS = (
    "table", "figure", "row", "task", "name", "entry-point", "gpus", "hours", "hours-on", "flags", "starts-from",
    "paper", "released", "tolerance", "checkpoint",
)  # fmt: skip


def read_yaml_mapping(path: str | Path, flag_name: str = "--config") -> dict[Any, Any]:
    """Read a YAML file that holds a mapping; recipes/{name}.yaml is found in every folder.

    Args:
        path: The file.
        flag_name: The flag that names the file, for messages.

    Returns:
        The mapping.

    Raises:
        UserError: The file cannot be read or holds something else. The message begins with `flag_name` and the path.
    """
    try:
        content = parse_yaml(read_text(config_path(path)))
    except OSError as e:
        raise UserError(f"{flag_name} {path}: cannot be read ({e.strerror}); give the path of a YAML file") from e
    except UnicodeDecodeError as e:
        raise UserError(f"{flag_name} {path}: not a text in UTF-8; expected lines of the form `flag: value`") from e
    except ValueError as e:
        raise UserError(f"{flag_name} {path}: {e}; expected lines of the form `flag: value`") from e
    if not isinstance(content, dict):
        raise UserError(f"{flag_name} {path}: expected a mapping of flags to values, found {type(content).__name__}")
    return content


def unknown_key(where: str, key: Any, known: Iterable[str], otherwise: str) -> UserError:
    """Make the error for a key that does not exist.

    Args:
        where: The file, with which the message begins.
        key: The key.
        known: The keys that exist; the message names those that are similar.
        otherwise: What the message says where no key is similar.

    Returns:
        The error.
    """
    near = difflib.get_close_matches(str(key), known, n=3)
    cure = f"did you mean {' or '.join(near)}?" if near else otherwise
    return UserError(f"{where}: unknown key {key!r}: {cure}")


def recipe_flags(where: str, content: dict[Any, Any], prog: str | None = None) -> dict[Any, Any]:
    """Return the flags of a recipe.

    Args:
        where: The file, with which messages begin.
        content: The content of the file; its keys must be RECIPE_KEYS.
        prog: The entry point that the recipe must be of; None: any.

    Returns:
        The values of the flags by their names.

    Raises:
        UserError: A key is missing, unknown or of another type, or the recipe is of another entry point.
    """
    for key in content:
        if key not in RECIPE_KEYS:
            raise unknown_key(where, key, RECIPE_KEYS, f"a recipe's keys are {', '.join(RECIPE_KEYS)}")
    for key, kind in (("entry-point", str), ("flags", dict)):
        if not isinstance(content.get(key), kind):
            found = type(content[key]).__name__ if key in content else "none"
            expected = "a name" if kind is str else "a mapping of flags to values"
            raise UserError(f"{where}: key {key!r} of a recipe: expected {expected}, found {found}")
    if prog is not None and content["entry-point"] != prog:
        raise UserError(f"{where}: is a recipe of {content['entry-point']}, not of {prog}; run that one")
    return content["flags"]
