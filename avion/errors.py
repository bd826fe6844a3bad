"""Mistakes that the user can mend, and how a program tells them. A leaf: imports nothing of the project."""

import contextlib
import os
import re
import select
import sys
from collections.abc import Callable, Iterator, Mapping

USER_ERROR, INTERRUPTED, NOBODY_READS = 2, 130, 141  # exit statuses

_LONGEST_MESSAGE = 4000
# What moves the cursor, ends a line, changes the direction of writing, or cannot be written in UTF-8: the control
# characters, the separators of lines and paragraphs, the marks of right-to-left text, and the lone surrogates by which
# Python holds bytes of file names that are not UTF-8.
_NOT_SHOWN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u061c\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """One line of text that a terminal or a log shows as it is, whatever the names in it are made of.

    Args:
        text: Any text, for example with the name of a file from outside in it.

    Returns:
        The text with a code such as `\\n` or `\\x1b` in the place of each character that would end the line, move the
        cursor or turn the direction of writing. A byte of a file name that is not UTF-8 becomes `\\xff`, say.
    """
    return _NOT_SHOWN.sub(_code_of, text)


def _code_of(found: re.Match[str]) -> str:
    number = ord(found[0])
    if 0xDC80 <= number <= 0xDCFF:  # a byte of a file name, as os.fsdecode holds it
        return f"\\x{number - 0xDC00:02x}"
    return {"\n": "\\n", "\r": "\\r", "\t": "\\t"}.get(
        found[0], f"\\x{number:02x}" if number < 256 else f"\\u{number:x}"
    )


def say(*lines: str, to_stderr: bool = False) -> None:
    """Print lines, each as `printable` makes it: what every program does with lines that hold names from outside."""
    for line in lines:
        print(printable(line), file=sys.stderr if to_stderr else sys.stdout, flush=True)


class UserError(ValueError):
    """Something given from outside is wrong: a flag, a file, an annotation, a checkpoint.

    The message is one line: which file, which field, what was found, what to do. Programs print it and
    exit with status 2; `--debug` shows the traceback too. The message is made printable, and is cut in the middle where
    it is longer than 4,000 characters.
    """

    def __init__(self, message: object = ""):
        text = printable(str(message))
        if len(text) > _LONGEST_MESSAGE:
            text = f"{text[: _LONGEST_MESSAGE // 2]} ... {text[-_LONGEST_MESSAGE // 2 :]}"
        super().__init__(text)


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
        say(
            f"{called_names(name)}: error: {called_names(str(e)).removeprefix(called_names(name) + ': ')}",
            to_stderr=True,
        )
        return USER_ERROR
    except KeyboardInterrupt:
        say(f"{called_names(name)}: interrupted", to_stderr=True)
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
