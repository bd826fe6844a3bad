"""Cutting, scaling and converting in one pass: the boxes of the plain path, and nearly its values."""

import av
import numpy as np
import pytest
import torch

from avion import c_code
from avion.data.clip_dataset import read_transformed
from avion.data.narrations import Narration
from avion.data.transforms import CropsTransform, EvalTransform, TrainTransform, normalize_clip
from avion.data.video import Scaling, VideoError, VideoStore, index_videos, open_video, pyav_reader
from tests.videos import read_barcode, write_video


def camera_like(index: int, height: int, width: int) -> np.ndarray:
    """Smooth in brightness and colour, with edges and a little noise, moving."""
    rng = np.random.default_rng(index)
    y, x = np.mgrid[0:height, 0:width] + 3.0 * index
    waves = [100 * np.sin(x / p) * np.cos(y / q) for p, q in ((37, 23), (29, 51), (61, 33))]
    picture = 128 + np.stack(waves, axis=-1)
    picture[height // 3 : height // 2, width // 4 : width // 2] += (40, -30, 20)
    return np.clip(picture + rng.normal(0, 2, (height, width, 1)), 0, 255).astype(np.uint8)


def write_camera(path, frames=20, height=144, width=256, pix_fmt="yuv420p", rotation=0, color=None, fps=10):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as sink:
        stream = sink.add_stream("libx264", rate=fps, options={"crf": "12", "g": "10"})
        stream.height, stream.width, stream.pix_fmt = height, width, pix_fmt
        if rotation:
            stream.set_display_rotation(rotation)
        if color is not None:
            stream.codec_context.colorspace, stream.codec_context.color_range = color
        for i in range(frames):
            sink.mux(stream.encode(av.VideoFrame.from_ndarray(camera_like(i, height, width), format="rgb24")))
        sink.mux(stream.encode(None))
    return path


def in_both_ways(root, transform_of, seed, decoder="pyav", span=(0.2, 1.7), video="v"):
    """The plain clip and the fused one, both normalised. -> two tensors"""
    store, row = VideoStore(root, decoder=decoder, layout="whole"), Narration(video, *span, ("",), None)
    plain = read_transformed(store, row, 5, transform_of(fused=False), np.random.default_rng(seed), jitter=True)[0]
    fused = read_transformed(store, row, 5, transform_of(fused=True), np.random.default_rng(seed), jitter=True)[0]
    assert fused.dtype == torch.uint8 and fused.shape == plain.shape
    return plain, normalize_clip(fused, "openai")


def difference_in_levels(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().mean()) * 0.27 * 255  # CLIP's deviations are 0.26 to 0.28


@pytest.fixture(params=["C", "libswscale"])
def scaled_by(request, monkeypatch):
    """Both ways of scaling."""
    monkeypatch.setenv("AVION_NATIVE", "1" if request.param == "C" else "0")
    c_code.forget()
    yield
    monkeypatch.undo()
    c_code.forget()


@pytest.mark.usefixtures("scaled_by")
class TestNearTheValuesOfThePlainPath:
    @pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv422p", "yuv444p", "yuv420p10le", "yuvj420p"])
    def test_pixel_formats(self, tmp_path, pix_fmt):
        write_camera(tmp_path / "v.mp4", pix_fmt=pix_fmt)
        for seed in np.random.default_rng().integers(0, 2**31, 4):
            plain, fused = in_both_ways(tmp_path, lambda fused: TrainTransform(112, fused=fused), int(seed))
            assert difference_in_levels(plain, fused) < 2.0

    @pytest.mark.parametrize("rotation", [90, 180, 270])
    def test_turned(self, tmp_path, rotation):
        write_camera(tmp_path / "v.mp4", rotation=rotation)
        plain, fused = in_both_ways(tmp_path, lambda fused: TrainTransform(96, fused=fused), 1)
        assert difference_in_levels(plain, fused) < 2.0

    @pytest.mark.parametrize("color", [(1, 1), (1, 2), (5, 1), (9, 1)], ids=["709", "709 full", "601", "2020"])
    def test_colour_spaces(self, tmp_path, color):
        write_camera(tmp_path / "v.mp4", color=color)
        plain, fused = in_both_ways(tmp_path, lambda fused: TrainTransform(112, fused=fused), 3)
        assert difference_in_levels(plain, fused) < 2.0

    @pytest.mark.parametrize("size", [(143, 255), (144, 255), (65, 64)])
    def test_odd_sizes(self, tmp_path, size):
        write_camera(tmp_path / "v.mp4", height=size[0], width=size[1], pix_fmt="yuv444p")
        plain, fused = in_both_ways(tmp_path, lambda fused: TrainTransform(64, fused=fused), 5)
        assert difference_in_levels(plain, fused) < 2.0

    @pytest.mark.parametrize("kind", [EvalTransform, lambda size, fused: CropsTransform(size, 3, fused=fused)])
    @pytest.mark.parametrize("rotation", [0, 90])
    def test_evaluation(self, tmp_path, kind, rotation):
        write_camera(tmp_path / "v.mp4", rotation=rotation)
        plain, fused = in_both_ways(tmp_path, lambda fused: kind(96, fused=fused), 0)
        assert difference_in_levels(plain, fused) < 2.0

    def test_decord_and_the_index(self, tmp_path):
        write_camera(tmp_path / "v.mp4")
        transform = TrainTransform(112, fused=True)
        row = Narration("v", 0.2, 1.7, ("",), None)

        def clip(**how):
            store = VideoStore(tmp_path, **how)
            return read_transformed(store, row, 5, transform, np.random.default_rng(9), jitter=True)[0].float()

        plain = clip()
        index_videos(tmp_path)
        torch.testing.assert_close(clip(), plain, rtol=0, atol=0)
        pytest.importorskip("decord")
        assert (clip(decoder="decord") - plain).abs().mean() < 2.0


class TestOtherColourSpaces:
    @pytest.mark.parametrize("space", [8, 10, 11, 14])
    def test_what_nobody_converts_is_one_line(self, tmp_path, space):
        """YCgCo, BT.2020 with constant luminance, SMPTE 2085, ICtCp."""
        path = write_camera(tmp_path / "v.mp4", frames=3, color=(space, 1))
        reason = f"has the colour space {space} of ITU-T H.273, which cannot be converted to RGB"
        assert reason in index_videos(tmp_path).plain["v.mp4"]
        with open_video(path, "pyav") as reader:
            for read in (reader.get_frames, lambda i: reader.get_scaled(i, lambda h, w: Scaling((0, 0, h, w), (8, 8)))):
                with pytest.raises(VideoError, match=f"v.mp4: {reason}"):
                    read([1])

    def test_a_reserved_number_says_nothing(self, tmp_path, monkeypatch):
        path = write_camera(tmp_path / "v.mp4", frames=3)
        with open_video(path, "pyav") as reader:
            plain, pictures = reader.get_frames([1]), pyav_reader.pictures

            def reserved(*what):
                for i, picture in pictures(*what):
                    picture.colorspace = 3
                    yield i, picture

            monkeypatch.setattr(pyav_reader, "pictures", reserved)
            assert np.array_equal(reader.get_frames([1]), plain)


@pytest.mark.usefixtures("scaled_by")
class TestBoxes:
    def test_every_offset_is_cut_where_it_should_be(self, tmp_path):
        """A picture of two ramps, whose means tell where a box lies. Boxes at even and odd places."""
        ramp = np.zeros((96, 160, 3), np.uint8)
        ramp[..., 0], ramp[..., 1] = np.arange(160), 2 * np.arange(96)[:, None]
        ramp[..., 2] = 128
        path = tmp_path / "v.mp4"
        with av.open(str(path), "w") as sink:
            stream = sink.add_stream("libx264", rate=10, options={"crf": "0"})
            stream.height, stream.width, stream.pix_fmt = 96, 160, "yuv420p"
            for _ in range(3):
                sink.mux(stream.encode(av.VideoFrame.from_ndarray(ramp, format="rgb24")))
            sink.mux(stream.encode(None))
        rng = np.random.default_rng()
        with open_video(path, "pyav") as reader:
            for parity in (0, 1):
                for _ in range(8):
                    height, width = (int(n) for n in rng.integers(20, 60, 2))
                    top = int(rng.integers(0, (96 - height) // 2)) * 2 + parity
                    left = int(rng.integers(0, (160 - width) // 2)) * 2 + parity
                    box = (min(top, 96 - height), min(left, 160 - width), height, width)
                    cut = reader.get_scaled([1], lambda h, w, box=box: Scaling(box, (32, 32)))[0]
                    red, green = cut[0].mean(), cut[1].mean()
                    assert abs(red - (box[1] + (width - 1) / 2)) < 2.5
                    assert abs(green - 2 * (box[0] + (height - 1) / 2)) < 2.5

    def test_the_box_is_drawn_after_the_frames_and_once(self, tmp_path):
        write_video(tmp_path / "v.mp4", 60, fps=10)
        seed = int(np.random.default_rng().integers(2**31))
        calls = []

        def scaling(height, width):
            calls.append((height, width))
            return Scaling((0, 0, height, width), (48, 72))

        store = VideoStore(tmp_path)
        scaled = store.read_clip("v", 0.0, 6.0, 4, rng=np.random.default_rng(seed), scaling=scaling)
        plain = store.read_clip("v", 0.0, 6.0, 4, rng=np.random.default_rng(seed))
        assert calls == [(64, 96)] and scaled.frames.shape == (4, 3, 48, 72)
        assert [read_barcode(f.transpose(1, 2, 0)) for f in scaled.frames] == [read_barcode(f) for f in plain.frames]

    def test_repeats_order_and_views(self, tmp_path):
        write_video(tmp_path / "v.mp4", 60, fps=10)
        with open_video(tmp_path / "v.mp4") as reader:
            scaled = reader.get_scaled([7, 3, 7, 59], lambda h, w: Scaling((0, 0, h, w), (h, w)))
        assert [read_barcode(f.transpose(1, 2, 0)) for f in scaled] == [7, 3, 7, 59]
        clip = VideoStore(tmp_path).read_clip(
            "v", 0.0, 4.0, 2, views=2, scaling=lambda h, w: Scaling((0, 0, h, w), (h, w))
        )
        assert [read_barcode(f.transpose(1, 2, 0)) for f in clip.frames] == [5, 25, 15, 35]

    def test_chunks_of_different_size_are_an_error(self, tmp_path):
        write_video(tmp_path / "v.mp4/0.mp4", 150, fps=10)
        write_video(tmp_path / "v.mp4/15.mp4", 20, fps=10, width=64, height=64)
        with pytest.raises(VideoError, match="15.mp4: has frames of 64 x 64"):
            VideoStore(tmp_path).read_clip("v", 14.0, 16.0, 4, scaling=lambda h, w: Scaling((0, 0, h, w), (32, 32)))

    def test_only_wanted_frames_are_converted(self, tmp_path, monkeypatch):
        from avion.data.video.picture import Converter

        converted = []
        scaled = Converter.scaled
        monkeypatch.setattr(Converter, "rgb", lambda *a: pytest.fail("was converted whole"))
        monkeypatch.setattr(Converter, "scaled", lambda self, *a: converted.append(1) or scaled(self, *a))
        write_video(tmp_path / "v.mp4", 60, fps=10)
        row = Narration("v", 0.0, 6.0, ("",), None)
        read_transformed(VideoStore(tmp_path), row, 4, TrainTransform(32, fused=True), np.random.default_rng(0))
        assert len(converted) == 4
