"""What the scripts about processes share: runs to hurt, their processes, and what they say when they end."""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.endurance import frame

STEPS = 6  # of an epoch of the tiny dataset, with a global batch of 4 clips
LONG = ["--epochs", "500", "--eval-freq", "500", "--print-freq", "1"]


@dataclass
class Run:
    """A run in the background. folder: its --output-dir. log: the file of its stdout and stderr."""

    process: subprocess.Popen
    folder: Path
    log: Path

    def said(self) -> list[str]:
        """The lines on stderr that are no log lines (of a time and a level), after the run has ended."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return [line for line in lines if line.strip() and not (line[2:3] == ":" and line[5:6] == ":")]

    def step(self) -> int:
        """How many optimizer steps were written to steps.txt."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            return json.loads((self.folder / "steps.txt").read_text().splitlines()[-1])["global_step"]
        return 0

    def reach(self, step: int) -> None:
        """Return once this optimizer step is done."""
        frame.wait_until(lambda: self.step() >= step or self.process.poll() is not None, f"step {step}", 240)
        assert self.process.poll() is None, f"the run has ended: {self.said()}"

    def ranks(self) -> list[int]:
        """The process ids of a run with torchrun, by rank."""
        found = {}
        for pid in children(self.process.pid):
            with contextlib.suppress(OSError):
                for word in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    if word.startswith(b"RANK="):
                        found[int(word[5:])] = pid
        return [found[rank] for rank in sorted(found)]

    def end(self, seconds: float) -> float:
        """Wait for the end, at most this long. Returns the seconds."""
        begin = time.monotonic()
        try:
            self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still there after {seconds:g} s: {self.said()}") from None
        return time.monotonic() - begin

    def holds_a_checkpoint(self) -> None:
        """AssertionError where the folder holds no checkpoint of the last step that was made."""
        import torch

        saved = torch.load(self.folder / "checkpoint.pt", weights_only=False, map_location="cpu")
        made = STEPS * saved["epoch"] + saved["step"]
        assert made >= self.step() > 0, f"the checkpoint holds {made} steps of {self.step()}"


@contextlib.contextmanager
def run(
    trial: frame.Trial,
    *more: object,
    processes: int = 1,
    program: str = "main_pretrain.py",
    launcher: str = "avion.engine.torchrun",
    flags: Sequence[str] | None = None,
) -> Iterator[Run]:
    """A run of many epochs, killed with all its processes when the block is left."""
    folder, log = trial.folder / "run", trial.folder / "log"
    flags = [*frame.tiny_flags(), *LONG] if flags is None else flags
    words = frame.command([*flags, *more, "--output-dir", folder], program=program, processes=processes)
    words = [launcher if word == "torch.distributed.run" else word for word in words]
    with frame.started(words, log) as process:
        run, ranks = Run(process, folder, log), []
        try:
            yield run
        finally:
            if processes > 1:
                ranks = run.ranks()
            for pid in ranks:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)


def children(pid: int) -> list[int]:
    """The process ids of the children of a process."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def one_line(lines: Sequence[str], *words: str) -> None:
    """AssertionError where there is not exactly one line, which has all these words."""
    assert len(lines) == 1 and all(word in lines[0] for word in words), lines


def alive(pid: int) -> bool:
    """Whether there is this process, and it has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False
