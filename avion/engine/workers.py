"""Data-loading processes that cannot hold up a run when they die, are stopped, or are stuck in the kernel.

PyTorch's own loader waits without end for a worker that was stopped, in three places: when it fetches the memory of a
batch from the worker, when it asks the workers to end, and when Python exits. It also raises the death of a worker as
an exception in the middle of whatever the main thread is doing. Here a thread receives the batches; the main thread
looks at signals, deaths and the clock while it waits; and workers are ended by SIGKILL and not waited for.
"""

import atexit
import contextlib
import errno
import functools
import multiprocessing
import multiprocessing.process
import multiprocessing.queues
import os
import queue
import re
import resource
import shutil
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling
from torch.utils.data._utils.pin_memory import pin_memory
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from avion.errors import UserError
from avion.processes import die_with

from . import signals

DATA_TIMEOUT_S = 900.0
_LOOK_EVERY_S = 0.5
_END_WITHIN_S = 2.0  # a worker that is still there so long after a SIGKILL is stuck in the kernel

_NO_FILES, _NO_MEMORY = 71, 72  # exit statuses of a worker
_TOO_MANY_FILES = re.compile(r"too many open files|ancdata|exit code 71\b", re.IGNORECASE)
_FULL = re.compile(
    r"no space left|bus error|unable to (allocate|write|mmap|resize).*(shm|shared|torch_)|exit code 72\b", re.IGNORECASE
)


# --- in a worker -------------------------------------------------------------------------------------------------


def collate_in_worker(collate: Callable[[list], dict[str, Any]] | None, samples: list | dict) -> dict[str, Any]:
    """Collate samples in a worker, and put the tensors of the batch where the parent process will map them.

    If this were left to the queue, it would happen in a thread whose errors nobody sees, and the parent would wait for
    a batch that is lost.

    Args:
        collate: Makes a batch of samples; None: there is one sample, which is the batch.
        samples: The samples, or the one sample.

    Returns:
        The batch; {"fatal": message} where memory or open files are lacking.

    Raises:
        RuntimeError: The tensors cannot be put there for another reason.
    """
    batch = samples if collate is None else collate(samples)
    if torch.utils.data.get_worker_info() is None:
        return batch
    try:
        for value in batch.values():
            for tensor in value.values() if isinstance(value, dict) else [value]:
                if isinstance(tensor, torch.Tensor):
                    tensor.share_memory_()
    except (RuntimeError, OSError) as e:
        if cause := shortage(str(e), getattr(e, "errno", None)):
            return {"fatal": cause}
        raise
    return batch


def _begin_worker(parent: int | None, worker: int) -> None:
    """Begin a worker that must not outlive the process `parent`; None where the parent's threads may end before it."""
    if parent == os.getppid():  # not of a fork server, which outlives the process that it serves
        die_with(parent)
    signals.obey_parent_only(worker, parent)
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end_worker)
    sys.excepthook = _tell


