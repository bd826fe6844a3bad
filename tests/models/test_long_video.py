"""The chunked forward of long clips: the same features as `encode_image`, and no large tensors on the way."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from avion.errors import UserError
from avion.models import transformer
from avion.models.long_video import encode_long_video, memory_bytes
from avion.models.registry import model_config
from avion.models.timemamba import DividedTower

from .tiny import DISTINCT_MODELS, tiny_model

# (model, overrides) of every kind of forward; nine patches, so that rows and frames cannot be taken for each other.
SIZES = {"img_size": 24, "patch_size": 8}
CASES = [
    *((name, {}) for name in DISTINCT_MODELS),
    ("TIMEMAMBA_VITB16", {"mixer": "vim_spacetime"}),  # vanilla: tokens and what is mixed are both needed
    ("TIMEMAMBA_SPACETIME_VITB16", {"ssm_expand": 2, "d_conv": 2, "d_state": 3}),
    ("LAVILA_TSF_B16", {"gated_time": True}),
    ("TIMESFORMER_VITB16", {"use_flash_attn": False, "use_fast_conv1": True}),
    ("CLIP_VITB16", {"use_flash_attn": False, "act_layer": "quick_gelu"}),
]


def both(model, video, max_tokens):
    """The features of a clip (C, T, H, W) in one go, and a few tokens at a time."""
    with torch.no_grad():
        whole = model.encode_image(video[None])[0]
    chunked = encode_long_video(model, lambda a, b: video[:, a:b], video.shape[1], max_tokens=max_tokens)
    return whole, chunked


def evaluated(name, **overrides):
    return tiny_model(name, **(SIZES | overrides)).eval()


@pytest.mark.parametrize("frames, max_tokens", [(1, 7), (4, 1000), (13, 30), (37, 45)])
@pytest.mark.parametrize("name, overrides", CASES)
def test_equals_the_forward_in_one_go(name, overrides, frames, max_tokens):
    """Frames in threes or fours, rows in ones to threes, 4 in the temporal embedding: nothing divides."""
    model = evaluated(name, **overrides)
    whole, chunked = both(model, torch.randn(3, frames, 24, 24), max_tokens)
    assert chunked.shape == (16,) and chunked.dtype == torch.float32
    torch.testing.assert_close(chunked, whole, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name, overrides", CASES)
def test_equals_it_in_double_precision_on_another_grid(name, overrides):
    model = evaluated(name, **overrides).double()
    whole, chunked = both(model, torch.randn(3, 11, 32, 16, dtype=torch.float64), 20)
    torch.testing.assert_close(chunked, whole, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("name, overrides", CASES)
def test_the_smallest_pieces(name, overrides):
    """One token in work: a frame, a row and a step of the scan at a time; the state crosses every border."""
    model = evaluated(name, **overrides).double()
    whole, chunked = both(model, torch.randn(3, 5, 24, 24, dtype=torch.float64), 1)
    torch.testing.assert_close(chunked, whole, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("name, overrides", CASES)
def test_under_autocast(name, overrides):
    """As near to float32 as the plain forward under autocast, which itself is off by bf16's rounding."""
    model = evaluated(name, **overrides)
    video = torch.randn(3, 13, 24, 24)
    with torch.no_grad():
        exact = model.encode_image(video[None])[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole, chunked = both(model, video, 30)
    bound = 0.02 * exact.abs().max()
    assert (whole - exact).abs().max() < bound and (chunked - exact).abs().max() < bound
    assert (chunked - exact).abs().max() > 0  # autocast was respected


def test_time_sees_all_frames_and_nothing_more_than_the_allowance_is_in_work():
    """No Linear ever gets more tokens than asked for, but one whole row; the mixer's rows are whole sequences."""
    model, frames, max_tokens = evaluated("TIMEMAMBA_VITB16", img_size=32), 50, 60
    seen: dict[str, set] = {"linear": set(), "time": set()}

    def linear(module, inputs):
        seen["linear"].add(inputs[0][..., 0].numel())

    for module in model.visual.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(linear)
    for block in model.visual.blocks:
        block.time_mamba.register_forward_pre_hook(lambda _, inputs: seen["time"].add(tuple(inputs[0].shape[:2])))
    calls = []

    def read(start, stop):
        calls.append((start, stop))
        return torch.randn(3, stop - start, 32, 32)

    encode_long_video(model, read, frames, max_tokens=max_tokens)
    assert max(seen["linear"]) <= max_tokens
    assert seen["time"] == {(1, frames)}
    assert calls[0] == (0, 1)  # for its size
    assert [n for start, stop in calls[1:] for n in range(start, stop)] == list(range(frames))
    assert max(stop - start for start, stop in calls) == max_tokens // (1 + 16)


def test_math_attention_of_long_sequences_is_done_in_parts(monkeypatch):
    q, k, v = torch.randn(3, 2, 4, 21, 8).unbind(0)
    whole = transformer.attend(q, k, v, False)
    monkeypatch.setattr(transformer, "MAX_MATH_SCORES", 500)
    sizes = []
    real = F.scaled_dot_product_attention

    def counted(q, *others, **options):
        sizes.append(q.shape[2])
        return real(q, *others, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    torch.testing.assert_close(transformer.attend(q, k, v, False), whole, atol=1e-6, rtol=1e-5)
    assert sizes == [2] * 10 + [1]  # 2 x 4 x 21 scores per query


def test_a_training_model_is_refused():
    with pytest.raises(ValueError, match="eval"):
        encode_long_video(evaluated("TIMEMAMBA_VITB16").train(), lambda a, b: None, 4)


def test_an_unknown_tower_is_refused():
    model = evaluated("TIMEMAMBA_VITB16")
    model.visual = nn.Linear(2, 2).eval()
    with pytest.raises(UserError, match="Linear: no forward for long videos"):
        encode_long_video(model, lambda a, b: None, 4)
    assert issubclass(DividedTower, nn.Module)


def test_memory_of_b16_at_8192_frames_stays_under_12_gb():
    """The figures of docs/egoschema.md; 1.2 GB of uint8 frames and 0.7 GB of weights come on top."""
    for name, limit in (("TIMEMAMBA_VITB16", 7e9), ("TIMEMAMBA_FROZEN_VITB16", 9.5e9), ("TIMESFORMER_VITB16", 7e9)):
        parts = memory_bytes(model_config(name), 8192, autocast=True, max_tokens=32_768)
        assert parts["stream"] == 4 * 196 * 8192 * 768
        assert sum(parts.values()) < limit
    frozen = memory_bytes(model_config("TIMEMAMBA_FROZEN_VITB16"), 8192, autocast=True, max_tokens=32_768)
    assert frozen["beside"] == frozen["stream"] // 2
