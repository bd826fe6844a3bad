"""TensorBoard's and wandb's own files, read back and held against log.txt; resumed and failing runs."""

import json
import sys
import types
from pathlib import Path

import pytest
import torch

import main_pretrain
from avion.commands import plot_run
from avion.engine import sinks
from avion.engine import trainer as trainer_module
from avion.engine.args import parse
from avion.engine.options import PretrainOptions
from avion.engine.run import train_or_evaluate
from avion.engine.steps import Contrastive
from avion.engine.tasks.pretrain import Pretrain
from avion.errors import UserError
from tests.engine.wandb_file import read_wandb
from tests.processes import run_processes

BOTH = ["--tensorboard", "--wandb", "--wandb-mode", "offline"]
NOT_SENT = {"epoch", "step", "global_step", "alpha"}


@pytest.fixture(autouse=True)
def quiet_wandb(monkeypatch):
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def train(flags, output, *more):
    words = [*flags, "--output-dir", str(output), *more]
    return train_or_evaluate(Pretrain, parse(PretrainOptions, words, "main_pretrain.py", ""))


def read_tensorboard(folder):
    """{tag: {step: value}}, as TensorBoard shows it; a step that is there twice fails."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    found = {}
    for tag in events.Tags()["scalars"]:
        points = [(e.step, e.value) for e in events.Scalars(tag)]
        found[tag] = dict(points)
        assert len(found[tag]) == len(points), f"{tag}: a step is there twice"
    return found


def by_tag(history):
    tags = {}
    for step, values in history.items():
        for tag, value in values.items():
            tags.setdefault(tag, {})[step] = value
    return tags


def expected_scalars(output):
    """{tag: {step: value}} from steps.txt and log.txt; of a step that is there twice the later line counts."""
    found = {}
    for row in lines(output / "steps.txt"):
        named = {f"train/{k}": v for k, v in row.items() if k not in NOT_SENT}
        named |= {f"alpha/{i:02d}": v for i, v in enumerate(row["alpha"])}
        for tag, value in named.items():
            found.setdefault(tag, {})[row["global_step"]] = value
    for row in lines(output / "log.txt"):
        for name, value in row.items():
            kind, _, key = name.partition("_")
            if kind in ("train", "test") and key != "alpha":
                found.setdefault({"train": "epoch/", "test": "test/"}[kind] + key, {})[row["global_step"]] = value
    return found


def assert_same_scalars(found, expected, rel):
    assert found.keys() == expected.keys()
    for tag, points in expected.items():
        assert found[tag] == pytest.approx(points, rel=rel), tag


def test_all_sinks_hold_what_the_log_holds(tiny_flags, tmp_path):
    train(tiny_flags, tmp_path, *BOTH, "--model-args", *tiny_flags_model(tiny_flags), "time_gate_init=0.3")
    expected = expected_scalars(tmp_path)
    wanted = "loss lr grad_norm clips_per_s wait memory_gb skipped_steps".split()
    assert {f"{kind}/{name}" for kind in ("train", "epoch") for name in wanted} <= expected.keys()
    assert {"alpha/00", "alpha/01", "epoch/replaced_clips", "test/avg_map", "test/txt_ndcg"} <= expected.keys()
    assert list(expected["train/loss"]) == [2, 4, 6, 8, 10, 12] and list(expected["test/avg_map"]) == [6, 12]
    assert_same_scalars(read_tensorboard(tmp_path / "tensorboard"), expected, rel=1e-6)  # it stores float32

    (file,) = tmp_path.glob("wandb/offline-*/*.wandb")
    found = read_wandb(file)
    assert_same_scalars(by_tag(found.history), expected, rel=1e-12)
    assert (found.project, found.name, found.exit_code) == ("avion-timemamba", tmp_path.name, 0)
    assert found.config["model"] == "TIMEMAMBA_VITT16" and found.config["lr"] == 1e-3


def tiny_flags_model(flags):
    start = flags.index("--model-args") + 1
    return flags[start : next(i for i in range(start, len(flags)) if flags[i].startswith("--"))]


def test_the_gates_in_the_logs_are_those_of_the_checkpoint(tiny_flags, tmp_path):
    train(tiny_flags, tmp_path)
    weights = torch.load(tmp_path / "checkpoint.pt", weights_only=False)["state_dict"]
    gates = [weights[f"visual.blocks.{i}.alpha_timeattn"].item() for i in range(2)]
    assert 0 not in gates
    assert lines(tmp_path / "log.txt")[-1]["train_alpha"] == gates
    assert lines(tmp_path / "steps.txt")[-1]["alpha"] == gates
    assert len({tuple(row["alpha"]) for row in lines(tmp_path / "steps.txt")}) == 6

    drawn = plot_run.read_run(tmp_path, "name")
    assert (drawn.blocks, len(drawn.steps), len(drawn.epochs)) == (2, 6, 2) and "avg_map" in drawn.evaluated()
    assert plot_run.main([str(tmp_path), "--output", str(tmp_path / "curves.png")]) == 0


def test_a_model_without_gates_logs_none(tiny_flags, tmp_path):
    train([*tiny_flags, "--model", "CLIP_VITB16", "--epochs", "1"], tmp_path)
    assert not [k for row in lines(tmp_path / "log.txt") + lines(tmp_path / "steps.txt") for k in row if "alpha" in k]


class Interrupted(Exception):
    pass


def interrupt_after(monkeypatch, steps, error=Interrupted):
    original, done = trainer_module.Trainer.optimizer_step, []

    def step(self, *args):
        if len(done) == steps:
            raise error
        done.append(1)
        return original(self, *args)

    monkeypatch.setattr(trainer_module.Trainer, "optimizer_step", step)


def test_a_resumed_run_goes_on_at_its_step_in_every_sink(tiny_flags, tmp_path, monkeypatch):
    """The last checkpoint is of step 8 of 12; the run breaks off after step 9 and does that one again."""
    words = [*tiny_flags, *BOTH, "--print-freq", "1", "--save-steps", "2"]
    with monkeypatch.context() as patch:
        interrupt_after(patch, 9)
        with pytest.raises(Interrupted):
            train(words, tmp_path)
    (first,) = tmp_path.glob("wandb/offline-*/*.wandb")
    with open(tmp_path / "steps.txt", "a") as file:
        file.write('{"epoch": 1, "st')  # as a process that was killed leaves it
    train(words, tmp_path)

    rows = lines(tmp_path / "steps.txt")
    assert [row["global_step"] for row in rows] == [*range(1, 10), *range(9, 13)]
    expected = expected_scalars(tmp_path)
    found = read_tensorboard(tmp_path / "tensorboard")
    assert list(found["train/loss"]) == list(range(1, 13))
    assert_same_scalars(found, expected, rel=1e-6)

    (second,) = set(tmp_path.glob("wandb/offline-*/*.wandb")) - {first}
    first, second = read_wandb(first), read_wandb(second)
    assert first.id == second.id == (tmp_path / "wandb_id.txt").read_text()
    assert (first.exit_code, second.exit_code) == (1, 0)
    assert list(first.history) == list(range(1, 10)) and list(second.history) == list(range(9, 13))


def test_a_run_that_begins_again_is_another_run_of_wandb(tiny_flags, tmp_path):
    words = [*tiny_flags, "--wandb", "--wandb-mode", "offline", "--epochs", "1", "--wandb-name", "mine"]
    train(words, tmp_path)
    for path in tmp_path.glob("checkpoint*.pt"):
        path.unlink()
    train(words, tmp_path)
    runs = [read_wandb(path) for path in tmp_path.glob("wandb/offline-*/*.wandb")]
    assert len({r.id for r in runs}) == 2 and {r.name for r in runs} == {"mine"}


def test_steps_that_wandb_has_already_are_not_sent_again(tiny_flags, tmp_path, monkeypatch):
    """As in a run resumed online, whose server says how far it is."""
    sent = []
    fake = types.SimpleNamespace(
        __file__="wandb.py",
        Settings=lambda **settings: settings,
        init=lambda **given: types.SimpleNamespace(
            step=5, log=lambda scalars, step: sent.append(step), finish=lambda exit_code: None
        ),
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    train([*tiny_flags, "--wandb", "--epochs", "1", "--print-freq", "1"], tmp_path)
    assert sent == [5, 6, 6]  # the last step, and the epoch's figures at it


# --- what goes wrong -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
@pytest.mark.parametrize("found", [None, types.ModuleType("a_folder")], ids=["missing", "a folder of that name"])
def test_a_missing_package_is_one_line_before_the_data_is_read(name, found, tmp_path, monkeypatch, capsys):
    if found is not None:
        found.__file__ = None
    monkeypatch.setitem(sys.modules, name, found)
    words = [f"--{name}", "--root", "no/such/folder", "--output-dir", str(tmp_path), "--device", "cpu"]
    assert main_pretrain.main(words) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"main_pretrain.py: error: --{name}: ") and error.endswith(f"pip install {name}")


@pytest.mark.parametrize(
    "words, message",
    [
        (["--wandb-project", "mine"], "--wandb-project: has no effect without --wandb"),
        (["--tensorboard", "--evaluate"], "--tensorboard: follows a training"),
        (["--wandb", "--wandb-mode", "offline", "--evaluate"], "--wandb: follows a training"),
    ],
)
def test_a_flag_without_effect_is_refused(words, message, tmp_path, capsys):
    assert main_pretrain.main([*words, "--output-dir", str(tmp_path), "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err


def test_wandb_without_a_login_is_one_line(tiny_flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert main_pretrain.main([*tiny_flags, "--wandb", "--output-dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "--wandb: the run could not be started (" in error and "--wandb-mode offline" in error


class Fragile:
    """A sink of the test's: breaks at the second row, and when it is closed."""

    flag = "--tensorboard"
    log = []

    def __init__(self, options, flags, done):
        self.log.append(("opened", done))

    def write(self, step, scalars):
        self.log.append(("write", step))
        if len(self.log) > 2:
            raise ConnectionError("no route to host\nand more")

    def close(self, failed):
        self.log.append(("closed", failed))
        raise OSError("cannot flush")


