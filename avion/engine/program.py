"""What a program does around its work: the command line, one line for what goes wrong, the exit status.

Importing PyTorch and the packages that build on it takes seconds. Nothing here needs them, and a program imports its
work when the command line has been understood, so that `--help` and a misspelt flag are answered at once.
"""

import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

from avion.errors import USER_ERROR, exit_status

from . import signals
from .args import parse
from .peers import PeerError
from .signals import STOPPED, Stopped

logger = logging.getLogger(__name__)


def run_program(
    work: Callable[[Any], Any], config: type, argv: Sequence[str] | None, prog: str, doc: str | None
) -> int:
    """Parse the command line and do the work.

    Args:
        work: Takes the options. It imports what it needs by itself, as the description of this file says.
        config: The dataclass of the options.
        argv: The words of the command line; None: `sys.argv[1:]`.
        prog: The name of the program, for `--help` and errors.
        doc: The description of the program's file, whose first line `--help` shows.

    Returns:
        The exit status: 0; 2 after one line on stderr for a mistake of the user's; 75 where SIGTERM or SIGUSR1 asked
        the program to stop and the same command would go on.
    """
    description = (doc or "").partition("\n")[0]
    debug = "--debug" in (sys.argv[1:] if argv is None else argv)

    def heeding() -> int:
        try:
            with signals.heeded():
                work(parse(config, argv, prog, description))
        except Stopped as e:
            logger.info("%s; leaving with status %d: the same command goes on from there", e, STOPPED)
            return STOPPED
        except PeerError as e:
            if debug:
                raise
            print(f"{prog}: stopped because {e}", file=sys.stderr, flush=True)
            return USER_ERROR
        return 0

    return exit_status(prog, heeding, debug=debug)


def run_task(task: str, config: type, argv: Sequence[str] | None, prog: str, doc: str | None) -> int:
    """Train or evaluate the task of this class name in `avion.engine.tasks`; otherwise as `run_program`."""

    def work(args: Any) -> None:
        from . import tasks
        from .run import run

        run(getattr(tasks, task), args)

    return run_program(work, config, argv, prog, doc)
