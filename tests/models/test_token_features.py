"""The towers' tokens after the last norm: which patch and frame each is, and that the last block counts."""

import pytest
import torch
import torch.nn.functional as F

from avion.models.registry import model_config

from .oracle import divided_features
from .tiny import DISTINCT_MODELS, DIVIDED_MODELS, tiny_model

SIZES = {"img_size": 24, "patch_size": 8, "embed_dim": 16, "num_heads": 2, "num_frames": 3}  # nine patches


def tower_and_video(name):
    tower = tiny_model(name, **SIZES).double().visual.eval()
    return tower, torch.randn(2, 3, 3, 24, 24, dtype=torch.float64)


@pytest.mark.parametrize("name", DISTINCT_MODELS)
def test_the_cls_is_that_of_the_embedding(name):
    tower, video = tower_and_video(name)
    cls, tokens = tower.token_features(video)
    assert tokens.shape == (2, 9, 3, 16)
    torch.testing.assert_close(cls, tower.features(video), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", DIVIDED_MODELS)
def test_tokens_of_divided_towers_equal_the_oracle(name):
    tower, video = tower_and_video(name)
    config = model_config(name)
    with torch.no_grad():
        cls, tokens = tower.token_features(video)
        kind = {"mixer": config.mixer, "residual": config.residual, "heads": 2, "depth": 2, "patch": 8}
        wanted = divided_features(video, dict(tower.named_parameters()), **kind)
    for b, (wanted_cls, wanted_tokens) in enumerate(wanted):
        torch.testing.assert_close(cls[b], wanted_cls, rtol=1e-9, atol=1e-9)
        assert len(wanted_tokens) == 27
        for (n, t), value in wanted_tokens.items():
            torch.testing.assert_close(tokens[b, n, t], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["CLIP_VITB16"])
def test_tokens_of_the_joint_tower_equal_pytorch_s_own_layers(name):
    tower, video = tower_and_video(name)
    with torch.no_grad():
        x = F.conv2d(video.transpose(1, 2).flatten(0, 1), tower.conv1.weight, stride=8).flatten(2).transpose(1, 2)
        x = x.view(2, 3, 9, 16) + tower.positional_embedding[1:] + tower.temporal_embedding[:, None]
        cls = (tower.class_embedding + tower.positional_embedding[0]).expand(2, 1, 16)
        x = tower.ln_pre(torch.cat([cls, x.flatten(1, 2)], dim=1))
        for block in tower.transformer.resblocks:
            y = block.ln_1(x).transpose(0, 1)
            own, out = block.attn.Wqkv, block.attn.out_proj
            y, _ = F.multi_head_attention_forward(
                y, y, y, 16, 2, own.weight, own.bias, None, None, False, 0.0, out.weight, out.bias
            )
            x = x + y.transpose(0, 1)
            x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.ln_2(x))))
        x = tower.ln_post(x)
        cls, tokens = tower.token_features(video)
    torch.testing.assert_close(cls, x[:, 0])
    torch.testing.assert_close(tokens, x[:, 1:].view(2, 3, 9, 16).transpose(1, 2))


@pytest.mark.parametrize("name", DISTINCT_MODELS)
def test_each_token_lies_at_its_patch_and_frame(name):
    """With blocks that do nothing a token is its patch's, and no other's."""
    tower, video = tower_and_video(name)
    with torch.no_grad():
        blocks = tower.blocks if hasattr(tower, "blocks") else tower.transformer.resblocks
        for block in blocks:
            for module in block.modules():
                for writer in ("out_proj", "proj", "fc2"):
                    if isinstance(getattr(module, writer, None), torch.nn.Linear):
                        for parameter in getattr(module, writer).parameters():
                            parameter.zero_()
        _, before = tower.token_features(video)
        changed = video.clone()
        changed[1, :, 2, 8:16, 16:24] += 1.0  # second row, third column: patch 5; frame 2
        _, after = tower.token_features(changed)
    moved = (after - before).abs().amax(dim=-1) > 1e-9
    assert moved.nonzero().tolist() == [[1, 5, 2]]


@pytest.mark.parametrize("name", DISTINCT_MODELS)
def test_the_last_block_s_mlp_counts(name):
    tower, video = tower_and_video(name)
    blocks = tower.blocks if hasattr(tower, "blocks") else tower.transformer.resblocks
    with torch.no_grad():
        _, before = tower.token_features(video)
        blocks[-1].mlp.fc2.bias += torch.randn(16, dtype=torch.float64)
        _, after = tower.token_features(video)
    assert ((after - before).abs().amax(dim=-1) > 1e-6).all()
