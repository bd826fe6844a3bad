"""Workers that die, are stopped or are stuck: one line, soon, and the process ends. Each case is a process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import main_egoschema
import main_pretrain
from avion.commands import extract_features
from avion.engine import loader
from tests.engine.egoschema.case import write_egoschema

ROOT = Path(__file__).parents[2]
CODE = """
import faulthandler, os, signal, sys, threading, time
import torch
from torch.utils.data import Dataset
from avion.engine import signals
from avion.engine.loader import batches_of, build_loader, read
from avion.errors import UserError

class Clips(Dataset):
    '''Clip 7 is read from a pipe into which nobody writes.'''
    def __len__(self):
        return 8
    def __getitem__(self, i):
        if i == 7:
            open(sys.argv[1]).read()
        return {"index": i, "video": torch.zeros(3, 4, 32, 32, dtype=torch.uint8), "text": "x" * 3000}

def after(seconds, function):
    timer = threading.Timer(seconds, function)
    timer.daemon = True
    timer.start()

def loader(keys, workers=2, timeout=3.0):
    return build_loader(Clips(), [[k % 8] for k in keys], workers=workers, device=torch.device("cpu"), timeout=timeout)

def pids():
    return [int(p) for p in open(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read().split()]

def told(batches, count):
    start = time.monotonic()
    try:
        for _ in range(count):
            read(batches)
        print("read", count)
    except (UserError, signals.Stopped) as e:
        print(f"{type(e).__name__} after {time.monotonic() - start:.1f} s: {e}")

faulthandler.dump_traceback_later(100, exit=True)
with signals.heeded():
    BODY
print("end", flush=True)
"""


def run(body, tmp_path, timeout=60):
    """(what the process printed, its status, seconds that it took to end after the line "end")"""
    os.mkfifo(tmp_path / "fifo")
    code = CODE.replace("BODY", "\n    ".join(body.strip().splitlines()))
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "fifo")],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    lines = []
    for line in process.stdout:
        lines.append(line.strip())
        if line == "end\n":
            break
    begin = time.monotonic()
    _, errors = process.communicate(timeout=timeout)  # until its workers have ended too
    assert "Traceback" not in errors and "most recent call first" not in errors, errors
    return lines, errors, process.returncode, time.monotonic() - begin


def test_sound_workers_read_everything_twice(tmp_path):
    body = "l = loader(list(range(7)) * 9)\ntold(batches_of(l), 63)\ntold(batches_of(l), 63)"
    lines, errors, status, seconds = run(body, tmp_path)
    assert lines == ["read 63", "read 63", "end"] and (errors, status) == ("", 0) and seconds < 10


STARTED = "b = batches_of(loader(list(range(7)) * 9)); [read(b) for _ in range(4)]\n"
STOP = "[os.kill(p, signal.SIGSTOP) for p in pids()]\n"
STUCK = {
    "stopped": STARTED + STOP,
    "reading from a pipe": "b = batches_of(loader([0, 7, 7, 7, 7, 7]))\n",
    # Nothing kills a process in the kernel: here nothing kills these.
    "in the kernel": (
        f"{STARTED}{STOP}import multiprocessing.popen_fork as f\nf.Popen._send_signal = lambda self, number: None\n"
    ),
}


def test_signals_that_arrive_just_as_a_wait_is_over(tmp_path):
    """The main thread waits in slices of a time; a signal at the end of a slice must not make it wait for ever."""
    body = """
import random
from avion.engine import workers
workers._LOOK_EVERY_S = 0.002
signal.signal(signal.SIGALRM, lambda number, frame: None)
b = batches_of(loader(list(range(7)) * 9, timeout=12))
[read(b) for _ in range(4)]
[os.kill(p, signal.SIGSTOP) for p in pids()]
def ring():
    while True:
        time.sleep(0.002 + random.uniform(-2e-5, 1.2e-4))
        os.kill(os.getpid(), signal.SIGALRM)
threading.Thread(target=ring, daemon=True).start()
told(b, 60)
"""
    lines, errors, status, _ = run(body, tmp_path)
    assert lines[0].startswith("UserError after ") and lines[1] == "end", (lines, errors)
    assert 11 < float(lines[0].split()[2]) < 60  # slices that last longer than they should count for less


@pytest.mark.parametrize("how", STUCK)
def test_stuck_workers_are_told_and_not_waited_for(tmp_path, how):
    lines, errors, status, seconds = run(STUCK[how] + "told(b, 60)", tmp_path)
    found, end = lines
    assert found.startswith("UserError") and "sent nothing for 3 s (--data-timeout)" in found and errors == ""
    assert 2.0 < float(found.split()[2]) < 13 and status == 0 and seconds < 10 and end == "end"


@pytest.mark.parametrize(("how", "number"), [*zip(STUCK, ["SIGTERM", "SIGINT", "SIGUSR1"], strict=True)])
def test_a_signal_is_heeded_while_workers_are_stuck(tmp_path, how, number):
    body = STUCK[how].replace("loader(", "loader(timeout=600, keys=")
    body += f"after(0.5, lambda: os.kill(os.getpid(), signal.{number}))\ntold(b, 60)"
    lines, errors, status, seconds = run(body, tmp_path)
    assert (
        lines
        and lines[0].startswith("Stopped")
        and lines[0].endswith(f"{number} while data were read")
        and errors == ""
    )
    assert float(lines[0].split()[2]) < 10 and status == 0 and seconds < 10


@pytest.mark.parametrize(
    "when", ["read(b); os.kill(pids()[0], signal.SIGKILL)", "told(b, 63); os.kill(pids()[1], signal.SIGKILL); b = b2"],
    ids=["within an epoch", "between two epochs"],
)  # fmt: skip
def test_a_killed_worker_is_one_line(tmp_path, when):
    body = f"l = loader(list(range(7)) * 9, timeout=600)\nb, b2 = batches_of(l), batches_of(l)\n{when}\ntold(b, 63)"
    lines, errors, status, seconds = run(body, tmp_path)
    assert lines[-2].startswith("UserError") and "was ended by SIGKILL (Killed); lower --workers" in lines[-2], lines
    assert float(lines[-2].split()[2]) < 10 and (errors, status) == ("", 0) and seconds < 10


def test_a_worker_that_dies_while_nobody_reads_interrupts_nothing(tmp_path):
    body = """
b = batches_of(loader(list(range(7)) * 9)); [read(b) for _ in range(4)]
os.kill(pids()[0], signal.SIGKILL)
time.sleep(1)
print("undisturbed")
told(b, 62)"""
    lines, errors, _, _ = run(body, tmp_path)
    assert lines[0] == "undisturbed" and "SIGKILL" in lines[1] and errors == ""


def test_a_parent_that_leaves_while_memory_is_handed_over_is_no_traceback_of_a_worker(tmp_path):
    body = """
import multiprocessing
from multiprocessing import connection, resource_sharer
def leave(ident):
    connection.Client(ident[0], authkey=multiprocessing.current_process().authkey).close()
    raise ConnectionResetError("left")
resource_sharer._ResourceSharer.get_connection = staticmethod(leave)
told(batches_of(loader(list(range(7)) * 9)), 60)"""
    lines, errors, status, _ = run(body, tmp_path)
    assert "a batch could not be received (ConnectionResetError: left)" in lines[0] and (errors, status) == ("", 0)


@pytest.mark.parametrize("number", [None, "SIGTERM"])
def test_without_workers_the_process_ends(tmp_path, number):
    """Its only thread that could say so waits in the file system."""
    signal_it = f"after(0.5, lambda: os.kill(os.getpid(), signal.{number}))" if number else ""
    lines, errors, status, _ = run(f"{signal_it}\ntold(batches_of(loader([0, 7], workers=0)), 2)", tmp_path)
    assert lines == [] and status == (75 if number else 2)
    assert "reading a batch took longer than --data-timeout, 3 s" in errors and errors.count("\n") == 1


def test_workers_end_with_their_process(tmp_path):
    body = """
b = batches_of(loader(list(range(7)) * 9)); [read(b) for _ in range(4)]
os.kill(pids()[0], signal.SIGSTOP)
print(*pids(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)"""
    lines, _, status, _ = run(body, tmp_path)
    assert status == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in lines[0].split()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in lines[0].split() if Path(f"/proc/{pid}").exists()]


@pytest.mark.parametrize("program", ["training", "evaluation", "EgoSchema", "features"])
def test_in_every_program_a_killed_worker_is_one_line(program, tiny_flags, tmp_path, monkeypatch, capsys):
    def killed(self, key):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(loader._ErrorsAsSamples, "__getitem__", killed)  # the workers are forks of this process
    output = ["--output-dir", str(tmp_path / "run"), "--workers", "1"]
    if program in ("training", "evaluation"):
        status = main_pretrain.main([*tiny_flags, *output, *(["--evaluate"] if program == "evaluation" else [])])
    else:
        case = write_egoschema(tmp_path)
        if program == "EgoSchema":
            status = main_egoschema.main([*case.flags, "--frames", "4", *output])
        else:
            (tmp_path / "list.txt").write_text("\n".join(path.name for path in (tmp_path / "videos").iterdir()))
            words = ["--checkpoint", case.checkpoint, "--videos", tmp_path / "list.txt", "--root", tmp_path / "videos"]
            status = extract_features.main([*map(str, words), *output, "--device", "cpu"])
    lines = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
    assert status == 2 and len(lines) == 1
    assert "a data-loading process (pid " in lines[0] and "was ended by SIGKILL" in lines[0]
