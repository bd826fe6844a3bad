"""A process opens a checkpoint once: for the project's checks, and within them once by the library that reads it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import main_egoschema
import main_finetune_classification
import main_finetune_retrieval
import main_pretrain
import main_zeroshot
from avion.commands import convert_checkpoint, extract_features, search_videos
from avion.weights import Checkpoint
from tests.engine import quick
from tests.engine.egoschema.case import write_egoschema
from tests.engine.zeroshot.case import write_benchmarks
from tests.opens import opens_of

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests/fixtures"
ONCE = 2  # for the checks, and by PyTorch, which maps the file


def opened(path, main, *words):
    with opens_of(path) as found:
        assert main([str(word) for word in words]) == 0
    return found.count


@pytest.fixture(scope="module")
def pretrained(tiny_flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    assert main_pretrain.main([*tiny_flags, "--epochs", "1", "--output-dir", str(folder)]) == 0
    return folder / "checkpoint.pt"


def test_the_count_is_of_one_checkpoint_that_is_opened(pretrained, tmp_path):
    with opens_of(pretrained) as found:
        Checkpoint.open(pretrained)
    assert found.count == ONCE
    with opens_of(pretrained) as found:
        torch.load(pretrained, weights_only=False)
    assert found.count == 1


def test_the_count_sees_a_file_that_is_opened_again(pretrained):
    with opens_of(pretrained) as found:
        Checkpoint.open(pretrained)
        Checkpoint.open(pretrained, verify=False)
    assert found.count == 2 * ONCE


def test_a_fine_tuning_that_is_resumed(pretrained, mir_flags, tmp_path):
    """A real process each: begun from another checkpoint, and gone on from the checkpoint of the own folder."""

    def count(path, *words):
        command = [sys.executable, "-m", "tests.opens", path, ROOT / "main_finetune_retrieval.py", *mir_flags, *words]
        done = subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return int(done.stdout.splitlines()[-1])

    first = ["--pretrain-model", pretrained, "--output-dir", tmp_path / "a", "--epochs", "1"]
    assert count(pretrained, *first) == ONCE
    resumed = ["--resume", tmp_path / "a/checkpoint.pt", "--pretrain-model", pretrained, "--output-dir", tmp_path / "b"]
    assert count(tmp_path / "a/checkpoint.pt", *resumed, "--epochs", "2") == ONCE
    before = (tmp_path / "b/log.txt").read_text()
    assert count(tmp_path / "b/checkpoint.pt", *resumed, "--epochs", "3") == ONCE
    after = (tmp_path / "b/log.txt").read_text()
    assert after.startswith(before) and len(after.splitlines()) == len(before.splitlines()) + 1


@pytest.mark.parametrize("name", ["checkpoint.pt", "checkpoint_previous.pt", "checkpoint_best.pt"])
@pytest.mark.parametrize("how", ["goes on", "is named", "is evaluated"])
def test_the_checkpoints_of_the_own_folder(name, how, tmp_path, monkeypatch):
    """Whichever of them a run takes; the best one is also asked for the best value."""
    # No later model is better: a new best one would be written, and then copied.
    monkeypatch.setattr(quick.Quick, "evaluate", lambda *_: {"avg_map": 0.5})
    quick.run(tmp_path)
    words = ["--epochs", "4"] if how != "is evaluated" else ["--evaluate"]
    if how == "is named":
        words += ["--resume", str(tmp_path / name)]
    else:
        left = ["checkpoint.pt", "checkpoint_previous.pt", "checkpoint_best.pt"]
        for other in left[: left.index(name)]:
            (tmp_path / other).unlink()
    with opens_of(tmp_path / name) as found:
        quick.run(tmp_path, *words)
    assert found.count == ONCE


def test_pretraining(pretrained, tiny_flags, tmp_path):
    words = [*tiny_flags, "--epochs", "1", "--output-dir", tmp_path]
    assert opened(pretrained, main_pretrain.main, *words, "--pretrain-model", pretrained) == ONCE
    evaluated = [*words, "--evaluate", "--resume", tmp_path / "checkpoint.pt"]
    assert opened(tmp_path / "checkpoint.pt", main_pretrain.main, *evaluated) == ONCE


def test_initial_weights(tiny_flags, tmp_path):
    """A file of --pretrain-path."""
    path = FIXTURES / "LAVILA_checkpoint.pt"
    # Its sizes are others than those of the model: the file is opened, and then refused.
    with opens_of(path) as found:
        words = [*tiny_flags, "--pretrain-zoo", "lavila", "--pretrain-path", str(path)]
        assert main_pretrain.main([*words, "--output-dir", str(tmp_path)]) == 2
    assert found.count == ONCE


def test_action_recognition(pretrained, tiny_actions, tmp_path):
    words = [*tiny_actions.flags, "--epochs", "1", "--output-dir", tmp_path]
    assert opened(pretrained, main_finetune_classification.main, *words, "--pretrain-model", pretrained) == ONCE
    words += ["--evaluate", "--resume", tmp_path / "checkpoint.pt"]
    assert opened(tmp_path / "checkpoint.pt", main_finetune_classification.main, *words) == ONCE


def test_retrieval_that_is_evaluated(pretrained, mir_flags, tmp_path):
    words = [*mir_flags, "--evaluate", "--resume", pretrained, "--output-dir", tmp_path]
    assert opened(pretrained, main_finetune_retrieval.main, *words) == ONCE


def test_egoschema(tmp_path):
    data = write_egoschema(tmp_path)
    words = [*data.flags, "--output-dir", tmp_path / "out", "--frames", "4"]
    assert opened(data.checkpoint, main_egoschema.main, *words) == ONCE


def test_zero_shot(tmp_path):
    data = write_benchmarks(tmp_path)
    words = [*data.flags, "--dataset", "egtea", "--output-dir", tmp_path / "out"]
    assert opened(data.checkpoint, main_zeroshot.main, *words) == ONCE


def test_tools(pretrained, tiny_data, tmp_path):
    assert opened(pretrained, convert_checkpoint.main, pretrained, tmp_path / "a.safetensors") == ONCE
    quickly = ["--device", "cpu", "--workers", "0"]
    videos = ["--root", tiny_data.root / "train/video0.mp4", "--checkpoint", pretrained, "--window", "1", *quickly]
    assert opened(pretrained, extract_features.main, *videos, "--output-dir", tmp_path / "features") == ONCE
    index = ["index", tiny_data.root / "train/video0.mp4", "--checkpoint", pretrained, "--index", tmp_path / "index"]
    assert opened(pretrained, search_videos.main, *index, *quickly) == ONCE
    asked = ["search", "cuts the onion", "--index", tmp_path / "index", "--device", "cpu"]
    assert opened(pretrained, search_videos.main, *asked) == ONCE
