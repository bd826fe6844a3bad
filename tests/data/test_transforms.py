import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import RandomResizedCrop, v2

from avion.constants import NORM_STYLES
from avion.data.transforms import (
    EvalTransform,
    Permute,
    SpatialCrop,
    TrainTransform,
    normalize_clip,
    random_crop_box,
    short_side_size,
)
from avion.errors import UserError


def picture_clip(t=3, height=90, width=120) -> np.ndarray:
    """Smooth random pictures (blown-up noise), as uint8."""
    noise = torch.rand(t, 3, height // 6, width // 6)
    clip = F.interpolate(noise, (height, width), mode="bicubic").clamp(0, 1)
    return (clip * 255).byte().permute(0, 2, 3, 1).contiguous().numpy()


def denormalized(clip: torch.Tensor, style="openai") -> torch.Tensor:
    mean, std = (torch.tensor(v).view(3, 1, 1, 1) for v in NORM_STYLES[style])
    return clip * std + mean


class TestCropBox:
    def test_boxes_lie_inside_and_have_the_asked_for_area_and_ratio(self):
        rng = np.random.default_rng()
        height, width = 288, 512
        boxes = np.array([random_crop_box(height, width, rng) for _ in range(4000)])
        top, left, h, w = boxes.T
        assert (top >= 0).all() and (left >= 0).all()
        assert (top + h <= height).all() and (left + w <= width).all()
        area, ratio = h * w / (height * width), w / h
        assert area.min() > 0.49 and area.max() <= 1.0
        assert ratio.min() > 0.74 and ratio.max() < 1.35

    def test_distribution_is_inceptions(self):
        """A picture in which every box fits: area uniform, log ratio uniform, position uniform. Standard errors of
        the means of 20,000 draws are 0.002 or less; a bound of 0.012 fails once in some billions of runs."""
        rng = np.random.default_rng()
        n, side = 20000, 1000
        boxes = np.array([random_crop_box(side, side, rng, scale=(0.1, 0.5)) for _ in range(n)])
        top, left, h, w = boxes.T.astype(np.float64)
        area = (h * w / side**2 - 0.1) / 0.4
        log_ratio = np.log(w / h) / np.log(4 / 3)  # in [-1, 1]
        for share in (area, (log_ratio + 1) / 2, top / (side - h), left / (side - w)):
            assert share.mean() == pytest.approx(0.5, abs=0.012)
            for quantile in (0.1, 0.25, 0.75, 0.9):
                assert np.quantile(share, quantile) == pytest.approx(quantile, abs=0.02)

    def test_distribution_matches_torchvisions(self):
        """Where some boxes do not fit (a wide picture), the two agree in mean and spread."""
        rng, n = np.random.default_rng(), 6000
        ours = np.array([random_crop_box(288, 384, rng) for _ in range(n)], dtype=np.float64)
        image, ratio = torch.empty(3, 288, 384), [3 / 4, 4 / 3]
        draw = RandomResizedCrop.get_params
        theirs = np.array([draw(image, [0.5, 1.0], ratio) for _ in range(n)], dtype=np.float64)
        error = np.sqrt(ours.var(0) / n + theirs.var(0) / n)
        assert (np.abs(ours.mean(0) - theirs.mean(0)) < 5 * error).all()
        np.testing.assert_allclose(ours.std(0), theirs.std(0), rtol=0.08)

    @pytest.mark.parametrize(
        "height, width, box",
        [(30, 300, (0, 130, 30, 40)), (300, 30, (130, 0, 40, 30))],
    )
    def test_fallback_by_hand(self, height, width, box):
        """Nothing of half the area and a ratio of at most 4:3 fits a 10:1 strip: the largest central 4:3 box."""
        assert random_crop_box(height, width, np.random.default_rng(), scale=(0.9, 1.0)) == box

    def test_a_picture_of_one_pixel(self):
        assert random_crop_box(1, 1, np.random.default_rng()) == (0, 0, 1, 1)


class TestTrainTransform:
    def test_shapes_and_dtypes(self):
        clip, rng = picture_clip(), np.random.default_rng()
        plain = TrainTransform(32)(clip, rng)
        fused = TrainTransform(32, fused=True)(clip, rng)
        assert plain.shape == fused.shape == (3, 3, 32, 32)
        assert plain.dtype == torch.float32 and fused.dtype == torch.uint8

    def test_fused_and_plain_agree_within_rounding(self):
        rng = np.random.default_rng()
        for _ in range(20):
            clip, seed = picture_clip(), int(rng.integers(2**31))
            plain = TrainTransform(48)(clip, np.random.default_rng(seed))
            fused = TrainTransform(48, fused=True)(clip, np.random.default_rng(seed))
            difference = (denormalized(plain) - fused.float()).abs()
            assert difference.max() <= 1.01 and difference.mean() < 0.4
            torch.testing.assert_close(normalize_clip(fused, "openai"), plain, atol=0.017, rtol=0)

    def test_it_is_the_box_resized(self):
        """Against torchvision, given the box that the same generator draws."""
        clip = picture_clip()
        box = random_crop_box(90, 120, np.random.default_rng(5))
        expected = v2.functional.resized_crop(torch.from_numpy(clip).permute(0, 3, 1, 2).float(), *box, [40, 40])
        got = denormalized(TrainTransform(40)(clip, np.random.default_rng(5)))
        torch.testing.assert_close(got.permute(1, 0, 2, 3), expected, atol=1e-3, rtol=0)

    def test_all_frames_get_the_same_box(self):
        still = np.repeat(picture_clip(t=1), 5, axis=0)
        out = TrainTransform(32, fused=True)(still, np.random.default_rng())
        assert (out == out[:, :1]).all()

    def test_the_generator_decides(self):
        clip, transform = picture_clip(), TrainTransform(32, fused=True)
        a, b, c = (transform(clip, np.random.default_rng(s)) for s in (1, 1, 2))
        assert torch.equal(a, b) and not torch.equal(a, c)

    def test_enlarging_small_pictures(self):
        out = TrainTransform(64)(picture_clip(height=30, width=36), np.random.default_rng())
        assert out.shape == (3, 3, 64, 64) and out.isfinite().all()


class TestEvalTransform:
    @pytest.mark.parametrize("height, width", [(90, 120), (120, 90), (64, 64), (36, 99), (91, 121)])
    def test_against_torchvision(self, height, width):
        clip = picture_clip(height=height, width=width)
        height, width = clip.shape[1:3]
        frames = torch.from_numpy(clip).permute(0, 3, 1, 2).float()
        reference = v2.Compose([v2.Resize(48, antialias=True), v2.CenterCrop(48)])(frames)
        got = denormalized(EvalTransform(48)(clip, np.random.default_rng()))
        torch.testing.assert_close(got.permute(1, 0, 2, 3), reference, atol=1e-3, rtol=0)
        fused = EvalTransform(48, fused=True)(clip, np.random.default_rng())
        assert fused.dtype == torch.uint8
        assert (fused.permute(1, 0, 2, 3).float() - reference).abs().max() <= 1.01

    def test_draws_nothing(self):
        rng = np.random.default_rng(3)
        EvalTransform(32)(picture_clip(), rng)
        assert rng.random() == np.random.default_rng(3).random()

    def test_short_side_by_hand(self):
        assert short_side_size(288, 512, 224) == (224, 398)
        assert short_side_size(512, 288, 224) == (398, 224)
        assert short_side_size(100, 100, 224) == (224, 224)


class TestNormalize:
    @pytest.mark.parametrize("style", list(NORM_STYLES))
    def test_by_hand(self, style):
        video = torch.randint(0, 256, (2, 3, 2, 4, 4), dtype=torch.uint8)
        out = normalize_clip(video, style)
        mean, std = NORM_STYLES[style]
        for c in range(3):
            expected = (video[:, c].double() - mean[c]) / std[c]
            torch.testing.assert_close(out[:, c].double(), expected, atol=1e-5, rtol=1e-5)
        assert out.dtype == torch.float32 and out.shape == video.shape

    def test_floats_pass_unchanged(self):
        video = torch.randn(1, 3, 2, 4, 4)
        assert normalize_clip(video, "openai") is video
        half = video.half()
        assert normalize_clip(half, "openai") is half

    def test_memory_order_is_kept_and_input_untouched(self):
        video = torch.randint(0, 256, (2, 3, 4, 8, 8), dtype=torch.uint8).to(memory_format=torch.channels_last_3d)
        before = video.clone()
        out = normalize_clip(video, "timm")
        assert out.is_contiguous(memory_format=torch.channels_last_3d) and torch.equal(video, before)

    def test_a_single_clip(self):
        clip = picture_clip()
        fused = EvalTransform(32, fused=True)(clip, np.random.default_rng())
        plain = EvalTransform(32)(clip, np.random.default_rng())
        assert (normalize_clip(fused, "openai") - plain).abs().max() < 0.017

    def test_black_is_minus_mean_over_std(self):
        black = np.zeros((1, 40, 40, 3), np.uint8)
        out = TrainTransform(16, norm_style="openai_legacy")(black, np.random.default_rng())
        assert out[0, 0, 0, 0].item() == pytest.approx(-108.3272985 / 68.5005327, abs=1e-6)


class TestBadArguments:
    @pytest.mark.parametrize(
        "make, message",
        [
            (lambda: TrainTransform(32, norm_style="clip"), "'clip' is not one of openai"),
            (lambda: TrainTransform(0), "crop size"),
            (lambda: TrainTransform(32, scale=(0.9, 0.5)), "crop scale"),
            (lambda: TrainTransform(32, scale=(0.0, 0.5)), "crop scale"),
            (lambda: TrainTransform(32, ratio=(2.0, 1.0)), "crop ratio"),
            (lambda: normalize_clip(torch.zeros(1, dtype=torch.uint8), "x"), "'x' is not one of"),
        ],
    )
    def test_user_errors(self, make, message):
        with pytest.raises(UserError, match=message):
            make()

    @pytest.mark.parametrize("frames", [np.zeros((2, 8, 8, 3)), np.zeros((8, 8, 3), np.uint8)])
    def test_frames_of_another_kind(self, frames):
        with pytest.raises(ValueError, match="frames"):
            TrainTransform(8)(frames, np.random.default_rng())
        with pytest.raises(ValueError, match="int64"):
            normalize_clip(torch.zeros(1, 3, 1, 2, 2, dtype=torch.int64), "openai")

    def test_ratio_and_scale_are_honoured(self):
        boxes = [random_crop_box(400, 400, np.random.default_rng(i), (0.2, 0.2), (2.0, 2.0)) for i in range(50)]
        for _, _, h, w in boxes:
            assert w / h == pytest.approx(2.0, abs=0.02)
            assert math.sqrt(h * w) == pytest.approx(400 * math.sqrt(0.2), abs=1.0)


class TestAvionsTransforms:
    def test_permute(self):
        video = torch.randn(4, 6, 8, 3)
        found = Permute([3, 0, 1, 2])(video)
        assert found.shape == (3, 4, 6, 8) and torch.equal(found[1, 2], video[2, ..., 1])

    @pytest.mark.parametrize("height, width", [(4, 9), (9, 4), (4, 4), (5, 9)])
    def test_three_crops_by_hand(self, height, width):
        """Halves of an odd room are rounded up."""
        video = torch.arange(2.0 * height * width).view(1, 2, height, width)
        found = SpatialCrop(4, 3)([video])
        tops = {(4, 9): [0, 0, 0], (9, 4): [0, 3, 5], (4, 4): [0, 0, 0], (5, 9): [1, 1, 1]}[height, width]
        lefts = {(4, 9): [0, 3, 5], (9, 4): [0, 0, 0], (4, 4): [0, 0, 0], (5, 9): [0, 3, 5]}[height, width]
        assert len(found) == 3
        for crop, top, left in zip(found, tops, lefts, strict=True):
            assert torch.equal(crop, video[..., top : top + 4, left : left + 4])

    def test_one_and_six_crops_of_several_videos(self):
        videos = [torch.randn(3, 2, 4, 6), torch.randn(3, 2, 7, 4)]
        for one, middle in zip(SpatialCrop(4, 1)(videos), SpatialCrop(4, 3)(videos)[1::3], strict=True):
            assert torch.equal(one, middle)
        six = SpatialCrop(4, 6)(videos)
        mirrored = SpatialCrop(4, 3)([v.flip(-1) for v in videos])
        assert len(six) == 12
        for video, first in ((0, 3), (1, 9)):
            for k in range(3):
                assert torch.equal(six[first + k], mirrored[3 * video + k])

    def test_errors(self):
        with pytest.raises(UserError, match="num_crops: 1, 3 or 6 are required, found 2"):
            SpatialCrop(4, 2)
        for shape in ((3, 2, 3, 9), (2, 4, 9)):
            with pytest.raises(UserError, match="at least 4 x 4, are required; found"):
                SpatialCrop(4)([torch.zeros(shape)])
