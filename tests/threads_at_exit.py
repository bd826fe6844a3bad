"""Runs a script as `python` does, and says as Python exits which threads would still run in C++ or in Python.

Usage: python tests/threads_at_exit.py SCRIPT WORDS...

The line "left at exit: [...]" names them. A thread that asks for Python's lock while Python exits crashes the process
("terminate called without an active exception").
"""

import atexit
import os
import runpy
import sys
import threading
from pathlib import Path

SAID = "left at exit: "


def threads() -> list[str]:
    """Threads of gloo by their names in the kernel, and those of Python but the main thread."""
    kernel = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    python = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    return sorted([name for name in kernel if "gloo" in name] + python)


if __name__ == "__main__":
    # What is registered first runs last. One write, so that the lines of several processes do not mix.
    atexit.register(lambda: os.write(1, f"{SAID}{threads()}\n".encode()))
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
