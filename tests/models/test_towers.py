"""What every video and text tower promises, over all registered models at a tiny size."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from avion.errors import UserError
from avion.models import create_model, list_models, transformer
from avion.models.registry import model_config
from avion.models.timemamba import DividedBlock

from .by_hand import bicubic_by_hand, linear_by_hand
from .tiny import DISTINCT_MODELS, DIVIDED_MODELS, TINY, at_tiny_size, tiny_inputs, tiny_model

every_model = pytest.mark.parametrize("name", DISTINCT_MODELS)
every_divided_model = pytest.mark.parametrize("name", DIVIDED_MODELS)


def test_the_distinct_models_stand_for_all():
    distinct = [at_tiny_size(name) for name in DISTINCT_MODELS]
    assert all(at_tiny_size(name) in distinct for name in list_models())
    assert len(DIVIDED_MODELS) == 5


def same_weights(name, model, **overrides):
    """The same model with other fields and the same weights."""
    twin = tiny_model(name, **overrides)
    twin.load_state_dict(model.state_dict())
    return twin


def outputs_and_gradients(model, video, tokens):
    model.zero_grad()
    video_embed, text_embed, scale = model(video, tokens)
    weights = torch.linspace(-1, 1, video_embed.numel()).view_as(video_embed)
    (scale * (video_embed * text_embed * weights).sum()).backward()
    return video_embed, text_embed, {key: p.grad for key, p in model.named_parameters()}


def assert_same_results(left, right, rtol=1e-4, atol=1e-5):
    for found, wanted, what in zip(left[:2], right[:2], ("video", "text"), strict=True):
        torch.testing.assert_close(found, wanted, rtol=rtol, atol=atol, msg=lambda m, w=what: f"{w}: {m}")
    assert left[2].keys() == right[2].keys()
    for key, gradient in right[2].items():
        torch.testing.assert_close(left[2][key], gradient, rtol=rtol, atol=atol, msg=lambda m, k=key: f"d {k}: {m}")


# ---- time and space ----------------------------------------------------------------------------


@every_divided_model
def test_closed_gates_give_the_image_model(name):
    """alpha = 0: T copies of an image give what one frame gives, and that is a plain ViT."""
    model = tiny_model(name).double()
    for block in model.visual.blocks:
        block.alpha_timeattn.data.zero_()
    if model.visual.temporal_embed is not None:
        model.visual.temporal_embed.data.zero_()
    image = torch.randn(2, 3, 1, 32, 32, dtype=torch.float64)
    one = model.encode_image(image)
    torch.testing.assert_close(model.encode_image(image.expand(-1, -1, 5, -1, -1)), one)
    torch.testing.assert_close(one, plain_image_vit(model.visual, image[:, :, 0]))


def plain_image_vit(tower, image):
    """(B, 3, H, W) → (B, E) with the tower's weights and PyTorch's own layers."""
    x = F.conv2d(image, tower.patch_embed.proj.weight, stride=16).flatten(2).transpose(1, 2)
    x = torch.cat([tower.cls_token.expand(len(x), -1, -1), x], dim=1) + tower.pos_embed
    x = tower.ln_pre(x)
    for block in tower.blocks:
        y = block.norm1(x)
        weights = (block.attn.Wqkv.weight, block.attn.Wqkv.bias)
        out = block.attn.out_proj
        y, _ = F.multi_head_attention_forward(
            *[y.transpose(0, 1)] * 3, y.shape[-1], 4, *weights, None, None, False, 0.0, out.weight, out.bias
        )
        x = x + y.transpose(0, 1)
        x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
    return tower.norm(x[:, 0]) @ tower.image_projection


@every_model
def test_the_order_of_frames_matters(name):
    model, (video, _) = tiny_model(name), tiny_inputs()
    assert not torch.allclose(model.encode_image(video), model.encode_image(video.flip(2)), atol=1e-3)


@every_model
def test_a_clip_does_not_depend_on_its_batch(name):
    model, (video, tokens) = tiny_model(name), tiny_inputs(clips=3)
    together = model(video, tokens)
    for i in range(3):
        alone = model(video[i : i + 1], tokens[i : i + 1])
        torch.testing.assert_close(alone[0], together[0][i : i + 1], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(alone[1], together[1][i : i + 1], atol=1e-5, rtol=1e-4)


@every_divided_model
def test_time_mixing_sees_other_patches_only_in_space_time(name):
    """The mixer's rows: a change in one patch reaches the others in mix_time for ID8 alone."""
    block = tiny_model(name).visual.blocks[0]
    tokens = torch.randn(2, 5, 5, 32, requires_grad=True)  # as many patches as frames
    block.mix_time(tokens)[0, 2, 3].sum().backward()
    reached = tokens.grad.abs().sum(-1) > 0  # (B, N, T)
    assert not reached[1].any()
    assert reached[0, 2].all()  # every frame of its own patch
    others = torch.cat([reached[0, :2], reached[0, 3:]])
    assert others.any() == (model_config(name).mixer == "vim_spacetime")


