"""avion.folder_lock: one run per folder, held by a process and not by what a process leaves behind."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace

import pytest

from avion.errors import UserError
from avion.folder_lock import LOCK_FILE, Holder, held

HOLD = """
import os, sys, time
from avion.folder_lock import held
with held(sys.argv[1]):
    child = os.fork() if "fork" in sys.argv else 1
    print(os.getpid(), flush=True)
    time.sleep(60 if child else 30)
"""


class Process(subprocess.Popen):
    """A process that holds a folder, and is killed when the block is left."""

    def __init__(self, folder, *words, **environment):
        super().__init__(
            [sys.executable, "-c", HOLD, str(folder), *words],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        assert self.stdout.readline()

    def __exit__(self, *error):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        super().__exit__(*error)


def test_the_second_is_told_who_holds_the_folder(tmp_path):
    with Process(tmp_path, SLURM_JOB_ID="4711") as holder:
        begin = time.monotonic()
        with pytest.raises(UserError) as refused, held(tmp_path, flag="--out", patience_s=0.7):
            raise AssertionError("held twice")
        assert time.monotonic() - begin >= 0.7
    text = str(refused.value)
    assert text.startswith(f"--out {tmp_path}: another run (process {holder.pid} on {socket.gethostname()}, SLURM job ")
    assert "SLURM job 4711, since 20" in text and text.endswith("; wait for it or stop it, or give another --out")


def test_a_killed_process_leaves_no_lock(tmp_path):
    with Process(tmp_path) as holder:
        holder.kill()
        holder.wait()
        assert (tmp_path / LOCK_FILE).exists()  # the file is left behind, the lock is not
        with held(tmp_path, patience_s=0):
            pass


def test_children_of_a_killed_process_do_not_hold_its_folder(tmp_path):
    with Process(tmp_path, "fork") as holder:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        with held(tmp_path, patience_s=0):
            pass


def test_a_run_that_is_ending_is_waited_for(tmp_path, caplog):
    calls = []
    with Process(tmp_path) as holder, caplog.at_level(logging.INFO):
        threading.Timer(1.2, holder.kill).start()
        with held(tmp_path, patience_s=30, meanwhile=lambda: calls.append(1)):
            assert calls
    assert "waiting 30 s for its end" in caplog.text and caplog.text.count("waiting") == 1


def test_the_wait_ends_when_the_run_is_asked_to_stop(tmp_path):
    class Stopped(Exception):
        pass

    def leave():
        raise Stopped

    with Process(tmp_path), pytest.raises(Stopped), held(tmp_path, meanwhile=leave):
        raise AssertionError("held twice")


def test_a_process_does_not_take_its_own_folder_twice_and_keeps_it(tmp_path):
    with held(tmp_path):
        with pytest.raises(UserError, match="this process has a run there already"), held(tmp_path):
            raise AssertionError("held twice")
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                "import sys; from avion.folder_lock import held\nwith held(sys.argv[1], patience_s=0): print('taken')",
                str(tmp_path),
            ],
            capture_output=True,
            text=True,
        )
        assert "UserError" in done.stderr and "taken" not in done.stdout
    with held(tmp_path):
        assert os.listdir(tmp_path) == [LOCK_FILE]
    assert os.listdir(tmp_path) == []


def test_two_never_hold_a_folder_at_once(tmp_path):
    """Six processes take the folder again and again; a file that may only exist once tells when two have it."""
    code = """
import os, sys, time
from avion import folder_lock
folder_lock._POLL_S = 0.001
folder, marker, end = sys.argv[1], sys.argv[2], time.monotonic() + 4
count = 0
while time.monotonic() < end:
    with folder_lock.held(folder, patience_s=60):
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
        time.sleep(0.0005)
        os.unlink(marker)
        count += 1
print(count)
"""
    words = [sys.executable, "-c", code, str(tmp_path / "folder"), str(tmp_path / "marker")]
    processes = [subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(6)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * 6, outputs
    assert all(int(out) > 0 for out, _ in outputs)


def without_locks(monkeypatch):
    def lockf(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", lockf)


def test_without_locks_a_living_process_of_this_machine_is_still_noticed(tmp_path, monkeypatch, caplog):
    without_locks(monkeypatch)
    (tmp_path / LOCK_FILE).write_text("left by something else")
    with Process(tmp_path) as holder:
        with pytest.raises(UserError, match=f"process {holder.pid} on"), held(tmp_path, patience_s=0):
            raise AssertionError("held twice")
        line = (tmp_path / LOCK_FILE).read_bytes()
    (tmp_path / LOCK_FILE).write_bytes(line)  # of a dead process
    with held(tmp_path, patience_s=0):
        assert "its file system knows no locks (No locks available)" in caplog.text


def test_a_process_is_known_by_number_and_start(tmp_path):
    own = Holder.this_process()
    assert own.is_alive() and Holder.read(json.dumps(asdict(own)).encode()) == own
    for other in (replace(own, started=own.started - 1), replace(own, host="elsewhere"), replace(own, pid=2**22 + 1)):
        assert not other.is_alive()


@pytest.mark.parametrize(
    "line", [b"", b"\xff\xfe", b"[1]", b"{}", b'{"host": 1, "pid": "x", "job": "", "since": ""}', b"[" * 5000, b"null"]
)
def test_a_line_that_names_nobody(tmp_path, line):
    assert Holder.read(line) is None


def test_a_name_with_control_characters_forges_no_line():
    line = json.dumps({"host": "a\nb\x1b[2J" + "x" * 500, "pid": 1, "job": "", "since": "now"}).encode()
    text = str(Holder.read(line))
    assert "\n" not in text and "\x1b" not in text and len(text) < 200


@pytest.mark.parametrize("kind", ["file", "link", "folder"])
def test_what_cannot_hold_a_lock_is_one_line(tmp_path, kind):
    target = tmp_path / "folder"
    if kind == "file":
        target.write_text("")
    else:
        target.mkdir()
        if kind == "link":
            (tmp_path / "elsewhere").write_text("of somebody")
            (target / LOCK_FILE).symlink_to(tmp_path / "elsewhere")
        else:
            (target / LOCK_FILE).mkdir()
    with (
        pytest.raises(UserError, match=r"--output-dir .*folder: cannot be written \(.+\); choose another"),
        held(target),
    ):
        raise AssertionError("held")
    assert kind != "link" or (tmp_path / "elsewhere").read_text() == "of somebody"
