"""Several commands as child processes, a few at a time; each starts after the commands that it needs."""

import contextlib
import logging
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from avion.engine.console import duration
from avion.errors import UserError

logger = logging.getLogger(__name__)

GRACE_S = 20.0  # for a job to end once it was asked to
_SHOWN_LINES = 25


@dataclass(frozen=True)
class Job:
    """A command whose output goes to the file `log`.

    Attributes:
        after: Names of jobs that must have succeeded before this job starts.
        done: Whether there is nothing left to run.
        begin: A function that is called just before the command starts.
    """

    name: str
    words: Sequence[str]
    log: Path
    after: tuple[str, ...] = ()
    done: bool = False
    begin: Callable[[], None] = field(default=lambda: None)


class JobFailed(Exception):
    """A job ended with a status other than 0. The message holds the end of the job's output."""

    def __init__(self, job: Job, status: int):
        super().__init__(f"{job.name} ended with status {status}; the end of its output ({job.log}):\n{_tail(job.log)}")
        self.status = status


def run_jobs(jobs: Sequence[Job], *, slots: int = 2, environment: Mapping[str, str] | None = None) -> None:
    """Run all jobs that are not done, `slots` at a time, in the order of the list.

    The first failure stops the other jobs, and so does any exception that is raised here meanwhile, such as
    KeyboardInterrupt. No job outlives this call.

    Args:
        environment: Variables that are added to the environment of this process.

    Raises:
        JobFailed: A job ended with a status other than 0.
    """
    waiting = [job for job in jobs if not job.done]
    finished = {job.name for job in jobs if job.done}
    assert all(name in {j.name for j in jobs} for job in jobs for name in job.after), "a job needs an unknown one"
    if finished:
        logger.info("done before: %s", ", ".join(job.name for job in jobs if job.done))
    running: dict[str, _Running] = {}
    try:
        while waiting or running:
            for job in [job for job in waiting if finished.issuperset(job.after)][: slots - len(running)]:
                waiting.remove(job)
                running[job.name] = _Running(job, environment or {})
                logger.info("%s started; its output is in %s", job.name, job.log)
            assert running, "jobs wait for each other"
            time.sleep(0.1)
            for name, child in list(running.items()):
                status = child.process.poll()
                if status is None:
                    continue
                del running[name]
                if status != 0:
                    raise JobFailed(child.job, status if status > 0 else 128 - status)
                finished.add(name)
                logger.info("%s done in %s; %d of %d", name, duration(child.seconds), len(finished), len(jobs))
    finally:
        _stop(list(running.values()))


class _Running:
    """A started job, in a process group of its own, so that it ends together with its own children."""

    def __init__(self, job: Job, environment: Mapping[str, str]):
        self.job, self._start = job, time.monotonic()
        job.begin()
        try:
            job.log.parent.mkdir(parents=True, exist_ok=True)
            with open(job.log, "ab") as log:
                log.write(f"$ {shlex.join(job.words)}\n".encode())
                log.flush()
                self.process = subprocess.Popen(
                    list(job.words),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **environment},
                    start_new_session=True,
                )
        except OSError as e:
            raise UserError(f"{job.name}: cannot be started ({e.filename}: {e.strerror})") from e

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.killpg(self.process.pid, number)


def _stop(children: Sequence[_Running]) -> None:
    """Ask all of them to end, wait a while, then make them."""
    for child in children:
        logger.info("stopping %s", child.job.name)
        child.send(signal.SIGTERM)
    limit = time.monotonic() + GRACE_S
    for child in children:
        try:
            child.process.wait(max(0.0, limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            logger.warning("%s did not end when it was asked to and is killed", child.job.name)
        child.send(signal.SIGKILL)  # it, or what it left behind
        child.process.wait()


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_SHOWN_LINES:]
    return "\n".join(f"    {line}" for line in lines)
