"""The error for mistakes that the user can mend, and how a program reports it. A leaf: it imports nothing of the
project.
"""

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
    """Make one line of a text, which a terminal or a log shows as it is, whatever the names in the text are made of.

    Args:
        text: Any text, for example with the name of a file from outside in it.

    Returns:
        The text with a code such as `\\n` or `\\x1b` in the place of each character that would end the line, move the
        cursor or turn the direction of writing. A byte of a file name that is not UTF-8 is written as `\\xff`, for
        example.
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
    """Print lines, each as `printable` makes it. Programs print this way every line that holds names from outside, and
    every line on stderr.

    A line and its end are written at once. `print` writes them one after the other, and the lines of several processes
    that share a terminal or a file would be glued together.

    Args:
        lines: The lines, without line ends.
        to_stderr: Whether to print to stderr instead of stdout.
    """
    stream = sys.stderr if to_stderr else sys.stdout
    for line in lines:
        stream.write(f"{printable(line)}\n")
        stream.flush()


class UserError(ValueError):
    """Something given from outside is wrong: a flag, a file, an annotation, a checkpoint.

    The message is one line: which file, which field, what was found, what to do. Programs print the message and exit
    with status 2; `--debug` shows the traceback too. The message is made printable, and is cut in the middle where it
    is longer than 4,000 characters.
    """

    def __init__(self, message: object = ""):
        text = printable(str(message))
        if len(text) > _LONGEST_MESSAGE:
            text = f"{text[: _LONGEST_MESSAGE // 2]} ... {text[-_LONGEST_MESSAGE // 2 :]}"
        super().__init__(text)


def exit_status(name: str, body: Callable[[], int | None], *, debug: bool = False) -> int:
    """Call `body()`, and return the status with which the program ends.

    Args:
        name: The name of the program, for messages.
        body: The work of the program; it returns a status or None.
        debug: Whether a UserError passes, for its traceback.

    Returns:
        The status that the body returns (0 for None); 2 after a UserError and 130 after Ctrl-C, each reported in one
        line on stderr; 141, without a message, where nobody reads the output any more (`… | head`).

    Raises:
        UserError: The body raised it, and `debug` is set.
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
    """Flush what was printed when the block is left; a closed stdout ends the block as `_NobodyReads`.

    A broken pipe of anything else, such as a socket or a child process, passes as it is.
    """
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
    """Return whether nobody can read stdout any more.

    If so, what is left to write is discarded: Python flushes stdout once more when it ends, and would complain
    otherwise.
    """
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
    _names.update(sorted(names.items(), key=lambda item: -len(item[0])))  # a part of a program before the whole


def called_names(text: str) -> str:
    """Name programs in a text as they were called: by their files, or as commands of `avion`.

    Args:
        text: A text for people, in which programs are named by their files.

    Returns:
        The text with the names that `call_programs` was given.
    """
    for file, name in _names.items():
        pattern = rf"(?<![\w/.-]){re.escape(file)}(?![\w/-])"
        text = re.sub(rf"(torchrun [^\n]*?){pattern}", rf"\1-m {name}", text)
        text = re.sub(rf"(?<!\w)(?:python )?{pattern}", name, text)
    return text
