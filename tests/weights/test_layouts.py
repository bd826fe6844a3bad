"""Names and shapes of foreign state dicts, on plain dicts of tensors."""

from pathlib import Path

import pytest
import torch

from avion.errors import UserError
from avion.models.timemamba import has_time_mamba
from avion.weights.files import checkpoint_state_dict, read_checkpoint
from avion.weights.layouts import canonical, fit, layout_of, likely_models, sizes_of

FIXTURES = Path(__file__).parents[1] / "fixtures"

# As the fixtures were made; text tower and sizes that all four share.
COMMON = {
    "img_size": 32,
    "patch_size": 16,
    "in_chans": 3,
    "embed_dim": 64,
    "depth": 2,
    "mlp_ratio": 4.0,
    "project_embed_dim": 32,
    "context_length": 16,
    "vocab_size": 512,
    "text_width": 48,
    "text_layers": 2,
}
VIM = {"ssm_expand": 1, "d_state": 16, "d_conv": 4, "dt_rank": None}  # 4 = 64 / 16, the default


def weights_of(name):
    return canonical(checkpoint_state_dict(read_checkpoint(FIXTURES / f"{name}_checkpoint.pt")))


@pytest.mark.parametrize(
    ("name", "layout", "extra"),
    [
        ("ID4", "divided", {"num_frames": 4}),
        ("ID6", "divided", VIM),
        ("VIT", "joint", {"num_frames": 4}),
        ("LAVILA", "lavila", {"num_frames": 4, "gated_time": False}),
    ],
)
def test_layout_and_sizes(name, layout, extra):
    weights = weights_of(name)
    found = layout_of(weights)
    assert found.name == layout
    assert sizes_of(weights, found, "file") == COMMON | extra
    assert has_time_mamba(weights) == (name == "ID6")


def test_wrappers_in_any_order_and_place():
    value = torch.ones(1)
    for name in (
        "visual.w",
        "module.visual.w",
        "_orig_mod.visual.w",
        "module._orig_mod.visual.w",
        "_orig_mod.module.visual.w",
        "module.module.visual.w",
        "visual._orig_mod.w",
        "module.visual._orig_mod.w",
    ):
        assert list(canonical({name: value})) == ["visual.w"]
    assert list(canonical({"visual.module.w": value, "module": value})) == ["visual.module.w", "module"]


def test_one_name_per_parameter_in_each_tower():
    value = torch.ones(1)
    plain = ["attn.in_proj_weight", "attn.in_proj_bias", "mlp.c_fc.weight", "mlp.c_proj.bias"]
    flash = ["attn.Wqkv.weight", "attn.Wqkv.bias", "mlp.fc1.weight", "mlp.fc2.bias"]
    for names in (plain, flash):
        video = canonical({f"visual.transformer.resblocks.1.{n}": value for n in names})
        text = canonical({f"textual.transformer.resblocks.1.{n}": value for n in names})
        assert list(video) == [f"visual.transformer.resblocks.1.{n}" for n in flash]
        assert list(text) == [f"textual.transformer.resblocks.1.{n}" for n in plain]


def test_two_entries_under_one_name_are_refused():
    value = torch.ones(1)
    with pytest.raises(UserError, match=r"file\.pt: holds visual\.w twice"):
        canonical({"module.visual.w": value, "visual.w": value}, "file.pt")
    with pytest.raises(UserError, match="twice"):
        canonical({"visual.b.attn.in_proj_bias": value, "visual.b.attn.Wqkv.bias": value})


def test_fast_conv1_is_in_c_h_w_order():
    conv = torch.arange(2 * 3 * 4 * 4.0).reshape(2, 3, 4, 4)
    rows = torch.stack([torch.cat([conv[d, c, y] for c in range(3) for y in range(4)]) for d in range(2)])
    assert torch.equal(canonical({"visual.conv1.weight": rows})["visual.conv1.weight"], conv)


def test_likely_models():
    names = {name: likely_models(weights_of(name), layout_of(weights_of(name))) for name in ("ID4", "ID6")}
    assert names["ID4"] == ["TIMESFORMER_FROZEN_VITB16", "TIMESFORMER_VITB16"]
    assert names["ID6"] == ["TIMEMAMBA_FROZEN_VITB16", "TIMEMAMBA_SPACETIME_VITB16", "TIMEMAMBA_VITB16"]


def test_sizes_of_impossible_shapes():
    weights = weights_of("ID4")
    for name, value, says in [
        ("visual.pos_embed", torch.zeros(1, 7, 64), "square grid"),
        ("visual.pos_embed", torch.zeros(5), "square grid"),
        ("visual.patch_embed.proj.weight", torch.zeros(64, 768), "4 dimensions"),
        ("textual.token_embedding.weight", torch.zeros(0, 48), "2 dimensions"),
    ]:
        with pytest.raises(UserError, match=f"file: {name}.*{says}"):
            sizes_of(weights | {name: value}, layout_of(weights), "file")


def test_fit_says_what_goes_where():
    target = {"a": torch.zeros(2), "b": torch.zeros(3), "scale": torch.zeros([]), "ids": torch.zeros(2).long()}
    weights = {
        "a": torch.ones(2),
        "scale": torch.ones(1),
        "ids": torch.ones(2),
        "other": torch.ones(1),
        "b": torch.ones(4),
    }
    found = fit(weights, target)
    assert found.values.keys() == {"a", "scale"} and found.values["scale"].shape == ()
    assert found.misshapen == ["b (4,) for (3,)", "ids torch.float32 for torch.int64"]
    assert (found.unexpected, found.missing, found.resized) == (["other"], [], [])


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("visual.temporal_embed", (1, 4, 8), (1, 6, 16)),  # another width
        ("visual.temporal_embed", (4, 8), (1, 6, 8)),
        ("visual.temporal_embed", (2, 4, 8), (1, 4, 8)),
        ("visual.pos_embed", (1, 6, 8), (1, 10, 8)),  # not square
        ("visual.pos_embed", (1, 1, 8), (1, 5, 8)),  # no patches
        ("textual.positional_embedding", (16, 8), (77, 8)),  # text has no other sizes
    ],
)
def test_embeddings_that_cannot_be_resized(name, value, wanted):
    found = fit({name: torch.zeros(value)}, {name: torch.zeros(wanted)})
    assert not found.values and found.misshapen == [f"{name} {value} for {wanted}"]
