"""The two towers together, the classifier, and AVION's factory functions."""

import math

import pytest
import torch

from avion.errors import UserError
from avion.models import create_model, model_clip
from avion.models.model_clip import CLIP, VideoClassifier
from avion.weights import factories

from .tiny import DISTINCT_MODELS, TINY, tiny_inputs, tiny_model

every_model = pytest.mark.parametrize("name", DISTINCT_MODELS)


@every_model
def test_the_contract(name):
    model, (video, tokens) = tiny_model(name), tiny_inputs()
    assert isinstance(model, CLIP) and model.config.name == name and model.config.depth == 2
    video_embed, text_embed, scale = model(video, tokens)
    assert video_embed.shape == text_embed.shape == (2, 16) and scale.shape == ()
    torch.testing.assert_close(video_embed.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(text_embed.norm(dim=1), torch.ones(2))
    image, text = model.encode_image(video), model.encode_text(tokens)
    torch.testing.assert_close(image / image.norm(dim=1, keepdim=True), video_embed)
    torch.testing.assert_close(text / text.norm(dim=1, keepdim=True), text_embed)
    assert not torch.allclose(image.norm(dim=1), torch.ones(2), atol=0.01)


@every_model
def test_temperature(name):
    model = tiny_model(name)
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07)) and model.logit_scale.requires_grad
    frozen = tiny_model(name, freeze_temperature=True, temperature_init=0.5)
    assert frozen.logit_scale.exp().item() == pytest.approx(2) and not frozen.logit_scale.requires_grad


@every_model
def test_every_parameter_gets_a_gradient(name):
    """Also the first one of a fresh model through closed gates: alpha's own."""
    model = create_model(name, **TINY)
    video_embed, text_embed, scale = model(*tiny_inputs())
    (scale * (video_embed * text_embed).sum()).backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []
    alphas = [p.grad for key, p in model.named_parameters() if key.endswith("alpha_timeattn")]
    assert all(gradient != 0 for gradient in alphas)


@every_model
def test_no_weight_decay_names_the_state_matrices(name):
    model = tiny_model(name)
    blocks = [f"visual.blocks.{i}.time_mamba" for i in range(2)]
    with_scan = name.startswith("TIMEMAMBA")
    wanted = {f"{block}.{matrix}" for block in blocks for matrix in ("A_log", "A_b_log")} if with_scan else set()
    assert model.no_weight_decay() == wanted
    assert VideoClassifier(model.visual, 0.5, 7).no_weight_decay() == wanted


# ---- text --------------------------------------------------------------------------------------


@every_model
def test_text_is_read_at_the_end_token_and_sees_nothing_after_it(name):
    model = tiny_model(name)
    tokens = torch.tensor([[510, 7, 8, 9, 511, *[0] * 11]])
    after, before, short = tokens.clone(), tokens.clone(), tokens[:, :5]
    after[0, 9] = 33
    before[0, 2] = 33
    wanted = model.encode_text(tokens)
    torch.testing.assert_close(model.encode_text(after), wanted)
    torch.testing.assert_close(model.encode_text(short), wanted)
    assert not torch.allclose(model.encode_text(before), wanted, atol=1e-3)


@every_model
def test_a_longer_text_than_the_context_is_refused(name):
    with pytest.raises(UserError, match="17 tokens, but the model's context_length is 16"):
        tiny_model(name).encode_text(torch.ones(1, 17, dtype=torch.int64))


# ---- classifier --------------------------------------------------------------------------------


@every_model
def test_video_classifier(name):
    visual = tiny_model(name).visual
    classifier = VideoClassifier(visual, dropout=0.5, num_classes=1000).eval()
    video, _ = tiny_inputs()
    logits = classifier(video)
    assert logits.shape == (2, 1000)
    torch.testing.assert_close(logits, visual.features(video) @ classifier.fc_cls.weight.T + classifier.fc_cls.bias)
    assert classifier.fc_cls.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert (classifier.fc_cls.bias == 0).all()
    assert not any("image_projection" in key for key in classifier.state_dict())
    logits.sum().backward()
    assert [key for key, p in classifier.named_parameters() if p.grad is None] == []


