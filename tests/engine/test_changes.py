"""Other flags when a run goes on: a list as a warning, and a refusal of what makes it another run."""

import logging
from pathlib import Path

import pytest
import torch

from avion.engine import changes
from avion.engine.args import flag_fields
from avion.engine.options import FinetuneClassificationOptions, FinetuneRetrievalOptions, PretrainOptions
from avion.errors import UserError
from avion.optim import cosine_scheduler
from avion.weights import Checkpoint
from tests.engine import quick
from tests.engine.kill_points import _stable, rows
from tests.processes import run_processes

FIXED = ["--fix-lr"]  # a schedule that does not depend on the batch or on --epochs


def contents(folder):
    return Checkpoint.open(folder / "checkpoint.pt").contents


@pytest.fixture
def messages(caplog):
    caplog.set_level(logging.INFO)
    return caplog


@pytest.fixture
def begun(tmp_path):
    quick.run(tmp_path / "run", "--epochs", "1")
    return tmp_path / "run"


@pytest.mark.parametrize(
    "words, listed",
    [
        ("--lr 0.02", "--lr 0.01 -> 0.02"), ("--wd 0.3", "--wd 0.01 -> 0.3"),
        ("--betas 0.8 0.9", "--betas 0.9 0.999 -> 0.8 0.9"), ("--eps 1e-4", "--eps 1e-08 -> 0.0001"),
        ("--grad-clip-norm 1", "--grad-clip-norm None -> 1.0"), ("--warmup-epochs 0", "--warmup-epochs 1 -> 0"),
        ("--drop-path-rate 0.1", "--drop-path-rate 0.0 -> 0.1"), ("--precision bf16", "--precision None -> bf16"),
        ("--scale-range 0.2 1", "--scale-range 0.5 1.0 -> 0.2 1.0"), ("--fix-lr", "--fix-lr False -> True"),
        ("--root other/", "--root datasets/Ego4D/videos_320px_15sec/ -> other/"),
        ("--train-metadata staged/ego4d_train.pkl", "--train-metadata datasets/Ego4D/ego4d_train.pkl -> staged/"),
        ("--batch-size 8", "global batch 4 -> 8 clips"),
    ],
)  # fmt: skip
def test_what_may_change_is_listed(words, listed, begun, messages):
    quick.run(begun, *words.split(), "--epochs", "2")
    warning = next(r.message for r in messages.records if "with other flags" in r.message)
    assert f"going on from {begun / 'checkpoint.pt'} with other flags: " in warning
    assert listed in warning and "--epochs 1 -> 2" in warning
    assert contents(begun)["epoch"] == 2


@pytest.mark.parametrize(
    "words, flag, listed",
    [
        ("--seed 1", "seed", "--seed 0 -> 1"), ("--frame-sampling strided", "frame-sampling", "uniform -> strided"),
        ("--clip-length 2", "clip-length", "model num_frames 1 -> 2"),
        ("--pretrain-zoo openai", "pretrain-zoo", "--pretrain-zoo none -> openai"),
        ("--dataset demo", "dataset", "ego4d -> demo"), ("--pretrain-path a/b.pt", "pretrain-path", "None -> a/b.pt"),
        ("CLIPS=20", "train-metadata", "--train-metadata has other clips"),
        ("VAL_CLIPS=9", "val-metadata", "--val-metadata has other clips"),
    ],
)  # fmt: skip
def test_another_run_is_refused_unless_it_is_allowed(words, flag, listed, begun, messages, monkeypatch):
    before = (begun / "checkpoint.pt").read_bytes()
    if "=" in words:
        monkeypatch.setenv(*words.split("="))
        words = ""
    words = ["--epochs", "2", *words.split()]
    with pytest.raises(UserError) as refused:
        quick.run(begun, *words)
    text = str(refused.value)
    assert (
        text.startswith(f"{begun / 'checkpoint.pt'}: ") and listed in text and text.endswith(f"--allow-changes {flag}")
    )
    assert (begun / "checkpoint.pt").read_bytes() == before
    quick.run(begun, *words, "--allow-changes", "seed", flag)
    assert listed in messages.text and contents(begun)["epoch"] == 2


def test_strides_that_are_not_used_and_files_elsewhere_are_the_same_run(tmp_path, messages):
    folder = tmp_path / "run"
    quick.run(folder, "--epochs", "1", "--clip-stride", "4")
    quick.run(folder, "--epochs", "1", "--clip-stride", "8", "--workers", "1", "--save-steps", "3", "--use-zero")
    assert "with other flags: --clip-stride 4 -> 8" in messages.text


def test_a_new_best_where_the_evaluation_is_another(begun, monkeypatch):
    """Values on other clips do not compare: the first model evaluated on them is the best."""
    assert contents(begun)["best_acc1"] > 0.02
    monkeypatch.setenv("VAL_CLIPS", "9")
    monkeypatch.setattr(quick.Quick, "evaluate", lambda *_: {"avg_map": 0.01})
    quick.run(begun, "--epochs", "2", "--allow-changes", "val-metadata")
    best = Checkpoint.open(begun / "checkpoint_best.pt").contents
    assert contents(begun)["best_acc1"] == best["best_acc1"] == 0.01 and best["epoch"] == 2


def test_optimizer_settings_are_those_of_the_command(begun):
    quick.run(begun, "--epochs", "2", "--wd", "0.3", "--betas", "0.8", "0.9", "--eps", "1e-4")
    decay, exempt = contents(begun)["optimizer"]["param_groups"]
    assert (decay["weight_decay"], exempt["weight_decay"]) == (0.3, 0.0)
    assert all((group["betas"], group["eps"]) == ((0.8, 0.9), 1e-4) for group in (decay, exempt))


