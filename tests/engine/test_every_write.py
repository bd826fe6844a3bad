"""A run may die at any point of its writing: what it goes on to leave is what an undisturbed run leaves."""

from pathlib import Path

import pytest

from tests.engine import kill_points

TRIES = 14


@pytest.fixture
def folder(tmp_path):
    """A folder in memory, where there is one: hundreds of checkpoints are brought to the disk."""
    import shutil
    import tempfile

    place = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else tmp_path))
    yield place
    shutil.rmtree(place)


def test_a_run_dies_at_any_write_and_goes_on(folder, rng):
    """Points spread over the whole run, others each time; `tests.endurance.best` takes all of them."""
    assert not kill_points.run(folder / "whole", writes=1)
    count = kill_points.points_of(folder / "whole")
    assert count > 150
    for at in (rng.integers(count // TRIES) + range(0, count, count // TRIES))[:TRIES]:
        place = folder / f"killed at {at}"
        assert kill_points.run(place, at=int(at), writes=1)
        kill_points.check_after_kill(place)
        kill_points.run(place)
        kill_points.check_after_the_end(place, folder / "whole")


def test_the_checks_see_what_is_wrong(folder):
    """A best value that was stored before its model, and a line that is there twice."""
    for name in ("whole", "other"):
        kill_points.run(folder / name)
    kill_points.check_after_the_end(folder / "other", folder / "whole")
    log = folder / "other" / "eval_log.txt"
    text = log.read_text()
    log.write_text(text + text.splitlines(keepends=True)[-1])
    with pytest.raises(AssertionError):
        kill_points.check_after_the_end(folder / "other", folder / "whole")
    log.write_text(text)
    (folder / "other" / "checkpoint_best.pt").unlink()
    with pytest.raises(AssertionError):
        kill_points.check_after_kill(folder / "other")
