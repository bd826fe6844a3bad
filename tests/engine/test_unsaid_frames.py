"""A checkpoint that says no number of frames: every entry point asks for it, or says which it uses."""

import argparse
import logging

import pytest
import torch

import main_egoschema
import main_finetune_classification
import main_finetune_retrieval
import main_pretrain
from avion.engine.args import parse
from avion.engine.distributed import World
from avion.engine.features import extract_features
from avion.engine.inputs import ModelInputs
from avion.engine.options import FinetuneRetrievalOptions, PretrainOptions
from avion.engine.options.features import FeatureOptions
from avion.engine.tasks.finetune_retrieval import FinetuneRetrieval
from avion.engine.tasks.pretrain import Pretrain
from avion.errors import UserError
from avion.models import load_checkpoint, model_from_checkpoint
from avion.weights import Checkpoint, classifier_from_checkpoint
from tests.engine.actions import pretrained
from tests.engine.egoschema.case import write_egoschema
from tests.videos import write_video
from tests.weights.checkpoints import FIXTURES, HEADS, NAMES, contents, tiny
from tests.weights.upstream_files import action_mappings

UNSAID = "does not say with how many frames it was trained"
MODEL = ["--model", "TIMEMAMBA_VITT16", "--model-args", "num_heads=2", "text_heads=2"]
SIZES = [
    "img_size=32",
    "embed_dim=32",
    "depth=2",
    "text_width=32",
    "text_layers=1",
    "project_embed_dim=16",
    "context_length=12",
]


@pytest.fixture
def bare(tmp_path):
    """The bare weights of a row whose tower has no temporal embedding."""
    saved = torch.load(pretrained(tmp_path / "whole.pt", context_length=12, vocab_size=49408), weights_only=True)
    torch.save(saved["state_dict"], tmp_path / "bare.pt")
    return tmp_path / "bare.pt"


def without_clip_length(flags):
    at = flags.index("--clip-length")
    return [*flags[:at], *flags[at + 2 :]]


def told(main, words, capsys) -> str:
    assert main([*map(str, words)]) == 2
    text = capsys.readouterr().err.strip().splitlines()[-1]
    assert UNSAID in text and "--clip-length" in text
    return text


def test_pretraining(bare, tiny_flags, tmp_path, capsys, caplog):
    words = [*without_clip_length(tiny_flags), "--evaluate", "--resume", bare, "--output-dir", tmp_path]
    assert str(bare) in told(main_pretrain.main, words, capsys)
    with caplog.at_level(logging.INFO):
        words = [str(word) for word in [*words, "--clip-length", "3"]]
        options = parse(PretrainOptions, words, "main_pretrain.py", "")
        model = Pretrain(options, World(), Checkpoint.open(bare)).build_model()
    assert (
        ModelInputs.of(model.config, options).num_frames == 3 and f"{UNSAID}, the model is built for 3" in caplog.text
    )


@pytest.mark.parametrize("flag", ["--resume", "--pretrain-model"])
def test_retrieval(bare, mir_flags, tmp_path, capsys, caplog, flag):
    words = [*without_clip_length(mir_flags), *MODEL, *SIZES, "--evaluate", flag, bare, "--output-dir", tmp_path]
    told(main_finetune_retrieval.main, words, capsys)
    with caplog.at_level(logging.INFO):
        words = [str(word) for word in [*words, "--clip-length", "3"]]
        options = parse(FinetuneRetrievalOptions, words, "", "")
        checkpoint = Checkpoint.open(bare) if flag == "--resume" else None
        model = FinetuneRetrieval(options, World(), checkpoint).build_model()
    assert (
        ModelInputs.of(model.config, options).num_frames == 3 and f"{UNSAID}, the model is built for 3" in caplog.text
    )


