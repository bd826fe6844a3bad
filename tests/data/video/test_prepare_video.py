"""One raw video through the preparation: no frame lost, doubled, moved in time, turned or tinted."""

import contextlib
from fractions import Fraction

import av
import numpy as np
import pytest

from avion.data.video import VideoError, VideoStore, open_video
from avion.data.video.prepare_encode import Encoder, Encoding
from avion.data.video.prepare_plan import Raw, Settings, _raw
from avion.data.video.prepare_source import RawVideo, target_size
from avion.data.video.prepare_verify import StreamCheck, psnr
from avion.data.video.prepare_video import prepare_video
from tests.videos import barcode_frame, read_barcode, write_audio_only, write_video


def prepare(path, folder, **settings):
    folder.mkdir(exist_ok=True)
    settings = Settings(**settings)
    return settings, prepare_video(_raw(path, "video"), settings, folder, 1, lambda share: None)


def shown(path):
    """[(time as the file states it, a Fraction of seconds, barcode)] of every frame."""
    with av.open(str(path)) as container:
        frames = [(f.pts * f.time_base, read_barcode(f.to_ndarray(format="rgb24"))) for f in container.decode(video=0)]
    return frames


def shown_in_chunks(folder, result, settings):
    frames = []
    for name, count, size in result["files"]:
        path = folder / result["partial"] / name
        assert path.stat().st_size == size
        part = shown(path)
        assert len(part) == count
        start = int(path.stem) * (settings.chunk_length if settings.layout == "vms" else 1)
        assert all(0 <= t < settings.chunk_length for t, _ in part), "a frame outside its chunk"
        frames += [(start + t, code) for t, code in part]
    return frames


def write_times(path, times, tick, **options):
    """Barcodes 0, 1, ... at these times (in ticks). -> path"""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options=options)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.codec_context.time_base = tick
        for i, time in enumerate(times):
            picture = av.VideoFrame.from_ndarray(barcode_frame(i), format="rgb24")
            picture.pts, picture.time_base = time, tick
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("fps", [Fraction(30000, 1001), 25, Fraction(60000, 1001), 12])
@pytest.mark.parametrize("layout", ["avion", "vms"])
def test_constant_rates_keep_every_frame_at_its_time(tmp_path, fps, layout):
    raw = write_video(tmp_path / "a.mp4", 100, fps=fps)
    settings, result = prepare(raw, tmp_path / "out", layout=layout, chunk_length=1)
    assert shown_in_chunks(tmp_path / "out", result, settings) == [(i / Fraction(fps), i) for i in range(100)]
    assert (result["frames"], result["fps"]) == (100, str(fps))


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_variable_rates_keep_every_frame_at_its_time(tmp_path, suffix):
    rng = np.random.default_rng(7)
    times = np.cumsum(rng.integers(3, 300, 120)).tolist()
    raw = write_times(tmp_path / f"a.{suffix}", times, Fraction(1, 1000))
    settings, result = prepare(raw, tmp_path / "out", layout="avion", chunk_length=2)
    due = [(Fraction(t - times[0], 1000), i) for i, t in enumerate(times)]
    assert shown_in_chunks(tmp_path / "out", result, settings) == due
    assert "variable frame rate" in result["notes"]


def test_a_frame_at_the_cut_begins_the_next_chunk(tmp_path):
    raw = write_times(tmp_path / "a.mp4", [0, 900, 999, 1000, 1001, 1999, 2000, 5000], Fraction(1, 1000))
    settings, result = prepare(raw, tmp_path / "out", layout="avion", chunk_length=1)
    assert [(name, frames) for name, frames, _ in result["files"]] == [
        ("0.mp4", 3),
        ("1.mp4", 3),
        ("2.mp4", 1),
        ("5.mp4", 1),
    ]
    assert any("2 chunks without a frame" in note for note in result["notes"])
    codes = [code for _, code in shown_in_chunks(tmp_path / "out", result, settings)]
    assert codes == list(range(8))


