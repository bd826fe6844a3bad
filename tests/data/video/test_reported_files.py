"""Files of the kinds that public reports describe: the right frames, in display order, or a refusal."""

import shutil
import struct
from fractions import Fraction

import av
import numpy as np
import pytest

from avion.data.video import VideoError, VideoStore, container, decord_reader, open_video
from avion.data.video.bitstream import PacketReader
from avion.data.video.packets import DISPOSABLE, HIDDEN
from avion.data.video.picture import orientation_from_matrix, stored_box, upright, upright_size
from tests.data.video.cases import EXPECTED, FOLDER, NAMES, UNTIMED
from tests.videos import barcode_frame, read_barcode, write_video

needs_decord = pytest.mark.skipif(not pytest.importorskip("decord"), reason="decord is not installed")


def codes(frames):
    return [read_barcode(frame) for frame in frames]


class TestPyAV:
    @pytest.mark.parametrize("name", NAMES)
    def test_all_frames_in_display_order(self, name):
        expected = EXPECTED[name]
        with open_video(FOLDER / name, "pyav") as reader:
            assert reader.num_frames == expected["frames"]
            assert [reader.height, reader.width] == expected["size"]
            assert codes(reader.get_frames(range(reader.num_frames))) == expected["codes"]

    @pytest.mark.parametrize("name", NAMES)
    def test_any_frame_first_whatever_was_read_before(self, name):
        rng = np.random.default_rng()
        expected = EXPECTED[name]["codes"]
        with open_video(FOLDER / name, "pyav") as reader:
            for _ in range(6):
                wanted = rng.integers(0, reader.num_frames, 5).tolist()
                assert codes(reader.get_frames(wanted)) == [expected[i] for i in wanted]

    @pytest.mark.parametrize("name", ["stsd_qp.mp4", "fromavi.mp4", "cut_hevc_def.mkv", "vp8_altref.webm"])
    def test_a_file_too_large_to_hold(self, name, monkeypatch):
        monkeypatch.setattr(container, "HELD_BYTES", 0)
        expected = EXPECTED[name]["codes"]
        with open_video(FOLDER / name, "pyav") as reader:
            assert reader.demuxed.held is None
            for wanted in ([len(expected) - 1], [3, 70], [0]):
                assert codes(reader.get_frames(wanted)) == [expected[i] for i in wanted]

    @pytest.mark.parametrize("name", [n for n in NAMES if n not in UNTIMED])
    def test_display_times(self, name):
        expected = np.array(EXPECTED[name]["seconds"])
        with open_video(FOLDER / name, "pyav") as reader:
            found = [reader.seconds_of(i) for i in range(reader.num_frames)]
        np.testing.assert_allclose(found, expected - expected[0], atol=1e-3)

    @pytest.mark.parametrize("name", ["x264.avi", "fromavi.mp4"])
    def test_made_up_times_are_handed_out_in_display_order(self, name):
        with open_video(FOLDER / name, "pyav") as reader:
            found = [reader.seconds_of(i) for i in range(90)]
            assert reader.constant_rate
        np.testing.assert_allclose(found, np.arange(90) / 30, atol=1e-6)

    def test_a_mirrored_file_is_the_unmirrored_one_mirrored(self):
        with open_video(FOLDER / "hflip.mp4", "pyav") as reader:
            assert codes(reader.get_frames(range(90))[:, :, ::-1]) == list(range(90))

    def test_frames_without_b_frames_cost_no_second_decoding(self, tmp_path, monkeypatch):
        """Times that ascend in decoding order are suspicious only where a stream may reorder."""
        path = write_video(tmp_path / "p.mp4", 30, bframes=0)
        monkeypatch.setattr(container.Demuxed, "_decoded_order", lambda self: pytest.fail("was decoded"))
        with open_video(path, "pyav") as reader:
            assert codes(reader.get_frames([3, 29])) == [3, 29]

    def test_an_avi_that_is_cut_short_is_told_apart_from_null_frames(self, tmp_path):
        data = (FOLDER / "null.avi").read_bytes()
        (tmp_path / "cut.avi").write_bytes(data[: len(data) * 7 // 10])
        with pytest.raises(VideoError, match="cut.avi: is cut short"):
            open_video(tmp_path / "cut.avi", "pyav")

    def test_only_a_cover_picture(self, tmp_path):
        path = tmp_path / "cover.mp4"
        with av.open(str(FOLDER / "cover_first.mp4")) as source, av.open(str(path), "w") as sink:
            cover = source.streams.video[0]
            out = sink.add_stream_from_template(cover)
            out.disposition = cover.disposition
            for packet in source.demux(cover):
                if packet.size:
                    packet.stream, packet.dts = out, packet.dts or 0
                    packet.pts = packet.pts or 0
                    sink.mux(packet)
        with pytest.raises(VideoError, match="holds no video stream"):
            open_video(path, "pyav")

    def test_the_default_track_is_read_and_else_the_largest(self, tmp_path):
        def write(path, sizes, default):
            with av.open(str(path), "w") as sink:
                streams = []
                for k, (height, width) in enumerate(sizes):
                    stream = sink.add_stream("libx264", rate=10)
                    stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
                    stream.disposition = int(k == default)
                    streams.append(stream)
                for stream in streams:
                    for i in range(5):
                        picture = np.full((stream.height, stream.width, 3), 40 * i, np.uint8)
                        sink.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
                    sink.mux(stream.encode(None))
            with open_video(path, "pyav") as reader:
                return reader.height, reader.width

        assert write(tmp_path / "a.mkv", [(32, 48), (64, 96)], default=0) == (32, 48)
        assert write(tmp_path / "b.mkv", [(64, 96), (32, 48)], default=1) == (32, 48)
        assert write(tmp_path / "c.mkv", [(32, 48), (64, 96)], default=None) == (64, 96)


@needs_decord
class TestDecord:
    @pytest.mark.parametrize(
        "name, reason",
        [
            ("b.ts", "MPEG transport stream"),
            ("x264.avi", "no true display times"),
            ("fromavi.mp4", "no true display times"),
            ("stsd_qp.mp4", "several codec configurations"),
            ("hflip.mp4", "mirrored"),
            ("vp8_altref.webm", "show nothing"),
            ("cut_hevc_def.mkv", "show nothing"),
        ],
    )
    def test_what_it_cannot_number_is_refused(self, name, reason):
        with pytest.raises(VideoError, match=f"{name}: .*{reason}.*use pyav"):
            open_video(FOLDER / name, "decord")

    @pytest.mark.parametrize("name", ["cover_first.mp4", "null.avi", "sjis.avi", "vfr.mp4"])
    def test_what_it_can(self, name):
        with open_video(FOLDER / name, "decord") as reader:
            assert codes(reader.get_frames(range(reader.num_frames))) == EXPECTED[name]["codes"]

    def test_transport_streams_are_refused_without_pyav_too(self, monkeypatch):
        find = decord_reader.importlib.util.find_spec
        monkeypatch.setattr(
            decord_reader.importlib.util, "find_spec", lambda name: None if name == "av" else find(name)
        )
        with pytest.raises(VideoError, match="b.ts: is an MPEG transport stream"):
            open_video(FOLDER / "b.ts", "decord")


class TestClipsByTime:
    """vfr.mp4: 30 frames per second for 10 s, then 10."""

    @pytest.fixture(params=["pyav", "decord"])
    def store(self, request, tmp_path):
        pytest.importorskip({"pyav": "av"}.get(request.param, request.param))
        shutil.copy(FOLDER / "vfr.mp4", tmp_path)
        return VideoStore(tmp_path, decoder=request.param)

    def shown_at(self, second):
        seconds = np.array(EXPECTED["vfr.mp4"]["seconds"])
        return EXPECTED["vfr.mp4"]["codes"][int((seconds <= second + 1e-3).sum()) - 1]

    def test_a_moment_shows_the_frame_whose_interval_holds_it(self, store):
        edges = np.array(EXPECTED["vfr.mp4"]["seconds"])  # rounded to four digits
        for middle in np.random.default_rng().uniform(0.6, 19.4, 20):
            if np.abs(edges - middle).min() < 1e-3:
                continue
            clip = store.read_clip("vfr", middle - 0.5, middle + 0.5, 1)
            assert codes(clip.frames) == [self.shown_at(middle)]

    def test_segments_of_equal_time_across_the_change_of_rate(self, store):
        clip = store.read_clip("vfr", 8.0, 12.0, 4)
        assert codes(clip.frames) == [self.shown_at(t) for t in (8.5, 9.5, 10.5, 11.5)]

    def test_a_short_span_is_widened_to_distinct_frames(self, store):
        assert codes(store.read_clip("vfr", 15.0, 15.1, 4).frames) == [450, 453, 456, 459]

    def test_strided_counts_frames(self, store):
        clip = store.read_clip("vfr", 15.0, 17.0, 3, sampling="strided", stride=4)
        assert codes(clip.frames) == [self.shown_at(15.0 + 0.1 * k) for k in (5, 9, 13)]

    def test_views_are_parts_of_each_segment(self, store):
        clip = store.read_clip("vfr", 12.0, 16.0, 2, views=2)
        assert codes(clip.frames) == [self.shown_at(t) for t in (12.5, 14.5, 13.5, 15.5)]

    def test_jitter_stays_in_the_span(self, store):
        rng = np.random.default_rng()
        low, high = self.shown_at(12.0), self.shown_at(13.999)
        for _ in range(10):
            found = codes(store.read_clip("vfr", 12.0, 14.0, 4, rng=rng).frames)
            assert found == sorted(found) and low <= found[0] and found[-1] <= high

    def test_the_end(self, store):
        clip = store.read_clip("vfr", 18.0, 22.0, 4)
        assert codes(clip.frames) == [self.shown_at(18.5), self.shown_at(19.5), 597, 597] and clip.clamped == 2
        with pytest.raises(VideoError, match="starts after the video's end"):
            store.read_clip("vfr", 25.0, 26.0, 4)


def test_times_across_chunks_of_unequal_frames(tmp_path):
    """Two chunks of 15 s: the first shows every second frame twice as long, the second has a constant rate."""
    write_unequal(tmp_path / "v.mp4/0.mp4", first=0)
    write_video(tmp_path / "v.mp4/15.mp4", 150, first=1000, fps=10)
    store = VideoStore(tmp_path)
    assert codes(store.read_clip("v", 2.0, 6.0, 4).frames) == unequal_shown([2.5, 3.5, 4.5, 5.5])
    found = codes(store.read_clip("v", 13.0, 17.0, 4).frames)
    assert found == [*unequal_shown([13.5, 14.5]), 1005, 1015]


UNEQUAL_TICKS = np.cumsum(
    [0] + [1 if i < 75 else 3 for i in range(74 + 26)]
)  # tenths of a second: 7.5 s at 10, then 3.3


def unequal_shown(seconds):
    return [int((round(10 * s) >= UNEQUAL_TICKS).sum()) - 1 for s in seconds]


def write_unequal(path, first):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as sink:
        stream = sink.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 10)
        for i, tick in enumerate(UNEQUAL_TICKS[:-1]):
            picture = av.VideoFrame.from_ndarray(barcode_frame(first + i), format="rgb24")
            picture.pts, picture.time_base = int(tick), Fraction(1, 10)
            sink.mux(stream.encode(picture))
        sink.mux(stream.encode(None))


class TestBitstreams:
    def test_slices_and_references_of_h264(self):
        reader = PacketReader("h264", b"\x01\x42\x00\x1e\xff\xe1\x00")

        def nal(*units):
            return b"".join(len(u).to_bytes(4, "big") + u for u in units)

        # first_mb_in_slice 0 is the bit 1; slice_type 5 (P) is 00110, 6 (B) is 00111, 7 (I) is 0001000
        assert reader.flags(nal(b"\x65\x88\x80")) == 0
        assert reader.flags(nal(b"\x41\x9a\x00")) == 0 and not reader.reorders
        assert reader.flags(nal(b"\x01\x9e\x00")) == DISPOSABLE and reader.reorders
        assert reader.flags(nal(b"\x01\x9a\x00", b"\x41\x9a\x00")) == 0  # one slice is referred to
        assert reader.flags(nal(b"\x06\x05\x01")) == HIDDEN  # a message alone
        assert reader.flags(b"\x00\x00\x00\x00") == 0  # damage is the decoder's to tell

    def test_vp9(self):
        reader = PacketReader("vp9", b"")
        assert reader.flags(bytes([0b10000010, 0, 0])) == 0  # shown
        assert reader.flags(bytes([0b10000000, 0, 0])) == HIDDEN
        assert reader.flags(bytes([0b10001000, 0, 0])) == 0  # show_existing_frame
        marker = 0b11000001  # two frames, sizes of a byte
        superframe = bytes([0b10000000, 9, 9, 0b10000010, 9]) + bytes([marker, 3, 2, marker])
        assert reader.flags(superframe) == 0

    def test_b_pictures_of_mpeg(self):
        reader = PacketReader("mpeg4", b"")
        reader.flags(b"\x00\x00\x01\xb6\x40")  # P
        assert not reader.reorders
        reader.flags(b"\x00\x00\x01\xb6\x80")
        assert reader.reorders
        packed = PacketReader("mpeg4", b"")
        packed.flags(b"\x00\x00\x01\xb6\x40\x00\x00\x01\xb6\x40")
        assert packed.reorders
        mpeg2 = PacketReader("mpeg2video", b"")
        mpeg2.flags(b"\x00\x00\x01\x00\x00\x10")
        assert not mpeg2.reorders
        mpeg2.flags(b"\x00\x00\x01\x00\x00\x18")
        assert mpeg2.reorders


class TestOrientation:
    def matrix(self, a, b, c, d):
        return struct.pack("<9i", *(n << 16 for n in (a, b, 0, c, d, 0, 0, 0)), 1 << 30)

    @pytest.mark.parametrize("numbers", [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)])
    @pytest.mark.parametrize("mirrored", [False, True])
    def test_matrices_do_to_pixels_what_they_say(self, numbers, mirrored):
        """A pixel at (x, y) of the stored picture is shown at (a x + c y, b x + d y), up to a shift."""
        a, b, c, d = numbers
        if mirrored:
            a, b = -a, -b
        stored = np.arange(12).reshape(3, 4)  # (y, x)
        places = {stored[y, x]: (a * x + c * y, b * x + d * y) for y in range(3) for x in range(4)}
        low_x, low_y = (min(place[k] for place in places.values()) for k in (0, 1))
        shown = upright(stored, orientation_from_matrix(self.matrix(a, b, c, d)))
        for value, (x, y) in places.items():
            assert shown[y - low_y, x - low_x] == value

    @pytest.mark.parametrize("orientation", range(8))
    def test_boxes_are_found_in_the_stored_picture(self, orientation):
        rng = np.random.default_rng()
        stored = rng.integers(0, 1000, (11, 17))
        seen = upright(stored, orientation)
        assert seen.shape == upright_size(stored.shape, orientation)
        for _ in range(10):
            height, width = (int(rng.integers(1, side + 1)) for side in seen.shape)
            top, left = int(rng.integers(seen.shape[0] - height + 1)), int(rng.integers(seen.shape[1] - width + 1))
            y, x, h, w = stored_box((top, left, height, width), seen.shape, orientation)
            cut = upright(stored[y : y + h, x : x + w], orientation)
            np.testing.assert_array_equal(cut, seen[top : top + height, left : left + width])
