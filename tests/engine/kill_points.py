"""A run that dies at a chosen point: before, within or after each write, append, fsync, rename, link or deletion."""

import builtins
import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path

from avion.files import PARTIAL
from avion.json_lines import read_json_lines
from tests.processes import PRELOADED

KILLED = 9


class Points:
    """Counts the points at which a process can die, and ends the process at number `at`."""

    def __init__(self, at: int, writes: int):
        self.at, self.count, self.writes = at, 0, writes

    def pass_one(self, half=lambda: None) -> None:
        """One more point. `half`: does half of what comes next, before the process dies here."""
        if self.count == self.at:
            half()
            os._exit(KILLED)
        self.count += 1

    def around(self, function):
        """A function with a point before and a point after it."""

        def call(*args, **keywords):
            self.pass_one()
            result = function(*args, **keywords)
            self.pass_one()
            return result

        return call


def _watch(points: Points, folder: Path) -> None:
    """Put the points around the primitives, as far as they concern files in `folder`."""
    from avion import files

    for name in ("fsync", "replace", "rename", "link", "unlink", "truncate"):
        setattr(os, name, points.around(getattr(os, name)))
    write = files._WatchedFile.write

    def watched(self, data, /):
        self.written = getattr(self, "written", 0) + 1
        if self.written > points.writes:
            return write(self, data)
        points.pass_one(lambda: write(self, memoryview(data).cast("B")[: memoryview(data).nbytes // 2]))
        written = write(self, data)
        points.pass_one()
        return written

    files._WatchedFile.write = watched

    class Appended:
        """A file whose writes are points."""

        def __init__(self, file):
            self.file = file

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def fileno(self):
            return self.file.fileno()

        def write(self, data):
            points.pass_one(lambda: (self.file.write(data[: len(data) // 2]), self.file.flush()))
            written = self.file.write(data)
            self.file.flush()
            points.pass_one()
            return written

    def opened(path, mode="r", *args, **keywords):
        file = builtins.open(path, mode, *args, **keywords)  # noqa: SIM115
        return Appended(file) if mode.startswith("a") else file

    files.open = opened  # type: ignore[attr-defined]


def _child(folder: str, words: list[str], at: int | None, writes: int, log: str) -> None:
    import torch

    from tests.engine import quick

    torch.set_num_threads(1)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    points = Points(-1 if at is None else at, writes)
    _watch(points, Path(folder))
    quick.run(Path(folder), *words)
    Path(log + ".points").write_text(str(points.count))
    os._exit(0)


def run(folder: Path, words: Sequence[str] = (), *, at: int | None = None, writes: int = 1 << 30) -> bool:
    """Run the quick training in a process of its own that dies at point number `at`. Whether it died there.

    writes: how many writes to a partial file are points; a checkpoint is written in about fifty.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED, "tests.engine.quick"])
    log = folder.with_suffix(".out")
    process = context.Process(target=_child, args=(str(folder), list(words), at, writes, str(log)))
    process.start()
    process.join(120)
    if process.exitcode is None:
        process.kill()
    assert process.exitcode in (0, KILLED), f"status {process.exitcode}: {log.read_text()[-3000:]}"
    return process.exitcode == KILLED


def points_of(folder: Path) -> int:
    """How many points the last run in `folder` passed, which did not die."""
    return int(folder.with_suffix(".out.points").read_text())


def rows(path: Path) -> list[dict]:
    """The lines of a log, each of them whole."""
    found = read_json_lines(path)
    assert not found.damaged, f"{path.name}: damaged lines {found.damaged}"
    return found.objects


def check_after_kill(folder: Path) -> None:
    """What must hold at any moment: every checkpoint is whole, and no best value without its model."""
    from avion.engine.run_files import BEST, LATEST, checkpoints
    from avion.weights import Checkpoint

    states = {path.name: Checkpoint.open(path).training for path in checkpoints(folder)}
    latest = states.get(LATEST)
    if latest is None:
        assert not states, f"no {LATEST} beside {sorted(states)}"
    elif latest.best > float("-inf"):
        assert BEST in states and states[BEST].best >= latest.best


def check_after_the_end(folder: Path, whole: Path) -> None:
    """A run that died and went on has left what the run in `whole` left, which nothing disturbed."""
    from avion.weights import Checkpoint

    for name in ("checkpoint.pt", "checkpoint_best.pt"):
        one, other = (Checkpoint.open(place / name) for place in (folder, whole))
        assert one.weights.keys() == other.weights.keys()
        assert all(bool((one.weights[key] == other.weights[key]).all()) for key in one.weights), f"{name}: weights"
        for key in ("epoch", "step", "clips", "best_acc1"):
            assert one.contents[key] == other.contents[key], f"{name}: {key}"
    assert rows(folder / "eval_log.txt") == rows(whole / "eval_log.txt")
    logs = [[_stable(row) for row in rows(place / "log.txt")] for place in (folder, whole)]
    assert logs[0] == logs[1], logs
    rows(folder / "steps.txt")
    left = [name for name in os.listdir(folder) if name.endswith(PARTIAL) or name == "run.lock"]
    assert not left, left


def _stable(row: dict) -> dict:
    """A line of log.txt without what depends on the machine."""
    return {k: v for k, v in row.items() if k not in ("train_clips_per_s", "train_wait", "train_memory_gb")}