@pytest.fixture
def fragile(monkeypatch):
    monkeypatch.setattr(Fragile, "log", [])
    monkeypatch.setitem(sinks.SINKS, "tensorboard", Fragile)
    return Fragile


def test_a_sink_that_fails_is_given_up_and_the_run_goes_on(fragile, tiny_flags, tmp_path):
    train([*tiny_flags, "--tensorboard"], tmp_path)
    assert fragile.log == [("opened", 0), ("write", 2), ("write", 4)]
    assert len(lines(tmp_path / "steps.txt")) == 6 and len(lines(tmp_path / "log.txt")) == 2
    log = (tmp_path / "train.log").read_text()
    assert log.count("--tensorboard failed (no route to host) and gets no more metrics; the run goes on") == 1


@pytest.mark.parametrize("error", [Interrupted, KeyboardInterrupt, SystemExit])
def test_sinks_are_closed_when_a_run_ends_by_an_error(error, fragile, tiny_flags, tmp_path, monkeypatch):
    interrupt_after(monkeypatch, 3, error)
    with pytest.raises(error):
        train([*tiny_flags, "--tensorboard"], tmp_path)
    assert fragile.log == [("opened", 0), ("write", 2), ("closed", True)]
    assert "--tensorboard could not be closed (cannot flush)" in (tmp_path / "train.log").read_text()


