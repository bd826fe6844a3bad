"""What a run goes on from: its own checkpoint before --resume, the previous one where the latest is damaged."""

import logging
import os
import shutil

import pytest
import torch

from avion.engine import trainer as trainer_module
from avion.engine.resume import find_start
from avion.engine.run_files import checkpoints, make_room, previous
from avion.errors import UserError
from avion.weights import Checkpoint
from tests.engine import quick


class PowerCut(Exception):
    pass


@pytest.fixture
def cut(monkeypatch):
    """cut(n): the next runs die before their optimizer step number n; cut(None): they end."""
    original, steps = trainer_module.Trainer.optimizer_step, []

    def step(self, *args):
        if not steps:
            return original(self, *args)
        steps[0] -= 1
        if steps[0] < 0:
            raise PowerCut
        return original(self, *args)

    monkeypatch.setattr(trainer_module.Trainer, "optimizer_step", step)

    def set_steps(number):
        steps[:] = [] if number is None else [number]

    return set_steps


@pytest.fixture
def messages(caplog):
    caplog.set_level(logging.INFO)
    return caplog


def contents(path):
    return Checkpoint.open(path).contents


def damage(path):
    """Put zeros into the middle of a file, where its weights are."""
    size = path.stat().st_size
    with open(path, "rb+") as file:
        file.seek(size // 2)
        file.write(bytes(4096))


@pytest.fixture
def began(tmp_path, cut):
    """A checkpoint to begin from: that of another run, two epochs old."""
    quick.run(tmp_path / "first", "--epochs", "2")
    return tmp_path / "first" / "checkpoint.pt"


def test_the_same_command_with_resume_never_starts_over(began, tmp_path, cut, messages):
    """Three interruptions of a run of 12 optimizer steps, of which 8 were done by the run before."""
    folder, words = tmp_path / "second", ["--resume", str(began), "--epochs", "5"]
    quick.run(tmp_path / "whole", *words)
    steps = []
    for _ in range(3):
        cut(3)
        with pytest.raises(PowerCut):
            quick.run(folder, *words)
        found = contents(folder / "checkpoint.pt")
        steps.append(found["epoch"] * 4 + found["step"])
    cut(None)
    quick.run(folder, *words)
    assert steps == [10, 12, 14]
    a, b = (contents(tmp_path / name / "checkpoint.pt") for name in ("whole", "second"))
    assert all(torch.equal(value, b["state_dict"][name]) for name, value in a["state_dict"].items())
    said = f"{folder / 'checkpoint.pt'} is newer than --resume {began}, from which this run began: going on from it"
    assert messages.text.count(said) == 3
    # Without --resume it is still the same run, and the command of before goes on with it after that, too.
    quick.run(folder, "--epochs", "6")
    quick.run(folder, "--resume", os.path.relpath(began), "--epochs", "7")
    assert contents(folder / "checkpoint.pt")["epoch"] == 7


def test_a_folder_of_another_run_is_left_alone(began, tmp_path):
    folder = tmp_path / "scratch"
    quick.run(folder, "--epochs", "1")
    before = (folder / "checkpoint.pt").read_bytes()
    with pytest.raises(UserError) as refused:
        quick.run(folder, "--resume", str(began), "--epochs", "5")
    text = str(refused.value)
    assert text.startswith(
        f"--resume {began}: {folder / 'checkpoint.pt'} is there already, of a run that began without"
    )
    assert "give another --output-dir" in text and (folder / "checkpoint.pt").read_bytes() == before
    other = tmp_path / "copy.pt"
    shutil.copy(began, other)
    quick.run(tmp_path / "third", "--resume", str(began), "--epochs", "3")
    with pytest.raises(UserError, match=f"of a run that began from {began}"):
        quick.run(tmp_path / "third", "--resume", str(other), "--epochs", "3")


def test_a_run_goes_back_to_its_best_once(tmp_path, cut, messages):
    """--resume D/checkpoint_best.pt --output-dir D, stopped, and the same command again."""
    folder = tmp_path / "run"
    quick.run(folder)
    best = folder / "checkpoint_best.pt"
    words = ["--resume", str(best), "--epochs", "6"]
    epoch = contents(best)["epoch"]
    cut(3)
    with pytest.raises(PowerCut):
        quick.run(folder, *words)
    assert f"going back to {best}" in messages.text
    assert (contents(folder / "checkpoint.pt")["epoch"], contents(folder / "checkpoint.pt")["step"]) == (epoch, 2)
    cut(None)
    quick.run(folder, *words)
    assert messages.text.count("going back to") == 1 and contents(folder / "checkpoint.pt")["epoch"] == 6


@pytest.mark.parametrize("where", ["folder", "named"])
def test_a_damaged_latest_checkpoint_gives_way_to_the_one_before(where, tmp_path, cut, messages):
    folder = tmp_path / "run"
    quick.run(tmp_path / "whole")
    cut(7)
    with pytest.raises(PowerCut):
        quick.run(folder)
    cut(None)
    latest, before = folder / "checkpoint.pt", folder / "checkpoint_previous.pt"
    assert contents(latest)["step"] == 2 and contents(before)["epoch"] == 1 and contents(before)["step"] == 0
    damage(latest)
    quick.run(folder, *(["--resume", str(latest)] if where == "named" else []))
    line = next(r.message for r in messages.records if r.levelname == "WARNING")
    assert f"{latest}: the file is damaged" in line and f"going on from {before}, which is older" in line
    a, b = (contents(tmp_path / name / "checkpoint.pt") for name in ("whole", "run"))
    assert all(torch.equal(value, b["state_dict"][name]) for name, value in a["state_dict"].items())
    assert a["best_acc1"] == b["best_acc1"]
    assert (folder / "checkpoint_damaged.pt").exists()


def test_a_lost_checkpoint_never_costs_a_better_best(tmp_path, messages):
    """Somebody removes the damaged latest checkpoints: the run goes on from the best one, and keeps it."""
    folder = tmp_path / "run"
    quick.run(folder)
    best = contents(folder / "checkpoint_best.pt")
    for path in checkpoints(folder)[:-1]:
        path.unlink()
    quick.run(folder)
    assert f"{folder / 'checkpoint.pt'} is missing: going on from {folder / 'checkpoint_best.pt'}" in messages.text
    assert contents(folder / "checkpoint.pt")["best_acc1"] == best["best_acc1"]
    assert contents(folder / "checkpoint_best.pt")["epoch"] == best["epoch"]


def test_an_older_checkpoint_does_not_replace_a_better_best(tmp_path, monkeypatch):
    """The run goes back to epoch 1, whose best value was lower; its second pass finds worse models than the first."""
    values = iter([0.2, 0.9, 0.1, 0.5, 0.6])
    monkeypatch.setattr(quick.Quick, "evaluate", lambda *_: {"avg_map": next(values)})
    folder = tmp_path / "run"
    quick.run(folder, "--epochs", "1")
    kept = (folder / "checkpoint.pt").read_bytes()
    quick.run(folder, "--epochs", "3")
    best = (folder / "checkpoint_best.pt").read_bytes()
    for path in checkpoints(folder)[:-1]:
        path.unlink()
    (folder / "checkpoint.pt").write_bytes(kept)
    quick.run(folder, "--epochs", "3")
    assert (folder / "checkpoint_best.pt").read_bytes() == best
    assert contents(folder / "checkpoint.pt")["best_acc1"] == 0.9


def test_only_damaged_checkpoints_are_an_error(tmp_path):
    folder = tmp_path / "run"
    quick.run(folder, "--epochs", "1")
    for path in checkpoints(folder):
        damage(path)
    before = {path: path.read_bytes() for path in folder.iterdir() if path.suffix == ".pt"}
    with pytest.raises(UserError, match=r"checkpoint.pt: the file is damaged .* no other checkpoint in .* is whole"):
        quick.run(folder, "--epochs", "2")
    assert before == {path: path.read_bytes() for path in folder.iterdir() if path.suffix == ".pt"}


def test_a_damaged_file_of_resume_is_an_error(began, tmp_path):
    damage(began)
    with pytest.raises(UserError, match="checkpoint.pt: the file is damaged"):
        quick.run(tmp_path / "second", "--resume", str(began))


def test_evaluation_takes_what_it_is_told(began, tmp_path, messages):
    folder = tmp_path / "run"
    quick.run(folder, "--epochs", "1")
    there = quick.run(folder, "--evaluate")
    told = quick.run(folder, "--evaluate", "--resume", str(began))
    assert there != told and f"evaluating --resume {began} and not {folder / 'checkpoint.pt'}" in messages.text
    for path in checkpoints(folder)[:-1]:
        path.unlink()
    assert find_start(quick.options(folder, "--evaluate"))[0].path == str(folder / "checkpoint_best.pt")
    assert "is missing: evaluating" in messages.text
    damage(folder / "checkpoint_best.pt")
    with pytest.raises(UserError, match="checkpoint_best.pt: the file is damaged"):
        quick.run(folder, "--evaluate")


def test_lines_of_an_earlier_run_stand_for_nothing(tmp_path, cut):
    """A new run in a folder whose checkpoints were removed, stopped before the evaluation of its first epoch."""
    folder = tmp_path / "run"
    quick.run(folder, "--seed", "5")
    for path in checkpoints(folder):
        path.unlink()
    whole = quick.run(tmp_path / "whole")
    cut(4)
    evaluate = quick.Quick.evaluate

    def stopped(*_):
        raise PowerCut

    quick.Quick.evaluate = stopped
    try:
        with pytest.raises(PowerCut):
            quick.run(folder)
    finally:
        quick.Quick.evaluate = evaluate
    cut(None)
    assert quick.run(folder) == whole
    old, new = ((tmp_path / name / "eval_log.txt").read_text().splitlines() for name in ("whole", "run"))
    assert new[3:] == old


def test_a_run_of_an_earlier_version_goes_on(tmp_path, cut):
    """Its checkpoint has neither clips nor sums, nor the lengths of logs."""
    quick.run(tmp_path / "whole")
    cut(7)
    folder = tmp_path / "run"
    with pytest.raises(PowerCut):
        quick.run(folder)
    old = dict(contents(folder / "checkpoint.pt"))
    for key in ("clips", "so_far", "logs", "began_from", "data"):
        old.pop(key)
    torch.save(old, tmp_path / "old.pt")  # `old` is mapped from the file that it replaces
    os.replace(tmp_path / "old.pt", folder / "checkpoint.pt")
    cut(None)
    quick.run(folder)
    a, b = (contents(tmp_path / name / "checkpoint.pt") for name in ("whole", "run"))
    assert all(torch.equal(value, b["state_dict"][name]) for name, value in a["state_dict"].items())


class TestFiles:
    def names(self, folder):
        return [path.name for path in checkpoints(folder)]

    def write(self, folder, content, keep):
        new = folder / "new"
        new.write_text(content)
        make_room(folder, keep)
        os.replace(new, folder / "checkpoint.pt")

    @pytest.mark.parametrize("links", [True, False])
    @pytest.mark.parametrize("keep", [1, 2, 4])
    def test_as_many_are_kept_as_asked_for(self, keep, links, tmp_path, monkeypatch):
        def link(*_):
            raise PermissionError(1, "Operation not permitted")

        if not links:
            monkeypatch.setattr(os, "link", link)
        for number in range(7):
            self.write(tmp_path, str(number), keep)
        assert [(path.read_text()) for path in checkpoints(tmp_path)] == [str(6 - k) for k in range(keep)]
        assert len(os.listdir(tmp_path)) == keep
        self.write(tmp_path, "7", 1)
        assert self.names(tmp_path) == ["checkpoint.pt"]

    def test_a_process_that_died_before_the_rename_costs_no_checkpoint(self, tmp_path):
        for number in range(4):
            self.write(tmp_path, str(number), 3)
        make_room(tmp_path, 3)  # and here it died
        self.write(tmp_path, "4", 3)
        assert [path.read_text() for path in checkpoints(tmp_path)] == ["4", "3", "2"]

    def test_names_in_their_order(self, tmp_path, rng):
        names = ["checkpoint.pt", *map(previous, range(1, 13)), "checkpoint_best.pt"]
        for name in rng.permutation(names):
            (tmp_path / str(name)).touch()
        for name in ("checkpoint_previous1.pt", "checkpoint_previous02.pt", "checkpoint_damaged.pt", "x.pt"):
            (tmp_path / name).touch()
        assert self.names(tmp_path) == names
        assert checkpoints(tmp_path / "none") == []
