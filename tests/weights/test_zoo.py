"""Initial weights: image CLIPs held against open_clip's own modules, LaViLa's against its tower here."""

import argparse
import warnings
from pathlib import Path

import huggingface_hub
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from avion.errors import UserError
from avion.models import create_model, load_checkpoint
from avion.weights import load_pretrained
from avion.weights import zoo as module

FIXTURES = Path(__file__).parents[1] / "fixtures"
SIZES = {
    "img_size": 32,
    "embed_dim": 64,
    "depth": 2,
    "num_heads": 4,
    "project_embed_dim": 32,
    "context_length": 16,
    "vocab_size": 512,
    "text_width": 48,
    "text_heads": 4,
    "text_layers": 2,
}
TOWERS = [
    "TIMESFORMER_VITB16",
    "TIMESFORMER_FROZEN_VITB16",
    "TIMEMAMBA_VITB16",
    "TIMEMAMBA_SPACETIME_VITB16",
    "CLIP_VITB16",
    "LAVILA_TSF_B16",
]


@pytest.fixture
def image_clip():
    """open_clip's own model, tiny, every parameter random."""
    model = open_clip.model.CLIP(
        embed_dim=32,
        vision_cfg=open_clip.CLIPVisionCfg(layers=2, width=64, head_width=16, patch_size=16, image_size=32),
        text_cfg=open_clip.CLIPTextCfg(context_length=16, vocab_size=512, width=48, heads=4, layers=2),
        quick_gelu=True,
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.logit_scale.fill_(3.5)
    return model


def tiny(name, **overrides):
    fields = SIZES | {"act_layer": "quick_gelu"} | overrides
    return create_model(name, **fields).eval()


def images(count=3, size=32):
    return torch.randn(count, 3, size, size)


def texts(length=16, context=16):
    """Words, then the end-of-text token, the largest id, then padding."""
    tokens = torch.zeros(3, context, dtype=torch.long)
    for row, end in enumerate((length - 1, 5, 2)):
        tokens[row, :end] = torch.randint(1, 500, (end,))
        tokens[row, end] = 511
    return tokens


def save(weights, path):
    torch.save(weights, path)
    return str(path)


def refusal(call, *args) -> str:
    with pytest.raises(UserError) as caught:
        call(*args)
    text = str(caught.value)
    assert "\n" not in text
    return text


def refused(model, zoo, path=None) -> str:
    """The message, after checking that the model is as it was."""
    before = {k: v.clone() for k, v in model.state_dict().items()}
    text = refusal(load_pretrained, model, zoo, path)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    return text


# --- image CLIPs -----------------------------------------------------------------------------


def with_epsilon_of_clip(*models):
    """The video towers' LayerNorms have an epsilon of 1e-6, CLIP's have 1e-5: too far apart to compare."""
    for model in models:
        for layer in model.modules():
            if isinstance(layer, torch.nn.LayerNorm):
                layer.eps = 1e-5


@torch.no_grad()
def assert_features_of(image_clip, model, frames=1):
    pictures, tokens = images(), texts()
    video = pictures[:, :, None].expand(-1, -1, frames, -1, -1)
    with_epsilon_of_clip(model)
    torch.testing.assert_close(model.encode_image(video), image_clip.encode_image(pictures), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.encode_text(tokens), image_clip.encode_text(tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("zoo", ["openai", "open_clip"])
@pytest.mark.parametrize("name", TOWERS)
def test_one_frame_gives_what_open_clip_gives(tmp_path, image_clip, name, zoo):
    model = tiny(name)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    report = load_pretrained(model, zoo, save(image_clip.state_dict(), tmp_path / "clip.pt"))
    assert model.logit_scale.item() == 3.5
    assert (report.resized, report.unexpected) == ((), ())
    assert report.loaded + len(report.missing) == len(start)
    temporal = ("temporal_embed", "norm3", "timeattn", "time_mamba")
    for key in report.missing:  # temporal parts only, and they start as they were
        assert any(part in key for part in temporal) and torch.equal(model.state_dict()[key], start[key])
    assert any("norm3" in key for key in report.missing) == (name != "CLIP_VITB16")
    assert_features_of(image_clip, model)


@pytest.mark.parametrize("name", ["TIMESFORMER_VITB16", "TIMEMAMBA_FROZEN_VITB16", "TIMEMAMBA_SPACETIME_VITB16"])
def test_copies_of_an_image_give_the_image_model(tmp_path, image_clip, name):
    model = tiny(name)
    load_pretrained(model, "open_clip", save(image_clip.state_dict(), tmp_path / "clip.pt"))
    assert_features_of(image_clip, model, frames=4)


@pytest.mark.parametrize("kind", ["safetensors", "wrapped", "torchscript", "newer open_clip"])
def test_every_format_of_an_image_clip(tmp_path, image_clip, kind):
    weights, path = image_clip.state_dict(), tmp_path / "clip.pt"
    if kind == "safetensors":
        path = tmp_path / "clip.safetensors"
        save_file({k: v.contiguous() for k, v in weights.items()}, path)
    elif kind == "wrapped":
        torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in weights.items()}}, path)
    elif kind == "newer open_clip":
        torch.save({k if k.startswith(("visual", "logit")) else f"text.{k}": v for k, v in weights.items()}, path)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(image_clip, (images(1), texts()[:1]), check_trace=False)
            traced.save(str(path))
    model = tiny("TIMEMAMBA_VITB16")
    load_pretrained(model, "openai", str(path))
    assert_features_of(image_clip, model)


