"""Data-loading processes that are stopped (SIGSTOP), which is as near to stuck in the kernel as a test can come: a run
ends within --data-timeout + 10 s with one line, keeps its steps, and heeds signals while it waits."""

import os
import signal

from tests.endurance import frame, hurt

TIMEOUT_S = 6


def _stop(trial: frame.Trial, run: hurt.Run, parents: list[int]) -> None:
    run.reach(int(trial.rng.integers(1, 12)))
    for parent in parents:
        for pid in hurt.children(parent):
            os.kill(pid, signal.SIGSTOP)


def nobody_signals(trial: frame.Trial) -> None:
    with hurt.run(trial, "--workers", 2, "--data-timeout", TIMEOUT_S * 2) as run:
        _stop(trial, run, [run.process.pid])
        run.end(2 * TIMEOUT_S + 10)
        assert run.process.returncode == 2
        hurt.one_line(run.said(), "sent nothing for 12 s (--data-timeout)")
        run.holds_a_checkpoint()


def signalled(trial: frame.Trial) -> None:
    with hurt.run(trial, "--workers", 2) as run:
        _stop(trial, run, [run.process.pid])
        number = trial.rng.choice([signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
        run.process.send_signal(signal.Signals(number))
        run.end(10)
        assert run.process.returncode == 75 and not run.said(), run.said()
        run.holds_a_checkpoint()


def of_one_rank_of_two(trial: frame.Trial) -> None:
    with hurt.run(trial, "--workers", 2, "--batch-size", 2, "--data-timeout", 2 * TIMEOUT_S, processes=2) as run:
        run.reach(1)
        _stop(trial, run, [run.ranks()[int(trial.rng.integers(2))]])
        run.end(2 * TIMEOUT_S + 10)
        assert run.process.returncode == 2
        lines = run.said()
        assert 1 <= len(lines) <= 2 and all("sent nothing for 12 s" in line for line in lines), lines
        run.holds_a_checkpoint()


if __name__ == "__main__":
    frame.main(
        __doc__,
        {
            "stopped workers": (nobody_signals, 10, 1),
            "stopped workers and a signal": (signalled, 20, 1),
            "stopped workers of one of two ranks": (of_one_rank_of_two, 10, 0),
        },
    )
