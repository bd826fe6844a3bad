"""Counts how often a process opens a file, as the interpreter's audit events tell it.

As a program: `python -m tests.opens FILE PROGRAM ...` runs a program and prints the number on the last line.
"""

import contextlib
import os
import runpy
import sys
from collections.abc import Iterator

_counters: list["Opens"] = []


class Opens:
    """The number of times that Python code of this process opened a file for reading."""

    def __init__(self, path):
        self.path, self.count = os.path.realpath(path), 0

    def see(self, path, mode) -> None:
        """Take one event; `mode` is None where a file is opened by `os.open`."""
        if os.path.basename(path) == os.path.basename(self.path) and os.path.realpath(path) == self.path:
            self.count += mode is None or "r" in mode


def _hook(event: str, args: tuple) -> None:
    if event == "open" and isinstance(args[0], str):
        for counter in _counters:
            counter.see(args[0], args[1])


@contextlib.contextmanager
def opens_of(path) -> Iterator[Opens]:
    """Count until the block is left. Hooks can never be removed, so all counters share one."""
    if not hasattr(_hook, "installed"):
        sys.addaudithook(_hook)
        _hook.installed = True
    counter = Opens(path)
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters.remove(counter)


if __name__ == "__main__":
    with opens_of(sys.argv[1]) as found:
        del sys.argv[:2]
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            assert not end.code, end.code
    print(found.count)
