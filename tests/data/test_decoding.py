import os
import pickle
import struct
import subprocess
import sys

import av
import numpy as np
import pytest

from avion.data.video import VideoError, container, open_video, resolve_decoder
from avion.data.video import reader as decoding
from avion.errors import UserError
from tests.videos import barcode_frame, read_barcode, write_audio_only, write_video

DECODERS = [name for name in decoding.DECODERS if decoding.importlib.util.find_spec({"pyav": "av"}.get(name, name))]
each_decoder = pytest.mark.parametrize("decoder", DECODERS)
needs_decord = pytest.mark.skipif("decord" not in DECODERS, reason="decord is not installed")


def barcodes(frames: np.ndarray) -> list[int]:
    return [read_barcode(frame) for frame in frames]


def packets_of(path) -> list[av.Packet]:
    with av.open(str(path)) as container:
        return [packet for packet in container.demux(video=0) if packet.size]


def rewritten(path, target, change):
    """A copy of `path` with `change(bytearray)` applied."""
    data = bytearray(path.read_bytes())
    change(data)
    target.write_bytes(bytes(data))
    return target


def remuxed_from(path, target, first: int, options: dict | None = None):
    """Cut `path` at frame `first` without re-encoding, as `ffmpeg -ss -c copy` does: packets from the keyframe
    before stay in the file, an edit list hides them."""
    with av.open(str(path)) as source, av.open(str(target), "w", options=options or {}) as sink:
        stream = source.streams.video[0]
        out = sink.add_stream_from_template(stream)
        offset = round(first / stream.average_rate / stream.time_base)
        source.seek(offset, stream=stream)
        for packet in source.demux(stream):
            if packet.dts is None:
                continue
            packet.pts, packet.dts, packet.stream = packet.pts - offset, packet.dts - offset, out
            sink.mux(packet)
    return target


