"""`main_pretrain.py --pretrain-model`: a new run from the weights of a checkpoint."""

import json

import pytest
import torch

import main_finetune_retrieval
import main_pretrain
from avion.engine.args import parse
from avion.engine.build import build_model
from avion.engine.options import PretrainOptions
from avion.weights import Checkpoint

SIZES = ("--context-length", "--project-embed-dim", "--model", "--model-args", "--pretrain-zoo", "--clip-length")


def options(*words):
    return parse(PretrainOptions, [str(word) for word in words], "main_pretrain.py", "")


@pytest.fixture(scope="module")
def first(tiny_flags, tmp_path_factory):
    """The checkpoint of a run of one epoch."""
    folder = tmp_path_factory.mktemp("first")
    assert main_pretrain.main([*tiny_flags, "--epochs", "1", "--seed", "3", "--output-dir", str(folder)]) == 0
    return folder / "checkpoint.pt"


@pytest.fixture
def bare_flags(tiny_flags):
    """Without the flags that say which model it is: the checkpoint says it."""
    left, skip = [], False
    for word in tiny_flags:
        skip = word in SIZES or (skip and not word.startswith("--"))
        left += [] if skip else [word]
    return left


@pytest.mark.parametrize("named", [True, False], ids=["--model", "without"])
def test_the_weights_are_those_of_the_checkpoint(named, first, tiny_flags, bare_flags):
    flags = tiny_flags if named else [*bare_flags, "--clip-length", "2"]
    model = build_model(options(*flags, "--pretrain-model", first), None)
    weights = Checkpoint.open(first).weights
    assert model.config.name == "TIMEMAMBA_VITT16" and model.config.num_frames == 2
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=0)


def test_clip_length_sets_the_frames(first, bare_flags):
    model = build_model(options(*bare_flags, "--pretrain-model", first, "--clip-length", 5), None)
    assert model.config.num_frames == 5
    assert (
        build_model(options(*bare_flags, "--pretrain-model", first), None).config.num_frames == 4
    )  # the flag's default


def test_a_run_begins_at_epoch_0_and_then_goes_on_from_itself(first, tiny_flags, tmp_path, capsys):
    words = [*tiny_flags, "--pretrain-model", str(first), "--output-dir", str(tmp_path)]
    assert main_pretrain.main([*words, "--epochs", "1"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0]
    first.rename(first.with_name("away.pt"))  # it is not read again
    try:
        assert main_pretrain.main([*words, "--epochs", "2"]) == 0
    finally:
        first.with_name("away.pt").rename(first)
    rows = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1]
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=False)["epoch"] == 2


def test_the_loss_begins_lower_than_from_scratch(first, tiny_flags, tmp_path):
    """The first step's loss differs from that of random weights, since the weights do."""
    losses = []
    for name, more in (("scratch", []), ("weights", ["--pretrain-model", str(first)])):
        assert main_pretrain.main([*tiny_flags, *more, "--epochs", "1", "--output-dir", str(tmp_path / name)]) == 0
        losses.append(json.loads((tmp_path / name / "steps.txt").read_text().splitlines()[0])["loss"])
    assert losses[1] < losses[0]


def test_fine_tuning_does_not_resume_such_a_pretraining(first, tiny_flags, mir_flags, tmp_path, capsys):
    words = [*tiny_flags, "--pretrain-model", str(first), "--epochs", "1", "--output-dir", str(tmp_path / "pre")]
    assert main_pretrain.main(words) == 0
    words = [*mir_flags, "--resume", str(tmp_path / "pre/checkpoint.pt"), "--output-dir", str(tmp_path / "mir")]
    assert main_finetune_retrieval.main(words) == 2
    assert "was written in pretraining" in capsys.readouterr().err


def test_what_does_not_fit_is_one_line(first, tiny_flags, tmp_path, capsys):
    words = [*tiny_flags, "--output-dir", str(tmp_path)]
    assert main_pretrain.main([*words, "--pretrain-model", str(tmp_path / "gone.pt")]) == 2
    assert "gone.pt: no such file" in capsys.readouterr().err
    assert main_pretrain.main([*words, "--pretrain-model", str(first), "--project-embed-dim", "8"]) == 2
    assert "does not fit TIMEMAMBA_VITT16" in capsys.readouterr().err
