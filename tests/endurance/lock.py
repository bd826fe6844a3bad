"""Two runs in one --output-dir: the second one is told who holds the folder, and the dead hold nothing."""

import os
import signal
import socket
import subprocess
import sys
import time

from avion import folder_lock
from avion.weights import Checkpoint
from tests.endurance import frame


def training(folder, *more: str) -> list[str]:
    """The words of a training that lasts, with a checkpoint after every step."""
    return [
        *frame.tiny_flags(),
        "--output-dir",
        str(folder),
        "--epochs",
        "400",
        "--eval-freq",
        "400",
        "--save-steps",
        "1",
        *more,
    ]


def children(pid: int) -> list[int]:
    """The processes that a process started."""
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()
    return [int(child) for child in found]


def has_checkpoint(folder):
    """Whether the run has written its first checkpoint."""
    return lambda: (folder / "checkpoint.pt").exists()


def refused(folder, trial: frame.Trial) -> str:
    """The line with which a run is refused that begins while another one is in its folder."""
    patience = 1 if trial.short else folder_lock.PATIENCE_S
    code = f"import main_pretrain; from avion import folder_lock; folder_lock.PATIENCE_S = {patience}; import sys; "
    words = [sys.executable, "-c", code + "sys.exit(main_pretrain.main(sys.argv[1:]))", *training(folder)]
    return frame.error_line(frame.run(words))


def second_run(trial: frame.Trial) -> None:
    """The second run is refused with one line that names the first; the first goes on, its checkpoint whole."""
    folder, log = trial.folder / "run", trial.folder / "first.log"
    with frame.started(frame.command(training(folder)), log) as first:
        frame.wait_until(has_checkpoint(folder), "the first checkpoint")
        line = refused(folder, trial)
        assert f"process {first.pid} on {socket.gethostname()}" in line and "--output-dir" in line, line
        # The run writes a checkpoint every few milliseconds, faster than one can be read. Stopped at any moment, it has
        # left a whole one.
        first.send_signal(signal.SIGSTOP)
        try:
            before = Checkpoint.open(folder / "checkpoint.pt").training
        finally:
            first.send_signal(signal.SIGCONT)
        assert before is not None and first.poll() is None, log.read_text()
        first.send_signal(signal.SIGTERM)
        assert first.wait(60) == 75, log.read_text()
    assert not list(folder.glob("*.partial")) and not (folder / "run.lock").exists()


def killed_agent(trial: frame.Trial) -> None:
    """kill -9 of torchrun's agent leaves its ranks training: they hold the folder until they are gone."""
    folder, log = trial.folder / "run", trial.folder / "first.log"
    words = frame.command(training(folder, "--batch-size", "2"), processes=2)
    with frame.started(words, log) as agent:
        frame.wait_until(has_checkpoint(folder), "the first checkpoint")
        ranks = children(agent.pid)
        agent.kill()
        agent.wait()
        assert len(ranks) == 2
        line = refused(folder, trial)
        assert any(f"process {rank} on" in line for rank in ranks), line
        for rank in ranks:
            os.kill(rank, signal.SIGKILL)
        goes_on(folder, trial)


def killed(trial: frame.Trial) -> None:
    """A run that was killed at any time holds nothing: the same command goes on at once."""
    folder, log = trial.folder / "run", trial.folder / "first.log"
    with frame.started(frame.command(training(folder)), log) as first:
        frame.wait_until(has_checkpoint(folder), "the first checkpoint")
        time.sleep(trial.rng.uniform(0, 0.5))
        first.kill()
        first.wait()
    goes_on(folder, trial)


def goes_on(folder, trial: frame.Trial) -> None:
    """The same command takes the folder and goes on from its checkpoint; what was being written is gone."""
    log = trial.folder / "second.log"
    with frame.started(frame.command(training(folder)), log) as second:
        frame.wait_until(lambda: "going on from" in log.read_text(), "going on")
        assert "waiting" not in log.read_text(), log.read_text()
        second.send_signal(signal.SIGTERM)
        assert second.wait(60) == 75, log.read_text()
    assert not list(folder.glob("*.partial"))


if __name__ == "__main__":
    frame.main(
        __doc__,
        {
            "a second run beside the first": (second_run, 6, 1),
            "torchrun's agent killed": (killed_agent, 6, 1),
            "the same command after kill -9": (killed, 20, 0),
        },
    )