def test_training_from_it_has_its_own_number(bare, mir_flags, caplog):
    """Fine-tuning is told its clip length by a flag with a default, as upstream's; the log still says it."""
    words = [str(w) for w in [*without_clip_length(mir_flags), *MODEL, *SIZES, "--pretrain-model", bare]]
    task = FinetuneRetrieval(parse(FinetuneRetrievalOptions, words, "", ""), World())
    with caplog.at_level(logging.INFO):
        model = task.build_model()
    assert model.config.num_frames == 16 and f"{UNSAID}, the model is built for 16" in caplog.text


def test_action_recognition(tiny_actions, tmp_path, capsys):
    model = classifier_from_checkpoint(FIXTURES / "classifier_pandas1.5.pt", name=NAMES["ID6"], num_heads=4)
    torch.save({"state_dict": model.state_dict(), "args": whole_args()}, tmp_path / "bare.pt")
    words = [
        *without_clip_length(tiny_actions.flags),
        "--model",
        NAMES["ID6"],
        "--model-args",
        "num_heads=4",
        "--evaluate",
        "--resume",
        tmp_path / "bare.pt",
        "--output-dir",
        tmp_path,
    ]
    told(main_finetune_classification.main, words, capsys)
    assert main_finetune_classification.main([*map(str, words), "--clip-length", "5"]) == 0
    assert f"{UNSAID}, the model is built for 5" in capsys.readouterr().err


def whole_args():
    """The list of actions, and no number of frames."""
    verbs, nouns = action_mappings()
    return argparse.Namespace(mapping_act2v=verbs, mapping_act2n=nouns)


def test_egoschema_says_which_it_uses(tmp_path, capsys):
    data = write_egoschema(tmp_path)
    saved = torch.load(data.checkpoint, weights_only=True)
    torch.save(saved["state_dict"], tmp_path / "bare.pt")
    words = [*data.flags, "--pretrain-model", str(tmp_path / "bare.pt"), *MODEL, "--output-dir", str(tmp_path / "out")]
    assert main_egoschema.main([*words, "--frames", "8"]) == 0
    assert f"{UNSAID}, the model is built for 8" in capsys.readouterr().err


def test_features(bare, tmp_path, caplog):
    write_video(tmp_path / "a.mp4", 30, width=48, height=40)
    (tmp_path / "videos.txt").write_text("a.mp4\n")
    words = [
        "--videos",
        tmp_path / "videos.txt",
        "--root",
        tmp_path,
        "--checkpoint",
        bare,
        *MODEL,
        "--device",
        "cpu",
        "--workers",
        "0",
        "--output-dir",
        tmp_path / "out",
    ]
    words = [str(word) for word in words]
    with pytest.raises(UserError, match=f"{UNSAID}.*--frames"):
        extract_features(parse(FeatureOptions, words, "", ""))
    with caplog.at_level(logging.INFO):
        report = extract_features(parse(FeatureOptions, [*words, "--frames", "6"], "", ""))
    assert report.errors == {}
    assert f"{UNSAID}, the model is built for 6" in caplog.text


def test_in_python(tmp_path):
    torch.save(contents("ID6")["state_dict"], tmp_path / "bare.pt")
    with pytest.raises(UserError, match=f"{UNSAID}.*num_frames="):
        model_from_checkpoint(tmp_path / "bare.pt", name=NAMES["ID6"], **HEADS)
    model = model_from_checkpoint(tmp_path / "bare.pt", name=NAMES["ID6"], num_frames=16, **HEADS)
    assert model.config.num_frames == 16
    report = load_checkpoint(tiny(NAMES["ID6"]), tmp_path / "bare.pt")
    assert f"{UNSAID}, the model is built for 4" in str(report)
    for name in ("ID4", "VIT", "LAVILA"):  # their temporal embedding says it
        torch.save(contents(name)["state_dict"], tmp_path / "said.pt")
        assert UNSAID not in str(model_from_checkpoint(tmp_path / "said.pt", name=NAMES[name], **HEADS).load_report)
