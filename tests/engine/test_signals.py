"""SIGTERM and SIGUSR1 at all times of a run: it leaves with status 75, and the same command ends as if nothing was."""

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import main_egoschema
import main_pretrain
from avion.engine import encode, signals
from avion.engine import trainer as trainer_module
from avion.engine.egoschema import evaluate
from avion.engine.tasks.pretrain import Pretrain
from tests.engine.egoschema.case import UIDS, read_outputs, write_egoschema
from tests.processes import run_processes

ROOT = Path(__file__).resolve().parents[2]
ALL = (signal.SIGTERM, signal.SIGUSR1)
DROPPING = ["--drop-path-rate", "0.3", "--patch-dropout", "0.5"]


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def in_processes(function, size, folder, *args):
    """`run_processes`, but one process is this one."""
    return [function(0, 1, *args)] if size == 1 else run_processes(function, size, folder / "log", *args)


@contextlib.contextmanager
def signalled(module, name, calls, how):
    """A function is replaced: after so many calls of it `how()` happens, once. Not where `how` is None."""
    original, done = getattr(module, name), []

    def replacement(*args, **kwargs):
        result = original(*args, **kwargs)
        done.append(1)
        if len(done) == calls and how is not None:
            how()
        return result

    setattr(module, name, replacement)
    try:
        yield
    finally:
        setattr(module, name, original)


def to_me(number):
    return lambda: os.kill(os.getpid(), number)


def _pretrain(rank, size, words, victims=(), how="step"):
    """Status, and how many data-loading processes there were."""
    workers, before = [], [signal.getsignal(number) for number in ALL]

    def signal_step():  # what scancel and the time limit do: every process of the step gets it
        workers.extend(multiprocessing.active_children())
        pids = " ".join(str(process.pid) for process in workers)
        # From a process that is not the workers' parent.
        subprocess.run(["sh", "-c", f"kill -TERM {pids}; kill -USR1 {pids}"], check=True)
        time.sleep(0.5)
        assert all(process.is_alive() for process in workers)
        to_me(signal.SIGUSR1)()
        to_me(signal.SIGUSR1)()  # srun forwards it once more

    action = {"step": to_me(signal.SIGTERM), "all": signal_step}[how] if rank in victims else None
    with signalled(trainer_module.Trainer, "optimizer_step", 4, action):
        status = main_pretrain.main(words)
    assert [signal.getsignal(number) for number in ALL] == before
    return status, len(workers)


def assert_same_run(a, b):
    one, two = (torch.load(folder / "checkpoint.pt", weights_only=False) for folder in (a, b))
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(value, two["state_dict"][name], rtol=0, atol=0)
    assert one["best_acc1"] == two["best_acc1"] and one["epoch"] == two["epoch"] == 2
    assert lines(a / "eval_log.txt") == lines(b / "eval_log.txt")
    assert [row["epoch"] for row in lines(b / "log.txt")] == [0, 1]