def test_ticks_that_do_not_divide_a_second(tmp_path):
    """AVI counts in frames: at 29.97 a second, 15 s are no whole number of ticks."""
    raw = tmp_path / "a.avi"
    with av.open(str(raw), "w") as container:
        stream = container.add_stream("mjpeg", rate=Fraction(30000, 1001))
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuvj420p"
        for i in range(95):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(barcode_frame(i), format="rgb24")))
        container.mux(stream.encode(None))
    settings, result = prepare(raw, tmp_path / "out", layout="avion", chunk_length=1)
    assert shown_in_chunks(tmp_path / "out", result, settings) == [(Fraction(i * 1001, 30000), i) for i in range(95)]


def test_the_store_reads_the_same_frames_before_and_after(tmp_path):
    """Clips of the chunks are clips of the raw file, to the frame, also where the rate varies and across the cut. Only
    a moment between a cut and the first frame after it shows that one, not the last one before the cut."""
    times = np.cumsum(np.random.default_rng(1).choice([33, 34, 66, 100], 200)).tolist()
    (tmp_path / "raw").mkdir()
    raw = write_times(tmp_path / "raw" / "v.mp4", [t - times[0] for t in times], Fraction(1, 1000))
    settings, result = prepare(raw, tmp_path / "out", layout="avion", chunk_length=3)
    (tmp_path / "out" / result["partial"]).rename(tmp_path / "out" / "v.mp4")
    before = VideoStore(tmp_path / "raw", layout="whole")
    after = VideoStore(tmp_path / "out", layout="avion", chunk_length=3)
    rng = np.random.default_rng(0)
    for _ in range(40):
        start = rng.uniform(0, 9)
        end = start + rng.uniform(0.5, 3)
        codes = [[read_barcode(f) for f in s.read_clip("v", start, end, 6).frames] for s in (before, after)]
        assert -1 not in codes[0]
        for one, other in zip(*codes, strict=True):
            cut = (times[other] - times[0]) // 3000 > (times[other - 1] - times[0]) // 3000
            assert other == one or (other == one + 1 and cut)


@pytest.mark.parametrize(
    ("size", "side", "due"),
    [
        ((1080, 1920), 288, (288, 512)), ((1920, 1080), 288, (512, 288)), ((1080, 1440), 288, (288, 384)),
        ((256, 456), 288, (256, 456)), ((75, 101), 288, (74, 100)), ((1, 1), 288, (2, 2)),
        ((720, 1279), 288, (288, 512)),
        ((480, 853), 320, (320, 568)), ((289, 289), 288, (288, 288)),
    ],
)  # fmt: skip
def test_the_target_size(size, side, due):
    assert target_size(*size, side) == due


def encode(path, pictures, *, pix_fmt="yuv420p", codec="libx264", rate=30, rotation=0, hflip=False, tags=(), **options):
    """pictures: (H, W, 3) uint8 RGB each. tags: (name, value) of the codec context. -> path"""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options={"crf": "10", **options} if codec == "libx264" else {})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pix_fmt
        if rotation or hflip:
            stream.set_display_rotation(rotation, hflip=hflip)
        for name, value in tags:
            setattr(stream.codec_context, name, value)
        for rgb in pictures:
            picture = av.VideoFrame.from_ndarray(rgb, format="rgb24")
            how = {k: v for k, v in tags if k in ("color_range", "colorspace")}
            picture = picture.reformat(
                format=pix_fmt, dst_color_range=how.get("color_range", 1), dst_colorspace=how.get("colorspace")
            )
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
@pytest.mark.parametrize("hflip", [False, True])
def test_turned_and_mirrored_pictures_stand_upright(tmp_path, rotation, hflip):
    raw = encode(tmp_path / "a.mp4", [barcode_frame(i, 64, 96) for i in range(12)], rotation=rotation, hflip=hflip)
    _, result = prepare(raw, tmp_path / "out", short_side=48)
    with open_video(raw) as before, open_video(tmp_path / "out" / result["partial"]) as after:
        assert [after.height, after.width] == result["size"] == ([48, 72] if rotation % 180 == 0 else [72, 48])
        wanted = before.get_frames(range(12))
        got = after.get_frames(range(12))
    small = wanted[:, 0::4, 0::4].astype(int), got[:, 0::3, 0::3].astype(int)
    assert np.abs(small[0] - small[1]).mean() < 12
    assert result["compared_with_source"] >= 1