@every_divided_model
def test_time_mixing_copies_no_tokens(name):
    block, seen = tiny_model(name).visual.blocks[0], []
    mixer = block.timeattn if block.mixer == "attention" else block.time_mamba
    mixer.register_forward_pre_hook(lambda module, args: seen.append(args[0].data_ptr()))
    tokens = torch.randn(2, 6, 4, 32)
    block.mix_time(tokens)
    assert seen == [tokens.data_ptr()]


# ---- other numbers of frames and other resolutions ---------------------------------------------


@every_model
@pytest.mark.parametrize("frames", [1, 2, 6])
def test_any_number_of_frames(name, frames):
    """Equal to a model built for that number whose temporal embedding was interpolated by hand."""
    model, (video, _) = tiny_model(name), tiny_inputs(frames=frames)
    weights = model.state_dict()
    for key in [key for key in weights if "visual.temporal_embed" in key]:
        by_hand = linear_by_hand(weights[key].reshape(4, -1).numpy(), frames)
        weights[key] = torch.from_numpy(by_hand).reshape(*weights[key].shape[:-2], frames, -1)
    built_for_it = tiny_model(name, num_frames=frames)
    built_for_it.load_state_dict(weights)
    torch.testing.assert_close(model.encode_image(video), built_for_it.encode_image(video), atol=1e-5, rtol=1e-4)


@every_model
def test_any_resolution(name):
    model = tiny_model(name)
    weights = model.state_dict()
    key = next(key for key in weights if key in ("visual.pos_embed", "visual.positional_embedding"))
    embed = weights[key].reshape(5, -1)
    patches = bicubic_by_hand(embed[1:].reshape(2, 2, -1).numpy(), 3, 3).reshape(9, -1)
    resized = torch.cat([embed[:1], torch.from_numpy(patches)])
    weights[key] = resized.reshape(*weights[key].shape[:-2], 10, -1)
    built_for_it = tiny_model(name, img_size=48)
    built_for_it.load_state_dict(weights)
    video = torch.randn(2, 3, 4, 48, 48)
    torch.testing.assert_close(model.encode_image(video), built_for_it.encode_image(video), atol=1e-5, rtol=1e-4)
    assert model.encode_image(torch.randn(1, 3, 2, 16, 64)).isfinite().all()


@every_model
def test_a_resolution_between_patches_is_refused(name):
    with pytest.raises(UserError, match=r"multiples of the patch size 16"):
        tiny_model(name).encode_image(torch.randn(1, 3, 4, 32, 40))


# ---- attention kernels -------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("use_flash", [True, False, None])
def test_use_flash_attn_chooses_the_kernel(name, use_flash, monkeypatch):
    enabled = []
    sdpa = F.scaled_dot_product_attention

    def spy(*args, **kwargs):
        cuda = torch.backends.cuda
        fused = cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled()
        enabled.append((fused, cuda.math_sdp_enabled()))
        return sdpa(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    free, (video, tokens) = tiny_model(name), tiny_inputs()
    wanted = outputs_and_gradients(free, video, tokens)
    enabled.clear()
    found = outputs_and_gradients(same_weights(name, free, use_flash_attn=use_flash), video, tokens)
    assert_same_results(found, wanted)
    kernels = {True: ((True, True, True), False), False: ((False, False, False), True)}
    assert set(enabled) == {kernels.get(use_flash, ((True, True, True), True))}
    assert transformer.FUSED_KERNELS and SDPBackend.MATH not in transformer.FUSED_KERNELS


@every_model
def test_rows_beyond_the_limit_are_split(name, monkeypatch):
    model, (video, tokens) = tiny_model(name), tiny_inputs(clips=3)
    whole = outputs_and_gradients(model, video, tokens)
    sizes = []
    sdpa = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda q, *args, **kwargs: sizes.append(q.shape[0] * q.shape[1]) or sdpa(q, *args, **kwargs),
    )
    monkeypatch.setattr(transformer, "MAX_ROWS_X_HEADS", 9)  # two rows of four heads
    assert_same_results(outputs_and_gradients(model, video, tokens), whole)
    assert max(sizes) == 8 and min(sizes) == 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("use_flash", [None, True])
