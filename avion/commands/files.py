"""Say where the recipes and SLURM's batch files of this installation are, or copy them to where they can be changed.

    avion files                # prints the two folders
    avion files --copy .       # copies them to ./recipes and ./slurm

A recipe is found in every folder as recipes/{name}.yaml. Batch files are submitted from the folder that holds slurm/:
sbatch slurm/pretrain.sbatch FLAGS. The copies run the installed command `avion`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from avion.engine.args import ToolParser
from avion.errors import UserError, exit_status
from avion.files import write_text
from avion.resources import RECIPES, SLURM, resources
from avion.targets import check_target_folder

NAME = "avion files"
_SUFFIXES = {RECIPES: (".yaml",), SLURM: (".sbatch", ".sh")}


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    parser = ToolParser(prog=NAME, doc=__doc__)
    parser.add_argument("--copy", metavar="DIR", help="folder in which recipes/ and slurm/ are made")
    parser.add_argument("--overwrite", "--force", action="store_true", help="replace files that differ")
    parser.add_argument("--debug", action="store_true", help="show the Python traceback of an error")
    return parser


def contents() -> dict[Path, Path]:
    """Return the files of this installation: where they are, by their paths below the root of a clone."""
    found = {}
    for name, suffixes in _SUFFIXES.items():
        folder = resources(name)
        paths = [path for path in sorted(folder.rglob("*")) if path.suffix in suffixes]
        found |= {Path(name) / path.relative_to(folder): path for path in paths}
    return found


def copy(target: Path, overwrite: bool) -> int:
    """Copy all files below a folder.

    Args:
        target: The folder.
        overwrite: Whether files of another content are replaced.

    Returns:
        The number of files.

    Raises:
        UserError: A file of another content exists, which is found before anything is written; or a file cannot be
            written.
    """
    files = {target / name: path.read_text(encoding="utf-8") for name, path in contents().items()}
    check_target_folder(target, "--copy")
    differing = [path for path, text in files.items() if path.exists() and path.read_text(encoding="utf-8") != text]
    if differing and not overwrite:
        raise UserError(f"--copy {target}: {differing[0]} is there with another content; --overwrite replaces it")
    for path, text in files.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f"--copy {target}: cannot be written ({e.strerror}); choose another folder") from e
        write_text(path, text)
    return len(files)


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these command-line words (None: `sys.argv`); returns the exit status."""
    given = build_parser().parse_args(argv)

    def body() -> None:
        if given.copy is None:
            print(resources(RECIPES), resources(SLURM), sep="\n")
        else:
            print(f"{given.copy}: {copy(Path(given.copy), given.overwrite)} files in {RECIPES}/ and {SLURM}/")

    return exit_status(NAME, body, debug=given.debug)
