"""Ctrl-C: the first one writes a checkpoint, as SIGTERM does, the second one leaves at once, and before the first
optimizer step nothing claims that a checkpoint holds anything."""

import os
import signal
import time

from tests.endurance import frame, hurt


def once(trial: frame.Trial) -> None:
    """To the process and to its workers, as a terminal sends it; then the run goes on."""
    with hurt.run(trial, "--workers", 2) as run:
        run.reach(int(trial.rng.integers(1, 20)))
        time.sleep(float(trial.rng.uniform(0, 0.3)))
        os.killpg(run.process.pid, signal.SIGINT)
        run.end(20)
        assert run.process.returncode == 75 and not run.said(), run.said()
        run.holds_a_checkpoint()
        step = run.step()
    with hurt.run(trial, "--workers", 2) as again:
        again.reach(step + 1)


def twice(trial: frame.Trial) -> None:
    """The second one may come when the run is about to leave by itself."""
    with hurt.run(trial, "--workers", 0, "--batch-size", 12) as run:
        run.reach(1)
        run.process.send_signal(signal.SIGINT)
        time.sleep(0.7)
        run.process.send_signal(signal.SIGINT)
        run.end(10)
        # Between the two it may have left by itself; as Python ends, the second one finds no handler any more.
        assert run.process.returncode in (75, 130, -signal.SIGINT), run.process.returncode
        assert "Traceback" not in run.log.read_text(), run.said()
        if run.process.returncode == 130:
            hurt.one_line(run.said(), "SIGINT after SIGINT: left at once")


def before_the_first_step(trial: frame.Trial) -> None:
    with hurt.run(trial, "--workers", 1) as run:
        frame.wait_until(lambda: (run.folder / "train.log").exists() or run.process.poll() is not None, "the log")
        time.sleep(float(trial.rng.uniform(0, 3)))
        run.process.send_signal(signal.SIGINT)
        run.end(30)
        assert run.process.returncode == 75, run.process.returncode
        log = (run.folder / "train.log").read_text()
        assert (run.folder / "checkpoint.pt").exists() == ("which the checkpoint in" in log), log


def with_torchrun(trial: frame.Trial) -> None:
    with hurt.run(trial, "--workers", 1, "--batch-size", 2, processes=2) as run:
        run.reach(int(trial.rng.integers(1, 20)))
        os.killpg(run.process.pid, signal.SIGINT)
        run.end(40)
        assert run.process.returncode == 130 and not run.said(), (run.process.returncode, run.said())
        run.holds_a_checkpoint()


if __name__ == "__main__":
    frame.main(
        __doc__,
        {
            "Ctrl-C": (once, 20, 1),
            "Ctrl-C twice": (twice, 10, 0),
            "Ctrl-C before the first step": (before_the_first_step, 20, 1),
            "Ctrl-C with torchrun": (with_torchrun, 10, 0),
        },
    )
