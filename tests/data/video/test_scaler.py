"""The C code that cuts, scales and converts: against the definition in float64, on random pictures."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from avion import c_code
from avion.c_code import native
from avion.data.transforms import TrainTransform
from avion.data.video import Scaling
from avion.data.video.picture import Converter
from avion.data.video.scaler import SCALE, SUBSAMPLING, Kind, scaler
from tests.sanitizers import run_sanitized

needs_it = pytest.mark.skipif(native(SCALE).library is None, reason=native(SCALE).reason)

# Red's and blue's shares of luma: BT.709, FCC 73.682, BT.601, SMPTE 240M, BT.2020.
SHARES = {1: (0.2126, 0.0722), 4: (0.3, 0.11), 6: (0.299, 0.114), 7: (0.212, 0.087), 9: (0.2627, 0.0593)}
LIMITED, FULL = 1, 2


def picture_of(planes: list[np.ndarray], name: str, space: int = 2, colour_range: int = LIMITED) -> av.VideoFrame:
    height, width = planes[0].shape
    picture = av.VideoFrame(width, height, name)
    for plane, values in zip(picture.planes, planes, strict=True):
        rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
        rows[: values.shape[0], : values.shape[1]] = values
    picture.colorspace, picture.color_range = space, colour_range
    return picture


def random_planes(name: str, height: int, width: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Noise, in which a mistake of one sample shows."""
    shifts = SUBSAMPLING[name]
    shapes = [(height, width)] + ([(-(-height >> shifts[1]), -(-width >> shifts[0]))] * 2 if shifts else [])
    return [rng.integers(0, 256, shape, dtype=np.uint8) for shape in shapes]


def weights(begin: int, length: int, count: int, shift: int, samples: int) -> np.ndarray:
    """The matrix (count, samples) of one direction, after the definition: float64."""
    luma = begin + (np.arange(count) + 0.5) * length / count - 0.5  # where an output lies among the samples of luma
    place = (luma + 0.5) / 2**shift - 0.5
    support = max(length / count / 2**shift, 1.0)
    found = np.maximum(0, 1 - np.abs(place[:, None] - np.arange(samples)) / support)
    found[:, : begin >> shift] = found[:, -(-(begin + length) >> shift) :] = 0  # only what lies in the box
    return found / found.sum(1, keepdims=True)


def expected(planes, box, size, name: str, shares: tuple[float, float], full: bool) -> np.ndarray:
    """(3, *size) float64, between 0 and 255."""
    top, left, height, width = box
    scaled = []
    for p, plane in enumerate(planes):
        across, down = SUBSAMPLING[name] if p else (0, 0)
        rows = weights(top, height, size[0], down, plane.shape[0])
        columns = weights(left, width, size[1], across, plane.shape[1])
        scaled.append(rows @ plane.astype(np.float64) @ columns.T)
    if len(planes) == 1:
        return np.stack(scaled * 3)
    red, blue = shares
    y = scaled[0] if full else (scaled[0] - 16) * 255 / 219
    cb, cr = ((s - 128) * (1.0 if full else 255 / 224) for s in scaled[1:])
    r, b = y + 2 * (1 - red) * cr, y + 2 * (1 - blue) * cb
    # Y is the sum of all three, each with a share.
    return np.clip(np.stack([r, (y - red * r - blue * b) / (1 - red - blue), b]), 0, 255)


def scaled_by(kind: Kind, picture) -> np.ndarray:
    made = scaler(kind)
    assert made is not None
    out = np.full((3, *kind.size), 77, np.uint8)
    made(picture, out)
    return out


