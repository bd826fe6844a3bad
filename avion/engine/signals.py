"""SIGTERM and SIGUSR1: a scheduler asks the run to stop and to be started again.

The handler only takes note; the run looks at `asked()` between two steps, where all processes agree on it
(`World.most`), and leaves by raising `Stopped`. `run_program` makes exit status 75 of that, EX_TEMPFAIL: "try again".
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

STOPPED = 75

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# Launchers hand on what the scheduler has sent to every process already: what comes within this many seconds of the
# first signal is the same request. What comes later ends the process at once.
ECHO_S = 10.0

_received: int = 0
_received_at: float = 0.0


class Stopped(Exception):
    """The run leaves because it was asked to; the message says where it stands."""


def asked() -> int:
    """Number of the signal that asks this process to stop; 0 if none did."""
    return _received


def raise_if_asked(where: str) -> None:
    """Raise Stopped if a signal has arrived: where nothing has to be written, inside a `World.together`."""
    if _received:
        raise Stopped(f"{name(_received)} {where}")


def name(number: int) -> str:
    return signal.Signals(number).name


def _take_note(number: int, frame) -> None:
    global _received, _received_at
    if not _received:
        _received, _received_at = number, time.monotonic()
    elif time.monotonic() - _received_at > ECHO_S:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


@contextlib.contextmanager
def heeded() -> Iterator[None]:
    """Take note of both signals within the block; the handlers there were come back after it.

    Handlers can be set in the main thread only: elsewhere the block does nothing.
    """
    global _received
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _received = 0
    before = {number: signal.signal(number, _take_note) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            # None: set by C code, which Python can neither name nor put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        _received = 0


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Processes that are started within the block are born with both signals blocked (this thread waits with them)."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def obey_parent_only(worker: int) -> None:
    """In a data-loading process born within `held`: only its parent's SIGTERM ends it.

    A scheduler signals every process of a job. A worker that died of that would take the run with it before the
    checkpoint is written; it ends when its parent does. (A DataLoader's `worker_init_fn`.)
    """
    if not hasattr(signal, "sigwaitinfo"):  # macOS, which no such scheduler runs on
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        return

    def listen() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=listen, name="obey_parent_only", daemon=True).start()
