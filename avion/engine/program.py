"""Does what every program does around its work: it reads the command line, and ends with one line and an exit status.

Nothing heavy is imported here, so that `--help` and mistakes in flags are answered at once.
"""

import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

from avion.errors import USER_ERROR, exit_status, say

from . import signals
from .args import T, parse
from .peers import PeerError
from .signals import STOPPED, Stopped

logger = logging.getLogger(__name__)


def run_program(
    body: Callable[[T], Any], options_class: type[T], argv: Sequence[str] | None, prog: str, doc: str | None
) -> int:
    """Parse a command line and call `body` with the options.

    Args:
        body: The work of the program. It imports what it needs when it is called.
        options_class: The class of the options.
        argv: The words of the command line (None: `sys.argv[1:]`).
        prog: The name of the program, for `--help` and errors.
        doc: The docstring of the file of the program; `--help` shows its first line.

    Returns:
        The exit status: 0; 2 after one line on stderr for a mistake of the user; 75 where SIGTERM, SIGUSR1 or SIGINT
        (Ctrl-C) asked the program to stop, and the same command would go on.
    """
    description = (doc or "").partition("\n")[0]
    debug = "--debug" in (sys.argv[1:] if argv is None else argv)

    def heeding() -> int:
        try:
            with signals.heeded():
                body(parse(options_class, argv, prog, description))
        except Stopped as e:
            logger.info("%s; leaving with status %d: run the same command again to go on", e, STOPPED)
            return STOPPED
        except PeerError as e:
            if debug:
                raise
            if not e.quiet:
                say(f"{prog}: stopped because {e}", to_stderr=True)
            return USER_ERROR
        return 0

    return exit_status(prog, heeding, debug=debug)
