"""Annotations of a line each."""

import os
from collections.abc import Iterator

from avion.errors import UserError
from avion.reading import open_file


def text_lines(path: str | os.PathLike, what: str) -> Iterator[tuple[int, str]]:
    """The number, from 1, and the text of every line of a UTF-8 file that is not empty.

    Args:
        path: The file.
        what: What the file holds, for messages.

    Raises:
        UserError: The file cannot be read, or has no such line.
    """
    found = False
    try:
        with open_file(path, "r", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if text := line.strip():
                    found = True
                    yield number, text
    except FileNotFoundError:
        raise UserError(f"{what} {path}: no such file") from None
    except OSError as error:
        raise UserError(f"{what} {path}: cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {path}: is not a text in UTF-8 ({error})") from None
    if not found:
        raise UserError(f"{what} {path}: the file is empty")