def _tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an error of multiprocessing's thread that hands over memory, but not that the parent left it in the middle:
    what became of the parent is told by the parent.
    """
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


def _end_worker(error: BaseException, _item: Any) -> None:
    """End a worker that cannot send its batch, with a status that says why: otherwise the parent would wait for the
    batch.
    """
    text = str(error)
    os._exit(_NO_FILES if _TOO_MANY_FILES.search(text) else _NO_MEMORY if _FULL.search(text) else 1)


def shortage(text: str, number: int | None = None) -> str | None:
    """Say what this machine lacks for data-loading processes, and the cure.

    Args:
        text: The text of an error.
        number: The number of an OSError, where the error has one.

    Returns:
        One line; None where the error is another one.
    """
    if number in (errno.EMFILE, errno.ENFILE) or _TOO_MANY_FILES.search(text):
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return (
            f"too many files are open (this process may open {limit}): data-loading processes hand over batches as "
            "open files; allow more with `ulimit -n 65536`, or lower --workers"
        )
    if number == errno.ENOSPC or _FULL.search(text):
        free = ""
        with contextlib.suppress(OSError):
            usage = shutil.disk_usage("/dev/shm")
            free = f" ({usage.free / 2**20:.0f} of {usage.total / 2**20:.0f} MiB are free)"
        return (
            f"/dev/shm is full{free}: data-loading processes hand over batches there; give it more room (`mount -o "
            "remount,size=16G /dev/shm`; Docker: --shm-size=16g), or lower --workers or --batch-size"
        )
    return None


# --- in the process that trains ----------------------------------------------------------------------------------


class WatchedLoader(DataLoader):
    """A loader whose workers survive the signals that a scheduler sends to all processes of a job, but not their
    parent.

    Args:
        dataset: The samples.
        data_timeout: Seconds after which workers that send nothing are given up. Without workers, the process itself
            ends where a batch takes longer, if it heeds signals (`signals.heeded`).
        device: Where the batches go. On their way to a GPU their memory is pinned.
        how: The arguments of a DataLoader.
    """

    data_timeout = DATA_TIMEOUT_S  # while DataLoader.__init__ runs

    def __init__(self, dataset: Dataset, data_timeout: float, device: torch.device, **how: Any):
        # PDEATHSIG is about the thread that forks, and threads may end before their process.
        tied = threading.current_thread() is threading.main_thread()
        begin = functools.partial(_begin_worker, os.getpid() if tied else None)
        super().__init__(dataset, worker_init_fn=begin, **how)
        self.data_timeout, self.device = data_timeout, device

    def __iter__(self) -> Iterator:
        if self.num_workers == 0:
            return self._read_here(super().__iter__())
        with signals.held():
            try:
                return super().__iter__()
            except OSError as e:
                if cause := shortage(str(e), e.errno):
                    raise UserError(cause) from e
                raise

    def _read_here(self, batches: Iterator) -> Iterator:
        line = f"error: reading a batch took longer than --data-timeout, {self.data_timeout:g} s; {_CAUSES}"
        while True:
            with signals.bounded(self.data_timeout, line):
                batch = next(batches, None)
            if batch is None:
                return
            yield pinned(batch, self.device)

    def _get_iterator(self) -> Iterator:
        return super()._get_iterator() if self.num_workers == 0 else _Batches(self)


_FEWER = "lower --workers if memory ran out"
_CAUSES = "a file system does not answer, or a decoder is stuck"


def pinned(batch: Any, device: torch.device) -> Any:
    """Return a batch in memory from which it is copied to this device without waiting."""
    return pin_memory(batch) if device.type == "cuda" else batch


class _Received:
    """Receives what the workers send in a thread, so that `get` really returns within its timeout."""

    def __init__(self, sent: Any, device: torch.device):
        # A SimpleQueue waits for ever where a signal arrives just as its timeout is over (CPython 3.11).
        self._items: queue.Queue = queue.Queue()
        self._device = device
        self._sent, self._ended = sent, threading.Event()
        self._thread = threading.Thread(target=self._receive, name="batches", daemon=True)
        self._thread.start()

    def _receive(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        while not self._ended.is_set():
            try:
                number, batch = self._sent.get(timeout=_LOOK_EVERY_S / 5)
                self._items.put((True, (number, pinned(batch, self._device))))
            except queue.Empty:
                continue
            except Exception as e:  # of a worker that died while it sent: the main thread finds out which
                self._items.put((False, e))
                self._ended.wait(_LOOK_EVERY_S)

    def get(self, timeout: float) -> Any:
        fine, item = self._items.get(timeout=timeout)
        if not fine:
            raise item
        return item

    def end(self) -> None:
        """End the thread: a thread that is in C++ when Python exits can crash the process."""
        self._ended.set()
        self._thread.join(timeout=_END_WITHIN_S)


class _Batches(_MultiProcessingDataLoaderIter):
    """PyTorch's iterator over the batches of workers, with another way to wait and to end the workers."""

    def __init__(self, loader: WatchedLoader):
        self._allowed_s = loader.data_timeout
        self._ended, self._owner = False, os.getpid()
        self._shutdown = False  # PyTorch's: its iterator gives nothing more once this is set
        _iterators.add(self)
        super().__init__(loader)
        # PyTorch would raise the death of a worker out of its handler of SIGCHLD, wherever the main thread is.
        signal_handling._remove_worker_pids(id(self))
        self._worker_pids_set = False
        for keys in self._index_queues:  # a worker that is stopped reads none: Python would wait at its exit
            keys.cancel_join_thread()
        self._data_queue = _Received(self._data_queue, loader.device)

    def _get_data(self) -> Any:
        """Return the next thing that a worker sends. UserError or Stopped is raised where nothing comes."""
        waited, last = 0.0, time.monotonic()
        while True:
            error: Exception | None = None
            try:
                return self._data_queue.get(timeout=_LOOK_EVERY_S)
            except queue.Empty:
                pass
            except (OSError, EOFError, RuntimeError) as e:
                error = e
            # A process that was suspended must not take the time of its sleep for a time that it waited.
            now = time.monotonic()
            waited, last = waited + min(now - last, 2 * _LOOK_EVERY_S), now
            line = self._told_of_the_dead(error)
            if line is None and waited >= self._allowed_s:
                line = (
                    f"data-loading processes sent nothing for {self._allowed_s:g} s (--data-timeout): {_CAUSES}; "
                    "they were killed"
                )
            if line is None and not signals.asked():
                continue
            self._shutdown_workers()
            if line is None or (signals.asked() and error is None):
                raise signals.Stopped(f"{signals.name(signals.asked())} while data were read")
            raise UserError(line) from error

    def _told_of_the_dead(self, error: Exception | None) -> str | None:
        """What is wrong with the workers, or with what they sent (`error`), in one line; None: nothing is."""
        deadline = time.monotonic() + (_END_WITHIN_S if error is not None else 0.0)
        while not (dead := [w for w in self._workers if not w.is_alive()]) and time.monotonic() < deadline:
            time.sleep(0.05)
        texts = [_death(w.exitcode) for w in dead]
        if error is not None:
            texts.insert(0, str(error))
        if cause := shortage(" ".join(texts), getattr(error, "errno", None)):
            return cause
        if dead:
            return f"a data-loading process (pid {dead[0].pid}) {_death(dead[0].exitcode)}; {_FEWER}"
        return None if error is None else f"a batch could not be received ({type(error).__name__}: {error})"

    def _shutdown_workers(self) -> None:
        """End the workers, within seconds, whatever state they are in."""
        if self._ended or os.getpid() != self._owner:  # a fork has a copy of this, not the workers
            return
        self._ended = self._shutdown = True
        workers = list(getattr(self, "_workers", ()))
        end_processes(workers)
        if isinstance(getattr(self, "_data_queue", None), _Received):
            self._data_queue.end()
        for keys in getattr(self, "_index_queues", ()):
            keys.cancel_join_thread()
            keys.close()
        if getattr(self, "_worker_pids_set", False):  # where the start failed
            signal_handling._remove_worker_pids(id(self))
            self._worker_pids_set = False

    def __del__(self) -> None:
        self._shutdown_workers()


