"""Files that come with the project beside its modules: recipes and SLURM's batch files. A leaf.

In a clone of the repository they lie in its root, where people read and change them; a wheel carries them inside the
package.
"""

import importlib.resources
from pathlib import Path

from avion.errors import UserError
from avion.remote import is_remote

RECIPES, SLURM = "recipes", "slurm"


def checkout() -> Path | None:
    """Return the root of the clone that this package is in; None where the package was installed from a wheel."""
    root = Path(__file__).resolve().parents[1]
    return root if (root / "pyproject.toml").is_file() and (root / "main_pretrain.py").is_file() else None


def resources(name: str) -> Path:
    """Find the folder of the files of one kind.

    Args:
        name: RECIPES or SLURM.

    Returns:
        The folder.

    Raises:
        UserError: The installation lacks the files, or is a zip file, out of which programs cannot read them.
    """
    root = checkout()
    place = importlib.resources.files("avion") / name if root is None else root / name
    if not isinstance(place, Path) or not place.is_dir():
        raise UserError(f"{place}: the folder of this installation's {name} is not there; install the package anew")
    return place


def config_path(path: str | Path) -> str | Path:
    """Find the file behind a path of the form recipes/{name}.yaml, which works in any folder; other paths stay as they
    are.
    """
    if is_remote(path):
        return str(path)
    path = Path(path)
    if path.parts[:1] == (RECIPES,) and not path.exists():
        inside = resources(RECIPES).joinpath(*path.parts[1:])
        if inside.is_file():
            return inside
    return path