@pytest.mark.parametrize(
    "size, victims, how, workers", [(1, (0,), "all", "2"), (2, (1,), "step", "0"), (2, (0, 1), "all", "1")],
    ids=["one process and its workers", "one of two", "both and their workers"],
)  # fmt: skip
def test_a_signal_in_training_loses_nothing(size, victims, how, workers, tiny_flags, tmp_path):
    words = [*tiny_flags, *DROPPING, "--batch-size", str(4 // size), "--dist-timeout", "1"]

    def pretrain(folder, *more, workers="0"):
        flags = [*words, "--output-dir", str(folder), "--workers", workers]
        return in_processes(_pretrain, size, tmp_path, flags, *more)

    assert {status for status, _ in pretrain(tmp_path / "whole")} == {0}
    results = pretrain(tmp_path / "cut", victims, how, workers=workers)
    assert {status for status, _ in results} == {75}
    assert {count for _, count in results} == {int(workers)}
    checkpoint = torch.load(tmp_path / "cut/checkpoint.pt", weights_only=False)
    assert (checkpoint["epoch"], checkpoint["step"]) == (0, 4)
    word = "SIGUSR1" if how == "all" else "SIGTERM"
    log = (tmp_path / "cut/train.log").read_text()
    assert log.count("status 75") == 1 and f"{word} at epoch 0, step 4 of 6" in log
    assert {status for status, _ in pretrain(tmp_path / "cut")} == {0}
    assert "epoch 0, step 4" in (tmp_path / "cut/train.log").read_text().split("status 75")[1]
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def _stopped_evaluation(rank, size, words):
    with signalled(encode, "read", 1, to_me(signal.SIGTERM) if rank == size - 1 else None):
        return main_pretrain.main(words)


@pytest.mark.parametrize("size", [1, 2])
def test_an_evaluation_that_was_stopped_is_made_up_for(size, tiny_flags, tmp_path):
    words = [*tiny_flags, "--batch-size", str(4 // size), "--eval-batch-size", "2", "--dist-timeout", "1"]
    for name in ("whole", "cut"):
        output = [*words, "--output-dir", str(tmp_path / name)]
        if name == "cut":
            assert in_processes(_stopped_evaluation, size, tmp_path, output) == [75] * size
            assert not (tmp_path / "cut/log.txt").exists() and not (tmp_path / "cut/eval_log.txt").exists()
        results = in_processes(_pretrain, size, tmp_path, output)
        assert {status for status, _ in results} == {0}
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    assert "SIGTERM while clips were encoded; leaving with status 75" in (tmp_path / "cut/train.log").read_text()
    whole, cut = (lines(tmp_path / name / "log.txt") for name in ("whole", "cut"))
    assert whole[0]["train_loss"] == cut[0]["train_loss"]


def test_a_signal_before_the_first_step_writes_nothing(tiny_flags, tmp_path):
    words = [*tiny_flags, "--output-dir", str(tmp_path)]
    with signalled(Pretrain, "__init__", 1, to_me(signal.SIGUSR1)):
        assert main_pretrain.main(words) == 75
    assert {p.name for p in tmp_path.iterdir()} == {"train.log"}
    assert "SIGUSR1 before the model was built" in (tmp_path / "train.log").read_text()


def test_a_signal_in_the_last_evaluation_of_a_run_without_further_epochs(tiny_flags, tmp_path):
    """The run has nothing left to train when it comes back, but its evaluation is still due, once."""
    words = [*tiny_flags, "--epochs", "1", "--output-dir", str(tmp_path)]
    with signalled(encode, "read", 1, to_me(signal.SIGTERM)):
        assert main_pretrain.main(words) == 75
    assert main_pretrain.main(words) == 0 and main_pretrain.main(words) == 0
    assert [row["epoch"] for row in lines(tmp_path / "log.txt")] == [0]
    assert len(lines(tmp_path / "eval_log.txt")) == 1
    assert (tmp_path / "checkpoint_best.pt").exists()
    assert "nothing left to train" in (tmp_path / "train.log").read_text()


def _stopped_questions(rank, size, words):
    with signalled(evaluate._Run, "_answer_one", 2, to_me(signal.SIGTERM) if rank == size - 1 else None):
        return main_egoschema.main(words)


@pytest.mark.parametrize("size", [1, 2])
def test_egoschema_keeps_the_answers_so_far(size, tmp_path):
    data = write_egoschema(tmp_path / "data")
    words = [*data.flags, "--frames", "4", "--dist-timeout", "1"]
    output = ["--output-dir", str(tmp_path / "cut")]
    assert in_processes(_stopped_questions, size, tmp_path, [*words, *output]) == [75] * size
    before = [row["q_uid"] for path in (tmp_path / "cut").glob("*.jsonl") for row in lines(path)]
    assert sorted(before) == sorted(UIDS[: 2 * size]) and not list((tmp_path / "cut").glob("egoschema_4.*"))
    assert main_egoschema.main([*words, *output]) == 0
    rows = [row["q_uid"] for path in (tmp_path / "cut").glob("*.jsonl") for row in lines(path)]
    assert sorted(rows) == sorted(UIDS)  # none was computed twice
    assert main_egoschema.main([*words, "--output-dir", str(tmp_path / "whole")]) == 0
    assert read_outputs(tmp_path / "cut", (4,)) == read_outputs(tmp_path / "whole", (4,))


SECOND = """
import os, signal, sys, time
from avion.engine import signals
signals.ECHO_S = float(sys.argv[1])
with signals.heeded():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.05)
    sys.exit(signals.asked())
"""


@pytest.mark.parametrize("echo, status", [(0.0, 128 + signal.SIGTERM), (10.0, signal.SIGTERM)])
def test_a_second_signal_ends_at_once_and_an_echo_does_not(echo, status):
    done = subprocess.run([sys.executable, "-c", SECOND, str(echo)], cwd=ROOT, timeout=60)
    assert done.returncode == status


STUCK = """
import ctypes, os, signal, subprocess, sys
from avion.engine import signals
signals.ECHO_S = 0.3
libc, lock = ctypes.CDLL(None), ctypes.create_string_buffer(256)
libc.pthread_mutex_init(lock, None)
libc.pthread_mutex_lock(lock)
with signals.heeded():
    kill = f"kill -{sys.argv[1]} {os.getpid()}"
    subprocess.Popen(["sh", "-c", f"sleep 0.5; {kill}; sleep 1; {kill}"], stdout=subprocess.DEVNULL)
    if sys.argv[2] == "at once":
        with signals.leaving_at_once("before it began"):
            libc.pthread_mutex_lock(lock)
    libc.pthread_mutex_lock(lock)  # Python's handlers do not run until it returns, which it does not
"""


@pytest.mark.parametrize("number", ["TERM", "USR1", "INT"])
def test_the_second_signal_ends_a_process_that_waits_in_c(number):
    """As a collective waits for another process."""
    done = subprocess.run(
        [sys.executable, "-c", STUCK, number, ""], cwd=ROOT, timeout=60, stderr=subprocess.PIPE, text=True
    )
    assert done.returncode == 128 + signal.Signals[f"SIG{number}"]
    assert done.stderr.strip().endswith(f": SIG{number} after SIG{number}: left at once")
    assert done.stderr.count("\n") == 1


def test_the_first_signal_ends_a_process_that_has_nothing_to_write():
    done = subprocess.run(
        [sys.executable, "-c", STUCK, "TERM", "at once"], cwd=ROOT, timeout=60, stderr=subprocess.PIPE, text=True
    )
    assert done.returncode == 75 and "SIGTERM before it began; leaving with status 75" in done.stderr


def test_ctrl_c_writes_a_checkpoint_and_nothing_claims_one_before_the_first_step(tiny_flags, tmp_path):
    words = [*tiny_flags, "--output-dir", str(tmp_path)]
    with signalled(trainer_module, "batches_of", 1, to_me(signal.SIGINT)):
        assert main_pretrain.main(words) == 75
    log = (tmp_path / "train.log").read_text()
    assert "SIGINT at epoch 0, step 0 of 6, before the first optimizer step: there was nothing to save; leaving" in log
    assert "holds" not in log and not (tmp_path / "checkpoint.pt").exists()
    with signalled(trainer_module.Trainer, "optimizer_step", 4, to_me(signal.SIGINT)):
        assert main_pretrain.main(words) == 75
    assert "SIGINT at epoch 0, step 4 of 6, which the checkpoint" in (tmp_path / "train.log").read_text()
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=False)
    assert (checkpoint["epoch"], checkpoint["step"]) == (0, 4)


def test_a_sigint_that_is_ignored_stays_ignored():
    code = "import os, signal; from avion.engine import signals\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    code += "with signals.heeded(): os.kill(os.getpid(), signal.SIGINT); print(signals.asked())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "0")


def test_in_a_thread_nothing_is_heeded_and_nothing_fails():
    before, found = [signal.getsignal(number) for number in ALL], []

    def body():
        with signals.heeded():
            found.append([signal.getsignal(number) for number in ALL])

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert found == [before]


def test_handlers_come_back_after_an_error():
    before = [signal.getsignal(number) for number in ALL]
    with pytest.raises(KeyError), signals.heeded():
        to_me(signal.SIGUSR1)()
        assert signals.asked() == signal.SIGUSR1
        raise KeyError
    assert [signal.getsignal(number) for number in ALL] == before and signals.asked() == 0


def _worker():
    signals.obey_parent_only(0)
    time.sleep(60)


def test_a_worker_ends_when_its_parent_says_so():
    """`terminate`, by which a DataLoader ends workers that hang, still works."""
    with signals.held():
        worker = multiprocessing.get_context("fork").Process(target=_worker, daemon=True)
        worker.start()
    killed_by_another = subprocess.run([sys.executable, "-c", f"import os; os.kill({worker.pid}, 15)"])
    assert killed_by_another.returncode == 0
    worker.join(0.5)
    assert worker.is_alive()
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0
