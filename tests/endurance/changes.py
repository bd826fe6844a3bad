"""Another batch size or another number of processes within an epoch: every clip once, and means of the whole epoch."""

import math

from tests.endurance import frame
from tests.engine import quick
from tests.engine.kill_points import rows
from tests.processes import run_processes

CLIPS = 48


def stages(trial: frame.Trial) -> list[tuple[int, int, int]]:
    """(processes, batch size, optimizer steps) of runs that follow each other and fill an epoch of 48 clips."""
    found, left = [], CLIPS
    while left:
        size, batch = int(trial.rng.integers(1, 4)), int(trial.rng.integers(1, 7))
        most = left // (size * batch) - 1  # one more whole batch is left, so that the run has to be stopped
        if len(found) == 2 or most < 1:  # the last one takes the rest
            size, batch = 1, next(b for b in (6, 5, 4, 3, 2, 1) if left % b == 0)
            steps = left // batch
        else:
            steps = int(trial.rng.integers(1, most + 1))
        found.append((size, batch, steps))
        left -= size * batch * steps
    return found


def every_clip_once(trial: frame.Trial) -> None:
    """Real processes with gloo, each stopped after its steps, until the epoch is full."""
    folder, plan, clips, losses = trial.folder / "run", stages(trial), [], []
    for number, (size, batch, steps) in enumerate(plan):
        last = number == len(plan) - 1
        path = trial.folder / f"seen{number}"
        words = [
            "--epochs",
            "1",
            "--batch-size",
            str(batch),
            "--allow-changes",
            "batch-size",
            "--save-steps",
            "0",
            "--fix-lr",
            "--print-freq",
            "1",
        ]
        environment = {"CLIPS": str(CLIPS), "SEEN": str(path), "STOP_AFTER": "0" if last else str(steps)}
        said = run_processes(quick.run_as_rank, size, trial.folder / f"p{number}", str(folder), words, environment)
        stopped = [text.startswith("Stopped") for text in said]
        assert all(stopped) if not last else said == [""] * size, f"{plan}: {said}"
        for rank in range(size):
            clips += path.with_name(f"{path.name}.{rank}").read_text().split()
    assert sorted(map(int, clips)) == list(range(CLIPS)), f"{plan}: {sorted(map(int, clips))}"
    (row,) = rows(folder / "log.txt")
    losses = [line["grad_norm"] for line in rows(folder / "steps.txt")]
    assert len(losses) == sum(steps for *_, steps in plan), f"{plan}: {len(losses)} steps"
    assert math.isclose(row["train_grad_norm"], sum(losses) / len(losses), rel_tol=1e-9), f"{plan}: {row}, {losses}"


if __name__ == "__main__":
    frame.main(__doc__, {"other batches within an epoch": (every_clip_once, 40, 1)})