def test_another_embedding_starts_anew(tmp_path, image_clip):
    model = tiny("TIMESFORMER_VITB16", project_embed_dim=24)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    report = load_pretrained(model, "openai", save(image_clip.state_dict(), tmp_path / "clip.pt"))
    fresh = {"visual.image_projection", "textual.text_projection", "logit_scale"}
    assert set(report.unexpected) == fresh and fresh < set(report.missing)
    assert all(torch.equal(model.state_dict()[k], start[k]) for k in fresh)
    assert any("start anew" in note for note in report.notes)
    # All but the projections is there: with the source's, the features are the source's.
    model.visual.image_projection = image_clip.visual.proj
    model.textual.text_projection = image_clip.text_projection
    assert_features_of(image_clip, model)


def test_notes_on_activation_and_temperature(tmp_path, image_clip):
    path = save(image_clip.state_dict(), tmp_path / "clip.pt")
    exact = load_pretrained(tiny("TIMESFORMER_VITB16", act_layer="gelu"), "openai", path)
    assert any("trained with QuickGELU, the model computes exact GELU" in note for note in exact.notes)
    quick = load_pretrained(tiny("TIMESFORMER_VITB16"), "openai", path)
    assert not any("GELU" in note for note in quick.notes)
    unknown = load_pretrained(tiny("TIMESFORMER_VITB16", act_layer="gelu"), "open_clip", path)
    assert not any("GELU" in note for note in unknown.notes)  # a file does not say
    frozen = load_pretrained(tiny("TIMESFORMER_VITB16", freeze_temperature=True), "openai", path)
    assert any("frozen temperature is the source's, 1 / 33.12" in note for note in frozen.notes)  # exp(3.5)


@pytest.mark.parametrize("context", [8, 24])
def test_another_text_context(tmp_path, image_clip, context):
    model = tiny("TIMEMAMBA_VITB16", context_length=context)
    start = model.textual.positional_embedding.clone()
    report = load_pretrained(model, "openai", save(image_clip.state_dict(), tmp_path / "clip.pt"))
    assert f"text context 16 -> {context}" in report.notes
    if context == 24:
        assert torch.equal(model.textual.positional_embedding[16:], start[16:])
    short = texts(length=8, context=16)
    fitted = torch.zeros(3, context, dtype=torch.long)
    fitted[:, :8] = short[:, :8]
    with torch.no_grad():
        torch.testing.assert_close(model.encode_text(fitted), image_clip.encode_text(short), rtol=1e-4, atol=1e-5)


