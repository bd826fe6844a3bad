"""Runs whose --output-dir is in an object store: what is there after an end of any kind, and who may write there."""

import contextlib
import io
import json
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("s3fs")
pytest.importorskip("moto.server")

import main_egoschema
import main_zeroshot
from avion import remote
from avion.commands import plot_run
from avion.engine import mirror
from avion.engine.distributed import World
from avion.engine.mirror import WRITER, in_working_folder, readable, working_folder
from avion.engine.remote_lock import RemoteLock, abandoned_s
from avion.engine.resume import Start
from avion.errors import UserError
from avion.remote import Remote
from tests.engine import quick, remote_run
from tests.engine.egoschema.case import write_egoschema
from tests.engine.zeroshot.case import write_benchmarks
from tests.object_store import door_to, empty_bucket, running_store
from tests.processes import run_processes

ADDRESS = "s3://runs/x/id6"


@pytest.fixture(scope="module")
def store():
    with running_store() as place:
        yield place


@pytest.fixture
def door(store, tmp_path, monkeypatch):
    for name in ("POLL_S", "LOGS_S", "AGAIN_S"):
        monkeypatch.setattr(mirror, name, getattr(mirror, name))
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(remote, "ANSWER_S", 0.5)
    monkeypatch.setattr("avion.engine.remote_lock.SETTLE_S", 0.05)
    monkeypatch.setenv("AVION_LOCK_S", "1")
    with door_to(store, tmp_path / "cache", monkeypatch) as door:
        yield door


@pytest.fixture
def bucket(door):
    return empty_bucket("runs")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of a run of the same flags that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    quick.run(folder)
    return folder


def machine(tmp_path, name):
    """The environment of a machine with a disk of its own."""
    return {"AVION_WORK": str(tmp_path / name), "AVION_CACHE": str(tmp_path / name)}


def client():
    """The environment of this test's client: the fork server may have an earlier test's."""
    return {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "AVION_", "NO_PROXY"))}


def run(tmp_path, name, *words, size=1, **environment):
    """A run to its end on a machine; what was raised, by rank."""
    there = {**client(), **machine(tmp_path, name), **environment}
    return run_processes(remote_run.run_as_rank, size, tmp_path / f"{name}-ranks", ADDRESS, list(words), there)


def content(bucket, name):
    bucket.invalidate_cache()
    return bucket.cat_file(f"runs/x/id6/{name}")


def names(bucket):
    bucket.invalidate_cache()
    return sorted(path.removeprefix("runs/x/id6/") for path in bucket.find("runs/x/id6"))


def epochs(text):
    return [json.loads(line)["epoch"] for line in text.splitlines()]


def is_as(bucket, undisturbed):
    """The remote folder holds the weights and the logs of a run that nothing disturbed."""
    for name in ("checkpoint.pt", "checkpoint_best.pt"):
        here = torch.load(undisturbed / name, weights_only=False)
        there = torch.load(io.BytesIO(content(bucket, name)), weights_only=False)
        assert (here["epoch"], here["step"], here["best_acc1"]) == (there["epoch"], there["step"], there["best_acc1"])
        for key, value in here["state_dict"].items():
            assert torch.equal(value, there["state_dict"][key]), (name, key)
    for name in ("log.txt", "eval_log.txt"):
        assert epochs(content(bucket, name)) == epochs((undisturbed / name).read_bytes())
    rows = [json.loads(line) for line in content(bucket, "log.txt").splitlines()]
    due = [json.loads(line) for line in (undisturbed / "log.txt").read_text().splitlines()]
    assert [row["train_loss"] for row in rows] == [row["train_loss"] for row in due]
    assert "run.lock" not in names(bucket)


