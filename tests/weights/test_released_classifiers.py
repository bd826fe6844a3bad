"""Classifiers as upstream's scripts release them, through tools/convert_checkpoint.py into folders of the hub."""

import argparse
import itertools

import pytest
import torch
from torch.nn import functional as F

from avion.commands import convert_checkpoint as tool
from avion.models.model_clip import VideoClassifier
from avion.weights import classifier_from_checkpoint
from tests.weights import upstream_files
from tests.weights.checkpoints import FIXTURES, NAMES

# Names of weights in a file: of DistributedDataParallel, of torch.compile, of both, and bare.
PREFIXES = ["module.", "", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
# The files hold no text tower; a small one costs nothing to build.
SIZES = {"num_heads": 4, "text_layers": 1, "text_width": 64, "vocab_size": 512}
MODEL_ARGS = ("--model-args", *(f"{name}={value}" for name, value in SIZES.items()))
STYLES = {"ID4": "openai", "ID6": "openai", "VIT": "openai_legacy", "LAVILA": "openai_legacy"}


def converted(source, folder, *words):
    assert tool.main([str(source), str(folder), *words]) == 0
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    return VideoClassifier.from_pretrained(folder)


def upstream_file(name, path, prefix="module.", change=None):
    """A file as upstream's classification writes it, with everything beside the weights; all in AVION's form."""
    weights = upstream_files.classifier_weights(name)
    generator = torch.Generator().manual_seed(7)  # a bias that is not zero shows whether it arrives
    weights["module.fc_cls.bias"] = torch.randn(len(weights["module.fc_cls.bias"]), generator=generator)
    weights = {prefix + key.removeprefix("module."): value for key, value in weights.items()}
    if change is not None:
        change(weights)
    verbs, nouns = upstream_files.action_mappings()
    args = argparse.Namespace(**upstream_files.CLASSIFY, mapping_act2v=verbs, mapping_act2n=nouns)
    args.norm_style = STYLES[name]
    torch.save(upstream_files.whole_file(weights, args, best=44.5, epoch=100), path)
    return path, weights.get(prefix + "fc_cls.bias")


@pytest.mark.parametrize("version, name", [
    ("1.5", "ID6"), ("1.5_legacy", "ID6"), ("2.2", "ID4"), ("3", "ID6"), ("3_pyarrow", "ID4"),
])  # fmt: skip
def test_released_files_become_folders(version, name, tmp_path):
    """The files that upstream's scripts wrote, with every version of pandas; expected: what upstream computed."""
    source = FIXTURES / f"classifier_pandas{version}.pt"
    model = converted(source, tmp_path / "folder", "--model", NAMES[name], *MODEL_ARGS)
    video, expected = upstream_files.expected_logits(name)
    assert not model.training and model.actions == tuple(upstream_files.ACTIONS)
    with torch.no_grad():
        torch.testing.assert_close(F.normalize(model(video), dim=-1), expected, rtol=0, atol=1e-5)
    assert model.preprocess["norm_style"] == "openai"


@pytest.mark.parametrize("name, prefix", list(itertools.product(STYLES, PREFIXES)))
def test_every_tower_under_every_prefix(name, prefix, tmp_path, capsys):
    """Video Mamba Suite's, AVION's and LaViLa's towers. Expected: upstream's features and the head of the file."""
    path, bias = upstream_file(name, tmp_path / "upstream.pt", prefix)
    model = converted(path, tmp_path / "folder", "--model", NAMES[name], *MODEL_ARGS)
    assert f"--norm-style {STYLES[name]}" in capsys.readouterr().out
    video, expected = upstream_files.expected_logits(name)
    with torch.no_grad():
        logits = model(video)
    # The rows of the head are the projection, so that without the bias the logits are upstream's embeddings.
    torch.testing.assert_close(F.normalize(logits - bias, dim=-1), expected, rtol=0, atol=1e-4)
    original = classifier_from_checkpoint(path, name=NAMES[name], **SIZES).eval()
    with torch.no_grad():
        torch.testing.assert_close(logits, original(video), rtol=0, atol=0)
    assert model.actions == tuple(upstream_files.ACTIONS) and model.config.num_frames == 4
    assert model.preprocess["norm_style"] == STYLES[name]


def test_a_classifier_with_several_heads_is_refused_in_one_line(tmp_path, capsys):
    """LaViLa's script can train a head each for verbs, nouns and actions."""

    def change(weights):
        head, bias = weights.pop("module.fc_cls.weight"), weights.pop("module.fc_cls.bias")
        for number, classes in enumerate((5, 9, len(head))):
            weights[f"module.fc_cls.{number}.weight"] = head[:classes]
            weights[f"module.fc_cls.{number}.bias"] = bias[:classes]

    path, _ = upstream_file("LAVILA", tmp_path / "upstream.pt", change=change)
    assert tool.main([str(path), str(tmp_path / "folder"), "--model", NAMES["LAVILA"]]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "has 3 heads (fc_cls.0, fc_cls.1, fc_cls.2)" in said
    assert not list((tmp_path / "folder").iterdir())
