"""The list of models, its errors, and a model added from outside."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from avion.constants import NORM_STYLES
from avion.errors import UserError
from avion.models import create_model, list_models, register_model
from avion.models.__main__ import LISTING, listing, main, registered, update_listing
from avion.models.registry import ModelConfig, model_aliases, model_config, resolve_name
from avion.models.timemamba import build_divided
from avion.weights import save_weights

from .tiny import DISTINCT_MODELS, TINY, tiny_inputs, tiny_model

ROWS = ["TIMESFORMER", "TIMESFORMER_FROZEN", "TIMEMAMBA", "TIMEMAMBA_FROZEN", "TIMEMAMBA_SPACETIME"]
SIZES = {"T16": (192, 3, 12, 16), "S16": (384, 6, 12, 16), "B16": (768, 12, 12, 16), "L14": (1024, 16, 24, 14)}


def meta_model(name, **overrides):
    with torch.device("meta"):
        return create_model(name, **overrides)


def test_the_list():
    others = {"CLIP_VITB16", "CLIP_VITB32", "CLIP_VITL14", "CLIP_VITL14_336PX", "LAVILA_TSF_B16", "LAVILA_TSF_L14"}
    assert set(list_models()) == {f"{row}_VIT{size}" for row in ROWS for size in SIZES} | others
    assert list_models() == sorted(list_models())
    assert list_models("TIMEMAMBA_VIT*") == [f"TIMEMAMBA_VIT{size}" for size in ("B16", "L14", "S16", "T16")]


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("size", SIZES)
def test_sizes(row, size):
    config = model_config(f"{row}_VIT{size}")
    assert (config.embed_dim, config.num_heads, config.depth, config.patch_size) == SIZES[size]
    text = (config.text_width, config.text_heads, config.text_layers, config.context_length)
    assert text == ((768, 12, 12, 77) if size == "L14" else (512, 8, 12, 77))
    assert (config.project_embed_dim, config.img_size, config.num_frames) == (256, 224, 4)


@pytest.mark.parametrize(
    ("alias", "name", "choices"),
    [
        ("CLIP_TimeSformerB16", "TIMESFORMER_VITB16", ("attention", "vanilla")),
        ("CLIP_FrozenInTime_TimeSformerB16", "TIMESFORMER_FROZEN_VITB16", ("attention", "frozen")),
        ("CLIP_TimeMamba_like_timesformer", "TIMEMAMBA_VITB16", ("vim", "vanilla")),
        ("CLIP_TimeMamba_like_frozen", "TIMEMAMBA_FROZEN_VITB16", ("vim", "frozen")),
        ("CLIP_TimeMamba_like_frozen_joint", "TIMEMAMBA_SPACETIME_VITB16", ("vim_spacetime", "frozen")),
        ("CLIP_OPENAI_TIMESFORMER_BASE", "LAVILA_TSF_B16", ("attention", "vanilla")),
        ("CLIP_OPENAI_TIMESFORMER_LARGE", "LAVILA_TSF_L14", ("attention", "vanilla")),
    ],
)
def test_upstream_names(alias, name, choices):
    config = model_config(alias)
    assert resolve_name(alias) == config.name == name
    assert (config.mixer, config.residual) == choices
    assert alias in model_aliases(name) and alias not in list_models()


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("TIMESFORMER_VITB16", 114_365_964),
        ("TIMESFORMER_FROZEN_VITB16", 114_365_964),
        ("TIMEMAMBA_VITB16", 110_031_372),
        ("TIMEMAMBA_FROZEN_VITB16", 110_031_372),
        ("TIMEMAMBA_SPACETIME_VITB16", 110_031_372),
    ],
)
def test_parameters_of_the_video_tower(name, count):
    assert sum(p.numel() for p in meta_model(name).visual.parameters()) == count


def test_expansion_two_doubles_the_mixers_inner_width():
    """E = 2, the ViM default: 6.5 D² of projections and more."""
    mixer = meta_model("TIMEMAMBA_VITB16", ssm_expand=2, d_state=8, d_conv=3).visual.blocks[0].time_mamba
    assert mixer.in_proj.weight.shape == (2 * 2 * 768, 768) and mixer.A_log.shape == (1536, 8)
    assert mixer.conv1d.weight.shape == (1536, 1, 3)
    video, tokens = tiny_inputs()
    wide = tiny_model("TIMEMAMBA_SPACETIME_VITB16", ssm_expand=2, d_state=8, d_conv=2, dt_rank=3)
    assert wide(video, tokens)[0].shape == (2, 16)


def test_the_main_lists_counts(capsys):
    assert main(["*_VITB16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 6
    row = next(line.split() for line in lines if line.startswith("TIMEMAMBA_VITB16"))
    # text: embeddings, 12 blocks of 12 D² + 13 D, the last norm, the projection
    text = 49408 * 512 + 77 * 512 + 12 * (12 * 512**2 + 13 * 512) + 2 * 512 + 512 * 256
    counts = [f"{n:,}" for n in (110_031_372, text, 110_031_372 + text + 1)]
    assert row == ["TIMEMAMBA_VITB16", *counts, "CLIP_TimeMamba_like_timesformer"]


def test_the_listing_is_that_of_the_registry(tmp_path, monkeypatch):
    assert listing() == registered(), "run: python -m avion.models --update-listing"
    monkeypatch.setattr("avion.models.__main__.LISTING", tmp_path / "listing.json")
    update_listing()
    assert (tmp_path / "listing.json").read_bytes() == LISTING.read_bytes()


def test_the_main_describes_a_checkpoint(capsys, tmp_path):
    model = create_model("TIMEMAMBA_VITT16", **TINY)
    save_weights(model, tmp_path / "model.pt", {"norm_style": "openai", **NORM_STYLES["openai"]._asdict()})
    assert main([str(tmp_path / "model.pt")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(tmp_path / "model.pt")
    facts = dict(line.split(maxsplit=1) for line in lines[1:] if not line.startswith("  image size"))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert facts["model"] == "TIMEMAMBA_VITT16" and facts["parameters"] == f"{count:,}"
    assert facts["normalisation"] == "openai" and facts["layout"] == "divided"
    assert f"  image size     {model.config.img_size} px" in lines


def test_the_main_says_what_a_checkpoint_does_not_say(capsys):
    fixtures = Path(__file__).parents[1] / "fixtures"
    assert main([str(fixtures / "ID6_checkpoint.pt")]) == 0
    facts = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:])
    # The text tower of the fixture is 48 channels wide, and heads are 64 wide.
    assert "give text_heads=" in facts["model"] and facts["layout"] == "divided"
    assert facts["training"] == "state  epoch 5, 0 optimizer steps done in it"


def test_the_main_refuses_a_pattern_without_a_model(capsys):
    assert main(["nothing*"]) == 2
    assert capsys.readouterr().err.startswith("python -m avion.models: error: nothing*: no registered model")


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [create_model, model_config, resolve_name])
def test_an_unknown_name_lists_the_near_ones(function):
    with pytest.raises(UserError, match=r"^unknown model 'TIMEMAMBA_VITB'; did you mean .*TIMEMAMBA_VITB16") as error:
        function("TIMEMAMBA_VITB")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="TIMEMAMBA_VITB16"):
        function("timemamba_vitb16")
    with pytest.raises(UserError, match=r"python -m avion\.models"):
        function("resnet50")


def test_an_unknown_field_names_the_near_ones():
    with pytest.raises(UserError, match=r"unknown field 'droppath_rate'; did you mean drop_path_rate"):
        create_model("TIMEMAMBA_VITB16", droppath_rate=0.1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"embed_dim": 50}, "embed_dim=50 must be a multiple of num_heads=4"),
        ({"text_heads": 5}, "text_width=32 must be a multiple of text_heads=5"),
        ({"img_size": 40}, "img_size=40 must be a multiple of patch_size=16"),
        ({"depth": 0}, "depth must be a whole number from 1 to 1024, found 0"),
        ({"depth": "12"}, "depth must be a whole number"),
        ({"num_frames": True}, "num_frames must be a whole number"),
        ({"drop_path_rate": 1.0}, "drop_path_rate must be a number from 0 to below 1, found 1.0"),
        ({"patch_dropout": -0.1}, "patch_dropout must be a number from 0 to below 1, found -0.1"),
        ({"act_layer": "relu"}, "act_layer must be one of gelu, quick_gelu, found 'relu'"),
        ({"use_flash_attn": "yes"}, "use_flash_attn must be True or False, or None, found 'yes'"),
        ({"grad_checkpointing": 1}, "grad_checkpointing must be True or False, found 1"),
        ({"temperature_init": 0}, "temperature_init must be a number from 1e-06 to 100, found 0"),
        ({"dt_rank": 0}, "dt_rank must be a whole number from 1 to 1000000, or None, found 0"),
        ({"tower": "joint"}, "tower cannot be overridden"),
        ({"mixer": "mamba"}, "mixer must be one of attention, vim, vim_spacetime"),
        ({"residual": "thawed"}, "residual must be one of vanilla, frozen"),
        ({"gated_time": True}, "gated_time=True would have no effect"),
        ({"scan_backend": "fastest"}, "fastest"),
    ],
)
def test_a_value_the_model_cannot_honour(overrides, message):
    with pytest.raises(UserError, match=message) as error:
        meta_model("TIMEMAMBA_VITB16", **{**TINY, **overrides})
    assert "\n" not in str(error.value)


CHANGES = {"mixer": "vim", "residual": "frozen", "d_state": 8, "scan_backend": "reference", "gated_time": True}


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        (name, field, value)
        for name in DISTINCT_MODELS
        for field, value in CHANGES.items()
        if getattr(model_config(name), field) != value
    ],
)
def test_an_override_does_something_or_is_refused(name, field, value):
    """A field that a model accepts changes it (here: its parameters, its blocks or its scan)."""
    try:
        changed = meta_model(name, **TINY, **{field: value})
    except UserError as error:
        assert f"{field}={value!r} would have no effect" in str(error)
        return
    plain = meta_model(name, **TINY)

    def shape(model):
        return {key: p.shape for key, p in model.named_parameters()}

    def attributes(model):
        names = ("residual", "mixer", "scan_backend")
        return [[getattr(module, name, None) for name in names] for module in model.modules()]

    assert shape(changed) != shape(plain) or attributes(changed) != attributes(plain)


# ---- from outside ------------------------------------------------------------------------------


def test_the_example_of_the_docs(clean_registry):
    page = Path(__file__).parents[2] / "docs" / "models.md"
    exec(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)[-1], {})

    assert list_models("MY_*") == ["MY_TIMEMAMBA"]
    config = model_config("my_timemamba")
    assert (config.depth, config.ssm_expand, config.embed_dim) == (6, 2, 384)
    model = create_model("my_timemamba", **{**TINY, "depth": 3})
    assert len(model.visual.blocks) == 3 and model.config.name == "MY_TIMEMAMBA"
    assert model(*tiny_inputs())[0].shape == (2, 16)


def test_a_tower_with_fields_of_its_own(clean_registry):
    @dataclasses.dataclass(frozen=True)
    class PoolConfig(ModelConfig):
        pool: str = "mean"

    class Pool(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            self.config = config

    register_model(PoolConfig("POOL", "pool"), Pool)
    assert create_model("POOL", pool="max").config.pool == "max"
    with pytest.raises(UserError, match="did you mean pool"):
        create_model("POOL", pol="max")


def test_a_taken_name_is_refused(clean_registry):
    for name in ("CLIP_VITB16", "CLIP_TimeSformerB16"):
        with pytest.raises(UserError, match=f"'{name}' is already taken"):
            register_model(ModelConfig(name, "joint"), build_divided)
    with pytest.raises(UserError, match="already taken"):
        register_model(ModelConfig("NEW", "divided"), build_divided, aliases=("CLIP_VITB16",))
    assert "NEW" not in list_models()


def test_a_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        model_config("CLIP_VITB16").depth = 3
