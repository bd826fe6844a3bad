"""Mistakes that the user can mend, and how a program tells them. A leaf: imports nothing of the project."""

import contextlib
import os
import re
import select
import sys
from collections.abc import Callable, Iterator, Mapping

USER_ERROR, INTERRUPTED, NOBODY_READS = 2, 130, 141  # exit statuses


class UserError(ValueError):
    """Something given from outside is wrong: a flag, a file, an annotation, a checkpoint.

    The message is one line: which file, which field, what was found, what to do. Programs print it and
    exit with status 2; `--debug` shows the traceback too.
    """


def exit_status(name: str, body: Callable[[], int | None], *, debug: bool = False) -> int:
    """What the program `name` ends with after `body()`.

    Returns:
        The status of the body (None is 0); 2 after a UserError and 130 after Ctrl-C, each told in one line on stderr;
        141 without a word where nobody reads the output any more (`… | head`).

    Raises:
        UserError: The body raised it, and `debug` is set, for its traceback.
    """
    try:
        with _printing():
            return body() or 0
    except UserError as e:
        if debug:
            raise
        message = called_names(str(e)).removeprefix(called_names(name) + ": ")
        print(f"{called_names(name)}: error: {message}", file=sys.stderr, flush=True)
        return USER_ERROR
    except KeyboardInterrupt:
        print(f"{called_names(name)}: interrupted", file=sys.stderr, flush=True)
        return INTERRUPTED
    except _NobodyReads:
        return NOBODY_READS


class _NobodyReads(Exception):
    """The reading end of stdout is closed."""


@contextlib.contextmanager
def _printing() -> Iterator[None]:
    """A context at whose end all that was printed is written; a closed stdout ends it as `_NobodyReads`. A broken pipe
    of anything else, such as a socket or a child process, passes as it is."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        if not stdout_is_closed():
            raise
        raise _NobodyReads from None
    except SystemExit:  # argparse, after --help
        if stdout_is_closed():
            raise _NobodyReads from None
        raise


def stdout_is_closed() -> bool:
    """Whether nobody can read stdout any more. What is left to write is then discarded, so that Python, which flushes
    stdout once more when it ends, finds nothing to complain about."""
    try:
        sys.stdout.flush()
        # A write that failed before may have left nothing to flush.
        waiting = select.poll()
        waiting.register(sys.stdout.fileno(), 0)
        closed = any(event & (select.POLLERR | select.POLLHUP) for _, event in waiting.poll(0))
    except BrokenPipeError:
        closed = True
    except (OSError, ValueError):  # no file, as in a notebook, or closed by the program itself
        return False
    if closed:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
    return closed


# --- the names by which programs were called ----------------------------------------------------

_names: dict[str, str] = {}


def call_programs(names: Mapping[str, str]) -> None:
    """From now on messages name programs by other names.

    Args:
        names: The name of a program by its file ("tools/plot_run.py": "avion plot").
    """
    _names.clear()
    _names.update(names)


def called_names(text: str) -> str:
    """A text for people with the programs named as they were called: by their files, or as commands of `avion`."""
    for file, name in _names.items():
        pattern = rf"(?<![\w/.-]){re.escape(file)}(?![\w/-])"
        text = re.sub(rf"(torchrun [^\n]*?){pattern}", rf"\1-m {name}", text)
        text = re.sub(rf"(?<!\w)(?:python )?{pattern}", name, text)
    return text