def early_death(text: str) -> str:
    """Say in the words of this module what PyTorch says of a worker that died before `_Batches` watched it.

    Args:
        text: The text of PyTorch's RuntimeError: "DataLoader worker (pid 7) is killed by signal: Killed. ", "... exited
            unexpectedly with exit code 1. ...", or "DataLoader worker (pid(s) 7, 8) exited unexpectedly".

    Returns:
        One line.
    """
    first = " ".join(text.splitlines()[0].split())
    found = re.search(r"\(pid(?:\(s\))? (\d+)", first)
    if found is None:
        return f"a data-loading process died ({first}); {_FEWER}"
    how = "died"
    if killed := re.search(r"killed by signal: (.+?)\.", first):
        numbers = {signal.strsignal(number): number for number in signal.valid_signals()}
        how = _death(-numbers[killed[1]]) if killed[1] in numbers else f"was ended by a signal ({killed[1]})"
    elif status := re.search(r"exit code (\d+)", first):
        how = _death(int(status[1]))
    return f"a data-loading process (pid {found[1]}) {how}; {_FEWER}"


def _death(status: int | None) -> str:
    if status is not None and status < 0:
        return f"was ended by {signals.name(-status)} ({signal.strsignal(-status)})"
    return f"ended with exit code {status}"


def end_processes(processes: Sequence[multiprocessing.process.BaseProcess]) -> None:
    """Kill these children.

    A child that is stuck in the kernel does not die of the signal; Python's exit will not wait for it.

    Args:
        processes: The children.
    """
    for process in processes:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            process.kill()
    deadline = time.monotonic() + _END_WITHIN_S
    for process in processes:
        with contextlib.suppress(ValueError, AssertionError):
            process.join(timeout=max(deadline - time.monotonic(), 0.0))
            if process.is_alive():
                # multiprocessing joins what is in this set, without a limit, when Python exits.
                multiprocessing.process._children.discard(process)


_iterators: weakref.WeakSet[_Batches] = weakref.WeakSet()


@atexit.register  # before multiprocessing's own, which was registered when the module was imported
def end_all_workers() -> None:
    """End the workers of all loaders of this process. Without this, what still refers to a loader keeps its workers
    alive.
    """
    for iterator in list(_iterators):
        iterator._shutdown_workers()