def test_another_image_size(tmp_path, image_clip):
    model = tiny("TIMESFORMER_VITB16", img_size=64)
    report = load_pretrained(model, "openai", save(image_clip.state_dict(), tmp_path / "clip.pt"))
    assert report.resized == ("visual.pos_embed (1, 5, 64) -> (1, 17, 64)",)
    position = image_clip.visual.positional_embedding
    grid = torch.nn.functional.interpolate(
        position[1:].T.reshape(1, 64, 2, 2), size=(4, 4), mode="bicubic", align_corners=False
    )
    wanted = torch.cat([position[:1], grid[0].flatten(1).T])
    torch.testing.assert_close(model.visual.pos_embed[0], wanted, rtol=0, atol=1e-6)


def test_differences_that_are_not_allowed(tmp_path, image_clip):
    model, weights = tiny("TIMEMAMBA_VITB16"), image_clip.state_dict()
    path = tmp_path / "clip.pt"
    text = refused(model, "openai", save(weights | {"logit_bias": torch.ones(1)}, path))
    assert str(path) in text and "1 unexpected (logit_bias)" in text
    text = refused(model, "openai", save({k: v for k, v in weights.items() if "ln_post" not in k}, path))
    assert "2 missing (visual.norm.weight, visual.norm.bias)" in text
    text = refused(tiny("TIMEMAMBA_VITB16", embed_dim=128), "openai", save(weights, path))
    assert "of another shape (visual.cls_token (1, 1, 64) for (1, 1, 128)" in text
    text = refused(tiny("TIMEMAMBA_VITB16", vocab_size=600), "openai", save(weights, path))
    assert "textual.token_embedding.weight (512, 48) for (600, 48)" in text
    text = refused(tiny("TIMEMAMBA_VITB16", depth=3), "openai", save(weights, path))
    assert "missing (visual.blocks.2.norm1" in text


# --- LaViLa ----------------------------------------------------------------------------------


def lavila_file(tmp_path, **overrides):
    """(model, path): LaViLa's dual encoder with random weights, saved as its authors do."""
    model = tiny("LAVILA_TSF_B16", **overrides)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    weights = {f"module.{k}": v for k, v in model.state_dict().items()}
    args = argparse.Namespace(model="CLIP_OPENAI_TIMESFORMER_BASE")
    return model, save({"state_dict": weights, "args": args}, tmp_path / "lavila.pt")


def test_lavila_into_its_own_tower(tmp_path):
    source, path = lavila_file(tmp_path)
    model = tiny("LAVILA_TSF_B16")
    report = load_pretrained(model, "lavila", path)
    assert report.missing == report.unexpected == ()
    assert all(torch.equal(model.state_dict()[k], v) for k, v in source.state_dict().items())
    assert any("--norm-style openai_legacy" in note for note in report.notes)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("name", ["TIMESFORMER_VITB16", "TIMESFORMER_FROZEN_VITB16"])
def test_lavila_into_attention_in_time(tmp_path, name, gated):
    source, path = lavila_file(tmp_path, gated_time=gated)
    model = tiny(name)
    report = load_pretrained(model, "lavila", path)
    ours, theirs = model.visual.blocks[1], source.visual.blocks[1]
    assert torch.equal(ours.timeattn.Wqkv.weight, theirs.timeattn.qkv.weight)
    assert torch.equal(ours.timeattn.out_proj.bias, theirs.timeattn.proj.bias)
    assert torch.equal(ours.norm3.weight, theirs.norm3.weight)
    assert torch.equal(model.visual.temporal_embed, source.visual.temporal_embed)
    assert report.unexpected == ()
    if gated:
        assert report.missing == () and torch.equal(ours.alpha_timeattn, theirs.alpha_timeattn)
    else:
        assert report.missing == tuple(f"visual.blocks.{i}.alpha_timeattn" for i in (0, 1))
        assert ours.alpha_timeattn == 0 and any("closed gates" in note for note in report.notes)