class TestRuns:
    def test_two_processes_and_on_another_machine(self, bucket, door, tmp_path):
        assert run(tmp_path, "one", size=2) == ["", ""]
        assert {"checkpoint.pt", "checkpoint_previous.pt", "log.txt", "eval_log.txt", "steps.txt", "train.log"} <= set(
            names(bucket)
        )
        assert "run.lock" not in names(bucket)
        saved = torch.load(io.BytesIO(content(bucket, "checkpoint.pt")), weights_only=False)
        assert vars(saved["args"])["output_dir"] == ADDRESS
        before = content(bucket, "log.txt")
        assert run(tmp_path, "two", "--epochs", "4", size=2) == ["", ""]
        assert epochs(content(bucket, "log.txt")) == [0, 1, 2, 3]
        assert content(bucket, "log.txt").startswith(before)
        drawn = plot_run.read_run(ADDRESS, "id6")
        assert [row["epoch"] for row in drawn.epochs] == [0, 1, 2, 3] and drawn.steps
        secret = os.environ["AWS_SECRET_ACCESS_KEY"].encode()
        assert not any(secret in content(bucket, name) for name in names(bucket))

    def test_it_is_the_run_of_a_local_folder(self, bucket, undisturbed, tmp_path):
        assert run(tmp_path, "one") == [""]
        is_as(bucket, undisturbed)
        assert run(tmp_path, "two") == [""]  # nothing is left to train
        is_as(bucket, undisturbed)

    def test_a_signal_and_then_another_machine(self, bucket, undisturbed, tmp_path):
        (told,) = run(tmp_path, "one", STOP_AFTER="3")
        assert told.startswith("Stopped: SIGTERM")
        assert run(tmp_path, "two", STOP_AFTER="0") == [""]
        is_as(bucket, undisturbed)
        assert "going on from" in content(bucket, "train.log").decode()

    @pytest.mark.parametrize("share", [0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95])
    def test_killed_between_two_uploads(self, share, bucket, door, undisturbed, tmp_path):
        """After the same share of all writes that a run makes; then another machine goes on."""
        writes = []

        def count(method, path):
            if method in ("PUT", "DELETE") and "run.lock" not in path:
                writes.append(path)
                if len(writes) == kill_at:
                    os.kill(process.pid, signal.SIGKILL)

        kill_at = max(1, int(share * 20))  # a run whose uploads are slow makes fewer, and may end before
        door.after = count
        process = remote_run.start(ADDRESS, [], machine(tmp_path, "one"), tmp_path / "answer")
        process.join(120)
        assert process.exitcode == (-signal.SIGKILL if len(writes) >= kill_at else 0)
        door.after = lambda *a: None
        assert run(tmp_path, "two") == [""]
        is_as(bucket, undisturbed)

    def test_killed_when_only_its_logs_had_come(self, bucket, door, undisturbed, tmp_path):
        """The first checkpoint waits for its turn behind the logs of the first epoch."""

        def hold(method, path):
            if method == "PUT" and path.endswith("/steps.txt"):
                os.kill(process.pid, signal.SIGKILL)

        bucket.pipe_file("runs/x/id6/eval_log.txt", b'{"epoch": 7, "avg_map": 0.5}\n')  # of an evaluation before
        door.after = hold
        process = remote_run.start(ADDRESS, [], machine(tmp_path, "one"), tmp_path / "answer")
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
        assert not bucket.exists("runs/x/id6/checkpoint.pt")
        door.after = lambda *a: None
        bucket.pipe_file("runs/x/id6/log.txt", b'{"epoch": 0, "global_step": 3}\n')  # as slow uploads leave it
        assert run(tmp_path, "two") == [""]
        assert epochs(content(bucket, "log.txt")) == [0, 1, 2]
        assert epochs(content(bucket, "eval_log.txt")) == [7, *epochs((undisturbed / "eval_log.txt").read_bytes())]

    def test_killed_and_on_the_same_machine(self, bucket, door, undisturbed, tmp_path):
        writes = []

        def count(method, path):
            if method == "PUT" and "checkpoint" in path:
                writes.append(path)
                if len(writes) == 2:
                    os.kill(process.pid, signal.SIGKILL)

        door.before = count
        process = remote_run.start(ADDRESS, [], machine(tmp_path, "one"), tmp_path / "answer")
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
        door.before = lambda *a: None
        assert run(tmp_path, "one") == [""]
        is_as(bucket, undisturbed)


