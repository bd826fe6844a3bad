"""Mixup and cutmix of clips: the same box in all frames, weights that agree with the pixels, draws that repeat."""

import numpy as np
import pytest
import torch

from avion.data.mixup import VideoMixup
from avion.errors import UserError

B, T, SIDE, CLASSES = 4, 3, 16, 5


def clips():
    """Clip b is b+1 everywhere, so that a pixel says which clip it is from."""
    return torch.arange(1.0, B + 1).view(B, 1, 1, 1, 1).expand(B, 3, T, SIDE, SIDE).clone(), torch.tensor([0, 1, 2, 3])


def one_hot(labels, smoothing):
    return torch.eye(CLASSES)[labels] * (1 - smoothing) + smoothing / CLASSES


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_mixup_by_hand(mode):
    video, labels = clips()
    mixed, targets = VideoMixup(CLASSES, mixup=0.8, cutmix=0.0, mode=mode, smoothing=0.1)(video.clone(), labels)
    assert mixed.shape == video.shape
    flipped = labels.flip(0)
    for b in range(B):
        values = mixed[b].unique()
        assert len(values) == 1
        own, other = b + 1.0, B - b * 1.0
        weight = ((values - other) / (own - other)).item()
        expected = weight * one_hot(labels[b], 0.1) + (1 - weight) * one_hot(flipped[b], 0.1)
        torch.testing.assert_close(targets[b], expected, atol=1e-5, rtol=0)
    assert targets.sum(dim=1) == pytest.approx([1.0] * B, abs=1e-5)


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("minmax", [None, (0.3, 0.9)])
def test_cutmix_cuts_one_box_out_of_all_frames_and_channels(mode, minmax):
    boxes = set()
    for _ in range(10):
        video, labels = clips()
        mix = VideoMixup(CLASSES, mixup=0.0, cutmix=1.0, cutmix_minmax=minmax, mode=mode)
        mixed, targets = mix(video.clone(), labels)
        for b in range(B):
            foreign = mixed[b] != b + 1  # (3, T, H, W)
            assert (foreign == foreign[:1, :1]).all()
            assert set(mixed[b].unique().tolist()) <= {b + 1.0, float(B - b)}
            rows, columns = foreign[0, 0].any(1), foreign[0, 0].any(0)
            assert foreign[0, 0].sum() == rows.sum() * columns.sum()  # a rectangle
            weight = 1 - foreign.float().mean().item()
            expected = weight * one_hot(labels[b], 0) + (1 - weight) * one_hot(labels[B - 1 - b], 0)
            torch.testing.assert_close(targets[b], expected, atol=1e-5, rtol=0)
            boxes.add((rows.sum().item(), columns.sum().item()))
    assert len(boxes) > 2


def test_draws_come_from_numpys_generator_alone():
    mix = VideoMixup(CLASSES, mixup=0.8, cutmix=1.0)
    state, results = np.random.get_state(), []
    for _ in range(2):
        np.random.set_state(state)
        torch.rand(5)
        results.append([mix(*clips()) for _ in range(4)])
    for (a, s), (b, t) in zip(*results, strict=True):
        assert torch.equal(a, b) and torch.equal(s, t)


def test_probability_zero_leaves_the_clips_and_smooths_the_labels():
    video, labels = clips()
    mixed, targets = VideoMixup(CLASSES, mixup=0.8, cutmix=1.0, prob=0.0, smoothing=0.2)(video.clone(), labels)
    assert torch.equal(mixed, video)
    torch.testing.assert_close(targets, one_hot(labels, 0.2))


def test_other_memory_orders_mix_alike():
    mix = VideoMixup(CLASSES, mixup=0.0, cutmix=1.0)
    video, labels = torch.randn(B, 3, T, SIDE, SIDE), torch.tensor([0, 1, 2, 3])
    state = np.random.get_state()
    plain, _ = mix(video.clone(), labels)
    np.random.set_state(state)
    other, _ = mix(video.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3), labels)
    assert torch.equal(plain, other)


def test_bad_input():
    with pytest.raises(UserError, match="a batch of 3 is odd"):
        VideoMixup(CLASSES, mixup=0.8, cutmix=1.0)(clips()[0][:3], clips()[1][:3])
    for shares in ((0.5, 0.5), (-0.1, 0.5), (0.2, 1.5), (0.6, 0.3)):
        with pytest.raises(UserError, match="two ascending shares"):
            VideoMixup(CLASSES, mixup=0.0, cutmix=1.0, cutmix_minmax=shares)
    with pytest.raises(UserError, match="the same in whole pixels of 16"):
        VideoMixup(CLASSES, mixup=0.0, cutmix=1.0, cutmix_minmax=(0.51, 0.52))(*clips())
