"""`--resume X --output-dir D`, killed again and again, and the same command each time: it never starts over."""

import signal
import time

from avion.weights import Checkpoint
from tests.endurance import frame


def steps_done(folder) -> int:
    """The optimizer steps that the checkpoint in a folder holds; 6 make an epoch."""
    state = Checkpoint.open(folder / "checkpoint.pt").training
    return 6 * state.epoch + state.step


def _written(folder) -> int:
    """When the checkpoint in a folder was written, in nanoseconds; 0: there is none."""
    try:
        return (folder / "checkpoint.pt").stat().st_mtime_ns
    except OSError:
        return 0


def requeue_loop(trial: frame.Trial) -> None:
    """A run that begins from another one's checkpoint is killed, or asked to stop, and started with the same words."""
    begun, folder = trial.folder / "begun", trial.folder / "run"
    words = [*frame.tiny_flags(), "--save-steps", "1", "--eval-freq", "400"]
    done = frame.run(frame.command([*words, "--epochs", "1", "--output-dir", begun]))
    assert done.returncode == 0, done.stderr
    command = frame.command([*words, "--epochs", "400", "--resume", begun / "checkpoint.pt", "--output-dir", folder])
    before = 0
    for number in range(2 if trial.short else 5):
        log, written = trial.folder / f"{number}.log", _written(folder)
        with frame.started(command, log) as run:
            # The progress line of a step comes before its checkpoint.
            frame.wait_until(lambda log=log: "clips/s" in log.read_text(), "a progress line")
            frame.wait_until(lambda before=written: _written(folder) > before, "a checkpoint of this run")
            time.sleep(trial.rng.uniform(0, 0.5))
            run.send_signal(signal.SIGKILL if number % 2 == 0 else signal.SIGTERM)
            run.wait(60)
        assert ("is newer than --resume" in log.read_text()) == (number > 0), log.read_text()
        after = steps_done(folder)
        assert after > max(before, 6), f"{before} steps before, {after} now"
        before = after


if __name__ == "__main__":
    frame.main(__doc__, {"the same command with --resume": (requeue_loop, 4, 1)})
