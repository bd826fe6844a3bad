"""Excerpts and thumbnails: the right frames out of whole and chunked videos, playable files, a bounded folder."""

import av
import numpy as np
import pytest
from PIL import Image

from avion.data.video import VideoError
from avion.data.windows import VideoFinder
from avion.search import excerpts
from avion.search.excerpts import Excerpts
from tests.search.case import write_data
from tests.videos import read_barcode, write_video


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def decoded(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        assert not container.streams.audio
        return frames, float(stream.average_rate)


@pytest.mark.parametrize(("folder", "chunks"), [("videos", 15), ("chunks", 3)])
def test_a_clip_shows_its_seconds(data, tmp_path, folder, chunks):
    cut = Excerpts(VideoFinder(data / folder, in_store=True, chunk_length=chunks), tmp_path)
    path = cut.clip("deep/b", 1.0, 4.5)
    frames, fps = decoded(path)
    assert fps == 15 and len(frames) == 53  # 3.5 s
    codes = [read_barcode(frame) for frame in frames]
    # 10 frames per second of the video are shown at 15: frame i of the excerpt is at second 1 + (i + 0.5) / 15.
    wanted = [200 + int(10 * (1 + (i + 0.5) / 15) + 1e-6) for i in range(53)]
    assert codes[0] == 210 and codes[-1] in (244, 245) and codes == sorted(codes)
    assert np.abs(np.array(codes) - wanted).max() <= 1
    assert path.read_bytes()[4:8] == b"ftyp" and path.read_bytes().index(b"moov") < path.read_bytes().index(b"mdat")


def test_a_thumbnail_is_the_middle(data, tmp_path):
    path = Excerpts(VideoFinder(data / "videos", in_store=True), tmp_path).thumbnail("a", 2.0, 4.0)
    with Image.open(path) as image:
        assert image.format == "JPEG" and read_barcode(np.asarray(image)) == 30


def test_sizes_are_even_and_small(tmp_path):
    write_video(tmp_path / "v/large.mp4", 8, fps=10, width=700, height=398)
    cut = Excerpts(VideoFinder(tmp_path / "v", in_store=True), tmp_path)
    frames, _ = decoded(cut.clip("large", 0.0, 0.5))
    assert frames[0].shape == (288, 506, 3) and read_barcode(frames[0]) == 0


def test_files_are_kept_and_their_number_is_bounded(data, tmp_path):
    cut = Excerpts(VideoFinder(data / "videos", in_store=True), tmp_path, keep=3)
    first = cut.thumbnail("a", 0.0, 1.0)
    stamp = first.stat().st_ino
    for start in (1.0, 2.0, 3.0, 4.0):
        assert cut.thumbnail("a", 0.0, 1.0).stat().st_ino == stamp  # in use, so it stays
        cut.thumbnail("a", start, start + 1)
    assert len(list(tmp_path.iterdir())) == 3 and first.exists()


def test_what_cannot_be_read_leaves_no_file(data, tmp_path, monkeypatch):
    cut = Excerpts(VideoFinder(data / "videos", in_store=True), tmp_path)
    for video, start in (("gone", 0.0), ("a", 100.0)):
        with pytest.raises(VideoError):
            cut.clip(video, start, start + 2)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(excerpts, "MOST_SECONDS", 1.0)
    assert len(decoded(cut.clip("a", 0.0, 8.0))[0]) == 15