def test_more_epochs_say_what_the_learning_rate_does(begun, messages):
    last = contents(begun)["optimizer"]["param_groups"][0]["lr"]
    quick.run(begun, "--epochs", "4")
    line = next(r.message for r in messages.records if "changes the schedule" in r.message)
    assert line == "--epochs changes the schedule: the learning rate of the next step is still 0.01"
    assert last == pytest.approx(0.01)
    quick.run(begun, "--epochs", "12")  # from the end of the cosine back to its beginning
    line = next(r.message for r in reversed(messages.records) if "changes the schedule" in r.message)
    schedules = [
        cosine_scheduler(1e-2, 1e-5, epochs, 4, warmup_epochs=1, start_warmup_value=1e-6) for epochs in (4, 12)
    ]
    before, after = schedules[0][15], schedules[1][16]
    assert after > 10 * before
    assert line.endswith(
        f"of the last step was {before:.3g}, that of the next step is {after:.3g}, {after / before:.3g} times as much"
    )


def test_files_of_other_programs_are_not_compared(begun, tmp_path, messages):
    foreign = dict(contents(begun))
    foreign.pop("step")
    torch.save(foreign, tmp_path / "foreign.pt")
    quick.run(tmp_path / "new", "--resume", str(tmp_path / "foreign.pt"), "--seed", "7", "--epochs", "2")
    assert "with other flags" not in messages.text


def seen(path, ranks):
    """The clips of all steps in their order, over the processes."""
    lines = [path.with_name(f"{path.name}.{rank}").read_text().split("\n")[:-1] for rank in range(ranks)]
    return [int(clip) for step in zip(*lines, strict=True) for part in step for clip in part.split()]


@pytest.mark.parametrize(
    "first, second", [((2, 2, 1), (1, 8, 1)), ((1, 4, 1), (2, 2, 2)), ((3, 2, 1), (2, 3, 1)), ((2, 2, 1), (2, 4, 1))]
)
def test_every_clip_once_in_an_epoch_of_two_kinds_of_processes(first, second, tmp_path):
    """(processes, batch size, micro-batches) of 24 clips, stopped after two steps, and then others."""
    folder, done = tmp_path / "run", 0
    for number, (size, batch, micro) in enumerate((first, second)):
        words = ["--epochs", "1", "--batch-size", str(batch), "--update-freq", str(micro), "--save-steps", "0"]
        words += [*FIXED, "--allow-changes", "batch-size"]
        environment = {"CLIPS": "24", "SEEN": str(tmp_path / f"seen{number}"), "STOP_AFTER": "0" if number else "2"}
        results = run_processes(quick.run_as_rank, size, tmp_path / f"p{number}", str(folder), words, environment)
        assert all(result.startswith("Stopped") if number == 0 else result == "" for result in results), results
        if number == 0:
            done = contents(folder)["clips"]
            assert done == 2 * size * batch * micro
    parts = [seen(tmp_path / f"seen{number}", size) for number, (size, *_) in enumerate((first, second))]
    assert len(parts[0]) == done and sorted(parts[0] + parts[1]) == list(range(24))
    assert len(rows(folder / "log.txt")) == 1


def test_another_batch_within_an_epoch_is_refused_unless_it_is_allowed(tmp_path):
    folder = tmp_path / "run"
    environment = {"CLIPS": "24", "STOP_AFTER": "2"}
    run_processes(quick.run_as_rank, 1, tmp_path / "p", str(folder), ["--epochs", "1"], environment)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIPS", "24")
        with pytest.raises(UserError, match="global batch 4 -> 8 clips within an epoch: .* --allow-changes batch-size"):
            quick.run(folder, "--epochs", "1", "--batch-size", "8")
        quick.run(folder, "--epochs", "1", "--batch-size", "2", "--update-freq", "2")  # the same global batch


def test_the_means_of_an_epoch_of_two_processes_are_those_of_the_whole(tmp_path):
    words = ["--epochs", "1", "--batch-size", "2", "--save-steps", "0"]
    for name, stops in (("whole", ["0"]), ("cut", ["2", "3", "0"])):
        for number, stop in enumerate(stops):
            environment = {"CLIPS": "32", "STOP_AFTER": stop}
            place = tmp_path / f"{name}{number}"
            run_processes(quick.run_as_rank, 2, place, str(tmp_path / name), words, environment)
    whole, cut = (_stable(rows(tmp_path / name / "log.txt")[-1]) for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    for name, value in whole.items():
        assert cut[name] == pytest.approx(value, rel=1e-9), name


def test_every_flag_is_free_or_listed():
    """A flag of a group that nobody thought of would be listed; the names here are those of flags."""
    flags = set()
    for options in (PretrainOptions, FinetuneRetrievalOptions, FinetuneClassificationOptions):
        flags |= flag_fields(options).keys()
    planned = {"data_timeout", "overwrite"}
    assert changes.FREE - planned <= flags
    assert {name.replace("-", "_") for name in changes.OTHER_RUN} <= flags


def test_the_page_names_every_flag_that_is_refused_or_listed():
    page = (Path(__file__).resolve().parents[2] / "docs/checkpoints.md").read_text(encoding="utf-8")
    table = page.split("## Other flags when a run goes on")[1].split("\n## ")[0]
    flags = set()
    for options in (PretrainOptions, FinetuneRetrievalOptions, FinetuneClassificationOptions):
        flags |= flag_fields(options).keys()
    silent = changes.FREE - {name.replace("-", "_") for name in changes.OTHER_RUN}
    mixing = {name for name in flags if name.startswith(("mixup", "cutmix"))}
    missing = [name for name in sorted(flags - silent - mixing) if f"--{name.replace('_', '-')}`" not in table]
    assert missing == []