def test_more_rows_than_a_cuda_grid_holds(use_flash):
    q, k, v = torch.randn(3, 70_000, 2, 4, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    out = transformer.attend(q, k, v, use_flash)
    some = slice(69_000, 70_000)
    torch.testing.assert_close(out[some], transformer.attend(q[some], k[some], v[some], False), atol=2e-2, rtol=2e-2)


# ---- training choices --------------------------------------------------------------------------


@every_model
def test_fast_conv1_gives_the_same(name):
    model, (video, tokens) = tiny_model(name), tiny_inputs()
    fast = same_weights(name, model, use_fast_conv1=True)
    for module in fast.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.forward = None  # it must not be used
    assert_same_results(outputs_and_gradients(fast, video, tokens), outputs_and_gradients(model, video, tokens))


@every_model
@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
def test_act_layer_in_both_towers(name, act):
    """The activations that run are the named function, one per MLP of each tower."""
    model, seen = tiny_model(name, act_layer=act), {"video": [], "text": []}
    for key, module in model.named_modules():
        if key.endswith("mlp.act"):
            seen["video" if key.startswith("visual") else "text"].append(module)
    assert len(seen["video"]) == len(seen["text"]) == 2
    x = torch.randn(50)
    wanted = x * torch.sigmoid(1.702 * x) if act == "quick_gelu" else 0.5 * x * (1 + torch.erf(x / 2**0.5))
    for module in seen["video"] + seen["text"]:
        torch.testing.assert_close(module(x), wanted)


def saved_bytes(forward, inputs) -> int:
    """What forward keeps for backward, outside of the blocks that checkpointing runs again."""
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = forward(inputs)
    del out
    return sum(kept.values())


@every_model
def test_grad_checkpointing_keeps_less_and_changes_nothing(name):
    plain = tiny_model(name, drop_path_rate=0.5, depth=3).train()
    saving = same_weights(name, plain, drop_path_rate=0.5, depth=3, grad_checkpointing=True).train()
    video, tokens = tiny_inputs()
    results = []
    for model in (saving, plain):
        torch.manual_seed(7)  # what drop path drops must be the same again in the second run of a block
        results.append(outputs_and_gradients(model, video, tokens))
    assert_same_results(*results)
    assert saved_bytes(saving.encode_image, video) < 0.7 * saved_bytes(plain.encode_image, video)
    assert saved_bytes(saving.encode_text, tokens) < 0.7 * saved_bytes(plain.encode_text, tokens)


def drop_paths(model):
    blocks = model.visual.transformer.resblocks if hasattr(model.visual, "transformer") else model.visual.blocks
    return [block.drop_path for block in blocks]


@every_model
def test_drop_path_rises_linearly(name):
    rates = [layer.drop_prob for layer in drop_paths(tiny_model(name, depth=5, drop_path_rate=0.2))]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    text = tiny_model(name, drop_path_rate=0.2)
    text_blocks = getattr(text, "textual", text).transformer.resblocks
    assert all(block.drop_path.drop_prob == 0 for block in text_blocks)


@every_model
def test_drop_path_drops_every_branch_in_training_only(name):
    model, (video, _) = tiny_model(name, drop_path_rate=0.5), tiny_inputs()
    for layer in drop_paths(model):
        layer.drop_prob = 1.0
    silent = same_weights(name, model)
    for key, parameter in silent.visual.named_parameters():
        if "blocks." in key and any(f".{last}." in key for last in ("out_proj", "proj", "fc2")):
            parameter.data.zero_()  # nothing is added to the residual stream
    torch.testing.assert_close(model.train().encode_image(video), silent.encode_image(video))
    torch.testing.assert_close(model.eval().encode_image(video), same_weights(name, model).encode_image(video))


@every_divided_model
def test_drop_path_drops_a_clip_as_a_whole(name):
    """Three branches, kept or not: at most 8 results, which CLS and tokens reach together."""
    config = at_tiny_size(name)
    block = DividedBlock(config, drop_path=0.5).train()
    block.alpha_timeattn.data.fill_(0.7)
    clip = torch.randn(1, 1, 32), torch.randn(1, 4, 4, 32)
    cls, tokens = block(*(x.expand(200, *x.shape[1:]) for x in clip))
    both = torch.cat([cls.flatten(1), tokens.flatten(1)], dim=1)
    results = (both * 1e3).round().unique(dim=0)
    assert 4 < len(results) <= 8


def patches_with_gradient(model, video):
    """(B, T, N): whether the embedding of a clip depends on a patch of a frame."""
    video = video.clone().requires_grad_()
    model.encode_image(video).pow(2).sum().backward()
    gradient = video.grad.unfold(3, 16, 16).unfold(4, 16, 16).abs().sum(dim=(1, 5, 6))  # (B, T, h, w)
    return gradient.flatten(2) > 0


@every_model
def test_patch_dropout_leaves_out_the_same_patches_in_every_frame(name):
    model = tiny_model(name, patch_dropout=0.75, img_size=64)
    video = torch.randn(6, 3, 4, 64, 64)
    seen = patches_with_gradient(model.train(), video)
    assert (seen.sum(dim=2) == 4).all()  # a quarter of 16 patches
    assert (seen == seen[:, :1]).all()  # in all frames alike
    assert len(seen[:, 0].unique(dim=0)) > 1  # each clip its own
    assert patches_with_gradient(model.eval(), video).all()


def test_drop_patches_keeps_order_and_at_least_one():
    numbered = torch.arange(10.0)[None, :, None, None].expand(3, 10, 2, 5)
    kept = transformer.drop_patches(numbered, 0.4)
    assert kept.shape == (3, 6, 2, 5)
    order = kept[:, :, 0, 0]
    assert (order.diff(dim=1) > 0).all()
    assert (kept == order[:, :, None, None]).all()
    assert transformer.drop_patches(numbered, 0.99).shape == (3, 1, 2, 5)


# ---- compilation, precision, initial values ----------------------------------------------------


ALL_CHOICES = {
    "grad_checkpointing": True,
    "use_fast_conv1": True,
    "use_flash_attn": False,
    "drop_path_rate": 0.3,
    "patch_dropout": 0.5,
}


@pytest.mark.parametrize(
    ("name", "choices"),
    [pytest.param(name, {}, id=name) for name in DISTINCT_MODELS]
    + [
        pytest.param(name, ALL_CHOICES, id=f"{name}-all-choices")
        for name in ("TIMEMAMBA_VITB16", "CLIP_VITB16", "LAVILA_TSF_B16")  # one of each kind of tower
    ],
)
def test_compiles_in_one_graph_with_the_same_results(name, choices):
    """fullgraph=True, forward and backward."""
    torch._dynamo.reset()
    model, inputs = tiny_model(name, text_layers=1, **choices).train(), tiny_inputs(frames=2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.manual_seed(7)
    wanted = outputs_and_gradients(model, *inputs)
    torch.manual_seed(7)
    video_embed, text_embed, gradients = outputs_and_gradients(compiled, *inputs)
    gradients = {key.removeprefix("_orig_mod."): value for key, value in gradients.items()}
    assert_same_results((video_embed, text_embed, gradients), wanted)


@every_model
def test_bf16_autocast_stays_near_float32(name):
    model, (video, tokens) = tiny_model(name), tiny_inputs()
    wanted = outputs_and_gradients(model, video, tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        video_embed, text_embed, _ = model(video, tokens)
    assert F.cosine_similarity(video_embed.float(), wanted[0]).min() > 0.99
    assert F.cosine_similarity(text_embed.float(), wanted[1]).min() > 0.99
    (video_embed * text_embed).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.visual.parameters())


@every_divided_model
def test_gates_and_mixers_at_the_start(name):
    """Distributions are held in test_initial_values.py."""
    tower = tower_at_init(name)
    assert all(block.alpha_timeattn.shape == () and block.alpha_timeattn == 0 for block in tower.blocks)
    if model_config(name).mixer == "attention":
        assert (tower.temporal_embed == 0).all()
    else:
        assert tower.temporal_embed is None
        block = tower.blocks[0].time_mamba
        torch.testing.assert_close(block.A_log[3].exp(), torch.arange(1.0, 17.0))
        assert block.dt_proj.bias.std() > 0.5  # the tower's initial values did not overwrite the mixer's


def tower_at_init(name):
    return create_model(name, **{**TINY, "embed_dim": 256}).visual


def test_initial_values_of_lavilas_time_attention():
    for block in tower_at_init("LAVILA_TSF_B16").blocks:
        assert (block.timeattn.qkv.weight == 0).all() and (block.timeattn.qkv.bias == 0).all()
        assert (block.timeattn.proj.weight == 1).all() and (block.timeattn.proj.bias == 0).all()
        assert block.attn.qkv.weight.any()


def test_lavilas_gate_scales_time_attention():
    gated = tiny_model("LAVILA_TSF_B16", gated_time=True)
    weights = gated.state_dict()
    for i, alpha in enumerate((0.3, -1.2)):
        gated.visual.blocks[i].alpha_timeattn.data.fill_(alpha)
        del weights[f"visual.blocks.{i}.alpha_timeattn"]
        for part in ("weight", "bias"):
            key = f"visual.blocks.{i}.timeattn.proj.{part}"
            weights[key] = weights[key] * np.tanh(alpha)
    plain = tiny_model("LAVILA_TSF_B16")
    plain.load_state_dict(weights)
    video, _ = tiny_inputs()
    torch.testing.assert_close(gated.encode_image(video), plain.encode_image(video), atol=1e-5, rtol=1e-4)


@every_model
def test_layer_norm_epsilons(name):
    model = tiny_model(name)
    for key, module in model.named_modules():
        if isinstance(module, torch.nn.LayerNorm):
            joint = model_config(name).tower == "joint"
            in_video_tower = key.startswith("visual.")
            wanted = 1e-6 if in_video_tower and (joint or not key.endswith("ln_pre")) else 1e-5
            assert module.eps == wanted, key