def test_sinks_that_are_open_are_closed_when_another_cannot_be_opened(fragile, tiny_flags, tmp_path, monkeypatch):
    class Refusing:
        def __init__(self, options, flags, done):
            raise UserError("--wandb: no")

    monkeypatch.setitem(sinks.SINKS, "wandb", Refusing)
    with pytest.raises(UserError, match="--wandb: no"):
        train([*tiny_flags, *BOTH], tmp_path)
    assert fragile.log == [("opened", 0), ("closed", True)]


def test_only_the_first_process_writes(tiny_flags, tmp_path):
    words = [*tiny_flags, *BOTH, "--batch-size", "2", "--epochs", "1"]
    run_processes(_train_in_process, 2, tmp_path / "processes", words, tmp_path / "run", None)
    assert len(list(tmp_path.glob("run/tensorboard/*"))) == len(list(tmp_path.glob("run/wandb/offline-*/*.wandb"))) == 1
    assert_same_scalars(read_tensorboard(tmp_path / "run/tensorboard"), expected_scalars(tmp_path / "run"), rel=1e-6)


@pytest.mark.parametrize("file", ["steps.txt", "log.txt", "eval_log.txt"])
def test_a_full_disk_under_the_log_ends_all_processes(file, tiny_flags, tmp_path):
    words = [*tiny_flags, "--batch-size", "2", "--epochs", "1"]
    errors = run_processes(_train_in_process, 2, tmp_path / "processes", words, tmp_path / "run", file)
    path = tmp_path / "run" / file
    assert errors[0] == f"{path}: cannot be written (No space left on device); free space or change --output-dir"
    assert errors[1] in [f"{what} failed on process 0: {errors[0]}" for what in ("reading the data", f"writing {file}")]


def _train_in_process(rank, size, words, output, full):
    """The error that the run ends with. full: the file that no line can be added to."""
    original = sinks.append_json

    def append(path, row):
        if path.name == full:
            raise OSError(28, "No space left on device")
        original(path, row)

    sinks.append_json = append
    try:
        train(words, output)
    except UserError as e:
        return str(e)


def test_steps_that_were_skipped_are_counted_line_by_line(tiny_flags, tmp_path, monkeypatch):
    original, calls = Contrastive.step, []

    def poisoned(self, model, *args):
        figures = original(self, model, *args)
        calls.append(1)
        if len(calls) in (3, 4, 6, 7):
            next(model.parameters()).grad.fill_(float("nan"))
        return figures

    monkeypatch.setattr(Contrastive, "step", poisoned)
    train(tiny_flags, tmp_path)
    steps = lines(tmp_path / "steps.txt")
    assert [row["skipped_steps"] for row in steps] == [0, 2, 1, 1, 0, 0]
    assert ["grad_norm" in row for row in steps] == [True, False, True, True, True, True]
    assert [row["train_skipped_steps"] for row in lines(tmp_path / "log.txt")] == [3, 1]
