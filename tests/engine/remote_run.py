"""A quick run whose folder is remote, in a process of its own: what a machine of a cluster would do."""

import multiprocessing
import os
from pathlib import Path

from avion import remote
from avion.engine import mirror, remote_lock
from tests.engine import quick
from tests.processes import PRELOADED


def hurry() -> None:
    """Look for changes all the time, and give up on a server at once."""
    mirror.POLL_S, mirror.LOGS_S, mirror.AGAIN_S = 0.005, 0.0, 0.1
    remote_lock.SETTLE_S = 0.05
    remote.FIRST_WAIT_S, remote.ANSWER_S = 0.01, 0.5


def run_as_rank(rank: int, size: int, folder: str, words: list[str], environment: dict[str, str]) -> str:
    """As `quick.run_as_rank`."""
    hurry()
    return quick.run_as_rank(rank, size, folder, words, environment)


def _alone(folder: str, words: list[str], environment: dict[str, str], answer: str) -> None:
    Path(answer).write_text(run_as_rank(0, 1, folder, words, environment))


def start(folder: str, words: list[str], environment: dict[str, str], answer: Path) -> multiprocessing.Process:
    """Start such a process, which writes what was raised into `answer`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_alone, args=(folder, words, {**os.environ, **environment}, str(answer)))
    process.start()
    return process
