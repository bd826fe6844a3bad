"""A rank that is killed or stopped: within 6 s, the processes together print one line, which names the rank."""

import os
import signal
import time

from tests.endurance import frame, hurt

# The busy machine of a test is given more time than people are promised.
WITHIN_S = 12.0 if (os.cpu_count() or 1) < 4 else 6.0
TORCHRUNS_LINES = 50


def _hurt(trial: frame.Trial, number: signal.Signals, launcher: str = "avion.engine.torchrun") -> list[str]:
    with hurt.run(trial, "--workers", 0, "--batch-size", 2, processes=2, launcher=launcher) as run:
        run.reach(int(trial.rng.integers(1, 20)))
        victim = int(trial.rng.integers(2))
        pid = run.ranks()[victim]
        os.kill(pid, number)
        begin = time.monotonic()
        frame.wait_until(lambda: "stopped because" in run.log.read_text(), "the line", WITHIN_S)
        run.end(WITHIN_S + 30 - (time.monotonic() - begin))
        lines = run.said()
        told = [line for line in lines if "main_pretrain.py: " in line]
        hurt.one_line(told, f"process {victim} of 2 (pid {pid} on ", "stopped" if number == signal.SIGSTOP else "died")
        return lines


def killed(trial: frame.Trial) -> None:
    assert len(_hurt(trial, signal.SIGKILL)) == 1


def stopped(trial: frame.Trial) -> None:
    assert len(_hurt(trial, signal.SIGSTOP)) == 1


def killed_under_plain_torchrun(trial: frame.Trial) -> None:
    """torchrun adds its own report, which nothing in its processes can prevent."""
    lines = _hurt(trial, signal.SIGKILL, "torch.distributed.run")
    assert len(lines) <= TORCHRUNS_LINES, lines


if __name__ == "__main__":
    frame.main(
        __doc__,
        {
            "a killed rank": (killed, 20, 1),
            "a stopped rank": (stopped, 10, 1),
            "a killed rank, plain torchrun": (killed_under_plain_torchrun, 5, 0),
        },
    )