def a_box(height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    top, left = int(rng.integers(height)), int(rng.integers(width))
    return top, left, int(rng.integers(1, height - top + 1)), int(rng.integers(1, width - left + 1))


def assert_close(found: np.ndarray, wanted: np.ndarray) -> None:
    """Rounding to whole levels is half a level; what is rounded before that is small."""
    assert np.abs(found - wanted).max() < 0.65


@needs_it
@pytest.mark.parametrize("name", SUBSAMPLING)
def test_any_box_of_any_format(name, rng):
    for _ in range(25):
        height, width = (int(n) for n in rng.integers(1, 150, 2))
        box, size = a_box(height, width, rng), tuple(int(n) for n in rng.integers(5, 90, 2))
        planes = random_planes(name, height, width, rng)
        found = scaled_by(Kind(box, size, name, 2, LIMITED), picture_of(planes, name))
        assert_close(found, expected(planes, box, size, name, SHARES[6], full="j" in name))


@needs_it
@pytest.mark.parametrize("name", SUBSAMPLING)
def test_rounding_leans_to_no_side(name, rng):
    planes, box, size = random_planes(name, 200, 260, rng), (11, 7, 150, 230), (112, 96)
    found = scaled_by(Kind(box, size, name, 2, LIMITED), picture_of(planes, name))
    wanted = expected(planes, box, size, name, SHARES[6], full="j" in name)
    inside = (wanted > 1) & (wanted < 254)
    assert abs((found - wanted)[inside].mean()) < 0.04


@needs_it
@pytest.mark.parametrize("colour_range", [0, LIMITED, FULL])
@pytest.mark.parametrize("space", [0, 1, 2, 4, 5, 6, 7, 9])
def test_colour_spaces_and_ranges(space, colour_range, rng):
    planes, box, size = random_planes("yuv420p", 97, 131, rng), (3, 5, 70, 120), (64, 48)
    found = scaled_by(Kind(box, size, "yuv420p", space, colour_range), picture_of(planes, "yuv420p"))
    shares = SHARES.get(space, SHARES[6])
    assert_close(found, expected(planes, box, size, "yuv420p", shares, colour_range == FULL))


@needs_it
@pytest.mark.parametrize("value", [(0, 0, 0), (255, 255, 255), (255, 0, 255), (235, 128, 128), (16, 128, 128)])
@pytest.mark.parametrize("colour_range", [LIMITED, FULL])
def test_the_darkest_and_the_brightest(value, colour_range):
    """Where a sum leaves 16 bits, black becomes white."""
    planes = [np.full(shape, v, np.uint8) for shape, v in zip([(60, 400), (30, 200), (30, 200)], value, strict=True)]
    for size in ((224, 224), (60, 400), (4, 13), (2, 14)):
        kind = Kind((0, 0, 60, 400), size, "yuv420p", 9, colour_range)
        wanted = expected(planes, kind.box, size, "yuv420p", SHARES[9], colour_range == FULL)
        assert_close(scaled_by(kind, picture_of(planes, "yuv420p")), wanted)


@needs_it
def test_luma_is_scaled_as_torch_scales(rng):
    planes, box = random_planes("gray", 200, 260, rng), (11, 7, 150, 230)
    cut = torch.from_numpy(planes[0][11:161, 7:237].astype(np.float64))[None, None]
    wanted = F.interpolate(cut, size=(112, 96), mode="bilinear", antialias=True, align_corners=False)[0].numpy()
    found = scaled_by(Kind(box, (112, 96), "gray", 2, LIMITED), picture_of(planes, "gray"))
    assert_close(found, np.repeat(wanted, 3, axis=0))


@needs_it
def test_rows_and_planes_of_a_larger_array(rng):
    """The target is one frame of a clip (3, frames, height, width); the other frames stay as they are."""
    planes = random_planes("yuv420p", 40, 50, rng)
    kind = Kind((1, 3, 30, 41), (24, 20), "yuv420p", 2, LIMITED)
    clip = np.full((3, 5, 24, 20), 7, np.uint8)
    scaler(kind)(picture_of(planes, "yuv420p"), clip[:, 2])
    assert np.array_equal(clip[:, 2], scaled_by(kind, picture_of(planes, "yuv420p")))
    assert (np.delete(clip, 2, axis=1) == 7).all()


@needs_it
def test_threads_do_not_disturb_each_other(rng):
    kind = Kind((1, 3, 90, 141), (64, 64), "yuv420p", 2, LIMITED)
    pictures = [picture_of(random_planes("yuv420p", 100, 150, rng), "yuv420p") for _ in range(4)]
    alone, made = [scaled_by(kind, picture) for picture in pictures], scaler(kind)

    def again(k: int) -> bool:
        out = np.empty((3, 64, 64), np.uint8)
        made(pictures[k % 4], out)
        return np.array_equal(out, alone[k % 4])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(again, range(200)))


@needs_it
def test_nothing_beside_the_planes_is_touched(tmp_path, fresh_seed):
    run_sanitized(SCALE, Path(__file__).with_name("scale_memory.c"), tmp_path, 3000, fresh_seed)


@needs_it
@pytest.mark.parametrize("fused", [False, True])
def test_it_is_compiled_before_the_workers_start(fused, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    c_code.forget()
    TrainTransform(64, fused=fused)
    assert len(list(tmp_path.rglob("scale-*.so"))) == fused
    c_code.forget()


# ---- where libswscale does the work ------------------------------------------------------------------------


@pytest.fixture
def without_c(monkeypatch):
    monkeypatch.setenv("AVION_NATIVE", "0")
    c_code.forget()
    yield
    monkeypatch.undo()
    c_code.forget()


def smooth_picture() -> av.VideoFrame:
    y, x = np.mgrid[0:144, 0:256]
    planes = [(128 + 90 * np.sin(x / 31 + 1) * np.cos(y / 27)).astype(np.uint8)]
    planes += [(128 + 60 * np.sin(x[::2, ::2] / p)).astype(np.uint8) for p in (41, 53)]
    return picture_of(planes, "yuv420p")


def converted(scaling: Scaling, picture: av.VideoFrame) -> np.ndarray:
    out = np.empty((3, *scaling.size), np.uint8)
    Converter((picture.height, picture.width), 0).scaled(picture, scaling, out)
    return out


def test_libswscale_gives_nearly_the_same(without_c):
    picture, scaling = smooth_picture(), Scaling((7, 12, 120, 201), (112, 112))
    assert scaler(Kind(scaling.box, scaling.size, "yuv420p", 2, LIMITED)) is None
    by_ffmpeg = converted(scaling, picture).astype(int)
    os.environ["AVION_NATIVE"] = "1"
    c_code.forget()
    assert np.abs(by_ffmpeg - converted(scaling, picture)).mean() < 1


def test_what_the_c_code_leaves_to_libswscale():
    assert scaler(Kind((0, 0, 90, 90), (64, 64), "yuv420p", 8, LIMITED)) is None  # YCgCo
    assert scaler(Kind((0, 0, 90, 90), (64, 64), "yuv410p", 2, LIMITED)) is None
    assert scaler(Kind((0, 0, 90, 90), (64, 2), "gray", 2, LIMITED)) is None  # 90 samples make one
    picture = smooth_picture()
    assert abs(int(converted(Scaling((0, 0, 144, 256), (1, 1)), picture).mean()) - 128) < 30
