"""Jobs as real processes: order, how many at a time, what a failure and an interruption leave behind."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from avion.errors import UserError
from avion.reproduce import jobs as module
from avion.reproduce.jobs import Job, JobFailed, run_jobs

ROOT = Path(__file__).resolve().parents[2]
# Appends "+name" and "-name" to a file when it begins and ends.
NOTE = (
    "import sys, time; f = open(sys.argv[1], 'a', buffering=1); f.write('+' + sys.argv[2] + '\\n'); "
    "time.sleep(float(sys.argv[3])); f.write('-' + sys.argv[2] + '\\n')"
)
SLEEP = "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"


@pytest.fixture
def notes(tmp_path):
    return tmp_path / "notes"


def job(tmp_path, notes, name, *after, seconds=0.05, **more) -> Job:
    words = [sys.executable, "-c", NOTE, str(notes), name, str(seconds)]
    return Job(name, words, tmp_path / "logs" / f"{name}.log", tuple(after), **more)


def most_at_once(events: list[str]) -> int:
    running, most = 0, 0
    for event in events:
        running += 1 if event[0] == "+" else -1
        most = max(most, running)
    return most


@pytest.mark.parametrize("slots", [1, 2])
def test_each_after_what_it_needs_and_no_more_than_slots_at_once(tmp_path, notes, slots):
    make = lambda *args, **more: job(tmp_path, notes, *args, **more)  # noqa: E731
    run_jobs([make("c", "a", "b"), make("a", seconds=0.3), make("b"), make("d", "c")], slots=slots)
    events = notes.read_text().split()
    assert sorted(events) == sorted(f"{sign}{name}" for sign in "+-" for name in "abcd")
    for before, after in (("-a", "+c"), ("-b", "+c"), ("-c", "+d")):
        assert events.index(before) < events.index(after)
    assert most_at_once(events) == slots


def test_done_jobs_are_not_run_again_and_what_needs_them_is(tmp_path, notes):
    begun = []
    first = job(tmp_path, notes, "a", done=True, begin=lambda: begun.append("a"))
    run_jobs([first, job(tmp_path, notes, "b", "a", begin=lambda: begun.append("b"))])
    assert notes.read_text().split() == ["+b", "-b"] and begun == ["b"]


def test_the_first_failure_stops_the_rest_and_shows_its_output(tmp_path, notes):
    fails = [sys.executable, "-c", "import sys, time; print('what went wrong'); time.sleep(0.7); sys.exit(3)"]
    sleeper = Job("sleeper", [sys.executable, "-c", SLEEP], tmp_path / "sleeper.log")
    broken = Job("broken", fails, tmp_path / "broken.log")
    start = time.monotonic()
    with pytest.raises(JobFailed, match="(?s)broken ended with status 3.*broken.log.*what went wrong") as error:
        run_jobs([sleeper, broken, job(tmp_path, notes, "later", "broken")])
    assert error.value.status == 3 and time.monotonic() - start < 30
    assert not notes.exists()
    assert gone(child_of(tmp_path / "sleeper.log"))


STUBBORN = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(os.getpid(), flush=True)
pathlib.Path(sys.argv[1]).touch()
time.sleep(60)
"""
FAIL_WHEN_THERE = """
import pathlib, sys, time
while not pathlib.Path(sys.argv[1]).exists():
    time.sleep(0.05)
sys.exit(1)
"""


def test_a_job_that_will_not_end_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "GRACE_S", 0.3)
    ready = str(tmp_path / "ready")
    stubborn = Job("stubborn", [sys.executable, "-c", STUBBORN, ready], tmp_path / "stubborn.log")
    fails = Job("fails", [sys.executable, "-c", FAIL_WHEN_THERE, ready], tmp_path / "fails.log")
    with pytest.raises(JobFailed, match="^fails ended"):
        run_jobs([stubborn, fails])
    assert gone(child_of(stubborn.log))


def test_killed_by_a_signal(tmp_path):
    with pytest.raises(JobFailed) as error:
        run_jobs([Job("a", [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], tmp_path / "a.log")])
    assert error.value.status == 137


def test_environment_and_a_command_that_does_not_exist(tmp_path):
    show = [sys.executable, "-c", "import os; print(os.environ['COLOUR'])"]
    run_jobs([Job("a", show, tmp_path / "a.log")], environment={"COLOUR": "green"})
    assert (tmp_path / "a.log").read_text().endswith("green\n")
    with pytest.raises(UserError, match=r"^b: cannot be started \(.*nowhere: No such file or directory\)$"):
        run_jobs([Job("b", [str(tmp_path / "nowhere")], tmp_path / "b.log")])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption_stops_all(tmp_path, number):
    """As tools/tables_demo.py takes both signals."""
    script = (
        "import signal, sys\n"
        "from pathlib import Path\n"
        "from avion.reproduce.jobs import Job, run_jobs\n"
        "from avion.commands.tables_demo import _interrupt\n"
        "signal.signal(signal.SIGTERM, _interrupt)\n"
        f"words = [sys.executable, '-c', {SLEEP!r}]\n"
        "try:\n"
        f"    run_jobs([Job(n, words, Path({str(tmp_path)!r}) / f'{{n}}.log') for n in 'ab'])\n"
        "except KeyboardInterrupt:\n"
        "    sys.exit(130)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", script], env=environment, stderr=subprocess.PIPE) as runner:
        logs = [tmp_path / "a.log", tmp_path / "b.log"]
        children = [child_of(log) for log in logs]
        runner.send_signal(number)
        error = runner.communicate(timeout=60)[1].decode()
    assert runner.returncode == 130 and "Traceback" not in error
    assert all(gone(child) for child in children)


def child_of(log: Path, limit: float = 60) -> int:
    """The number that a job's process printed, as soon as it is there."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        if log.exists() and (found := re.search(r"^(\d+)$", log.read_text(), re.MULTILINE)):
            return int(found[1])
        time.sleep(0.05)
    raise AssertionError(f"{log} says nothing")


def gone(pid: int, limit: float = 10) -> bool:
    """Whether a process is, or soon will be, no more than a zombie."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False
