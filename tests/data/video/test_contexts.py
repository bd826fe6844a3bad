"""Decoders that serve several clips: what they give never depends on what they decoded before."""

import os
from concurrent.futures import ThreadPoolExecutor

import av
import numpy as np
import pytest

from avion.data.video import VideoError, VideoStore, contexts, index_videos
from avion.data.video.contexts import Decoder, forget_decoders
from tests.data.video.test_index import indexed


@pytest.fixture(autouse=True)
def made(monkeypatch) -> list[str]:
    """The codecs of the decoders that were made, from none on."""
    names, bare_context = [], contexts.bare_context
    monkeypatch.setattr(contexts, "bare_context", lambda codec, *how: names.append(codec) or bare_context(codec, *how))
    forget_decoders()
    yield names
    forget_decoders()


def write(path, seed: int, codec="libx264", pix_fmt="yuv420p", size=(96, 160), **options):
    rng = np.random.default_rng(seed)
    still = rng.integers(0, 256, (size[0] // 8, size[1] // 8, 3)).repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as sink:
        stream = sink.add_stream(codec, rate=10, options={"g": "12", **options})
        stream.height, stream.width, stream.pix_fmt = *size, pix_fmt
        for i in range(30):
            pixels = np.clip(np.roll(still, 3 * i, axis=1) + rng.normal(0, 6, still.shape), 0, 255).astype(np.uint8)
            sink.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        sink.mux(stream.encode(None))
    return path


def clip(root, video: str, start: float, **how) -> np.ndarray:
    return VideoStore(root, layout="whole", **how).read_clip(video, start, start + 0.8, 4).frames


def test_one_decoder_serves_clips_of_several_files(tmp_path, made):
    """The first frames of a file come with the encoder's message about itself, which does no harm."""
    for name, seed in (("a", 1), ("b", 2)):
        write(tmp_path / f"{name}.mp4", seed)
    index_videos(tmp_path)
    places = [(video, start) for video in "ab" for start in (0.0, 0.9, 1.7)]
    alone = {}
    for place in places:
        forget_decoders()
        alone[place] = clip(tmp_path, *place)
    made.clear()
    forget_decoders()
    order = np.random.default_rng().permutation(len(places) * 3) % len(places)
    for k in order:
        assert np.array_equal(clip(tmp_path, *places[k]), alone[places[k]])
    assert made == ["h264"]


@pytest.mark.parametrize(
    "how",
    [
        {"x264-params": "repeat-headers=1"},  # parameter sets among the packets
        {"x264-params": "open-gop=1:keyint=6:min-keyint=6"},  # messages of recovery points
        {"pix_fmt": "yuv444p"},
        {"codec": "libx265", "x265-params": "log-level=none"},
        {"codec": "libvpx-vp9", "deadline": "realtime"},
    ],
    ids=["parameter sets", "recovery points", "4:4:4", "HEVC", "VP9"],
)
def test_a_new_decoder_for_each_clip(tmp_path, how, made):
    write(tmp_path / "a.mp4", 1, **how)
    assert not index_videos(tmp_path).plain
    forget_decoders()
    made.clear()
    for _ in range(3):
        clip(tmp_path, "a", 0.5)
    assert len(made) == 3


@pytest.mark.parametrize(("build", "kept"), [(b"164", True), (b"033", False)])
def test_old_encoders_leave_their_version_behind(tmp_path, made, build, kept):
    """Up to build 33, x264 coded direct B-blocks in a way of its own: a decoder that has seen it decodes others so."""
    path = write(tmp_path / "a.mp4", 1)
    data = path.read_bytes()
    at = data.index(b"x264 - core ") + len(b"x264 - core ")
    path.write_bytes(data[:at] + build + data[at + 3 :])
    index_videos(tmp_path)
    forget_decoders()
    made.clear()
    for _ in range(2):
        clip(tmp_path, "a", 0.0)
    assert len(made) == (1 if kept else 2)


def test_no_decoder_with_threads_is_kept(tmp_path, made):
    write(tmp_path / "a.mp4", 1)
    index_videos(tmp_path)
    made.clear()
    for _ in range(2):
        clip(tmp_path, "a", 0.5, threads=2)
    assert len(made) == 2


def test_after_damage_nobody_gets_the_decoder(tmp_path, made):
    write(tmp_path / "a.mp4", 1)
    bad = write(tmp_path / "b.mp4", 2)
    index_videos(tmp_path)
    wanted = clip(tmp_path, "a", 0.5)
    data, stamp = bytearray(bad.read_bytes()), bad.stat().st_mtime_ns
    for at in np.random.default_rng().integers(2000, len(data) - 3000, 800):  # of the packets
        data[at] ^= 0x5A
    bad.write_bytes(data)
    os.utime(bad, ns=(stamp, stamp))  # the index takes it for the file that it knows
    made.clear()
    with pytest.raises(VideoError):
        clip(tmp_path, "b", 1.9)
    before = len(made)
    assert np.array_equal(clip(tmp_path, "a", 0.5), wanted)
    assert len(made) == before + 1


def test_a_stream_that_is_not_read_to_its_end_keeps_its_decoder(tmp_path, made):
    """The stream flushes it when it is collected, which may be while another clip is decoded."""
    write(tmp_path / "a.mp4", 1)
    index_videos(tmp_path)
    wanted = clip(tmp_path, "a", 0.5)
    made.clear()
    with indexed(tmp_path / "a.mp4") as reader:
        stream = reader.stream_frames(range(30))
        next(stream)
    assert np.array_equal(clip(tmp_path, "a", 0.5), wanted)
    stream.close()
    assert np.array_equal(clip(tmp_path, "a", 0.5), wanted)
    assert len(made) == 1  # the stream has the one that was kept


def test_threads_have_a_decoder_each(tmp_path):
    write(tmp_path / "a.mp4", 1)
    index_videos(tmp_path)
    starts = (0.0, 0.6, 1.3, 1.9)
    alone = [clip(tmp_path, "a", start) for start in starts]

    def again(k: int) -> bool:
        return np.array_equal(clip(tmp_path, "a", starts[k % 4]), alone[k % 4])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(again, range(60)))


def test_few_are_kept(tmp_path, made):
    """A dataset of many sizes."""
    with av.open(str(write(tmp_path / "a.mp4", 1))) as container:
        config = container.streams.video[0].codec_context.extradata

    def use(width: int) -> None:
        Decoder("h264", config, (96, width), 1).give_back()

    for width in range(160, 167):
        use(width)
    assert len(made) == 7
    for width in range(166, 162, -1):
        use(width)
    assert len(made) == 7
    use(160)
    assert len(made) == 8
