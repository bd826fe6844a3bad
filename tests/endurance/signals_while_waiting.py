"""A rank that waits for another one in a collective, in C++: it leaves within 10 s of the second signal. And ranks that
wait for others to start leave at the first signal."""

import os
import signal
import time

from tests.endurance import frame, hurt
from tests.processes import free_port


def second_signal(trial: frame.Trial) -> None:
    """Rank 1 waits for its data, whose workers are stopped; rank 0 waits for rank 1."""
    number = signal.SIGINT if trial.short else signal.Signals(int(trial.rng.choice([signal.SIGTERM, signal.SIGINT])))
    with hurt.run(trial, "--workers", 1, "--batch-size", 2, processes=2) as run:
        run.reach(int(trial.rng.integers(1, 6)))
        waiting, kept = run.ranks()
        for pid in hurt.children(kept):
            os.kill(pid, signal.SIGSTOP)
        time.sleep(2)
        os.kill(waiting, number)
        time.sleep(1 if number == signal.SIGINT else 11)
        assert hurt.alive(waiting), f"rank 0 left after the first signal: {run.said()}"
        os.kill(waiting, number)
        frame.wait_until(lambda: not hurt.alive(waiting), "the end of the rank that waits", 10)
        run.end(20)
        lines = run.said()
        assert len(lines) == 2 and f"{number.name} after {number.name}: left at once" in lines[0], lines
        assert "process 0 of 2" in lines[1], lines


def before_they_met(trial: frame.Trial) -> None:
    number = signal.Signals(int(trial.rng.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])))
    words = ["--world-size", 2, "--rank", 0, "--dist-url", f"tcp://127.0.0.1:{free_port()}"]
    with hurt.run(trial, *words) as run:
        time.sleep(float(trial.rng.uniform(8, 15)))
        run.process.send_signal(number)
        run.end(10)
        assert run.process.returncode == 75, run.process.returncode
        hurt.one_line(run.said(), number.name, "before the processes had met")


if __name__ == "__main__":
    frame.main(
        __doc__,
        {
            "the second signal": (second_signal, 10, 1),
            "a signal before the processes had met": (before_they_met, 10, 0),
        },
    )
