"""SIGTERM and SIGUSR1, by which a scheduler asks the run to stop and to be started again.

The handler only takes note of the signal. The run looks at `asked()` between two steps, where all processes agree on it
(`World.most`), and leaves by raising `Stopped`. `run_program` turns that into exit status 75, EX_TEMPFAIL ("try
again").
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

STOPPED = 75

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# Launchers hand on signals that the scheduler has already sent to every process. A signal within this many seconds of
# the first one is the same request. A later signal ends the process at once.
ECHO_S = 10.0

_received: int = 0
_received_at: float = 0.0


class Stopped(Exception):
    """The run leaves because it was asked to stop; the message says where it stands."""


def asked() -> int:
    """The number of the signal that asked this process to stop; 0 if there was none."""
    return _received


def raise_if_asked(where: str) -> None:
    """Raise Stopped if a signal has arrived, inside `World.together` and where nothing has to be written."""
    if _received:
        raise Stopped(f"{name(_received)} {where}")


def name(number: int) -> str:
    """The name of a signal, such as SIGTERM."""
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
    """Take note of both signals within the block; the earlier handlers come back after it.

    Handlers can only be set in the main thread. In another thread this does nothing.
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
            # A handler of None was set by C code; Python can neither name it nor put it back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        _received = 0


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Block both signals within the block, in this thread and in the processes that are started within it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def obey_parent_only(worker: int) -> None:
    """Let only the SIGTERM of its parent end a data-loading process that was started within `held`.

    A scheduler sends its signal to every process of a job. A worker that ended because of it would end the run before
    the checkpoint is written. Workers end with their parent. This is the `worker_init_fn` of a DataLoader.
    """
    if not hasattr(signal, "sigwaitinfo"):  # on macOS, where no such scheduler runs
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        return

    def listen() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=listen, name="obey_parent_only", daemon=True).start()
