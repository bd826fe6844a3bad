"""Processes that end with the process that started them."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
POOL = """
import os, time
from avion.processes import pool
def work(_):
    time.sleep(0.2)
    return os.getpid()
if __name__ == "__main__":
    with pool(2) as processes:
        print(*set(processes.map(work, range(4))), flush=True)
        time.sleep(600)
"""


def is_alive(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


@pytest.mark.parametrize("stopped", [False, True], ids=["waiting", "stopped"])
def test_a_pool_ends_with_the_process_that_was_killed(tmp_path, stopped):
    (tmp_path / "pool.py").write_text(POOL)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "pool.py")], stdout=subprocess.PIPE, text=True, env=environment
    )
    workers = [int(pid) for pid in process.stdout.readline().split()]
    assert workers and all(map(is_alive, workers))
    if stopped:
        os.kill(workers[0], signal.SIGSTOP)
    process.kill()
    process.communicate(timeout=60)  # the pipe is held by the workers too
    deadline = time.monotonic() + 20
    while any(map(is_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_alive, workers))
