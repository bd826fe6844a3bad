"""Processes that prepare videos: one that dies or gets stuck costs the video that it was at, and nothing else."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

from avion.errors import UserError
from avion.processes import die_with

from .errors import VideoError, one_line
from .prepare_plan import Raw, Settings
from .prepare_video import prepare_video

STUCK_S = 600.0  # without a word, after which a process is given up
# A fork would share the parent's locks with its children, which may outlive it.
_SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class News:
    """What a process says about a video: share, how much of it is done; result, what `prepare_video` returned; reason,
    why it failed. At most one of the last two is set, with share 1."""

    raw: Raw
    share: float
    result: dict | None = None
    reason: str | None = None


class _Process:
    def __init__(self, settings: Settings, folder: Path, threads: int):
        self.pipe, other = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_work, args=(other, settings, folder, threads, os.getpid()), daemon=True)
        self._process.start()
        other.close()
        self.raw: Raw | None = None
        self.heard = time.monotonic()

    def give(self, raw: Raw) -> None:
        self.raw, self.heard = raw, time.monotonic()
        with contextlib.suppress(OSError):  # it has died: `receive` will tell
            self.pipe.send(raw)

    def receive(self) -> tuple[str, object]:
        """(kind, content) of what it says. ("died", why) where it cannot say anything any more."""
        self.heard = time.monotonic()
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            self._process.join(timeout=10)
            code = self._process.exitcode
            if code is not None and code < 0:
                hint = "; is there memory enough?" if code == -signal.SIGKILL else ""
                return "died", f"the process that prepared it was ended by {signal.Signals(-code).name}{hint}"
            return "died", f"the process that prepared it ended with status {code}"

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self.pipe.close()


def prepare_all(
    raws: list[Raw], settings: Settings, folder: Path, processes: int, threads: int, stuck_s: float = STUCK_S
) -> Iterator[News]:
    """Prepare these videos, in order, `processes` at a time -> what happens, as it does.

    Raises UserError where the target cannot be written. When the iterator is closed, its processes are ended.
    """
    waiting = list(reversed(raws))
    running: list[_Process] = []
    try:
        while waiting or any(p.raw for p in running):
            while len(running) < min(processes, len(waiting) + len(running)):
                running.append(_Process(settings, folder, threads))
            for process in running:
                if process.raw is None and waiting:
                    process.give(waiting.pop())
            busy = {p.pipe: p for p in running if p.raw is not None}
            for pipe in wait(list(busy), timeout=1.0):
                yield from _news(busy[pipe], running)
            for process in list(busy.values()):
                if process.raw is not None and time.monotonic() - process.heard > stuck_s:
                    raw = process.raw
                    process.kill()
                    running.remove(process)
                    yield News(raw, 1.0, reason=f"made no progress for {stuck_s:g} s")
    finally:
        for process in running:
            process.kill()


def _news(process: _Process, running: list[_Process]) -> Iterator[News]:
    kind, content = process.receive()
    raw = process.raw
    if kind == "share":
        yield News(raw, content)
        return
    process.raw = None
    if kind == "target":
        raise UserError(content)
    if kind == "died":
        process.kill()
        running.remove(process)
    if kind == "result":
        yield News(raw, 1.0, result=content)
    else:
        yield News(raw, 1.0, reason=content)


def _work(pipe: Connection, settings: Settings, folder: Path, threads: int, parent: int) -> None:
    """What a process does: videos come through the pipe, news goes back."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its processes
    die_with(parent)
    while True:
        try:
            raw = pipe.recv()
        except EOFError:
            return
        try:
            answer = "result", prepare_video(raw, settings, folder, threads, lambda share: pipe.send(("share", share)))
        except VideoError as error:
            answer = "failed", error.reason if error.path == raw.path else str(error)
        except UserError as error:
            answer = "target", str(error)
        except BrokenPipeError:
            return  # the parent is gone
        except MemoryError:
            answer = "failed", "there was not memory enough"
        except Exception as error:  # whatever a strange file brings about, the other videos go on
            answer = "failed", f"{type(error).__name__}: {one_line(error)}"
        pipe.send(answer)
