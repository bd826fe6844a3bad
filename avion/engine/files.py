"""Files that are there whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from avion.errors import UserError


@contextlib.contextmanager
def written_whole(path: str | os.PathLike, *, flag: str = "", cure: str = "change --output-dir") -> Iterator[BinaryIO]:
    """A file open for writing beside `path`; when the block is left it is flushed to disk and renamed over it: a reader
    sees the old file or the new one.

    An OSError becomes a UserError that begins with `flag`, if given, and the path, and ends with `cure`.
    """
    target = Path(path)
    partial = target.with_name(target.name + ".partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except OSError as e:
        partial.unlink(missing_ok=True)
        name = f"{flag} {path}".strip()
        raise UserError(f"{name}: cannot be written ({e.strerror}); free space or {cure}") from e