class TestBadPlaces:
    def test_a_server_that_is_busy_again_and_again(self, bucket, door, undisturbed, tmp_path):
        def refuse(method, path):
            if len(door.seen) % 7 == 0:
                door.refusals = 2

        door.before = refuse
        assert run(tmp_path, "one") == [""]
        is_as(bucket, undisturbed)

    def test_a_server_that_stops_answering(self, bucket, door, undisturbed, tmp_path):
        """Training goes on; what could not be uploaded is told, is not lost, and follows with the next run here."""

        def silence(method, path):
            if method == "PUT" and path.endswith("log.txt"):
                door.silent = True

        door.after = silence
        (told,) = run(tmp_path, "one")
        assert "could not be uploaded (the server does not answer" in told and "same command on this machine" in told
        door.after = lambda *a: None
        door.silent = False
        with open(next((tmp_path / "one").rglob("log.txt"))) as file:
            assert epochs(file.read()) == [0, 1, 2]
        assert run(tmp_path, "one") == [""]
        is_as(bucket, undisturbed)

    @pytest.mark.parametrize("code", ["AccessDenied", "InvalidAccessKeyId"])
    def test_no_permission(self, code, bucket, door, tmp_path):
        door.refusals, door.status, door.code = 10_000, 403, code
        (told,) = run(tmp_path, "one")
        assert told.startswith(f"UserError: --output-dir {ADDRESS}: access is denied") and "\n" not in told

    def test_no_bucket(self, door, tmp_path, monkeypatch):
        there = {**client(), **machine(tmp_path, "one")}
        (told,) = run_processes(
            remote_run.run_as_rank, 1, tmp_path / "ranks", "s3://no-bucket-of-this-name/x", [], there
        )
        assert told.startswith("UserError: --output-dir s3://no-bucket-of-this-name/x: ") and "ucket" in told