COLOURS = [(200, 40, 40), (40, 180, 60), (30, 60, 210), (235, 235, 235), (16, 16, 16), (128, 128, 128)]


def patches(height=96, width=144):
    picture = np.zeros((height, width, 3), np.uint8)
    for i, colour in enumerate(COLOURS):
        picture[
            (i // 3) * height // 2 : (i // 3 + 1) * height // 2, (i % 3) * width // 3 : (i % 3 + 1) * width // 3
        ] = colour
    return picture


def patch_means(rgb):
    height, width = rgb.shape[:2]
    means = []
    for i in range(6):
        top, left = (i // 3) * height // 2, (i % 3) * width // 3
        means.append(rgb[top + 8 : top + height // 2 - 8, left + 8 : left + width // 3 - 8].mean(axis=(0, 1)))
    return np.array(means)


@pytest.mark.parametrize(
    ("pix_fmt", "tags"),
    [
        ("yuv420p", ()),
        ("yuvj420p", (("color_range", 2),)),
        ("yuv420p", (("color_range", 1), ("colorspace", 1), ("color_primaries", 1), ("color_trc", 1))),
        ("yuv420p", (("color_range", 2), ("colorspace", 1))),
        ("yuv444p", (("color_range", 1), ("colorspace", 5))),
        ("yuv420p10le", (("color_range", 1), ("colorspace", 1))),
        ("yuv422p10le", ()),
    ],
)  # fmt: skip
def test_colours_stay_what_they_are(tmp_path, pix_fmt, tags):
    raw = encode(tmp_path / "a.mp4", [patches()] * 6, pix_fmt=pix_fmt, tags=tags)
    _, result = prepare(raw, tmp_path / "out", short_side=48)
    out = tmp_path / "out" / result["partial"]
    with open_video(out) as after:
        np.testing.assert_allclose(patch_means(after.get_frames([3])[0].repeat(2, 0).repeat(2, 1)), COLOURS, atol=6)
    with av.open(str(out)) as container:
        context = container.streams.video[0].codec_context
        frame = next(container.decode(video=0))
        assert context.pix_fmt == "yuv420p"
        assert int(frame.color_range) != 2, "limited range, stated or by default"
        stated = dict(tags).get("colorspace")
        assert stated is None or int(frame.colorspace) == stated


def test_high_dynamic_range_becomes_bt709(tmp_path):
    """A grey of PQ's signal 0.58 is about 203 cd/m², the white of standard range; 0.38 a tenth of its light."""
    grey = tmp_path / "a.mp4"
    with av.open(str(grey), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "5"})
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p10le"
        context = stream.codec_context
        context.color_range, context.colorspace, context.color_primaries, context.color_trc = 1, 9, 9, 16
        for _ in range(4):
            picture = av.VideoFrame(96, 64, "yuv420p10le")
            for k, plane in enumerate(picture.planes):
                rows = np.frombuffer(plane, np.uint16).reshape(-1, plane.line_size // 2)
                rows[:] = 512
                if k == 0:
                    rows[:, :48], rows[:, 48:] = 64 + round(0.58 * 876), 64 + round(0.38 * 876)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    _, result = prepare(grey, tmp_path / "out")
    out = tmp_path / "out" / result["partial"]
    with av.open(str(out)) as container:
        frame = next(container.decode(video=0))
        assert [int(v) for v in (frame.colorspace, frame.color_primaries, frame.color_trc)] == [1, 1, 1]
    with open_video(out) as reader:
        rgb = reader.get_frames([0])[0]
    white, dark = rgb[:, 8:40].mean(), rgb[:, 56:88].mean()
    assert white > 230, "signal 0.58 of PQ is standard white"
    assert 60 < dark < 110, "an inverse of BT.709's curve of a tenth of white is about 0.32"
    assert "high dynamic range brought to BT.709" in result["notes"]


def test_odd_sizes_and_anamorphic_pictures(tmp_path):
    raw = encode(tmp_path / "a.mkv", [barcode_frame(i, 75, 101) for i in range(8)], pix_fmt="yuv444p")
    _, result = prepare(raw, tmp_path / "out")
    assert result["size"] == [74, 100]
    assert [code for _, code in shown(tmp_path / "out" / result["partial"])] == list(range(8))
    wide = tmp_path / "wide.mp4"
    with av.open(str(wide), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 72, 64, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)
        for i in range(8):
            picture = av.VideoFrame.from_ndarray(barcode_frame(i, 64, 72), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    _, result = prepare(wide, tmp_path / "out")
    assert result["size"] == [64, 96], "pixels that are 4/3 as wide as high become square"


def test_sound_is_dropped_and_said(tmp_path):
    raw = write_video(tmp_path / "a.mp4", 40, with_audio=True)
    _, result = prepare(raw, tmp_path / "out")
    with av.open(str(tmp_path / "out" / result["partial"])) as container:
        assert [s.type for s in container.streams] == ["video"]
    assert "audio dropped" in result["notes"]


def test_interlaced_pictures_are_said(tmp_path):
    raw = encode(tmp_path / "a.mp4", [barcode_frame(i) for i in range(8)], flags="+ildct+ilme")
    with av.open(str(raw)) as container:
        assert next(container.decode(video=0)).interlaced_frame, "the fixture is interlaced"
    _, result = prepare(raw, tmp_path / "out")
    assert any(note.startswith("interlaced") for note in result["notes"])


def test_b_frames_are_disposable_and_keyframes_as_near_as_asked(tmp_path):
    raw = write_video(tmp_path / "a.mp4", 60)
    _, result = prepare(raw, tmp_path / "out", encoding=Encoding(gop=9, bframes=3))
    from avion.data.video.container import Demuxed, open_container
    from avion.data.video.packets import DISPOSABLE, KEY

    path = str(tmp_path / "out" / result["partial"])
    with open_container(path) as container:
        table = Demuxed(container, path).table
    flags = np.asarray(table.flags)[table.display]  # in display order
    kinds = "".join("K" if f & KEY else "b" if f & DISPOSABLE else "P" for f in flags)
    assert kinds.startswith("KbbbPbbbP" * 6)


@pytest.mark.parametrize("damage", ["cut", "middle", "sound", "text"])
def test_a_damaged_source_leaves_nothing_behind(tmp_path, damage):
    raw = write_video(tmp_path / "a.mp4", 120)
    if damage == "cut":
        raw.write_bytes(raw.read_bytes()[: raw.stat().st_size // 2])
    elif damage == "middle":
        data = bytearray(raw.read_bytes())
        data[len(data) // 3 : len(data) // 3 + 400] = np.random.default_rng(0).bytes(400)
        raw.write_bytes(data)
    elif damage == "sound":
        raw = write_audio_only(tmp_path / "b.mp4")
    else:
        raw.write_text("not a video")
    with pytest.raises(VideoError):
        prepare(raw, tmp_path / "out", layout="avion", chunk_length=1)
    assert list((tmp_path / "out").iterdir()) == []


class Faulty(Encoder):
    """An encoder that does the wrong thing with frame number 20."""

    fault = ""

    def add(self, picture, time, duration):
        self.count = getattr(self, "count", -1) + 1
        if self.count == 20:
            if self.fault == "picture":
                picture = av.VideoFrame.from_ndarray(255 - picture.to_ndarray(format="rgb24"), format="rgb24")
                picture = picture.reformat(format="yuv420p")
            elif self.fault == "lost":
                return []
            elif self.fault == "time":
                return super().add(picture, time + 1, duration)
        return super().add(picture, time, duration)


@pytest.mark.parametrize("fault", ["picture", "lost", "time"])
def test_what_was_written_wrongly_is_noticed(tmp_path, monkeypatch, fault):
    raw = write_video(tmp_path / "a.mp4", 40)
    monkeypatch.setattr(Faulty, "fault", fault)
    monkeypatch.setattr("avion.data.video.prepare_video.Encoder", Faulty)
    with pytest.raises(VideoError):
        prepare(raw, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("what", ["byte", "short"])
def test_a_file_that_holds_other_bytes_is_noticed(tmp_path, what):
    check, path = StreamCheck("a", (64, 96)), tmp_path / "a.mp4"
    encoder = Encoder(str(path), (64, 96), 30, Fraction(30), Encoding())
    for i in range(20):
        picture = av.VideoFrame.from_ndarray(barcode_frame(i), format="rgb24").reformat(format="yuv420p")
        check.expect(i, picture, None)
        check.packets(encoder.add(picture, i, 1), encoder.config)
    check.packets(encoder.close(), encoder.config)
    check.finish()
    check.check_file(str(path), 30)
    data = bytearray(path.read_bytes())
    if what == "byte":
        pictures = data.index(b"mdat") + 4
        size = int.from_bytes(data[pictures - 8 : pictures - 4], "big") - 8
        data[pictures + size // 2] ^= 4
    path.write_bytes(data if what == "byte" else data[:-200])
    with pytest.raises(VideoError):
        check.check_file(str(path), 30)


def test_a_source_that_was_turned_wrongly_is_noticed(tmp_path, monkeypatch):
    raw = encode(tmp_path / "a.mp4", [barcode_frame(i, 64, 96) for i in range(12)], rotation=180)
    monkeypatch.setattr("avion.data.video.prepare_source._turned", lambda picture, orientation: picture)
    with pytest.raises(VideoError, match="does not look like the source's"):
        prepare(raw, tmp_path / "out")


def test_a_range_that_was_taken_wrongly_is_noticed(tmp_path, monkeypatch):
    ramp = np.tile(np.linspace(0, 255, 96).astype(np.uint8)[None, :, None], (64, 1, 3))
    raw = encode(tmp_path / "a.mp4", [255 - ramp // 8] * 6, pix_fmt="yuvj420p", tags=(("color_range", 2),))
    good = prepare(raw, tmp_path / "out")[1]
    assert good["compared_with_source"] == 1
    monkeypatch.setattr("avion.data.video.prepare_source._range_of", lambda picture: 1)
    with contextlib.suppress(VideoError):
        bad = prepare(raw, tmp_path / "bad")[1]
        assert bad["psnr"] <= good["psnr"], "small differences of range stay below the threshold"


def test_psnr_by_hand():
    a, b = np.full((2, 2), 10, np.uint8), np.array([[10, 10], [10, 20]], np.uint8)
    assert psnr([a], [b]) == pytest.approx(10 * np.log10(255**2 / 25))
    assert psnr([a], [a]) == 100.0


def test_display_order_where_the_raw_file_states_none(tmp_path):
    """H.264 with B-frames in AVI."""
    raw = encode(tmp_path / "a.avi", [barcode_frame(i) for i in range(50)], bf="3")
    _, result = prepare(raw, tmp_path / "out")
    assert [code for _, code in shown(tmp_path / "out" / result["partial"])] == list(range(50))


def test_one_frame(tmp_path):
    raw = write_video(tmp_path / "a.mp4", 1)
    _, result = prepare(raw, tmp_path / "out", layout="avion")
    assert result["frames"] == 1
    with contextlib.closing(RawVideo(str(raw), 288)) as video:
        assert [shot.time for shot in video.shots()] == [0]


def test_raws_are_found_with_size_and_time(tmp_path):
    raw = write_video(tmp_path / "a.mp4", 2)
    found = raw.stat()
    assert _raw(raw, "a") == Raw(str(raw), "a", found.st_size, found.st_mtime_ns)
