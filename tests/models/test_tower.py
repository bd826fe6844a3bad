"""A tower is described once, in a file of its own; everything else asks the description."""

import textwrap

import pytest
import torch

from avion.errors import UserError
from avion.models import create_model, list_models, long_video, registry, tower
from avion.models.long_video import encode_long_video
from avion.models.registry import model_config
from avion.weights import Checkpoint, load_pretrained, save_weights
from avion.weights.layouts import layout_of, layouts

from .tiny import TINY, tiny_inputs, tiny_model

# All that it takes to add a tower: this file, and a line that imports it.
MEAN_TOWER = '''
"""A tower without blocks: the mean of all patch embeddings."""

import torch
from torch import nn

from avion.models.clip import CLIP
from avion.models.config import ModelConfig
from avion.models.registry import register_model
from avion.models.stream import Stem, Stream
from avion.models.tower import Layout, Tower, register_tower, rename
from avion.models.transformer import TextTransformer, embed_patches


class MeanTower(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.width = config.embed_dim
        self.patches = nn.Conv2d(config.in_chans, config.embed_dim, config.patch_size, config.patch_size, bias=False)
        self.position = nn.Parameter(torch.zeros(1, 1 + (config.img_size // config.patch_size) ** 2, config.embed_dim))
        self.norm = nn.LayerNorm(config.embed_dim)
        self.image_projection = nn.Parameter(torch.randn(config.embed_dim, config.project_embed_dim))

    def features(self, video):
        tokens = self.norm(embed_patches(video, self.patches, False) + self.position[:, 1:, None])
        return tokens.flatten(1, 2).mean(dim=1)

    def forward(self, video):
        return self.features(video) @ self.image_projection


def build(config):
    return CLIP(MeanTower(config), TextTransformer(config), config)


def stem(tower):
    return Stem(tower.patches, False, tower.position.new_zeros(1, 1, tower.width), tower.position, None, tower.norm)


register_tower(
    Tower(
        name="mean",
        module=MeanTower,
        build=build,
        layout=Layout(
            name="mean", requires=("visual.patches.",), excludes=(), position="visual.position",
            patches="visual.patches.weight", blocks="visual.blocks.", text="textual.",
            projection="visual.image_projection", temporal=None, act_layer="gelu", norm_style="timm",
        ),
        ignored=lambda config: {"mlp_ratio": "this tower has no MLP"},
        from_common=lambda weights: rename(
            {n: w for n, w in weights.items() if not n.startswith(("visual.blocks", "visual.cls_token", "visual.ln_"))},
            ((r"visual[.]patch_embed[.]proj[.]", "visual.patches."), (r"visual[.]pos_embed$", "visual.position")),
        ),
        stem=stem,
        walk=lambda tower, stream: stream.tokens.flatten(1, 2).mean(dim=1),
    )
)
register_model(ModelConfig("MEAN_VITB16", "mean", depth=1), aliases=("UPSTREAM_MEAN",))
'''


@pytest.fixture
def mean_tower(tmp_path, clean_registry):
    """The tower's file, imported; afterwards nothing of it is left."""
    namespace = {"__name__": "mean_tower"}
    exec(compile(textwrap.dedent(MEAN_TOWER), str(tmp_path / "mean_tower.py"), "exec"), namespace)
    return namespace["MeanTower"]


def test_adding_a_tower_is_one_file_and_one_import(mean_tower, tmp_path):
    sizes = {**TINY, "depth": 1}
    model = create_model("UPSTREAM_MEAN", **sizes).eval()
    assert isinstance(model.visual, mean_tower) and "MEAN_VITB16" in list_models("MEAN*")

    # fields that the tower ignores
    with pytest.raises(UserError, match=r"mlp_ratio=2.0 would have no effect: this tower has no MLP"):
        create_model("MEAN_VITB16", mlp_ratio=2.0)
    with pytest.raises(UserError, match=r"mixer='vim' would have no effect"):
        create_model("MEAN_VITB16", mixer="vim")

    # long videos
    video = torch.randn(3, 9, 32, 32)
    with torch.no_grad():
        whole = model.encode_image(video[None])[0]
    walked = encode_long_video(model, lambda a, b: video[:, a:b], 9, max_tokens=10)
    torch.testing.assert_close(walked, whole, atol=1e-5, rtol=0)

    # foreign checkpoints in the tower's layout: found by the names, sizes from the shapes, its normalisation
    torch.save({"state_dict": {f"module.{n}": w for n, w in model.state_dict().items()}}, tmp_path / "foreign.pt")
    opened = Checkpoint.open(tmp_path / "foreign.pt")
    assert layout_of(opened.weights).name == "mean" and opened.facts.norm_style == "timm"
    again = opened.build(name="MEAN_VITB16", num_heads=4, text_heads=4, depth=1, num_frames=4).eval()
    video, tokens = tiny_inputs()
    for ours, theirs in zip(again(video, tokens), model(video, tokens), strict=True):
        assert torch.equal(ours, theirs)

    # our own checkpoints
    save_weights(model, tmp_path / "own.safetensors", {"norm_style": "openai", "mean": [0.0] * 3, "std": [1.0] * 3})
    assert Checkpoint.open(tmp_path / "own.safetensors").build().config == model.config


