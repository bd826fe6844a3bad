"""Processes that are started for a piece of work, and must not go on when the process that started them has died."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor

_PR_SET_PDEATHSIG = 1
_LOOK_EVERY_S = 1.0


def pool(workers: int) -> ProcessPoolExecutor:
    """Make a pool of processes, which end when this process dies.

    Args:
        workers: The number of processes.

    Returns:
        The pool.
    """
    # A fork server, Python's choice from 3.14 on, would be the parent, and outlives the process that it serves.
    method = "fork" if sys.platform == "linux" else "spawn"
    context = multiprocessing.get_context(method)
    return ProcessPoolExecutor(workers, context, initializer=die_with, initargs=(os.getpid(),))


def die_with(parent: int) -> None:
    """End this process when its parent dies, however the parent dies, even by SIGKILL.

    A pool's processes wait for work at a pipe of which they hold both ends, so the death of the parent alone never
    wakes them. On Linux, the kernel ends this process, even one that is stopped. Elsewhere a thread watches the parent.

    Args:
        parent: The process id that `os.getpid()` gave in the parent; the parent may have died before this call.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    if os.getppid() != parent:
        os._exit(1)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_EVERY_S)
    os._exit(1)