class TestWhoWrites:
    def foreign(self, beat=0, host="elsewhere"):
        line = {"host": host, "pid": 7, "job": "12", "since": "today", "started": 5, "token": "t", "beat": beat}
        return json.dumps(line).encode()

    def lock(self):
        return RemoteLock(Remote(ADDRESS), f"{ADDRESS}/run.lock", ADDRESS)

    def test_a_run_that_lives_keeps_others_out(self, bucket, door, tmp_path):
        bucket.pipe_file("runs/x/id6/run.lock", self.foreign())
        ending = threading.Event()

        def live():
            for beat in range(1, 1000):
                if ending.wait(0.2):
                    return
                bucket.pipe_file("runs/x/id6/run.lock", self.foreign(beat))

        thread = threading.Thread(target=live)
        thread.start()
        try:
            with pytest.raises(UserError, match=r"another run \(process 7 on elsewhere, SLURM job 12, since today\)"):
                self.lock().__enter__()
        finally:
            ending.set()
            thread.join()

    def test_a_run_that_is_dead_is_followed(self, bucket, door):
        bucket.pipe_file("runs/x/id6/run.lock", self.foreign())
        began = time.monotonic()
        with self.lock():
            assert time.monotonic() - began >= abandoned_s()
            assert b"elsewhere" not in content(bucket, "run.lock")
        assert "run.lock" not in names(bucket)

    def test_two_that_begin_together(self, bucket, door, monkeypatch):
        monkeypatch.setattr("avion.engine.remote_lock.SETTLE_S", 0.5)
        outcomes = []

        def begin():
            lock = self.lock()
            try:
                with lock:
                    time.sleep(0.7)
                    outcomes.append("held")
            except UserError as error:
                outcomes.append(str(error))

        threads = [threading.Thread(target=begin) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert outcomes.count("held") == 1 and sum("writes there" in told for told in outcomes) == 2

    def test_a_run_that_was_taken_over_writes_no_more(self, bucket, door, tmp_path):
        writing = threading.Lock()

        def write() -> None:
            """Write the other's lock. The request passes the door too."""
            if writing.acquire(blocking=False):
                with contextlib.suppress(Exception):
                    bucket.pipe_file("runs/x/id6/run.lock", self.foreign())
                writing.release()

        def take(method, path):
            if method == "PUT" and path.endswith("checkpoint.pt"):
                write()
                door.seen.clear()
                door.after = keep

        def keep(method, path):
            """As a run does: a write of the run that it has taken over from may come just after its own."""
            if method == "PUT" and path.endswith("run.lock"):
                write()

        door.after = take
        (told,) = run(tmp_path, "one", "--epochs", "200", "--warmup-epochs", "1")
        door.after = lambda *a: None
        assert (
            "another run (process 7 on elsewhere" in told and "taken it over" in told and told.startswith("UserError")
        )
        later = [path for method, path in door.seen if method == "PUT" and "run.lock" not in path]
        assert len(later) <= 2, later  # what was under way
        assert content(bucket, "run.lock") == self.foreign()

    def test_files_that_were_never_uploaded_are_kept(self, bucket, door, tmp_path, monkeypatch):
        for name, value in machine(tmp_path, "one").items():
            monkeypatch.setenv(name, value)
        folder = working_folder(ADDRESS)
        with mirror.kept(ADDRESS, folder):
            (folder / "log.txt").write_text('{"epoch": 0}\n')
        (folder / "checkpoint.pt").write_bytes(b"mine")
        bucket.pipe_file(f"runs/x/id6/{WRITER}", b'{"id": "another"}')
        bucket.pipe_file("runs/x/id6/log.txt", b'{"epoch": 7}\n')
        with mirror.kept(ADDRESS, folder):
            assert (folder / "log.txt").read_text() == '{"epoch": 7}\n' and not (folder / "checkpoint.pt").exists()
        (aside,) = [path for path in folder.parent.iterdir() if path != folder]
        assert (aside / "checkpoint.pt").read_bytes() == b"mine"

    @pytest.mark.parametrize("text", ["soon", "0", "nan"])
    def test_a_patience_that_is_no_number(self, text, monkeypatch):
        monkeypatch.setenv("AVION_LOCK_S", text)
        with pytest.raises(UserError, match="AVION_LOCK_S .*: a number of seconds from 1 to 86400 is required"):
            abandoned_s()


def test_other_places(tmp_path, undisturbed, monkeypatch):
    """A file system that is mounted elsewhere, by fsspec's name for it."""
    address, logs = f"file://{tmp_path}/far/run", tmp_path / "far/run/log.txt"
    for name, stop in (("one", "5"), ("two", "0")):
        there = {**machine(tmp_path, name), "STOP_AFTER": stop}
        (told,) = run_processes(remote_run.run_as_rank, 1, tmp_path / f"{name}-r", address, [], there)
        assert told.startswith("Stopped") if name == "one" else told == ""
    assert epochs(logs.read_text()) == [0, 1, 2]
    here, there = (torch.load(f / "checkpoint.pt", weights_only=False) for f in (undisturbed, logs.parent))
    assert all(torch.equal(value, there["state_dict"][key]) for key, value in here["state_dict"].items())
    assert not list(logs.parent.glob("*.partial")) and not (logs.parent / "run.lock").exists()


@pytest.mark.parametrize("task", ["egoschema", "zeroshot"])
def test_evaluations(task, bucket, door, tmp_path, monkeypatch, capsys):
    """Their files are there too; another machine finds what was computed and does not do it again."""
    if task == "egoschema":
        main, words, result = main_egoschema.main, write_egoschema(tmp_path / "d").flags, "egoschema_scores.json"
    else:
        main, result = main_zeroshot.main, "egomcq.json"
        words = [*write_benchmarks(tmp_path / "d").flags, "--dataset", "egomcq"]
    for name in ("one", "two"):
        for variable, value in machine(tmp_path, name).items():
            monkeypatch.setenv(variable, value)
        assert main([*words, "--output-dir", ADDRESS]) == 0
        told = capsys.readouterr().err
        assert (", 0 of" in told) == (name == "one"), told
    assert result in names(bucket) and len(content(bucket, "eval_log.txt").splitlines()) == 2
    assert json.loads(content(bucket, result))


def test_the_checkpoint_for_processes_of_other_machines(monkeypatch, tmp_path):
    monkeypatch.setenv("AVION_WORK", str(tmp_path))
    options = in_working_folder(quick.options(ADDRESS))
    start = Start(str(Path(options.output_dir) / "checkpoint.pt"), own=True)
    here = World()
    assert readable(start, options, here) == start
    elsewhere = SimpleNamespace(broadcast=lambda value: "another machine")
    assert readable(start, options, elsewhere).path == f"{ADDRESS}/checkpoint.pt"
    other = Start("/shared/checkpoint.pt")
    assert readable(other, options, elsewhere) == other
    local = quick.options(tmp_path / "local")
    assert in_working_folder(local) is local


def test_a_checkpoint_of_the_folder_may_be_named(monkeypatch, tmp_path):
    monkeypatch.setenv("AVION_WORK", str(tmp_path))
    options = in_working_folder(quick.options(ADDRESS, "--resume", f"{ADDRESS}/checkpoint_best.pt"))
    assert options.resume == str(working_folder(ADDRESS) / "checkpoint_best.pt")
    assert options.output_dir == str(working_folder(ADDRESS)) and options.values()["output_dir"] == ADDRESS
