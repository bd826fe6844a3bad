"""Checkpoints of every layout into models, and models into files."""

import argparse
import dataclasses

import huggingface_hub
import numpy as np
import pytest
import torch

from avion.constants import NORM_STYLES
from avion.models import create_model, load_checkpoint, model_from_checkpoint
from avion.weights import Checkpoint, save_safetensors, save_weights
from tests.weights.checkpoints import (
    FIXTURES,
    HEADS,
    NAMES,
    OPENAI,
    SIZES,
    assert_same_outputs,
    contents,
    fixture,
    outputs,
    refusal,
    refused_load,
    tiny,
)

# --- the fixtures, both ways in --------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_fixtures_give_what_upstream_computed(name):
    expected = torch.load(FIXTURES / f"{name}_expected.pt", weights_only=True)
    built = model_from_checkpoint(fixture(name), **HEADS)
    assert built.config.name == NAMES[name] and built.config.num_frames == 4
    loaded = create_model(NAMES[name], **SIZES)
    report = load_checkpoint(loaded, fixture(name))
    assert report == built.load_report
    assert (report.resized, report.missing, report.unexpected, report.notes) == ((), (), (), ())
    assert report.loaded == len(loaded.state_dict())
    for model in (built, loaded):
        video, text, _ = outputs(model, expected["video"], expected["tokens"])
        torch.testing.assert_close(video, expected["video_embed"], rtol=0, atol=1e-4)
        torch.testing.assert_close(text, expected["text_embed"], rtol=0, atol=1e-4)


def test_avions_other_layouts_give_the_same_model(tmp_path):
    """Without flash attention and fast conv1, without or with other wrappers, as bare weights."""
    saved = contents("VIT")
    plain = {}
    for name, value in saved["state_dict"].items():
        name = name.removeprefix("module.")
        if name.startswith("visual."):
            name = name.replace("Wqkv.", "in_proj_").replace("mlp.fc1", "mlp.c_fc").replace("mlp.fc2", "mlp.c_proj")
        if name == "visual.conv1.weight":
            value = value.reshape(64, 3, 16, 16)
        plain[name] = value
    assert "visual.transformer.resblocks.0.attn.in_proj_weight" in plain
    variants = {
        "plain": saved | {"state_dict": plain},
        "prefix": saved | {"state_dict": {f"module.{k}": v for k, v in plain.items()}},
        "compiled": saved | {"state_dict": {f"module._orig_mod.{k}": v for k, v in plain.items()}},
        "half": saved | {"state_dict": {k: v.half() for k, v in plain.items()}},
        "bare": plain,
    }
    wanted = model_from_checkpoint(fixture("VIT"), **HEADS)
    for variant, content in variants.items():
        torch.save(content, tmp_path / f"{variant}.pt")
        model = model_from_checkpoint(tmp_path / f"{variant}.pt", **HEADS)
        assert model.config.name == "CLIP_VITB16"
        if variant != "half":
            assert_same_outputs(model, wanted)
        else:
            assert next(model.parameters()).dtype == torch.float32
            assert torch.equal(model.textual.text_projection, plain["textual.text_projection"].half().float())


@pytest.mark.parametrize(
    ("upstream", "name"),
    [
        ("CLIP_FrozenInTime_TimeSformerB16", "TIMESFORMER_FROZEN_VITB16"),
        ("CLIP_TimeMamba_like_frozen", "TIMEMAMBA_FROZEN_VITB16"),
        ("CLIP_TimeMamba_like_frozen_joint", "TIMEMAMBA_SPACETIME_VITB16"),
    ],
)
def test_upstream_names_decide_what_shapes_cannot_show(tmp_path, upstream, name):
    source = tiny(name)
    args = argparse.Namespace(model=upstream, clip_length=4, freeze_temperature=True)
    weights = {f"module.{k}": v for k, v in source.state_dict().items()}
    torch.save({"state_dict": weights, "args": args}, tmp_path / "a.pt")
    model = model_from_checkpoint(tmp_path / "a.pt", **HEADS)
    assert (model.config.name, model.config.residual, model.config.mixer) == (
        name,
        source.config.residual,
        source.config.mixer,
    )
    assert not model.logit_scale.requires_grad
    assert_same_outputs(model, source)


