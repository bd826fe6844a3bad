"""What cannot be read of a video, in one line."""

from __future__ import annotations

import errno
import os
import re

from avion.errors import UserError


class VideoError(UserError):
    """A video file, or a part of it, cannot be read. `path` and `reason` say which and why.

    unreadable: the operating system refused (no permission, an input/output error), so that nothing is known about the
    file itself.
    """

    def __init__(self, path: str | os.PathLike, reason: str | None = None, unreadable: bool = False):
        if reason is None:
            # A DataLoader rebuilds an exception of its worker by calling the class with the worker's whole
            # traceback as the only argument; its last line is our message.
            lines = [line for line in str(path).splitlines() if line.strip()] or [""]
            path, reason = "", lines[-1].split("VideoError: ", 1)[-1]
        self.path, self.reason, self.unreadable = str(path), reason, unreadable
        super().__init__(f"{self.path}: {reason}" if self.path else reason)

    def __reduce__(self):
        return type(self), (self.path, self.reason, self.unreadable)


def refused(path: str | os.PathLike, error: OSError) -> UserError:
    """The operating system's `error` at `path`, as the error of a clip that cannot be read.

    Too many open files is no fault of the video, and every further file would fail: it is a UserError that says so.
    """
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return UserError(f"{path}: too many files are open; allow more with `ulimit -n 65536`, or lower --workers")
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return VideoError(path, "no such file")
    return VideoError(path, f"cannot be opened ({error.strerror or error})", unreadable=True)


def one_line(error: BaseException) -> str:
    """The text of an error without line ends, of at most 160 characters."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    text = " ".join(re.sub(r"\[[\d:]+\] \S+\.(cc|h):\d+: ", "", text).split())  # decord's time and source line
    return text if len(text) <= 160 else text[:157] + "..."