@pytest.mark.parametrize("name", TOWERS)
def test_lavila_without_its_time_is_the_same_image_model(tmp_path, name):
    """With nothing in time attention, one frame goes through the spatial part alone, in every tower."""
    source, _ = lavila_file(tmp_path)
    with torch.no_grad():
        for block in source.visual.blocks:
            for parameter in block.timeattn.parameters():
                parameter.zero_()
    path = save({"state_dict": source.state_dict()}, tmp_path / "spatial.pt")
    model = tiny(name)
    report = load_pretrained(model, "lavila", path)
    if "TIMEMAMBA" in name:  # no temporal embedding to add to the tokens: leave it out of the source too
        source.visual.temporal_embed.data.zero_()
        assert "visual.temporal_embed" in report.unexpected and "visual.blocks.0.norm3.bias" in report.missing
    if name == "CLIP_VITB16":
        assert torch.equal(model.visual.temporal_embedding, source.visual.temporal_embed[0])
        assert all("timeattn" in n or "norm3" in n for n in report.unexpected)
    with_epsilon_of_clip(model, source)
    video, tokens = images()[:, :, None], texts()
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(video), source.encode_image(video), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.encode_text(tokens), source.encode_text(tokens), rtol=1e-4, atol=1e-5)


def test_lavila_with_other_frames_and_embedding(tmp_path):
    source, path = lavila_file(tmp_path)
    model = tiny("TIMESFORMER_VITB16", num_frames=8, project_embed_dim=24)
    report = load_pretrained(model, "lavila", path)
    assert report.resized == ("visual.temporal_embed (1, 4, 64) -> (1, 8, 64)",)
    # The second of eight frames lies between the first two of four: at (1 + ½) / 2 − ½ = ¼.
    first, second = source.visual.temporal_embed[0, :2]
    torch.testing.assert_close(model.visual.temporal_embed[0, 1], 0.75 * first + 0.25 * second)
    assert set(report.unexpected) == {"visual.image_projection", "textual.text_projection", "logit_scale"}


def test_lavila_fixture_loads():
    model = create_model("TIMEMAMBA_FROZEN_VITB16", **SIZES)
    report = load_pretrained(model, "lavila", str(FIXTURES / "LAVILA_checkpoint.pt"))
    assert any("trained with QuickGELU" in note for note in report.notes)


# --- wrong files, wrong flags ----------------------------------------------------------------


def test_files_of_another_kind(tmp_path, image_clip):
    clip = save(image_clip.state_dict(), tmp_path / "clip.pt")
    model = tiny("TIMESFORMER_VITB16")
    lavila = str(FIXTURES / "LAVILA_checkpoint.pt")
    assert "give --pretrain-zoo open_clip" in refused(model, "lavila", clip)
    assert "give --pretrain-zoo lavila" in refused(model, "openai", lavila)
    assert "load_checkpoint" in refused(model, "openai", str(FIXTURES / "ID4_checkpoint.pt"))
    assert "load_checkpoint" in refused(model, "lavila", str(FIXTURES / "VIT_checkpoint.pt"))
    assert "first names are w" in refused(model, "open_clip", save({"w": torch.ones(2)}, tmp_path / "w.pt"))
    assert "no such file" in refused(model, "openai", str(tmp_path / "none.pt"))
    assert "no such file" in refused(model, "open_clip", "none.safetensors")
    text = refusal(load_checkpoint, model, clip)
    assert "--pretrain-zoo open_clip --pretrain-path FILE" in text


def test_flags_that_contradict():
    model = tiny("TIMESFORMER_VITB16")
    assert "must be one of openai, open_clip, lavila, none" in refused(model, "clip")
    assert "needs --pretrain-path" in refused(model, "lavila")
    assert "would not be read" in refused(model, "none", "a.pt")
    assert load_pretrained(model, "none").loaded == 0
    assert load_pretrained(model, "none", "").loaded == 0


@pytest.mark.parametrize("zoo", ["openai", "open_clip"])
def test_a_model_of_another_size_names_the_sizes(zoo):
    model = tiny("TIMEMAMBA_VITS16")
    text = refused(model, zoo, None if zoo == "openai" else "laion2b_s34b_b88k")
    assert all(name in text for name in ("ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336"))
    assert "width 64" in text and "--pretrain-zoo none" in text


# --- open_clip's table and the hub -----------------------------------------------------------


