"""Excerpts and thumbnails of videos, cut without the program ffmpeg, into a folder that keeps a bounded number."""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from avion.data.transforms import short_side_size
from avion.data.video import Scaling
from avion.data.windows import VideoFinder
from avion.files import partial_file

SHORT_SIDE = 288  # pixels of an excerpt; smaller videos keep their size
FPS = 15
MOST_SECONDS = 60.0  # of an excerpt
_AT_ONCE = 30  # frames that are decoded at a time


class Excerpts:
    """Cuts excerpts out of videos. The files are H.264 in MP4 without sound, which all browsers play.

    Args:
        finder: Where the videos are.
        folder: The folder of the files, which must exist.
        keep: How many files stay in the folder; the oldest ones are deleted.
    """

    def __init__(self, finder: VideoFinder, folder: str | os.PathLike, keep: int = 200):
        self.finder, self.folder, self.keep = finder, Path(folder), keep
        self._lock = threading.Lock()  # one excerpt at a time, so that no file is cut twice at once

    def clip(self, video: str, start: float, end: float) -> Path:
        """Cut the seconds [start, end) of a video, at most MOST_SECONDS of them.

        Args:
            video: The name of the video.
            start: The begin, in seconds.
            end: The end, in seconds.

        Returns:
            The path of an MP4 file.

        Raises:
            VideoError: The video cannot be read.
            UserError: The file cannot be written.
        """
        end = min(end, start + MOST_SECONDS)
        return self._kept(f"{video} {start} {end}", ".mp4", lambda path: self._write_clip(path, video, start, end))

    def thumbnail(self, video: str, start: float, end: float) -> Path:
        """Write a JPEG of the frame in the middle of the seconds [start, end) of a video.

        Args:
            video: The name of the video.
            start: The begin, in seconds.
            end: The end, in seconds.

        Returns:
            The path of the JPEG file.

        Raises:
            VideoError: The video cannot be read.
            UserError: The file cannot be written.
        """
        return self._kept(f"{video} {start} {end}", ".jpg", lambda path: self._write_picture(path, video, start, end))

    def _kept(self, key: str, extension: str, write: Callable[[Path], None]) -> Path:
        path = self.folder / (hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:32] + extension)
        with self._lock:
            if path.exists():
                os.utime(path)  # it is of use
                return path
            files = sorted(
                (p for p in self.folder.iterdir() if p.suffix in (".mp4", ".jpg")), key=lambda p: p.stat().st_mtime
            )
            for old in files[: max(len(files) - self.keep + 1, 0)]:
                old.unlink(missing_ok=True)
            with partial_file(path, cure="set TMPDIR to another folder") as partial:
                write(partial)
        return path

    def _frames(self, video: str, times: Sequence[tuple[float, float]]) -> np.ndarray:
        """Return the frame that is shown in each of these ranges of time: (n, height, width, 3) uint8, of even height
        and width.
        """
        store, name = self.finder.find(video)
        frames, _ = store.read_clips(name, times, 1, scaling=_small)
        return np.ascontiguousarray(frames[:, 0].transpose(0, 2, 3, 1))

    def _write_picture(self, path: Path, video: str, start: float, end: float) -> None:
        from PIL import Image

        Image.fromarray(self._frames(video, [(start, end)])[0]).save(path, format="JPEG", quality=85)

    def _write_clip(self, path: Path, video: str, start: float, end: float) -> None:
        import av

        options = {"crf": "23", "preset": "veryfast", "g": str(2 * FPS)}
        with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
            stream = None
            count = max(math.ceil((end - start) * FPS - 1e-6), 1)
            edges = [min(start + i / FPS, end) for i in range(count + 1)]
            for first in range(0, count, _AT_ONCE):
                some = range(first, min(first + _AT_ONCE, count))
                pictures = self._frames(video, [(edges[i], edges[i + 1]) for i in some])
                for i, picture in zip(some, pictures, strict=True):
                    if stream is None:
                        stream = container.add_stream("libx264", rate=Fraction(FPS), options=options)
                        stream.height, stream.width, stream.pix_fmt = *picture.shape[:2], "yuv420p"
                    frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                    frame.pts, frame.time_base = i, Fraction(1, FPS)
                    container.mux(stream.encode(frame))
            if stream is not None:
                container.mux(stream.encode(None))


def _small(height: int, width: int) -> Scaling:
    h, w = short_side_size(height, width, min(SHORT_SIDE, height, width))
    return Scaling((0, 0, height, width), (max(h // 2 * 2, 2), max(w // 2 * 2, 2)))