def test_dropout_comes_before_the_head():
    classifier = VideoClassifier(tiny_model("CLIP_VITB16").visual, dropout=0.5, num_classes=3).train()
    seen = []
    classifier.fc_cls.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    video, _ = tiny_inputs(clips=8)
    classifier(video)
    features = classifier.visual.features(video)
    kept = seen[0] != 0
    assert 0.3 < kept.float().mean() < 0.7
    torch.testing.assert_close(seen[0][kept], 2 * features[kept])


# ---- AVION's factory functions -----------------------------------------------------------------


AVIONS = ["CLIP_VITB32", "CLIP_VITB16", "CLIP_VITL14", "CLIP_VITL14_336PX"]
VIDEO_MAMBA_SUITES = {
    "CLIP_TimeSformerB16": "TIMESFORMER_VITB16",
    "CLIP_FrozenInTime_TimeSformerB16": "TIMESFORMER_FROZEN_VITB16",
    "CLIP_TimeMamba_like_timesformer": "TIMEMAMBA_VITB16",
    "CLIP_TimeMamba_like_frozen": "TIMEMAMBA_FROZEN_VITB16",
    "CLIP_TimeMamba_like_frozen_joint": "TIMEMAMBA_SPACETIME_VITB16",
}


@pytest.mark.parametrize("name", [*AVIONS, *VIDEO_MAMBA_SUITES])
def test_the_factories_of_avion_and_video_mamba_suite(name, monkeypatch):
    """Their scripts give use_quick_gelu=True to models that have GELU all the same."""
    calls = []
    monkeypatch.setattr(factories, "load_pretrained", lambda *args: calls.append(args))
    factory = getattr(model_clip, name)
    with torch.device("meta"):
        model = factory(
            freeze_temperature=True,
            use_grad_checkpointing=True,
            context_length=40,
            vocab_size=1000,
            patch_dropout=0.25,
            num_frames=8,
            drop_path_rate=0.1,
            use_fast_conv1=True,
            use_flash_attn=True,
            use_quick_gelu=True,
            project_embed_dim=128,
            pretrain_zoo="open_clip",
            pretrain_path="weights.pt",
        )
    config = model.config
    assert config.name == VIDEO_MAMBA_SUITES.get(name, name) and config.act_layer == "gelu"
    assert isinstance(model.textual.transformer.resblocks[0].mlp.act, torch.nn.GELU)
    assert config.freeze_temperature and config.grad_checkpointing and config.use_fast_conv1
    assert (config.patch_dropout, config.drop_path_rate, config.use_flash_attn) == (0.25, 0.1, True)
    assert config.num_frames == 8
    assert model.visual.image_projection.shape[1] == model.textual.text_projection.shape[1] == 128
    assert model.textual.positional_embedding.shape[0] == 40
    assert model.textual.token_embedding.num_embeddings == 1000
    assert calls == [(model, "open_clip", "weights.pt")]
    assert factory.__name__ == name


def test_avions_defaults(monkeypatch):
    calls = []
    monkeypatch.setattr(factories, "load_pretrained", lambda *args: calls.append(args))
    with torch.device("meta"):
        model = model_clip.CLIP_VITB16()
    assert (model.config.num_frames, model.config.project_embed_dim, model.config.use_flash_attn) == (1, 512, None)
    assert calls == [(model, "openai", None)]


def test_an_unknown_argument_of_a_factory_is_refused():
    with pytest.raises(TypeError, match="use_fast_conv"):
        model_clip.CLIP_VITB16(use_fast_conv=True)
    with pytest.raises(UserError, match="CLIP_VITB16: use_bidirectional_lm=True is not supported"):
        model_clip.CLIP_VITB16(use_bidirectional_lm=True)


@pytest.mark.parametrize("start", [0.0, 1.5])
def test_time_gates_start_where_asked(start):
    model = create_model("TIMEMAMBA_VITT16", **TINY, time_gate_init=start)
    assert [float(block.alpha_timeattn) for block in model.visual.blocks] == [start] * TINY["depth"]


@pytest.mark.parametrize("name", ["CLIP_VITB16", "LAVILA_TSF_B16"])
def test_a_gate_that_does_not_exist_cannot_be_set(name):
    with pytest.raises(UserError, match="time_gate_init=1.0 would have no effect"):
        create_model(name, time_gate_init=1.0)
