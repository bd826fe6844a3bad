"""SIGTERM, SIGUSR1 and SIGINT (Ctrl-C), by which a scheduler or a person asks the run to stop.

The handler only takes note of the signal. The run looks at `asked()` between two optimizer steps, where all processes
agree on it (`World.most`), and while it waits for data; it leaves by raising `Stopped`. `run_program` turns `Stopped`
into exit status 75, EX_TEMPFAIL ("try again").

Python runs handlers in the main thread, and only between two bytecodes: not while the main thread waits in C++ for
another process. A thread of its own therefore learns of every signal too (`signal.set_wakeup_fd`). The thread ends the
process where the main thread cannot: on a second signal, and when a time that was set with `bounded` is over.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator

from avion.errors import USER_ERROR

STOPPED = 75

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# Launchers hand on signals that the scheduler has already sent to every process. A signal within this many seconds of
# the first one is the same request. A later signal ends the process at once.
ECHO_S = 10.0
# A person who presses Ctrl-C again means it, but a launcher hands on the first one as well.
INTERRUPT_ECHO_S = 0.5

_received: int = 0
_watch: "_Watch | None" = None


class Stopped(Exception):
    """The run leaves because it was asked to stop; the message says where it stands."""


def asked() -> int:
    """Return the number of the signal that asked this process to stop; 0 if there was none."""
    return _received


def raise_if_asked(where: str) -> None:
    """Raise Stopped if a signal has arrived. This is for places inside `World.together` where nothing has to be
    written.

    Args:
        where: What the line says after the name of the signal.

    Raises:
        Stopped: A signal has arrived.
    """
    if _received:
        raise Stopped(f"{name(_received)} {where}")


def name(number: int) -> str:
    """Return the name of a signal, such as SIGTERM."""
    return signal.Signals(number).name


def leave(line: str, status: int) -> None:
    """Print a line on stderr and end this process at once, from any thread.

    The process waits for nothing: no other thread, no child, no lock of a stream.

    Args:
        line: The line; "" prints none.
        status: The exit status.
    """
    if line:
        with contextlib.suppress(OSError):
            os.write(2, f"{_program()}: {line}\n".encode(errors="backslashreplace"))
    os._exit(status)


def _program() -> str:
    return os.path.basename(sys.argv[0]) or "python"


class _Watch(threading.Thread):
    """Hears of signals while the main thread is busy."""

    def __init__(self) -> None:
        super().__init__(name="signals", daemon=True)
        self._reads, self.writes = os.pipe()
        for end in (self._reads, self.writes):
            os.set_blocking(end, False)
        self._first_at: float | None = None
        self._ending = False
        self.at_once = ""
        self._bound: tuple[float, str] | None = None

    def set_bound(self, bound: tuple[float, str] | None) -> None:
        self._bound = bound
        self._wake()

    def end(self) -> None:
        self._ending = True
        self._wake()
        self.join()
        os.close(self._reads)
        os.close(self.writes)

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # it is awake where so much is unread
            os.write(self.writes, b"\0")

    def run(self) -> None:
        poll = select.poll()
        poll.register(self._reads, select.POLLIN)
        while not self._ending:
            bound = self._bound
            wait = None if bound is None else max(bound[0] - time.monotonic(), 0.0)
            if poll.poll(None if wait is None else 1000 * wait):
                for number in os.read(self._reads, 4096):
                    if number in _SIGNALS:
                        self._hear(number)
            elif bound is not None and bound is self._bound:
                leave(bound[1], STOPPED if _received else USER_ERROR)

    def _hear(self, number: int) -> None:
        global _received
        now = time.monotonic()
        if self._first_at is None:
            self._first_at = now
            _received = _received or number
            if self.at_once:
                leave(f"{name(number)} {self.at_once}; leaving with status {STOPPED}", STOPPED)
        elif now - self._first_at > (INTERRUPT_ECHO_S if number == signal.SIGINT else ECHO_S):
            leave(f"{name(number)} after {name(_received)}: left at once", 128 + number)


def _take_note(number: int, frame: object) -> None:
    global _received
    _received = _received or number


@contextlib.contextmanager
def heeded() -> Iterator[None]:
    """Take note of the signals within the block; the earlier handlers come back after the block.

    A SIGINT that is ignored (in a background job of a shell) stays ignored. Handlers can only be set in the main
    thread; in another thread this function does nothing.
    """
    global _received, _watch
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _received = 0
    _watch = watch = _Watch()
    watch.start()
    wakeup = signal.set_wakeup_fd(watch.writes, warn_on_full_buffer=False)
    heard = [n for n in _SIGNALS if n != signal.SIGINT or signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, _take_note) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            # A handler of None was set by C code; Python can neither name it nor put it back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(wakeup)
        _watch = None
        watch.end()
        _received = 0


def _forget_in_child() -> None:
    """A forked process must not write its signals into the pipe of its parent."""
    global _watch
    if _watch is not None:
        _watch = None
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forget_in_child)


@contextlib.contextmanager
def leaving_at_once(where: str) -> Iterator[None]:
    """Within the block the first signal ends the process: nothing has to be written, and the main thread waits in C++.

    Args:
        where: What the line says after the signal, such as "before the processes had met".
    """
    watch = _watch
    if watch is None:
        yield
        return
    raise_if_asked(where)
    watch.at_once = where
    try:
        yield
    finally:
        watch.at_once = ""


@contextlib.contextmanager
def bounded(seconds: float, line: str) -> Iterator[None]:
    """End the process with a line where the block takes too long, even while the main thread is stuck in a call.

    The exit status is 2, or 75 if a signal asked the process to stop. Only the programs' own processes have such a
    bound, within `heeded`.

    Args:
        seconds: The time that the block may take.
        line: The line.
    """
    watch = _watch
    if watch is None:
        yield
        return
    watch.set_bound((time.monotonic() + seconds, line))
    try:
        yield
    finally:
        watch.set_bound(None)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Block the signals within the block, in this thread and in the processes that are started within it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def obey_parent_only(worker: int, owner: int | None = None) -> None:
    """Let only the SIGTERM of its parent end a data-loading process that was started within `held`.

    A scheduler sends its signal to every process of a job, and a terminal its Ctrl-C. A worker that ended because of
    it would end the run before the checkpoint is written. Workers end with their parent. This is part of the
    `worker_init_fn` of a DataLoader.

    Args:
        worker: The number of the worker.
        owner: The process that asked for this worker, where a fork server is the parent.
    """
    if not hasattr(signal, "sigwaitinfo"):  # on macOS, where no such scheduler runs
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        return

    def listen() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid not in (owner, os.getppid()):
            pass
        os._exit(0)

    threading.Thread(target=listen, name="obey_parent_only", daemon=True).start()
