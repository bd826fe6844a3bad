"""From which values training starts, held as distributions: where CLIP's weights come on top, and where none do.

Samples are compared with a distribution by their largest distance from its cumulative function (Kolmogorov and
Smirnov), which exceeds 2.5 / √n once in 130,000 draws of the right distribution.
"""

import math

import open_clip
import pytest
import torch

from avion.models import create_model
from avion.weights import load_pretrained

from .tiny import DIVIDED_MODELS

WIDTH, LAYERS, TEXT_WIDTH = 128, 4, 96
SIZES = {
    "img_size": 224, "patch_size": 16, "embed_dim": WIDTH, "depth": LAYERS, "num_heads": 4, "num_frames": 4,
    "project_embed_dim": 64, "context_length": 77, "vocab_size": 512, "text_width": TEXT_WIDTH, "text_heads": 4,
    "text_layers": LAYERS,
}  # fmt: skip
ATTENTION_MODELS = [name for name in DIVIDED_MODELS if name.startswith("TIMESFORMER")]


def uniform(bound):
    return lambda x: ((x + bound) / (2 * bound)).clamp(0, 1)


def normal(std):
    return lambda x: (1 + torch.erf(x / (std * math.sqrt(2)))) / 2


def distance(values, cumulative):
    """The largest distance between the share of values below a number and `cumulative` there."""
    values = torch.cat([v.detach().double().flatten() for v in values]).sort().values
    expected, n = cumulative(values), len(values)
    rank = torch.arange(n, dtype=torch.float64)
    return max((expected - rank / n).max().item(), ((rank + 1) / n - expected).max().item()), n


def assert_distributed(values, cumulative):
    found, n = distance(values, cumulative)
    assert found < 2.5 / math.sqrt(n), f"distance {found:.4f} of {n} values"


def assert_uniform(layers):
    """PyTorch's linear layers: weights and biases uniform in ±1/√inputs, out to the bound."""
    bound = layers[0].in_features ** -0.5
    for values in ([layer.weight for layer in layers], [layer.bias for layer in layers]):
        assert_distributed(values, uniform(bound))
        largest = max(v.abs().max().item() for v in values)
        assert 0.97 * bound < largest <= bound
        assert torch.cat([v.flatten() for v in values]).std().item() == pytest.approx(bound / math.sqrt(3), rel=0.12)


def assert_normal(values, std):
    assert_distributed(values, normal(std))
    assert torch.cat([v.flatten() for v in values]).std().item() == pytest.approx(std, rel=0.1)


def test_the_distance_tells_the_shapes_apart():
    """A normal of the same mean and deviation is not taken for the uniform, nor the reverse; nor 0.02 for 0.0225."""
    bound, n = 1 / math.sqrt(WIDTH), 3 * WIDTH * WIDTH
    flat = torch.empty(n).uniform_(-bound, bound)
    bell = torch.empty(n).normal_(std=bound / math.sqrt(3))
    assert_distributed([flat], uniform(bound))
    assert_distributed([bell], normal(bound / math.sqrt(3)))
    for values, cumulative in ((flat, normal(bound / math.sqrt(3))), (bell, uniform(bound))):
        assert distance([values], cumulative)[0] > 4 * 2.5 / math.sqrt(n)
    assert distance([torch.empty(n).normal_(std=0.0225)], normal(0.02))[0] > 2 * 2.5 / math.sqrt(n)


def test_the_distance_by_hand():
    """The uniform on ±1 has 0.55 of its values below 0.1, below which the sample has none; at 0.7 they are nearer."""
    found, n = distance([torch.tensor([0.7, 0.1])], uniform(1.0))
    assert n == 2 and found == pytest.approx(0.55, abs=1e-6)


# ---- from scratch ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DIVIDED_MODELS)
def test_a_divided_tower_starts_from_pytorchs_linear_layers(name):
    tower = create_model(name, **SIZES).visual
    assert_uniform([block.attn.Wqkv for block in tower.blocks])
    assert_uniform([block.attn.out_proj for block in tower.blocks])
    assert_uniform([block.mlp.fc1 for block in tower.blocks])
    assert_uniform([block.mlp.fc2 for block in tower.blocks])
    assert_normal([tower.pos_embed], 0.02)
    assert_normal([tower.image_projection], WIDTH**-0.5)
    for norm in (tower.ln_pre, tower.norm, *(n for b in tower.blocks for n in (b.norm1, b.norm2, b.norm3))):
        assert (norm.weight == 1).all() and (norm.bias == 0).all()