def trimmed(path, target, percent: int = 50):
    """A copy of `path` whose edit list shows only its first so many percent."""

    def shorten(data):
        at = data.find(b"elst") + 12
        data[at : at + 4] = struct.pack(">I", struct.unpack(">I", data[at : at + 4])[0] * percent // 100)

    return rewritten(path, target, shorten)


def hide_package(monkeypatch, hidden: str) -> None:
    real = decoding.importlib.util.find_spec
    monkeypatch.setattr(decoding.importlib.util, "find_spec", lambda name: None if name == hidden else real(name))


class TestBarcode:
    def test_every_index_reads_back_and_blends_do_not(self):
        rng = np.random.default_rng()
        for index in rng.integers(0, 4096, 50):
            assert read_barcode(barcode_frame(int(index))) == index
        assert read_barcode(np.full((64, 96, 3), 255, np.uint8)) == -1


class TestExactFrames:
    @each_decoder
    @pytest.mark.parametrize("name", ["gop250", "short_gop", "ntsc", "portrait"])
    def test_random_access_gives_the_frames_asked_for(self, videos, decoder, name):
        rng = np.random.default_rng()
        with open_video(getattr(videos, name), decoder) as reader:
            for _ in range(6):
                indices = rng.integers(0, reader.num_frames, 6)
                assert barcodes(reader.get_frames(indices)) == indices.tolist()

    @each_decoder
    def test_every_frame_of_a_gop_of_250(self, videos, decoder):
        with open_video(videos.gop250, decoder) as reader:
            assert barcodes(reader.get_frames(range(300))) == list(range(300))

    @each_decoder
    def test_order_and_repeats_are_kept(self, videos, decoder):
        with open_video(videos.gop250, decoder) as reader:
            assert barcodes(reader.get_frames([7, 290, 7, 0, 299])) == [7, 290, 7, 0, 299]
            assert reader.get_frames([]).shape == (0, 64, 96, 3)

    @each_decoder
    def test_facts_of_the_file(self, videos, decoder):
        with open_video(videos.ntsc, decoder) as reader:
            assert (reader.num_frames, reader.height, reader.width) == (90, 64, 96)
            assert reader.fps == pytest.approx(30000 / 1001, abs=1e-6)
        with open_video(videos.portrait, decoder) as reader:
            assert (reader.num_frames, reader.height, reader.width) == (60, 112, 64)
            frames = reader.get_frames([3, 4])
            assert frames.shape == (2, 112, 64, 3) and frames.dtype == np.uint8

    @pytest.mark.skipif(len(DECODERS) < 2, reason="needs both decoders")
    def test_decoders_agree_to_the_bit(self, videos):
        indices = np.random.default_rng().integers(0, 300, 12)
        with open_video(videos.gop250, "pyav") as ours, open_video(videos.gop250, "decord") as theirs:
            np.testing.assert_array_equal(ours.get_frames(indices), theirs.get_frames(indices))

    @pytest.mark.parametrize("threads", [1, 2])
    def test_threads_do_not_matter(self, videos, threads):
        with open_video(videos.gop250, "pyav", threads=threads) as reader:
            assert barcodes(reader.get_frames([5, 180, 255, 299])) == [5, 180, 255, 299]

    @each_decoder
    @pytest.mark.parametrize("frames", [1, 2, 5])
    def test_tiny_files(self, tmp_path, decoder, frames):
        path = write_video(tmp_path / "tiny.mp4", frames)
        with open_video(path, decoder) as reader:
            assert barcodes(reader.get_frames(range(frames))) == list(range(frames))

    @pytest.mark.parametrize(
        "x264",
        ["open-gop=1:keyint=30", "b-pyramid=strict:bframes=8", "b-pyramid=none:bframes=5", "intra-refresh=1:keyint=40"],
    )
    @pytest.mark.parametrize("held", [True, False], ids=["held", "seeking"])
    def test_reference_structures_of_h264(self, tmp_path, monkeypatch, x264, held):
        """Skipping unreferenced frames, and seeking again in files too large to hold, change nothing."""
        if not held:
            monkeypatch.setattr(container, "HELD_BYTES", 0)
        path = write_video(tmp_path / "x.mp4", 120, x264=x264)
        rng = np.random.default_rng()
        with open_video(path, "pyav") as reader:
            assert (reader.demuxed.held is not None) == held
            for _ in range(5):
                indices = rng.integers(0, 120, 4)
                assert barcodes(reader.get_frames(indices)) == indices.tolist()

    def test_unreferenced_frames_are_really_skipped(self, videos):
        """Of the 200 frames before the wanted one, the decoder puts out about half."""

        class Counting:
            def __init__(self, context):
                object.__setattr__(self, "context", context)
                object.__setattr__(self, "pictures", 0)

            def __setattr__(self, name, value):
                setattr(self.context, name, value)

            def flush_buffers(self):
                self.context.flush_buffers()

            def decode(self, packet):
                pictures = self.context.decode(packet)
                object.__setattr__(self, "pictures", self.pictures + len(pictures))
                return pictures

        with open_video(videos.gop250, "pyav") as reader:
            counting = Counting(reader._context)
            reader._context = counting
            assert barcodes(reader.get_frames([200])) == [200]
            assert 60 < counting.pictures < 140

    def test_frames_hidden_by_an_edit_list_have_no_number(self, videos, tmp_path):
        path = remuxed_from(videos.gop250, tmp_path / "cut.mp4", first=100)
        with open_video(path, "pyav") as reader:
            assert reader.num_frames == 200
            assert barcodes(reader.get_frames([0, 50, 150, 199])) == [100, 150, 250, 299]
        with open_video(trimmed(videos.gop250, tmp_path / "trimmed.mp4"), "pyav") as reader:
            assert reader.num_frames == 150
            assert barcodes(reader.get_frames([0, 149])) == [0, 149]

    @needs_decord
    @pytest.mark.parametrize("with_pyav", [True, False])
    def test_decord_refuses_files_that_it_miscounts(self, videos, tmp_path, monkeypatch, with_pyav):
        paths = [remuxed_from(videos.gop250, tmp_path / "cut.mp4", first=100)]
        if with_pyav:
            paths.append(trimmed(videos.gop250, tmp_path / "trimmed.mp4"))
        else:
            hide_package(monkeypatch, "av")
        for path in paths:
            with pytest.raises(VideoError, match=f"{path.name}.*decord miscounts: use pyav"):
                open_video(path, "decord")

    @each_decoder
    def test_a_rotated_video_comes_out_upright(self, tmp_path, decoder):
        path = write_video(tmp_path / "rotated.mp4", 8, rotation=90)
        with open_video(path, decoder) as reader:
            assert (reader.height, reader.width) == (96, 64)
            assert read_barcode(np.rot90(reader.get_frames([5])[0], -1)) == 5

    def test_mpeg_program_streams(self, tmp_path):
        """Opening one ended the process with PyAV 17.0."""
        path = write_video(tmp_path / "a.mpg", 40, codec="mpeg2video")
        with open_video(path) as reader:
            assert reader.num_frames == 40
            assert barcodes(reader.get_frames([31, 0, 39, 12])) == [31, 0, 39, 12]

    def test_matroska(self, tmp_path):
        path = write_video(tmp_path / "clip.mkv", 60)
        with open_video(path, "pyav") as reader:
            assert barcodes(reader.get_frames([59, 2, 31])) == [59, 2, 31]


class TestDamage:
    """Whatever is wrong with a file, a VideoError names it and says why."""

    def broken(self, tmp_path, videos, kind):
        path = tmp_path / f"{kind}.mp4"
        if kind == "missing":
            return path
        if kind == "folder":
            path.mkdir()
        elif kind == "empty":
            path.write_bytes(b"")
        elif kind == "text":
            path.write_text("this is not a video\n" * 50)
        elif kind == "playlist":
            (tmp_path / "target.mp4").hardlink_to(videos.gop250)
            path.write_text("ffconcat version 1.0\nfile 'target.mp4'\n")
        elif kind == "hls":
            path.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{videos.gop250}\n#EXT-X-ENDLIST\n")
        elif kind == "audio only":
            write_audio_only(path)
        elif kind == "no frames":
            path = rewritten(write_video(tmp_path / "one.mp4", 1), path, _declare_no_frames)
        elif kind == "no moov":
            data = videos.gop250.read_bytes()
            path.write_bytes(data[: len(data) * 6 // 10])
        elif kind == "cut short":
            whole = remuxed_from(videos.gop250, tmp_path / "fast.mp4", 0, {"movflags": "faststart"})
            data = whole.read_bytes()
            path.write_bytes(data[: len(data) * 6 // 10])
        elif kind == "zeros":
            path.write_bytes(bytes(20000))
        return path

    @each_decoder
    @pytest.mark.parametrize(
        "kind, reason",
        [
            ("missing", "no such file"),
            ("folder", "not a file"),
            ("empty", "empty"),
            ("text", "read"),
            ("zeros", "read"),
            ("audio only", "video stream"),
            ("no moov", "read"),
            ("cut short", "cut short|read"),
            ("no frames", "no frames|read"),
        ],
    )
    def test_unreadable_files(self, tmp_path, videos, decoder, kind, reason):
        path = self.broken(tmp_path, videos, kind)
        with pytest.raises(VideoError, match=reason) as caught:
            with open_video(path, decoder) as reader:
                reader.get_frames([0])
        assert caught.value.path == str(path) and str(path) in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("kind", ["playlist", "hls"])
    def test_a_script_that_names_other_files_is_not_followed(self, tmp_path, videos, kind):
        with pytest.raises(VideoError):
            open_video(self.broken(tmp_path, videos, kind), "pyav")

    def test_pictures_too_large_to_hold(self, videos, monkeypatch):
        monkeypatch.setattr(container, "MAX_PIXELS", 64 * 96 - 1)
        with pytest.raises(VideoError, match="states a picture of 96 x 64 pixels"):
            open_video(videos.short_gop, "pyav")

    @each_decoder
    def test_packets_wiped_in_the_middle(self, tmp_path, videos, decoder):
        packets = packets_of(videos.gop250)

        def wipe(data):
            for packet in packets[100:110]:
                data[packet.pos : packet.pos + packet.size] = bytes(packet.size)

        path = rewritten(videos.gop250, tmp_path / "wiped.mp4", wipe)
        with pytest.raises(VideoError, match="wiped.mp4"):
            with open_video(path, decoder) as reader:
                reader.get_frames([0, 200])
        if decoder == "pyav":  # the second keyframe, at 250, does not depend on what was lost
            with open_video(path, decoder) as reader:
                assert barcodes(reader.get_frames([255, 299])) == [255, 299]

    def test_flipped_bits_never_give_another_frame(self, tmp_path, videos):
        """What PyAV returns from a damaged file is the frame that was asked for, if perhaps smeared where H.264
        cannot tell; never a neighbour or a repeat. Most damage is told."""
        rng = np.random.default_rng(7)
        packets = packets_of(videos.gop250)
        told = 0
        for trial in range(12):

            def flip(data):
                for packet in packets[20:60]:
                    data[packet.pos + int(rng.integers(5, packet.size))] ^= 1 << int(rng.integers(8))

            path = rewritten(videos.gop250, tmp_path / f"flipped{trial}.mp4", flip)
            try:
                with open_video(path, "pyav") as reader:
                    for index, code in zip([10, 70, 120], barcodes(reader.get_frames([10, 70, 120])), strict=True):
                        assert code in (index, -1)
            except VideoError:
                told += 1
        assert told >= 11

    @each_decoder
    def test_a_frame_that_does_not_exist(self, videos, decoder):
        with open_video(videos.short_gop, decoder) as reader:
            for index in (90, -1):
                with pytest.raises(VideoError, match=f"frame {index} was asked for, the file has 90"):
                    reader.get_frames([0, index])

    @needs_decord
    def test_a_decord_call_that_hangs_is_an_error(self, videos, tmp_path):
        """A real hang, without PyAV to see it coming: decord never returns from this file. In a process of its
        own, since the abandoned thread goes on."""
        path = trimmed(videos.gop250, tmp_path / "trimmed.mp4", percent=30)
        code = f"""
import os
from avion.data.video import decord_reader, reader as decoding
find = decoding.importlib.util.find_spec
decoding.importlib.util.find_spec = lambda name: None if name == "av" else find(name)
decord_reader.DECORD_TIMEOUT_S = 3.0
for attempt in range(2):
    try:
        decoding.open_video({str(path)!r}, "decord").get_frames([0, 299])
    except decoding.VideoError as error:
        print(error.reason, flush=True)
os._exit(0)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
        assert done.stdout.splitlines() == [
            "decord did not return within 3 s",
            "made decord hang before, in this process",
        ]


def _declare_no_frames(data: bytearray) -> None:
    """Set the sample counts of the first track to zero."""
    for box in (b"stsz", b"stts", b"stsc", b"stco", b"ctts", b"stss"):
        at = data.find(box)
        if at > 0:
            offset = at + (12 if box == b"stsz" else 8)
            data[offset : offset + 4] = bytes(4)


class TestInterface:
    def test_auto_prefers_pyav_and_falls_back(self, monkeypatch):
        assert resolve_decoder("auto") == DECODERS[0]
        hide_package(monkeypatch, "av")
        if "decord" in DECODERS:
            assert resolve_decoder("auto") == "decord"
        with pytest.raises(UserError, match="needs the package 'av'"):
            resolve_decoder("pyav")
        monkeypatch.setattr(decoding.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(UserError, match="neither"):
            resolve_decoder("auto")

    def test_wrong_arguments(self, videos):
        with pytest.raises(UserError, match="'gpu' is not one of auto, pyav, decord"):
            open_video(videos.gop250, "gpu")
        with pytest.raises(UserError, match="threads"):
            open_video(videos.gop250, threads=0)

    def test_errors_travel_between_processes(self):
        error = pickle.loads(pickle.dumps(VideoError("a/b.mp4", "is empty")))
        assert isinstance(error, UserError)
        assert (error.path, error.reason, str(error)) == ("a/b.mp4", "is empty", "a/b.mp4: is empty")

    def test_a_dataloaders_copy_of_an_error_is_one_line(self):
        text = "Caught VideoError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        text += "  File x\navion.data.video.errors.VideoError: a/b.mp4: is empty\n"
        assert str(VideoError(text)) == "a/b.mp4: is empty"

    @each_decoder
    def test_closing_releases_the_file(self, videos, decoder):
        def held():
            links = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
            return sum(os.path.realpath(link) == str(videos.short_gop) for link in links if os.path.exists(link))

        if not os.path.isdir("/proc/self/fd"):
            pytest.skip("needs /proc")
        before = held()
        reader = open_video(videos.short_gop, decoder)
        reader.get_frames([0])
        assert held() == before + 1
        reader.close()
        reader.close()
        assert held() == before


class TestStream:
    @each_decoder
    def test_frames_come_one_by_one_each_once(self, videos, decoder, rng):
        wanted = rng.integers(0, 300, 40).tolist()
        with open_video(videos.gop250, decoder) as reader:
            found = dict((i, read_barcode(frame)) for i, frame in reader.stream_frames(wanted + wanted[:5]))
        assert found == {i: i for i in set(wanted)}

    def test_every_packet_is_decoded_once(self, videos, monkeypatch):
        """300 frames in one pass; asking for them in tens would decode most of them over and over."""
        sent = []
        with open_video(videos.gop250, "pyav") as reader:
            packets = reader.packets
            monkeypatch.setattr(reader, "packets", lambda *run: [sent.append(p) or p for p in packets(*run)])
            assert sum(1 for _ in reader.stream_frames(range(300))) == 300
        assert len([p for p in sent if p is not None]) == 300

    @each_decoder
    def test_a_number_that_does_not_exist(self, videos, decoder):
        with open_video(videos.gop250, decoder) as reader, pytest.raises(VideoError, match="frame 300 was asked for"):
            next(reader.stream_frames([0, 300]))

    @each_decoder
    def test_nothing_wanted(self, videos, decoder):
        with open_video(videos.gop250, decoder) as reader:
            assert list(reader.stream_frames([])) == []
