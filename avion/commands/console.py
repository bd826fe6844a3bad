"""The command `avion` runs every entry point and every tool by one name, with and without a clone of the repository."""

import difflib
import pkgutil
import sys
from collections.abc import Sequence

from avion import __version__
from avion.errors import UserError, call_programs, exit_status

from .table import PROGRAMS, Program, programs

_USAGE = "usage: avion COMMAND [FLAGS]      avion COMMAND --help says more of a command"


def listing() -> str:
    """Return a list of all commands with a line each."""
    width = max(len(program.name) for program in programs())
    lines = [_USAGE]
    for title, group in PROGRAMS.items():
        lines += ["", f"{title}:", *(f"  {program.name:<{width}}  {program.summary}" for program in group)]
    lines += ["", "several processes on one machine: torchrun --nproc_per_node=8 -m avion pretrain FLAGS"]
    return "\n".join(lines)


def find(word: str) -> Program:
    """Find the program of a name, or of a file of a clone.

    Args:
        word: The name or the file.

    Returns:
        The program.

    Raises:
        UserError: There is no such program. The message names the commands of similar names.
    """
    known = {program.name: program for program in programs()}
    known |= {program.file: program for program in programs() if program.file and not program.part}
    if word in known:
        return known[word]
    near = list(dict.fromkeys(known[n].name for n in difflib.get_close_matches(word.replace("_", "-"), known, n=3)))
    cure = f"did you mean {' or '.join(near)}?" if near else "avion --help lists all commands"
    raise UserError(f"there is no command {word!r}: {cure}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these command-line words (None: `sys.argv`); returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    found: list[Program] = []

    def choose() -> None:
        if not words or words[0] in ("-h", "--help"):
            print(listing())
        elif words[0] == "--version":
            print(f"avion-timemamba {__version__}")
        else:
            found.append(find(words[0]))

    status = exit_status("avion", choose)
    if not found:
        return status
    call_programs({program.called: f"avion {program.name}" for program in programs()})
    # `python -m` and torchrun give the name of this module to the processes that multiprocessing starts.
    return pkgutil.resolve_name(f"{found[0].module}:main")(found[0].argv(words[1:])) or 0