@pytest.mark.parametrize("name", ATTENTION_MODELS)
def test_time_attention_starts_from_pytorchs_linear_layers(name):
    tower = create_model(name, **SIZES).visual
    assert_uniform([block.timeattn.Wqkv for block in tower.blocks])
    assert_uniform([block.timeattn.out_proj for block in tower.blocks])
    assert (tower.temporal_embed == 0).all()


@pytest.mark.parametrize("name", ["TIMESFORMER_VITB16", "TIMEMAMBA_VITB16", "LAVILA_TSF_B16"])
def test_the_cls_token_of_divided_towers(name):
    """128 numbers a model are few: those of many."""
    sizes = SIZES | {"depth": 1, "text_layers": 1, "img_size": 32}
    assert_normal([create_model(name, **sizes).visual.cls_token for _ in range(24)], 0.02)


def test_lavilas_space_attention_and_mlp():
    tower = create_model("LAVILA_TSF_B16", **SIZES).visual
    assert_uniform([block.attn.qkv for block in tower.blocks])
    assert_uniform([block.attn.proj for block in tower.blocks])
    assert_uniform([block.mlp.fc1 for block in tower.blocks])
    assert_uniform([block.mlp.fc2 for block in tower.blocks])
    assert_normal([tower.pos_embed], 0.02)


def test_avions_vit_starts_from_timms_values():
    tower = create_model("CLIP_VITB16", **SIZES).visual
    for block in tower.transformer.resblocks:
        for layer in (block.attn.Wqkv, block.attn.out_proj, block.mlp.fc1, block.mlp.fc2):
            assert_normal([layer.weight], 0.02)
            assert (layer.bias == 0).all()
        assert (block.ln_1.weight == 1).all() and (block.ln_2.weight == 1).all()
    assert_normal([tower.positional_embedding], 0.02)
    assert_normal([tower.image_projection], WIDTH**-0.5)
    assert (tower.temporal_embedding == 0).all()
    small = SIZES | {"depth": 1, "text_layers": 1, "img_size": 32}
    assert_normal([create_model("CLIP_VITB16", **small).visual.class_embedding for _ in range(24)], 0.02)


def test_the_text_tower_starts_from_clips_values():
    tower = create_model("TIMEMAMBA_VITB16", **SIZES).textual
    blocks, out_std = tower.transformer.resblocks, TEXT_WIDTH**-0.5 * (2 * LAYERS) ** -0.5
    assert_normal([b.attn.in_proj_weight for b in blocks], TEXT_WIDTH**-0.5)
    assert_normal([b.attn.out_proj.weight for b in blocks], out_std)
    assert_normal([b.mlp.c_fc.weight for b in blocks], (2 * TEXT_WIDTH) ** -0.5)
    assert_normal([b.mlp.c_proj.weight for b in blocks], out_std)
    assert_normal([tower.token_embedding.weight], 0.02)
    assert_normal([tower.positional_embedding], 0.01)
    assert_normal([tower.text_projection], TEXT_WIDTH**-0.5)
    assert all((b.attn.in_proj_bias == 0).all() and (b.attn.out_proj.bias == 0).all() for b in blocks)
    for layers in ([b.mlp.c_fc for b in blocks], [b.mlp.c_proj for b in blocks]):
        assert_distributed([layer.bias for layer in layers], uniform(layers[0].in_features ** -0.5))


# ---- after CLIP's weights ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def image_clip(tmp_path_factory):
    """A file of open_clip's own model of these sizes, every weight 7: what is loaded is plain to see."""
    clip = open_clip.model.CLIP(
        embed_dim=64,
        vision_cfg=open_clip.CLIPVisionCfg(layers=LAYERS, width=WIDTH, head_width=32, patch_size=16, image_size=224),
        text_cfg=open_clip.CLIPTextCfg(context_length=77, vocab_size=512, width=TEXT_WIDTH, heads=4, layers=LAYERS),
        quick_gelu=True,
    )
    path = tmp_path_factory.mktemp("clip") / "clip.pt"
    torch.save({name: torch.full_like(value, 7.0) for name, value in clip.state_dict().items()}, path)
    return path


@pytest.mark.parametrize("name", ATTENTION_MODELS)
def test_time_attention_after_clips_weights(name, image_clip):
    """Rows ID4 and ID5: all else is CLIP's then, and time attention still starts from PyTorch's linear layers."""
    model = create_model(name, **SIZES)
    load_pretrained(model, "openai", str(image_clip))
    blocks = model.visual.blocks
    assert_uniform([block.timeattn.Wqkv for block in blocks])
    assert_uniform([block.timeattn.out_proj for block in blocks])
    own = [n for n, value in model.state_dict().items() if not (value == 7.0).all()]
    assert own and all("timeattn" in n or "norm3" in n or n == "visual.temporal_embed" for n in own)
