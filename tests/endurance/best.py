"""A run that dies before, within or after a write, append, fsync, rename, link or deletion, and goes on.

Every such point of a run of three epochs is tried once in the long form. checkpoint_best.pt, best_acc1, eval_log.txt
and log.txt end as those of a run that nothing disturbed.
"""

import functools
import tempfile
from pathlib import Path

from tests.endurance import frame
from tests.engine import kill_points


@functools.cache
def whole() -> Path:
    """The folder of an undisturbed run; it goes with this process."""
    _KEPT.append(tempfile.TemporaryDirectory(prefix="endurance-whole-", dir=frame.memory()))
    folder = Path(_KEPT[0].name) / "run"
    assert not kill_points.run(folder)
    return folder


_KEPT: list[tempfile.TemporaryDirectory] = []


def one_point(trial: frame.Trial) -> None:
    """The long form takes the points one after the other, the short form some of them."""
    count = kill_points.points_of(whole())
    at = int(trial.rng.integers(count)) if trial.short else trial.number % count
    folder = trial.folder / "run"
    assert kill_points.run(folder, at=at), f"there is no point {at}"
    again = int(trial.rng.integers(count)) if trial.number % 3 == 0 else None
    try:
        kill_points.check_after_kill(folder)
        if again is not None:  # dies a second time while it goes on
            kill_points.run(folder, at=again)
            kill_points.check_after_kill(folder)
        kill_points.run(folder)
        kill_points.check_after_the_end(folder, whole())
    except AssertionError as e:
        raise AssertionError(f"point {at} of {count}, then {again}: {e}") from e


if __name__ == "__main__":
    frame.main(__doc__, {"killed at a write": (one_point, 750, 6)})
