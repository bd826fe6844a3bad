"""Files whose pictures do not all say how they are turned: all frames are turned as the first one is."""

import io
import shutil
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from avion.data.video import Scaling, VideoError, VideoStore, index_videos, open_video
from avion.data.video.bitstream import sei_messages
from tests.videos import read_barcode, write_video

from .cases import FOLDER

ANTICLOCKWISE = 270  # degrees by which the message says that pictures are turned; also np.rot90's direction


# The header of the NAL unit, and what follows the angle: that the message persists, and what fills the byte.
UNITS = {"h264": (bytes([6]), "01001"), "hevc": (bytes([39 << 1, 1]), "11000")}


def with_message(codec: str, source, target):
    """The same file, with a message of display orientation (ITU-T H.264 D.1.27, H.265 D.2.17) in its first packet."""
    header, ending = UNITS[codec]
    bits = f"000{ANTICLOCKWISE * 2**16 // 360:016b}{ending}"  # not cancelled, not mirrored
    unit = header + bytes([47, 3]) + int(bits, 2).to_bytes(3, "big") + b"\x80"
    with av.open(str(source)) as container, av.open(str(target), "w") as sink:
        stream = container.streams.video[0]
        copy = sink.add_stream_from_template(stream)
        for k, packet in enumerate(p for p in container.demux(stream) if p.size):
            changed = av.Packet((b"" if k else len(unit).to_bytes(4, "big") + unit) + bytes(packet))
            changed.pts, changed.dts, changed.time_base = packet.pts, packet.dts, packet.time_base
            changed.duration, changed.is_keyframe, changed.stream = packet.duration, packet.is_keyframe, copy
            sink.mux(changed)
    return target


@pytest.mark.parametrize("codec", ["h264", "hevc"])
def test_a_message_in_the_first_packet_turns_all_frames(tmp_path, codec):
    source = write_video(tmp_path / "source.mp4", 40, gop=10, codec={"h264": "libx264", "hevc": "libx265"}[codec])
    (tmp_path / "root").mkdir()
    path = with_message(codec, source, tmp_path / "root" / "v.mp4")
    with open_video(source) as reader:
        wanted = np.rot90(reader.get_frames([0, 1, 17, 39]), ANTICLOCKWISE // 90, (1, 2))
    with open_video(path) as reader:
        assert (reader.height, reader.width) == wanted.shape[1:3]
        assert np.array_equal(reader.get_frames([0, 1, 17, 39]), wanted)
    with open_video(path) as reader:
        assert np.array_equal(reader.get_frames([17, 39]), wanted[2:])
    assert not index_videos(tmp_path / "root").plain
    for index in ("auto", None):
        store = VideoStore(tmp_path / "root", layout="whole", index=index)
        assert store.read_clip("v", 0.0, 1.3, 4).frames.shape[1:3] == wanted.shape[1:3]


def test_decord_refuses_it(tmp_path):
    path = with_message("h264", write_video(tmp_path / "a.mp4", 20), tmp_path / "b.mp4")
    with pytest.raises(VideoError, match="says in its packets how it is turned"):
        open_video(path, "decord").get_frames([3])


def test_a_turned_file_of_two_configurations(tmp_path):
    """The display matrix is the container's, and the decoder of the second configuration does not see it."""
    path = tmp_path / "v.mp4"
    shutil.copyfile(FOLDER / "stsd_qp.mp4", path)
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44  # ISO/IEC 14496-12, 8.3.2: after name, version, times, numbers and volume
    one = 1 << 16
    data[at : at + 36] = b"".join(n.to_bytes(4, "big", signed=True) for n in (0, one, 0, -one, 0, 0, 0, 0, 1 << 30))
    path.write_bytes(data)
    with open_video(path) as reader:
        assert (reader.height, reader.width) == (96, 64)
        turned = reader.get_frames([0, 50, 100])
    assert [read_barcode(np.rot90(frame)) for frame in turned] == [0, 50, 100]
    index_videos(tmp_path)
    clip = VideoStore(tmp_path, layout="whole").read_clip("v", 1.5, 2.5, 4).frames  # on both sides of the change
    assert [read_barcode(np.rot90(frame)) for frame in clip] == [48, 56, 63, 71]


def write_photographs(path, orientations: list[int]):
    """A video of photographs, of which each says in its EXIF how it is turned."""
    with av.open(str(path), "w") as sink:
        stream = sink.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for k, orientation in enumerate(orientations):
            file, exif = io.BytesIO(), Image.Exif()
            exif[0x0112] = orientation
            Image.new("RGB", (64, 48), (40 * k, 100, 100)).save(file, "JPEG", exif=exif)
            packet = av.Packet(file.getvalue())
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, k, k, Fraction(1, 10)
            packet.is_keyframe = True
            sink.mux(packet)
    return path


def test_pictures_that_are_turned_in_different_ways_are_refused(tmp_path):
    path = write_photographs(tmp_path / "v.mov", [1, 1, 1, 6, 6, 6])
    with open_video(path) as reader:
        assert reader.get_frames([0, 2]).shape[1:3] == (48, 64)
        if reader.get_frames([4]).shape[1:3] == (48, 64):
            pytest.skip("FFmpeg reads the orientation in EXIF from version 8.1 on")
        with pytest.raises(VideoError, match="turns its pictures in different ways"):
            reader.get_frames([0, 4])
        with pytest.raises(VideoError, match="turns its pictures in different ways"):
            reader.get_scaled([0, 4], lambda height, width: Scaling((0, 0, height, width), (8, 8)))


def test_kinds_of_side_data_that_pyav_does_not_know(tmp_path):
    """FFmpeg attaches EXIF to a picture as a kind of data that PyAV 18 cannot name."""
    path = write_photographs(tmp_path / "v.mov", [1, 1, 1])
    with open_video(path) as reader:
        assert reader.get_frames([0, 2]).shape == (2, 48, 64, 3)
    assert not index_videos(tmp_path).plain


def test_messages_of_supplemental_information():
    long = bytes(300)
    body = bytes([6, 1, 0x84]) + bytes([255, 3, 255, 45]) + long + bytes([5, 2, 7]) + b"\x08\x80"
    escaped = body.replace(b"\x00\x00\x00", b"\x00\x00\x03\x00")
    assert list(sei_messages(body))[:2] == [(6, b"\x84"), (258, long)]
    assert [kind for kind, _ in sei_messages(escaped)] == [6, 258, 5]
    for end in range(len(body)):
        assert len(list(sei_messages(body[:end]))) <= 3
    assert list(sei_messages(b"\xff" * 40)) == []
