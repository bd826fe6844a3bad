"""`--import MODULE` imports the user's own modules, which register models and mixers, before a program does its work. A
leaf.
"""

import importlib.util
import os
import pkgutil
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from avion.errors import UserError

HINT = "a model or mixer of your own: --import MODULE"


def import_plugins(names: Sequence[str]) -> None:
    """Import modules. A module that has been imported before is not run again.

    Args:
        names: Modules as Python finds them, also in the current folder; or paths of files that end with .py.

    Raises:
        UserError: There is no such module, or it cannot be imported. The message names the module and the line.
    """
    for name in names:
        try:
            if name.endswith(".py"):
                _import_file(Path(name))
            else:
                _import_module(name)
        except UserError as e:
            raise UserError(f"--import {name}: {e}") from e
        except Exception as e:
            frame = traceback.extract_tb(e.__traceback__)[-1]
            message = " ".join(f"{type(e).__name__}: {e}".split())
            raise UserError(f"--import {name}: {frame.filename} line {frame.lineno}: {message}") from e


def _import_module(name: str) -> None:
    here = os.getcwd()
    if here not in sys.path:  # behind all others, so that no file here takes the place of a package
        sys.path.append(here)
    try:
        pkgutil.resolve_name(f"{name}:")
    except ModuleNotFoundError as e:
        if e.name is None or not f"{name}.".startswith(f"{e.name}."):
            raise  # the module is there, and one that it needs is not
        raise UserError(f"there is no module of this name in {here} or among the installed packages") from e
    except ValueError as e:
        if "invalid format" not in str(e):
            raise
        raise UserError("expected the name of a module, such as timeconv, or the path of a .py file") from e


def _import_file(path: Path) -> None:
    """Import a file under its own name, so that what it defines can be found by that name."""
    path = path.resolve()
    known = sys.modules.get(path.stem)
    if known is not None:
        if Path(getattr(known, "__file__", None) or "").resolve() == path:
            return
        raise UserError(f"a module {path.stem!r} has been imported from elsewhere; rename the file")
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None, "files that end with .py have a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
