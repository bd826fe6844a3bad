"""What a checkpoint says of its model and of its input, and models built from that."""

import argparse
import dataclasses

import pytest
import torch

from avion.constants import NORM_STYLES
from avion.models import model_from_checkpoint
from avion.weights import Checkpoint
from avion.weights.facts import check_preprocess
from tests.weights.checkpoints import (
    HEADS,
    NAMES,
    assert_same_outputs,
    contents,
    fixture,
    refusal,
    tiny,
)

# --- building a model from what a checkpoint says --------------------------------------------


def test_bare_weights_are_recognised_where_keys_decide(tmp_path):
    for name in ("VIT", "LAVILA"):
        torch.save(contents(name)["state_dict"], tmp_path / f"{name}.pt")
        model = model_from_checkpoint(tmp_path / f"{name}.pt", **HEADS)
        assert model.config.name == NAMES[name]
        assert_same_outputs(model, model_from_checkpoint(fixture(name), **HEADS))


def test_bare_weights_of_a_divided_tower_need_a_name(tmp_path):
    for name in ("ID4", "ID6"):
        path = tmp_path / f"{name}.pt"
        torch.save(contents(name)["state_dict"], path)
        text = refusal(model_from_checkpoint, path, **HEADS)
        assert NAMES[name] in text and NAMES[name].replace("_VIT", "_FROZEN_VIT") in text and "give name=" in text
        if name == "ID6":
            assert "does not say with how many frames" in refusal(
                model_from_checkpoint, path, name=NAMES[name], **HEADS
            )
        frames = {"num_frames": 4} if name == "ID6" else {}  # the other one's temporal embedding says it
        model = model_from_checkpoint(path, name=NAMES[name], **HEADS, **frames)
        assert model.config.num_frames == 4 and ("does not say" in str(model.load_report)) == (name == "ID6")
        assert_same_outputs(model, model_from_checkpoint(fixture(name), **HEADS))


def test_gates_of_lavila_are_seen(tmp_path):
    source = tiny("LAVILA_TSF_B16", gated_time=True)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "a.pt")
    model = model_from_checkpoint(tmp_path / "a.pt", **HEADS)
    assert model.config.gated_time
    assert_same_outputs(model, source)


def test_sizes_of_the_mixer_are_seen(tmp_path):
    source = tiny("TIMEMAMBA_VITB16", ssm_expand=2, d_state=8, d_conv=3, dt_rank=5)
    args = argparse.Namespace(model="CLIP_TimeMamba_like_timesformer", clip_length=8)
    torch.save({"state_dict": source.state_dict(), "args": args}, tmp_path / "a.pt")
    model = model_from_checkpoint(tmp_path / "a.pt", **HEADS)
    assert dataclasses.replace(model.config, num_frames=4) == source.config and model.config.num_frames == 8
    assert_same_outputs(model, source)


def test_heads_are_width_over_64_unless_given(tmp_path):
    source = tiny("TIMESFORMER_VITB16", embed_dim=128, num_heads=2, text_width=64, text_heads=1)
    args = argparse.Namespace(model="CLIP_TimeSformerB16")
    torch.save({"state_dict": source.state_dict(), "args": args}, tmp_path / "a.pt")
    model = model_from_checkpoint(tmp_path / "a.pt")
    assert (model.config.num_heads, model.config.text_heads) == (2, 1)
    assert_same_outputs(model, source)
    assert "give text_heads=" in refusal(model_from_checkpoint, fixture("ID4"))  # width 48


def test_a_model_name_that_the_weights_contradict_is_not_believed(tmp_path):
    """Upstream's fine-tuning saves the default of a --model that it never read."""
    saved = contents("ID6")
    saved["args"].model = "CLIP_VITB16"
    torch.save(saved, tmp_path / "a.pt")
    assert Checkpoint(saved).facts.model_name is None
    assert "TIMEMAMBA_FROZEN_VITB16" in refusal(model_from_checkpoint, tmp_path / "a.pt", **HEADS)
    model = model_from_checkpoint(tmp_path / "a.pt", name="TIMEMAMBA_VITB16", **HEADS)
    assert_same_outputs(model, model_from_checkpoint(fixture("ID6"), **HEADS))


def test_unknown_names_and_fields(tmp_path):
    saved = contents("ID4")
    saved["args"].model = "SOMEBODYS_OWN"
    torch.save(saved, tmp_path / "a.pt")
    assert "'SOMEBODYS_OWN' is not registered" in refusal(model_from_checkpoint, tmp_path / "a.pt", **HEADS)
    assert "num_framse" in refusal(model_from_checkpoint, fixture("ID4"), num_framse=3, **HEADS)
    for hostile in (3, None, ["x"], "two\nlines"):
        saved["args"].model = hostile
        assert Checkpoint(saved).facts.model_name is None
    saved["args"].clip_length = "4; drop"
    del saved["state_dict"]["module.visual.temporal_embed"]
    assert Checkpoint(saved).facts.num_frames is None


# --- what a checkpoint needs of its input ----------------------------------------------------


@pytest.mark.parametrize(
    ("name", "style", "red", "act"),
    [
        ("ID4", "openai", 122.7709383, "gelu"),
        ("ID6", "openai", 122.7709383, "gelu"),
        ("VIT", "openai_legacy", 108.3272985, "gelu"),
        ("LAVILA", "openai_legacy", 108.3272985, "quick_gelu"),
    ],
)
def test_facts_of_upstreams_checkpoints(name, style, red, act):
    facts = Checkpoint.open(fixture(name)).facts
    assert (facts.model_name, facts.norm_style, facts.act_layer) == (NAMES[name], style, act)
    assert facts.mean == (red, 116.7460125, 104.0937362) and facts.std == (68.5005327, 66.6321579, 70.3231631)
    assert (facts.num_frames, facts.img_size, facts.config) == (4, 32, None)
    check_preprocess(facts, style)
    wrong = "openai" if style == "openai_legacy" else "openai_legacy"
    text = refusal(check_preprocess, facts, wrong)
    assert str(fixture(name)) in text and f"give --norm-style {style}" in text
    assert ("AVION and LaViLa" in text) == (style == "openai_legacy")
    assert ("Video Mamba Suite" in text) == (style == "openai")
    refusal(check_preprocess, facts, "timm")


def test_preprocess_of_upstreams_timm_style_and_of_our_own():
    saved = contents("VIT")
    saved["args"].norm_style = "timm"
    check_preprocess(Checkpoint(saved).facts, "timm")
    model = tiny("TIMESFORMER_VITB16")
    ours = {"state_dict": model.state_dict(), "model_config": dataclasses.asdict(model.config)}
    for style in NORM_STYLES:
        check_preprocess(Checkpoint(ours).facts, style)  # says nothing, so nothing contradicts
    odd = {"norm_style": "mine", "mean": [1.0, 2.0, 3.0], "std": [1.0, 1.0, 1.0]}
    text = refusal(check_preprocess, Checkpoint(ours | {"preprocess": odd}).facts, "openai")
    assert "no --norm-style has this mean and deviation" in text
