"""Mistakes that the user can mend, and how a program tells them. A leaf: imports nothing of the project."""

import sys
from collections.abc import Callable

USER_ERROR, INTERRUPTED = 2, 130  # exit statuses


class UserError(ValueError):
    """Something given from outside is wrong: a flag, a file, an annotation, a checkpoint.

    The message is one line: which file, which field, what was found, what to do. Programs print it and
    exit with status 2; `--debug` shows the traceback too.
    """


def exit_status(name: str, body: Callable[[], int | None], *, debug: bool = False) -> int:
    """What the program `name` ends with after `body()`: its own status (None is 0), or 2 after a UserError and 130
    after Ctrl-C, each told in one line on stderr. debug: the UserError passes, for its traceback."""
    try:
        return body() or 0
    except UserError as e:
        if debug:
            raise
        print(f"{name}: error: {str(e).removeprefix(name + ': ')}", file=sys.stderr, flush=True)
        return USER_ERROR
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr, flush=True)
        return INTERRUPTED
