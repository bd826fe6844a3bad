"""Views of a clip: which frames and which crops they are; labels that follow the clip that is shown."""

import numpy as np
import pytest
import torch

from avion.data.clip_dataset import ClipDataset
from avion.data.ek100_actions import read_ek100_actions
from avion.data.labelled_clips import ClipViews, LabelledClips
from avion.data.transforms import CropsTransform, EvalTransform
from avion.data.video import VideoStore
from avion.errors import UserError
from tests.videos import read_barcode, write_video

FPS, CHUNK_S = 10, 3
HEADER = "narration_id,participant_id,video_id,start_timestamp,stop_timestamp,narration,verb_class,noun_class"


class Barcodes:
    """A transform that keeps the frames' numbers alone: (T, H, W, 3) -> (1, 3, T, 1, 1)."""

    crop_size = 8

    def __call__(self, frames, rng=None):
        numbers = torch.tensor([float(read_barcode(frame)) for frame in frames])
        return numbers.view(1, 1, -1, 1, 1).expand(1, 3, -1, 1, 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("views")
    for k in range(3):
        write_video(root / f"P01/P01_01.MP4/{CHUNK_S * k}.MP4", CHUNK_S * FPS, first=CHUNK_S * FPS * k, fps=FPS)
    write_video(root / "P01/P01_02.MP4/0.MP4", 20, fps=FPS)
    clips = [
        "a,P01,P01_01,00:00:00.00,00:00:08.00,x,1,2",  # frames 0 to 79, over all chunks
        "b,P01,P01_01,00:00:02.50,00:00:02.90,x,3,4",  # four frames
        "c,P01,P01_03,00:00:00.00,00:00:01.00,x,5,6",  # there is no such video
        "d,P01,P01_02,00:00:01.00,00:00:02.00,x,7,8",
    ]
    (root / "clips.csv").write_text("\n".join([HEADER, *clips]) + "\n")
    return read_ek100_actions(root / "clips.csv"), VideoStore(root, chunk_length=CHUNK_S)


def frames_of(data, index, num_frames, num_clips, **more):
    sample = ClipViews(*data, num_frames=num_frames, num_clips=num_clips, transform=Barcodes(), **more)[index]
    assert sample["error"] == ""
    return sample["video"][:, 0, :, 0, 0].int().tolist()


class TestStretches:
    def test_one_is_the_middles_of_the_segments(self, data):
        assert frames_of(data, 0, 4, 1) == [[10, 30, 50, 70]]

    def test_several_lie_at_the_middles_of_each_segments_parts(self, data):
        assert frames_of(data, 0, 4, 2) == [[5, 25, 45, 65], [15, 35, 55, 75]]
        # Segments of 20 frames, parts of 6 2/3: their middles, truncated.
        assert frames_of(data, 0, 4, 3) == [[3, 23, 43, 63], [10, 30, 50, 70], [16, 36, 56, 76]]

    def test_a_clip_of_few_frames_repeats_them_and_does_not_reach_beyond(self, data):
        assert frames_of(data, 1, 4, 3) == [[25, 26, 27, 28]] * 3
        assert frames_of(data, 1, 2, 4) == [[25, 27], [25, 27], [26, 28], [26, 28]]

    def test_strided_windows_spread_over_the_clip(self, data):
        # Windows of 2·3 + 1 = 7 frames in 80: 73 frames of room, in halves and thirds.
        options = {"sampling": "strided", "stride": 3}
        assert frames_of(data, 0, 3, 1, **options) == [[36, 39, 42]]
        assert frames_of(data, 0, 3, 2, **options) == [[18, 21, 24], [54, 57, 60]]
        assert frames_of(data, 0, 3, 3, **options) == [[12, 15, 18], [36, 39, 42], [60, 63, 66]]
        assert frames_of(data, 1, 3, 2, **options) == frames_of(data, 1, 3, 1, **options) * 2

    def test_one_stretch_and_crop_is_the_evaluation_sample(self, data):
        options = {"num_frames": 4}
        views = ClipViews(*data, num_clips=1, transform=CropsTransform(32, 1), **options)
        plain = ClipDataset(*data, transform=EvalTransform(32), tokenizer=None, train=False, **options)
        for index in range(2):
            assert views[index]["video"].shape == (1, 3, 4, 32, 32)
            assert torch.equal(views[index]["video"][0], plain[index]["video"])


class TestCrops:
    @pytest.mark.parametrize("fused", [False, True])
    def test_three_crops_side_by_side(self, fused, rng):
        frames = rng.integers(0, 256, (2, 16, 40, 3), dtype=np.uint8)  # as high as the crops: nothing is resized
        crops = CropsTransform(16, 3, fused=True)(frames)
        expected = [frames[:, :, left : left + 16].transpose(3, 0, 1, 2) for left in (0, 12, 24)]
        assert crops.dtype is torch.uint8 and torch.equal(crops, torch.from_numpy(np.stack(expected)))
        upright = CropsTransform(16, 3, fused=True)(frames.transpose(0, 2, 1, 3))
        assert torch.equal(upright, crops.transpose(-1, -2))

    def test_the_centre_is_the_evaluation_crop(self, rng):
        frames = rng.integers(0, 256, (2, 37, 50, 3), dtype=np.uint8)
        centre = EvalTransform(16)(frames, rng)
        assert torch.equal(CropsTransform(16, 1)(frames)[0], centre)
        assert torch.equal(CropsTransform(16, 3)(frames)[1], centre)

    def test_other_numbers_of_crops(self):
        with pytest.raises(UserError, match="1 .centre. or 3 .left, centre, right. are required, found 2"):
            CropsTransform(16, 2)

    def test_views_go_by_stretch_then_crop(self, data):
        many = ClipViews(*data, num_frames=2, num_clips=2, transform=CropsTransform(32, 3))[0]["video"]
        crops = CropsTransform(32, 3)
        assert many.shape == (6, 3, 2, 32, 32)
        for v in range(2):
            clip = data[1].read_clip("P01/P01_01", 0.0, 8.0, 2, views=2).frames[2 * v : 2 * v + 2]
            assert torch.equal(many[3 * v : 3 * v + 3], crops(clip))


def test_a_clip_that_cannot_be_read_is_zeros_of_the_same_shape(data):
    views = ClipViews(*data, num_frames=2, num_clips=2, transform=CropsTransform(32, 3))
    sample = views[2]
    assert "P01_03" in sample["error"] and sample["video"].shape == views[0]["video"].shape
    assert not sample["video"].any()


def test_labels_follow_the_clip_that_is_shown(data):
    table, store = data
    clips = ClipDataset(*data, num_frames=2, transform=EvalTransform(32), tokenizer=None, train=True)
    labelled = LabelledClips(clips, table.verb_class)
    shown = set()
    for epoch in range(8):
        for index in range(4):
            sample = labelled[(epoch, index)]
            row = sample["replaced_by"] if sample["replaced_by"] >= 0 else index
            assert (sample["replaced_by"] >= 0) is (index == 2) and bool(sample["error"]) is (index == 2)
            assert sample["label"] == table.verb_class[row] and type(sample["label"]) is int
            if index == 2:
                shown.add(sample["label"])
    assert len(shown) > 1 and 5 not in shown


def test_bad_numbers(data):
    for name in ("num_frames", "num_clips", "stride"):
        with pytest.raises(UserError, match="must be at least 1"):
            ClipViews(*data, **{"num_frames": 2, "num_clips": 1, "stride": 1, name: 0}, transform=CropsTransform(32, 1))
