"""The frame of the endurance scripts: a script names its trials, and `main` tries each many times and counts what held.

    def killed_while_it_writes(trial: frame.Trial) -> None:
        ...    # trial.folder is empty and goes afterwards, trial.rng draws; an AssertionError: it did not hold

    if __name__ == "__main__":
        frame.main(__doc__, {"killed while it writes": (killed_while_it_writes, 40, 2)})    # tries: long, short

Each trial prints a line "NAME: 40 tries, 40 held"; a try that did not hold prints why. The exit status is 1 if a try
did not hold. A trial that cannot be tried on this machine raises `Skipped`, and its line says why.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from tests.engine.tiny import RUN, write_tiny_data
from tests.processes import free_port

ROOT = Path(__file__).resolve().parents[2]
_LAUNCHERS = ("SLURM_", "TORCHELASTIC_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")
# One thread, no network; and nothing of a launcher that this process was started by.
ENVIRONMENT = {
    **{k: v for k, v in os.environ.items() if not k.startswith(_LAUNCHERS)},
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(ROOT),
}


class Skipped(Exception):
    """This trial cannot be tried on this machine; the message says why."""


@dataclass(frozen=True)
class Trial:
    """One try.

    Attributes:
        number: The number of the try, from 0.
        folder: An empty folder, which is deleted after the try.
        rng: Draws what differs between tries.
        short: Whether only few tries were asked for.
    """

    number: int
    folder: Path
    rng: np.random.Generator
    short: bool


Trials = Mapping[str, tuple[Callable[[Trial], None], int, int]]


def main(doc: str | None, trials: Trials) -> None:
    """Try all trials of a script and end the process, with status 1 if a try did not hold.

    Args:
        doc: The docstring of the script, for `--help`.
        trials: By name: what is tried, and how often in the long form and with `--short` (0: not there). The function
            returns where the try held, and raises AssertionError, or any other exception, where it did not.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="few tries of each trial")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    parser.add_argument("--only", default="", metavar="TEXT", help="only trials with this text in their name")
    args = parser.parse_args()
    print(f"--seed {args.seed}", flush=True)
    not_held = 0
    for name, (function, long, short) in trials.items():
        tries = short if args.short else long
        if args.only in name and tries > 0:
            not_held += _try(name, function, tries, args.seed, args.short)
    sys.exit(int(not_held > 0))


def _try(name: str, function: Callable[[Trial], None], tries: int, seed: int, short: bool) -> int:
    """Try one trial; the number of tries that did not hold."""
    held, begin = 0, time.perf_counter()
    for number in range(tries):
        folder = Path(tempfile.mkdtemp(prefix="endurance-", dir=memory()))
        try:
            function(Trial(number, folder, np.random.default_rng((seed, number)), short))
            held += 1
        except Skipped as e:
            print(f"{name}: skipped, {e}", flush=True)
            return 0
        except Exception:
            print(f"{name}: try {number} did not hold:\n{traceback.format_exc()}", flush=True)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    print(f"{name}: {tries} tries, {held} held ({time.perf_counter() - begin:.0f} s)", flush=True)
    return tries - held


# --- runs to hurt ------------------------------------------------------------------------------------------------


def memory() -> str | None:
    """A folder in memory, where runs need not wait for a disk; None where there is none."""
    return "/dev/shm" if os.path.isdir("/dev/shm") else None


@cache
def tiny_flags() -> list[str]:
    """A complete, quick pretraining on a small dataset of real videos, but for `--output-dir`.

    The dataset is written once per process and goes with the process.
    """
    folder = tempfile.TemporaryDirectory(prefix="endurance-data-")
    _KEPT.append(folder)
    return [*write_tiny_data(Path(folder.name)), *RUN]


_KEPT: list[tempfile.TemporaryDirectory] = []


def command(words: Sequence[object], *, program: str = "main_pretrain.py", processes: int = 1) -> list[str]:
    """The words that start an entry point, with torchrun where there are several processes."""
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={free_port()}"]
    return [sys.executable, *(launcher if processes > 1 else []), str(ROOT / program), *map(str, words)]


def run(words: Sequence[str], *, timeout: float = 240, **environment: str) -> subprocess.CompletedProcess:
    """Run a command to its end; stdout and stderr are texts."""
    return subprocess.run(
        words, env={**ENVIRONMENT, **environment}, capture_output=True, text=True, timeout=timeout, cwd=ROOT
    )


@contextlib.contextmanager
def started(words: Sequence[str], log: Path, **environment: str) -> Iterator[subprocess.Popen]:
    """A command in the background, in a session of its own, writing to `log`; killed when the block is left."""
    with open(log, "ab") as file:
        process = subprocess.Popen(
            words, env={**ENVIRONMENT, **environment}, stdout=file, stderr=file, cwd=ROOT, start_new_session=True
        )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_until(condition: Callable[[], object], what: str, timeout: float = 120) -> None:
    """Return once `condition()` is true; AssertionError when it is not within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {timeout:g} s"
        time.sleep(0.02)


def error_line(done: subprocess.CompletedProcess) -> str:
    """The one line of a program that refused its work. AssertionError where it ended in another way."""
    lines = done.stderr.splitlines()
    assert done.returncode == 2, f"status {done.returncode}: {done.stderr[-2000:]}"
    errors = [line for line in lines if ": error: " in line]
    assert len(errors) == 1 and "Traceback" not in done.stderr, done.stderr[-2000:]
    return errors[0]