def test_the_registered_models_find_their_image_clip():
    from avion.models.registry import model_config

    def find(name, tag="openai"):
        return module.open_clip_name(model_config(name), tag)

    for name in ("TIMESFORMER_VITB16", "TIMEMAMBA_SPACETIME_VITB16", "CLIP_VITB16", "LAVILA_TSF_B16"):
        assert find(name) == find(name, "laion2b_s34b_b88k") == "ViT-B-16"
    assert find("CLIP_VITB32") == "ViT-B-32"
    assert find("TIMEMAMBA_VITL14") == find("CLIP_VITL14") == "ViT-L-14"
    assert find("CLIP_VITL14_336PX") == "ViT-L-14-336"
    assert find("CLIP_VITL14_336PX", "laion2b_s32b_b82k") == "ViT-L-14"
    assert find("TIMEMAMBA_VITT16") is find("TIMESFORMER_VITS16") is None


def test_sizes_are_open_clips_own():
    for name, sizes in module.OPEN_CLIP_MODELS.items():
        config = open_clip.get_model_config(name)
        vision, text = config["vision_cfg"], config["text_cfg"]
        assert sizes == (
            vision["patch_size"],
            vision["width"],
            vision["layers"],
            text["width"],
            text["layers"],
            vision["image_size"],
        )
        assert (text["context_length"], text["vocab_size"]) == (77, 49408)


@pytest.fixture
def tiny_b16(tmp_path, monkeypatch):
    """The tests' size passes for ViT-B-16; the hub's cache is an empty folder."""
    monkeypatch.setitem(module.OPEN_CLIP_MODELS, "ViT-B-16", (16, 64, 2, 48, 2, 224))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def put_into_cache(hub, repo, name, weights):
    folder = hub / f"models--{repo.replace('/', '--')}"
    target = folder / "snapshots" / ("b" * 40) / name
    target.parent.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("b" * 40)
    save_file({k: v.contiguous() for k, v in weights.items()}, target)


def test_weights_from_the_hubs_cache(tiny_b16, image_clip):
    put_into_cache(
        tiny_b16, "timm/vit_base_patch16_clip_224.openai", "open_clip_model.safetensors", image_clip.state_dict()
    )
    model = tiny("TIMEMAMBA_VITB16", act_layer="gelu")
    report = load_pretrained(model, "openai")
    assert report.path == "ViT-B-16 openai"
    assert any("trained with QuickGELU" in note for note in report.notes)
    assert torch.equal(model.visual.cls_token[0, 0], image_clip.visual.class_embedding)


def test_a_tag_of_open_clip(tiny_b16, image_clip):
    repo = "laion/CLIP-ViT-B-16-laion2B-s34B-b88K"
    put_into_cache(tiny_b16, repo, "open_clip_model.safetensors", image_clip.state_dict())
    report = load_pretrained(tiny("TIMEMAMBA_VITB16"), "open_clip", "laion2b_s34b_b88k")
    assert report.path == "ViT-B-16 laion2b_s34b_b88k"
    assert any("trained with exact GELU, the model computes QuickGELU" in note for note in report.notes)


def test_without_network_the_missing_file_is_named(tiny_b16):
    model = tiny("TIMEMAMBA_VITB16")
    text = refused(model, "openai")
    assert "timm/vit_base_patch16_clip_224.openai" in text and "open_clip_model.safetensors" in text
    assert "--pretrain-path" in text and str(tiny_b16) in text
    text = refused(model, "open_clip", "laion2b_s34b_b88")
    assert "neither a file nor a tag" in text and "laion2b_s34b_b88k" in text
    assert "a tag of ViT-B-16 (openai, " in refused(model, "open_clip")


def test_weights_outside_the_hub(tiny_b16, monkeypatch, image_clip, tmp_path):
    model = tiny("TIMEMAMBA_VITB16")
    url = "http://127.0.0.1:9/some/ViT-B-16.pt"
    monkeypatch.setattr(open_clip.pretrained, "get_pretrained_cfg", lambda name, tag: {"url": url})
    monkeypatch.setenv("HOME", str(tmp_path))
    text = refused(model, "openai")
    assert url in text and "--pretrain-path" in text and str(tmp_path / ".cache" / "clip") in text
    (tmp_path / ".cache" / "clip").mkdir(parents=True, exist_ok=True)
    save(image_clip.state_dict(), tmp_path / ".cache" / "clip" / "ViT-B-16.pt")
    load_pretrained(model, "openai")
    assert torch.equal(model.visual.cls_token[0, 0], image_clip.visual.class_embedding)
