"""The same numbers as the upstream modules (recorded in tests/fixtures) and as an oracle written in loops."""

import pytest
import torch

from avion.models import create_model, load_checkpoint, model_from_checkpoint
from avion.models.registry import model_config
from tests.weights.checkpoints import FIXTURES, HEADS, SIZES, fixture

from .oracle import divided_tower
from .tiny import DIVIDED_MODELS, tiny_model

MODELS = {  # upstream's name, as in the checkpoint's args
    "ID4": "CLIP_TimeSformerB16",
    "ID6": "CLIP_TimeMamba_like_timesformer",
    "VIT": "CLIP_VITB16",
    "LAVILA": "CLIP_OPENAI_TIMESFORMER_BASE",
}


def expected(name: str) -> dict:
    return torch.load(FIXTURES / f"{name}_expected.pt", weights_only=True)


def loaded_model(name: str, **overrides):
    model = create_model(MODELS[name], **SIZES, **overrides)
    report = load_checkpoint(model, fixture(name))
    assert not report.missing and not report.unexpected and not report.resized
    return model


@pytest.mark.parametrize("fast_conv1", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_embeddings_are_upstreams(name, fast_conv1):
    model, wanted = loaded_model(name, use_fast_conv1=fast_conv1), expected(name)
    with torch.no_grad():
        video_embed, text_embed, scale = model(wanted["video"], wanted["tokens"])
    torch.testing.assert_close(video_embed, wanted["video_embed"], atol=1e-4, rtol=0)
    torch.testing.assert_close(text_embed, wanted["text_embed"], atol=1e-4, rtol=0)
    torch.testing.assert_close(scale.item(), 1 / 0.07, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["ID4", "ID6", "VIT"])
def test_gradient_norms_are_upstreams(name):
    model, wanted = loaded_model(name), expected(name)
    video_embed, _, _ = model(wanted["video"], wanted["tokens"])
    (video_embed * wanted["loss_weight"]).sum().backward()
    parameters = dict(model.visual.named_parameters())
    assert parameters.keys() == wanted["grad_norms"].keys()
    for key, norm in wanted["grad_norms"].items():
        found = parameters[key].grad.norm()
        torch.testing.assert_close(found, torch.as_tensor(norm), rtol=1e-3, atol=1e-7, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_says_which_model_it_is(name):
    model, wanted = model_from_checkpoint(fixture(name), **HEADS), expected(name)
    assert model.config.name == model_config(MODELS[name]).name
    with torch.no_grad():
        video_embed = torch.nn.functional.normalize(model.encode_image(wanted["video"]), dim=-1)
    torch.testing.assert_close(video_embed, wanted["video_embed"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("name", DIVIDED_MODELS)
def test_all_five_rows_equal_the_oracle(name, act):
    """Outputs and every gradient, float64. Nine patches and three frames: swapping them would still run."""
    sizes = {"img_size": 24, "patch_size": 8, "embed_dim": 16, "num_heads": 2, "num_frames": 3, "d_state": 5}
    if model_config(name).mixer == "attention":
        del sizes["d_state"]
    tower = tiny_model(name, act_layer=act, **sizes).double().visual
    video = torch.randn(2, 3, 3, 24, 24, dtype=torch.float64)
    weight = torch.randn(2, 16, dtype=torch.float64)

    found = tower(video)
    (found * weight).sum().backward()
    leaves = {key: value.detach().clone().requires_grad_() for key, value in tower.named_parameters()}
    config = model_config(name)
    wanted = divided_tower(
        video, leaves, mixer=config.mixer, residual=config.residual, heads=2, depth=2, patch=8, act=act
    )
    (wanted * weight).sum().backward()

    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)
    for key, parameter in tower.named_parameters():
        torch.testing.assert_close(
            parameter.grad, leaves[key].grad, rtol=1e-7, atol=1e-9, msg=lambda m, k=key: f"d {k}: {m}"
        )
