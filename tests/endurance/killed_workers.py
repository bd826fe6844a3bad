"""Data-loading processes that are killed, in training and as an evaluation begins, with one and with two ranks: one
line that says so, soon, and never a traceback."""

import os
import signal
import time

import numpy as np

from tests.endurance import frame, hurt


def _kill_one(rng: np.random.Generator, parent: int) -> None:
    pids = hurt.children(parent)
    if pids:
        os.kill(int(rng.choice(pids)), signal.SIGKILL)


def _check(run: hurt.Run, processes: int) -> None:
    run.end(20)
    assert run.process.returncode == 2
    lines = run.said()
    assert 1 <= len(lines) <= processes, lines
    assert all("a data-loading process (pid " in line and "SIGKILL" in line for line in lines), lines


def in_training(trial: frame.Trial) -> None:
    with hurt.run(trial, "--workers", 2) as run:
        run.reach(int(trial.rng.integers(1, 10)))
        time.sleep(float(trial.rng.uniform(0, 0.2)))
        _kill_one(trial.rng, run.process.pid)
        _check(run, 1)


def of_one_of_two_ranks(trial: frame.Trial) -> None:
    with hurt.run(trial, "--workers", 1, "--batch-size", 2, processes=2) as run:
        run.reach(int(trial.rng.integers(1, 10)))
        time.sleep(float(trial.rng.uniform(0, 0.2)))
        _kill_one(trial.rng, run.ranks()[int(trial.rng.integers(2))])
        _check(run, 2)


def as_evaluations_begin(trial: frame.Trial) -> None:
    """Every epoch has an evaluation; a worker of the training or of the evaluation is killed around it.

    One that had nothing left to send disturbs nothing: then the run must go on, over another epoch.
    """
    with hurt.run(trial, "--workers", 2, "--eval-freq", 1) as run:
        run.reach(5)
        frame.wait_until(lambda: run.step() % 6 == 0 or run.process.poll() is not None, "the end of an epoch")
        time.sleep(float(trial.rng.uniform(0, 0.5)))
        _kill_one(trial.rng, run.process.pid)
        goal = run.step() + 2 * hurt.STEPS
        frame.wait_until(lambda: run.process.poll() is not None or run.step() >= goal, "an end or two more epochs", 20)
        if run.process.poll() is not None:
            _check(run, 1)


if __name__ == "__main__":
    frame.main(
        __doc__,
        {
            "killed in training": (in_training, 20, 0),
            "killed with two ranks": (of_one_of_two_ranks, 30, 1),
            "killed as an evaluation begins": (as_evaluations_begin, 20, 0),
        },
    )