def test_a_wrapped_model_is_loaded_inside():
    model = create_model("TIMESFORMER_VITB16", **SIZES)
    wrapped = torch.nn.Module()
    wrapped.module = model
    assert load_checkpoint(wrapped, fixture("ID4")).loaded == len(model.state_dict())
    assert_same_outputs(model, model_from_checkpoint(fixture("ID4"), **HEADS))


def test_from_the_hub_cache(tmp_path, monkeypatch):
    folder = tmp_path / "models--owner--repo"
    target = folder / "snapshots" / ("a" * 40) / "id4.pt"
    target.parent.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("a" * 40)
    target.symlink_to(fixture("ID4"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    model = model_from_checkpoint("hf:owner/repo/id4.pt", **HEADS)
    assert model.load_report.path == "hf:owner/repo/id4.pt"
    assert_same_outputs(model, model_from_checkpoint(fixture("ID4"), **HEADS))


# --- other numbers of frames, other image sizes ----------------------------------------------


def linear_over_time(embed, frames):
    """By hand: frames are equal segments of the clip, their middles at (i + ½) · T / T', ends clamped."""
    embed = np.asarray(embed, dtype=np.float64)
    rows = []
    for i in range(frames):
        at = min(max((i + 0.5) * len(embed) / frames - 0.5, 0), len(embed) - 1)
        low = int(at)
        high = min(low + 1, len(embed) - 1)
        rows.append((1 - (at - low)) * embed[low] + (at - low) * embed[high])
    return np.stack(rows)


@pytest.mark.parametrize("name", ["ID4", "VIT", "LAVILA"])
@pytest.mark.parametrize("frames", [1, 3, 16])
def test_temporal_embedding_is_resized_linearly(name, frames):
    model = model_from_checkpoint(fixture(name), num_frames=frames, **HEADS)
    key = "visual.temporal_embedding" if name == "VIT" else "visual.temporal_embed"
    old = contents(name)["state_dict"][f"module.{key}"]
    new = model.state_dict()[key]
    wanted = linear_over_time(old.reshape(4, 64), frames)
    np.testing.assert_allclose(new.reshape(frames, 64).numpy(), wanted, rtol=0, atol=1e-5)
    assert model.load_report.resized == (f"{key} {tuple(old.shape)} -> {tuple(new.shape)}",)
    assert any(f"trained with 4 frames, the model is built for {frames}" in n for n in model.load_report.notes)
    # The model of 4 frames does the same at run time.
    assert_same_outputs(model, model_from_checkpoint(fixture(name), **HEADS), video=torch.randn(2, 3, frames, 32, 32))


def test_frames_of_a_model_without_temporal_embedding():
    model = model_from_checkpoint(fixture("ID6"), num_frames=16, **HEADS)
    assert model.load_report.resized == () and "4 frames" in model.load_report.notes[0]


@pytest.mark.parametrize("name", NAMES)
def test_position_embedding_is_resized(name):
    model = model_from_checkpoint(fixture(name), img_size=48, **HEADS)
    original = model_from_checkpoint(fixture(name), **HEADS)
    key = "visual.positional_embedding" if name == "VIT" else "visual.pos_embed"
    old, new = original.state_dict()[key], model.state_dict()[key]
    assert new.shape[-2] == 10 and len(model.load_report.resized) == 1
    assert torch.equal(new.reshape(10, 64)[0], old.reshape(5, 64)[0])  # the CLS stays
    # Bicubic (a = -0.75) from 2 to 3 points: the middle one is the mean of the two, by symmetry.
    center = old.reshape(5, 64)[1:].mean(0)
    torch.testing.assert_close(new.reshape(10, 64)[5], center, rtol=0, atol=1e-5)
    assert_same_outputs(model, original, video=torch.randn(2, 3, 4, 48, 48))


# --- what does not fit -----------------------------------------------------------------------


@pytest.mark.parametrize(("saved", "built"), [(a, b) for a in NAMES for b in NAMES if a != b])
def test_a_checkpoint_of_another_model(saved, built):
    model = tiny(NAMES[built])
    text = refused_load(model, fixture(saved))
    assert f"looks like a {NAMES[saved]} checkpoint, the model is {NAMES[built]}" in text
    assert "unexpected (" in text and "missing (" in text


def test_the_count_and_the_first_names_are_given():
    text = refused_load(tiny("TIMEMAMBA_VITB16"), fixture("ID4"))
    # A temporal embedding and 2 x 4 parameters of time attention against 2 x 16 of the mixer.
    assert "9 unexpected (visual.temporal_embed, visual.blocks.0.timeattn." in text
    assert "32 missing (visual.blocks.0.time_mamba." in text


def test_another_residual_is_refused_though_every_shape_fits():
    model = tiny("TIMESFORMER_FROZEN_VITB16")
    text = refused_load(model, fixture("ID4"))
    assert "residual: vanilla in the checkpoint, frozen in the model" in text
    assert "looks like a TIMESFORMER_VITB16 checkpoint, the model is TIMESFORMER_FROZEN_VITB16" in text
    report = load_checkpoint(model, fixture("ID4"), strict=False)
    assert "differs in residual: vanilla in the checkpoint, frozen in the model" in report.notes


@pytest.mark.parametrize("name", NAMES)
def test_another_activation_is_refused(name):
    right = "quick_gelu" if name == "LAVILA" else "gelu"
    wrong = "gelu" if name == "LAVILA" else "quick_gelu"
    text = refused_load(tiny(NAMES[name], act_layer=wrong), fixture(name))
    assert f"act_layer: {right} in the checkpoint, {wrong} in the model" in text
    assert f"build the model with act_layer={right}" in text


def test_other_sizes_are_named():
    text = refused_load(tiny("TIMESFORMER_VITB16", text_width=64, depth=3), fixture("ID4"))
    assert "of another shape (" in text and "textual.positional_embedding (16, 48) for (16, 64)" in text
    assert "same model, other sizes" in text and "depth=2" in text and "text_width=48" in text
    assert "of another shape" in refused_load(tiny("TIMESFORMER_VITB16", text_width=64), fixture("ID4"), strict=False)


def test_entries_of_one_side_only(tmp_path):
    saved = contents("ID4")
    del saved["state_dict"]["module.visual.norm.bias"]
    saved["state_dict"]["module.visual.extra\n"] = torch.ones(1)
    torch.save(saved, tmp_path / "a.pt")
    model = tiny("TIMESFORMER_VITB16")
    bias = model.visual.norm.bias.clone()
    text = refused_load(model, tmp_path / "a.pt")
    assert "1 unexpected ('visual.extra\\n')" in text and "1 missing (visual.norm.bias)" in text
    assert "incomplete" in text
    report = load_checkpoint(model, tmp_path / "a.pt", strict=False)
    assert (report.missing, report.unexpected) == (("visual.norm.bias",), ("visual.extra\n",))
    assert torch.equal(model.visual.norm.bias, bias)
    assert torch.equal(model.visual.norm.weight, saved["state_dict"]["module.visual.norm.weight"])


def test_nothing_in_common_is_refused_even_when_not_strict(tmp_path):
    torch.save({"state_dict": {"w": torch.ones(2)}}, tmp_path / "a.pt")
    text = refused_load(tiny("TIMESFORMER_VITB16"), tmp_path / "a.pt", strict=False)
    assert "no weight in common" in text and "of no layout this project knows" in text


def test_a_part_of_the_weights_loads_when_not_strict(tmp_path):
    weights = {k: v for k, v in contents("ID4")["state_dict"].items() if ".blocks." in k}
    torch.save({"state_dict": weights}, tmp_path / "a.pt")
    report = load_checkpoint(tiny("TIMESFORMER_VITB16"), tmp_path / "a.pt", strict=False)
    assert report.loaded == len(weights) and "visual.cls_token" in report.missing


def test_integers_are_no_weights(tmp_path):
    saved = contents("ID4")
    saved["state_dict"]["module.logit_scale"] = torch.tensor(3)
    torch.save(saved, tmp_path / "a.pt")
    assert "torch.int64 for torch.float32" in refused_load(tiny("TIMESFORMER_VITB16"), tmp_path / "a.pt")


def test_a_classifier_and_an_image_clip_are_named(tmp_path):
    weights = {k: v for k, v in contents("ID4")["state_dict"].items() if ".visual." in k}
    weights["module.fc_cls.weight"] = torch.ones(5, 64)
    torch.save({"state_dict": weights}, tmp_path / "cls.pt")
    image_clip = {"visual.proj": torch.ones(64, 32), "visual.transformer.resblocks.0.ln_1.bias": torch.ones(64)}
    torch.save(image_clip, tmp_path / "clip.pt")
    for path, says in [(tmp_path / "cls.pt", "fine-tuned classifier"), (tmp_path / "clip.pt", "image CLIP")]:
        assert says in refused_load(tiny("TIMESFORMER_VITB16"), path)
        assert says in refusal(model_from_checkpoint, path)


# --- our own ---------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("name", ["TIMEMAMBA_SPACETIME_VITB16", "CLIP_VITB16", "LAVILA_TSF_B16"])
def test_our_own_checkpoints_carry_everything(tmp_path, suffix, name):
    model = tiny(name, num_frames=6, act_layer="quick_gelu", patch_dropout=0.25, grad_checkpointing=True)
    path = tmp_path / f"model{suffix}"
    save_weights(model, path, OPENAI)
    again = model_from_checkpoint(path)
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    # What the model is comes back, how it was run does not.
    assert again.config == dataclasses.replace(model.config, patch_dropout=0.0, grad_checkpointing=False)
    facts = Checkpoint.open(path).facts
    assert (facts.model_name, facts.act_layer, facts.num_frames, facts.img_size) == (name, "quick_gelu", 6, 32)
    assert (facts.norm_style, facts.mean, facts.std) == ("openai", *NORM_STYLES["openai"])
    assert facts.config == model.config
    assert model_from_checkpoint(path, num_frames=3).config.num_frames == 3


def test_our_own_are_checked_against_the_model(tmp_path):
    path = tmp_path / "a.safetensors"
    save_safetensors(tiny("TIMEMAMBA_FROZEN_VITB16"), path, OPENAI)
    text = refused_load(tiny("TIMEMAMBA_SPACETIME_VITB16"), path)
    assert "mixer: vim in the checkpoint, vim_spacetime in the model" in text
    text = refused_load(tiny("TIMEMAMBA_FROZEN_VITB16", num_heads=2), path)
    assert "num_heads: 4 in the checkpoint, 2 in the model" in text
    text = refused_load(tiny("TIMEMAMBA_FROZEN_VITB16", act_layer="quick_gelu"), path)
    assert "build the model with act_layer=gelu" in text
    assert "contradicts" in refusal(model_from_checkpoint, path, name="TIMEMAMBA_VITB16")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"colour": 3}, "unknown fields colour"),
        ({"name": None}, "no name"),
        ({"embed_dim": 10**6}, "says embed_dim=1000000, the weights beside it have 64"),
        ({"depth": 3}, "says depth=3, the weights beside it have 2"),
        ({"depth": "2"}, "depth must be a whole number"),
        ({"mixer": "magic"}, "mixer must be one of"),
        ({"mlp_ratio": "4"}, "model_config"),
        ({"dt_rank": 7}, "says dt_rank=7, the weights beside it have 4"),
        ({"name": "SOMEBODYS_OWN"}, "not registered"),
    ],
)
def test_a_config_that_cannot_be(tmp_path, change, says):
    model = tiny("TIMEMAMBA_VITB16")
    config = dataclasses.asdict(model.config) | change
    torch.save({"state_dict": model.state_dict(), "model_config": config}, tmp_path / "a.pt")
    text = refusal(model_from_checkpoint, tmp_path / "a.pt")
    assert str(tmp_path / "a.pt") in text and says in text


@pytest.mark.parametrize(
    "preprocess",
    [
        [1],
        {"norm_style": "openai"},
        OPENAI | {"mean": (1, 2)},
        OPENAI | {"std": "abc"},
        OPENAI | {"norm_style": 3},
    ],
)
def test_a_preprocess_that_cannot_be(preprocess):
    model = tiny("TIMESFORMER_VITB16")
    saved = {"state_dict": model.state_dict(), "model_config": dataclasses.asdict(model.config)}
    assert "field preprocess" in refusal(lambda: Checkpoint(saved | {"preprocess": preprocess}).facts)


def test_saving_under_another_suffix(tmp_path):
    assert "expected .pt, .pth or .safetensors" in refusal(save_weights, None, tmp_path / "a.bin", OPENAI)
