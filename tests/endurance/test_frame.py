"""The frame counts what held, tells what did not, and repeats the draws of a seed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.endurance import __main__ as everything
from tests.endurance import frame

SCRIPT = """
from tests.endurance import frame

def draws(trial):
    assert not list(trial.folder.iterdir()) and trial.folder.is_dir()
    (trial.folder / "left behind").touch()
    print("drawn", trial.number, int(trial.rng.integers(1 << 30)))

def breaks(trial):
    assert trial.number != 1, "the second one broke"

def elsewhere(trial):
    raise frame.Skipped("there is no such disk")

frame.main("A script.", {"draws": (draws, 5, 2), "breaks": (breaks, 4, 1), "elsewhere": (elsewhere, 3, 3)})
"""


def run(*words):
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, *words], capture_output=True, text=True, timeout=120, cwd=frame.ROOT
    )


def test_tries_and_held_are_counted():
    done = run("--seed", "7")
    assert done.returncode == 1, done.stderr
    assert "draws: 5 tries, 5 held" in done.stdout and "breaks: 4 tries, 3 held" in done.stdout
    assert "breaks: try 1 did not hold" in done.stdout and "the second one broke" in done.stdout
    assert "elsewhere: skipped, there is no such disk" in done.stdout


def test_the_short_form_repeats_the_draws_of_its_seed():
    first, second, other = (run("--short", "--only", "draws", "--seed", seed) for seed in ("7", "7", "8"))
    drawn = [[line for line in done.stdout.splitlines() if "drawn" in line] for done in (first, second, other)]
    assert first.returncode == 0 and len(drawn[0]) == 2 and drawn[0] == drawn[1] != drawn[2]


def test_every_script_is_found_and_says_what_it_does():
    names = everything.scripts()
    assert names == sorted(names)
    for name in names:
        source = (Path(frame.__file__).parent / f"{name}.py").read_text(encoding="utf-8")
        assert source.startswith('"""') and '__name__ == "__main__"' in source, name


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_every_script_runs_and_one_that_does_not_hold_is_told(jobs, tmp_path, monkeypatch, capfd):
    """With two at a time, each says all that it has to say in one piece."""
    package = tmp_path / "tests" / "endurance"
    package.mkdir(parents=True)
    (package / "__init__.py").touch(), (package.parent / "__init__.py").touch()  # before the package of this file
    for name, status in (("first", 0), ("lock", 3), ("second", 0)):
        write = f"print('{name} begins', flush=True); time.sleep(0.1); print('{name} ends', *sys.argv[1:])"
        (package / f"{name}.py").write_text(f"import sys, time\n{write}\nsys.exit({status})\n")
    monkeypatch.setattr(everything, "FOLDER", package)
    monkeypatch.setattr(everything, "scripts", lambda: ["first", "lock", "second"])
    assert everything.main(["--short", "--seed", "7", "--jobs", jobs]) == 1
    said = capfd.readouterr().out
    for name in ("first", "lock", "second"):
        assert f"== {name}\n{name} begins\n{name} ends --short --seed 7\n" in said
    assert said.endswith("did not hold: lock\n")
    assert everything.main(["first", "second", "--jobs", jobs]) == 0
    assert capfd.readouterr().out.endswith("everything held\n")


def test_a_refused_program_is_one_line():
    done = frame.run(frame.command(["--batchsize", "3"]))
    assert "unknown flag --batchsize: did you mean --batch-size" in frame.error_line(done)
    with pytest.raises(AssertionError, match="status 0"):
        frame.error_line(frame.run(frame.command(["--help"])))


def test_a_started_program_does_not_outlive_its_block(tmp_path):
    with frame.started(
        [sys.executable, "-c", "import time; print(1, flush=True); time.sleep(60)"], tmp_path / "log"
    ) as job:
        frame.wait_until(lambda: (tmp_path / "log").read_bytes() == b"1\n", "the first line")
    assert job.returncode == -9
    with pytest.raises(ProcessLookupError):
        os.kill(job.pid, 0)


def test_waiting_ends():
    with pytest.raises(AssertionError, match="the moon: not within 0.1 s"):
        frame.wait_until(lambda: False, "the moon", timeout=0.1)