def test_a_new_tower_may_start_from_image_models(mean_tower, tmp_path):
    """Weights of an image CLIP, by names that this test writes itself."""
    torch.manual_seed(0)
    model = create_model("MEAN_VITB16", **{**TINY, "depth": 1})
    text = {n.removeprefix("textual."): w for n, w in model.state_dict().items() if n.startswith("textual.")}
    clip = {
        **{n: torch.randn_like(w) for n, w in text.items()},
        "visual.conv1.weight": torch.randn(32, 3, 16, 16),
        "visual.class_embedding": torch.randn(32),
        "visual.positional_embedding": torch.randn(5, 32),
        "visual.ln_pre.weight": torch.randn(32),
        "visual.ln_pre.bias": torch.randn(32),
        "visual.ln_post.weight": torch.randn(32),
        "visual.ln_post.bias": torch.randn(32),
        "visual.proj": torch.randn(32, 16),
        "visual.transformer.resblocks.0.ln_1.weight": torch.randn(32),
        "logit_scale": torch.tensor(3.0),
    }
    torch.save(clip, tmp_path / "clip.pt")
    load_pretrained(model, "open_clip", tmp_path / "clip.pt")
    assert torch.equal(model.visual.patches.weight, clip["visual.conv1.weight"])
    assert torch.equal(model.visual.position, clip["visual.positional_embedding"][None])
    assert torch.equal(model.visual.norm.bias, clip["visual.ln_post.bias"])
    assert torch.equal(model.textual.ln_final.weight, clip["ln_final.weight"])


def test_every_tower_states_all_facts():
    """Of the towers of the project, each belongs to registered models, and no two layouts fit the same names."""
    used = {model_config(name).tower for name in list_models()}
    assert {t.name for t in tower.towers()} == used == {"divided", "joint", "lavila"}
    for name in list_models("*B16"):
        weights = create_model(name, **TINY).state_dict()
        assert [layout.name for layout in layouts() if layout.fits(weights)] == [model_config(name).tower]


@pytest.mark.parametrize("name", ["TIMESFORMER_VITB16", "TIMEMAMBA_FROZEN_VITB16", "CLIP_VITB16", "LAVILA_TSF_B16"])
def test_the_block_and_its_walk_hold_the_same_mathematics(name):
    """Every registered tower in double precision, one token in work at a time (all overrides: test_long_video.py)."""
    model = tiny_model(name).double().eval()
    video = torch.randn(3, 6, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        whole = model.encode_image(video[None])[0]
    walked = encode_long_video(model, lambda a, b: video[:, a:b], 6, max_tokens=1)
    torch.testing.assert_close(walked, whole, atol=1e-11, rtol=1e-9)


def test_the_walks_of_all_towers_are_among_the_cases():
    names = ["TIMESFORMER_VITB16", "TIMEMAMBA_FROZEN_VITB16", "CLIP_VITB16", "LAVILA_TSF_B16"]
    assert {model_config(name).tower for name in names} == {t.name for t in tower.towers() if t.walk is not None}


def test_a_name_is_registered_once(mean_tower):
    with pytest.raises(ValueError, match="'divided' is already registered"):
        tower.register_tower(tower.find_tower("divided"))
    with pytest.raises(UserError, match=r"tower 'none' is not registered: give build="):
        registry.register_model(registry.ModelConfig("NEW", "none"))


def test_a_tower_without_a_walk_is_refused_for_long_videos():
    model = tiny_model("CLIP_VITB16").eval()
    model.visual = torch.nn.Linear(1, 1)
    with pytest.raises(UserError, match="Linear: no forward for long videos is known for it, only for"):
        long_video.encode_long_video(model, lambda a, b: torch.zeros(3, b - a, 32, 32), 4)
