"""Clips out of a folder of videos: which files hold them, which frames they are, and what to do at the edges.

Three layouts, recognised once per root:

    avion   {root}/{video}.mp4/{start}.mp4            start = 0, L, 2 L, ... seconds (AVION, LaViLa)
    vms     {root}/{video}/{start // L:04d}.mp4       (Video Mamba Suite)
    whole   {root}/{video}.mp4

`video` is the path below the root without extension: "9a7c2b-..." for Ego4D, "P01/P01_01" for EPIC-KITCHENS.
A video of EPIC-KITCHENS may also lie without the folder of its participant, in each of the layouts: Video Mamba
Suite has {root}/P01_01/0000.mp4. Extensions (.mp4, .MP4, ...) are those found on disk.
"""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from avion.data.decoding import VideoError, VideoReader, open_video, resolve_decoder
from avion.errors import UserError

logger = logging.getLogger(__name__)

LAYOUTS = ("avion", "vms", "whole")
SAMPLINGS = ("uniform", "strided")
VIDEO_EXTENSIONS = (".mp4", ".mkv", ".webm", ".avi", ".mov")
TOLERANCE_S = 1.0  # by how much annotations and cuts may disagree with a video before it counts as damaged
_LISTED = 64  # entries of a folder that are looked at to recognise a layout


@dataclass(frozen=True)
class Layout:
    kind: str  # one of LAYOUTS
    folder_extension: str  # of a video's folder of chunks ("avion" only)
    extension: str  # of the video files
    flat: bool = False  # the videos lie directly below the root, not in folders of several videos

    def pattern(self) -> str:
        return {
            "avion": f"{{video}}{self.folder_extension}/{{start}}{self.extension}",
            "vms": f"{{video}}/{{chunk:04d}}{self.extension}",
            "whole": f"{{video}}{self.extension}",
        }[self.kind]


@dataclass(frozen=True)
class ClipFrames:
    frames: np.ndarray  # (T, H, W, 3) uint8, RGB
    clamped: int  # how many of the T lie after the video's last frame and show that one instead


def uniform_frame_ids(start: int, end: int, num_frames: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """Frames of [start, end) cut into `num_frames` equal segments: each one's middle, truncated to an integer.

    With `rng` each is moved by up to half a segment either way, a segment then being (end - start - 1) /
    num_frames long, so that no frame leaves the span (AVION's and LaViLa's rule). -> (num_frames,) int64
    """
    edges = np.linspace(start, end, num_frames + 1)
    middles = (edges[:-1] + edges[1:]) / 2
    if rng is not None:
        middles += (rng.random(num_frames) - 0.5) * (end - start - 1) / num_frames
    return middles.astype(np.int64)


def strided_frame_ids(
    start: int, end: int, num_frames: int, stride: int, rng: np.random.Generator | None = None
) -> np.ndarray:
    """`num_frames` frames, `stride` apart, in the middle of [start, end); with `rng` anywhere inside it.

    A window longer than the span stays centred on it, and begins at frame 0 at the earliest.
    -> (num_frames,) int64
    """
    room = (end - start) - ((num_frames - 1) * stride + 1)
    offset = int(rng.integers(room + 1)) if rng is not None and room > 0 else room // 2
    return max(start + offset, 0) + stride * np.arange(num_frames, dtype=np.int64)


def find_layout(root: str | os.PathLike, kind: str = "auto") -> Layout:
    """Recognise how the videos under `root` are laid out. UserError if there are none in a known layout."""
    root = Path(root)
    if kind not in ("auto", *LAYOUTS):
        raise UserError(f"video layout: {kind!r} is not one of auto, {', '.join(LAYOUTS)}")
    if not root.is_dir():
        raise UserError(f"video root {root}: no such folder")
    layout = _find_layout(root, kind, depth=0)
    if layout is None:
        wanted = "in a known layout" if kind == "auto" else f"in the layout {kind!r}"
        raise UserError(
            f"video root {root}: no videos {wanted} were found; expected {{video}}.mp4/{{start}}.mp4, "
            "{video}/{chunk:04d}.mp4 or {video}.mp4 below it"
        )
    return layout


def _find_layout(folder: Path, kind: str, depth: int) -> Layout | None:
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))[:_LISTED]
    except OSError as error:
        raise UserError(f"video root {folder}: cannot be listed ({error.strerror})") from None
    plain_folders = []
    for name in names:
        stem, extension = os.path.splitext(name)
        is_video_name = extension.lower() in VIDEO_EXTENSIONS
        if (folder / name).is_dir():
            if is_video_name and kind in ("auto", "avion"):
                chunk_extension = _extension_of_chunks(folder / name)
                if chunk_extension is not None:
                    return Layout("avion", extension, chunk_extension, flat=depth == 0)
            plain_folders.append(folder / name)
        elif is_video_name:
            found = "vms" if depth > 0 and re.fullmatch(r"\d{4}", stem) else "whole"
            if kind in ("auto", found):
                return Layout(found, "", extension, flat=depth == (1 if found == "vms" else 0))
    if depth < 2:
        for plain in plain_folders[:16]:
            layout = _find_layout(plain, kind, depth + 1)
            if layout is not None:
                return layout
    return None


def _extension_of_chunks(folder: Path) -> str | None:
    for name in os.listdir(folder):
        stem, extension = os.path.splitext(name)
        if stem.isdigit() and extension.lower() in VIDEO_EXTENSIONS:
            return extension
    return None


class VideoStore:
    """The videos under one root. Holds no open file, so that it can be handed to DataLoader workers.

    root: folder of the videos. chunk_length: seconds per chunk (its file names count in it), ignored for whole
    files. layout: "auto" or one of LAYOUTS. decoder, threads: as in `open_video`.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        *,
        chunk_length: int = 15,
        layout: str = "auto",
        decoder: str = "auto",
        threads: int = 1,
    ):
        self.root = Path(root)
        self.decoder = resolve_decoder(decoder)
        self.threads = threads
        self.layout = find_layout(root, layout)
        if self.layout.kind != "whole" and (chunk_length != int(chunk_length) or chunk_length < 1):
            raise UserError(f"video chunk length: {chunk_length} is not a whole number of seconds, at least 1")
        self.chunk_length = int(chunk_length)
        self._short_names: dict[str, str] = {}
        logger.info("videos in %s: layout %s (%s), decoder %s", root, self.layout.kind, self.pattern, self.decoder)

    @property
    def pattern(self) -> str:
        return self.layout.pattern()

    @property
    def chunked(self) -> bool:
        return self.layout.kind != "whole"

    def chunk_index(self, second: float) -> int:
        """The number of the chunk that holds this second of a video; 0 for whole files."""
        return int(max(second, 0.0) // self.chunk_length) if self.chunked else 0

    def chunk_path(self, video: str, chunk: int) -> Path:
        """The file that holds chunk number `chunk` (counted from 0) of `video`."""
        return self._path(self._name(video), chunk)

    def _path(self, name: str, chunk: int) -> Path:
        return self.root / self.pattern.format(video=name, start=chunk * self.chunk_length, chunk=chunk)

    def _name(self, video: str) -> str:
        """`video` as it lies below the root: "P01/P01_01" is "P01_01" where there is no folder P01/P01_01.

        Only the participant of EPIC-KITCHENS is left out, which the rest of the name repeats: of other names, the
        last parts alone need not differ between two videos.
        """
        participant, _, short = video.rpartition("/")
        if not participant or not short.startswith(f"{participant}_"):
            return video
        if video not in self._short_names:
            long_there, short_there = self._is_there(video), self._is_there(short)
            if not long_there and not short_there:  # not remembered: it may still be copied
                return short if self.layout.flat else video
            self._short_names[video] = video if long_there else short
        return self._short_names[video]

    def _is_there(self, name: str) -> bool:
        path = self._path(name, 0)
        return path.parent.is_dir() if self.chunked else path.is_file()

    def last_chunk(self, video: str) -> int | None:
        """The highest chunk number that `video` has on disk, None if it has no chunk at all."""
        folder = self.chunk_path(video, 0).parent
        if not self.chunked:
            return 0 if self.chunk_path(video, 0).exists() else None
        unit = self.chunk_length if self.layout.kind == "avion" else 1
        names = os.listdir(folder) if folder.is_dir() else []
        stems = [stem for stem, extension in map(os.path.splitext, names) if extension == self.layout.extension]
        return max((int(stem) // unit for stem in stems if stem.isdigit()), default=None)

    def read_clip(
        self,
        video: str,
        start: float,
        end: float,
        num_frames: int,
        *,
        rng: np.random.Generator | None = None,
        sampling: str = "uniform",
        stride: int = 1,
        views: int = 1,
    ) -> ClipFrames:
        """Read `num_frames` frames of the seconds [start, end) of a video.

        sampling: "uniform" over the span, or "strided", `stride` frames apart. rng: None for the fixed frames of
        evaluation, a Generator for training's jitter. views: so many times `num_frames`, one view after the other,
        fixed frames only: `uniform` view v takes the middle of the v-th of `views` equal parts of each segment,
        `strided` view v has its window in the middle of the v-th part of the room that there is.
        A span of fewer than `num_frames` frames is widened to that many. The frame rate is the file's. Frames after
        the video's end show its last frame and are counted. Raises VideoError for a missing, damaged or cut-short
        file, and for a clip that starts more than a second after the video's end.
        """
        first_chunk = self.chunk_index(start)
        with self._open_first(video, first_chunk) as reader:
            ids = _frame_ids(start, end, reader.fps, num_frames, rng, sampling, stride, views)
            order: np.ndarray | slice = slice(None)
            if views > 1:  # neither ascending nor distinct
                ids, order = np.unique(ids, return_inverse=True)
            frames_per_chunk = self.chunk_length * reader.fps if self.chunked else np.inf
            chunks = (ids // frames_per_chunk).astype(np.int64)
            places = np.floor(ids - chunks * frames_per_chunk + 1e-6) if self.chunked else ids  # in their chunk
            chunks, places = self._mind_the_end(video, first_chunk, chunks, places)
            pieces, clamped = [], 0
            for chunk in np.unique(chunks):  # frame numbers ascend, so do the pieces
                wanted = places[chunks == chunk]
                if chunk == first_chunk:
                    piece, late = self._read_chunk(video, chunk, reader, wanted)
                else:
                    with self._open(video, chunk) as other:
                        piece, late = self._read_chunk(video, chunk, other, wanted)
                if pieces and piece.shape[1:] != pieces[0].shape[1:]:
                    reason = f"has frames of {piece.shape[2]} x {piece.shape[1]}, unlike the chunk before it"
                    raise VideoError(self.chunk_path(video, chunk), reason)
                pieces.append(piece)
                clamped += late
        return ClipFrames((pieces[0] if len(pieces) == 1 else np.concatenate(pieces))[order], clamped)

    def _open(self, video: str, chunk: int) -> VideoReader:
        return open_video(self.chunk_path(video, chunk), self.decoder, self.threads)

    def _open_first(self, video: str, chunk: int) -> VideoReader:
        try:
            return self._open(video, chunk)
        except VideoError:
            if self.chunk_path(video, chunk).exists():
                raise
        last, path = self.last_chunk(video), self.chunk_path(video, chunk)
        if last is None:
            raise VideoError(path, "no such file, and none else of this video")
        if last < chunk:
            raise VideoError(path, f"no such file: the clip starts after the video's last chunk (number {last})")
        raise VideoError(path, "no such file: this chunk is missing, though later ones are there")

    def _mind_the_end(
        self, video: str, first_chunk: int, chunks: np.ndarray, places: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Move frames of chunks after the last one to the (never reached) end of the last one; a chunk that is
        missing before that is an error."""
        for chunk in np.unique(chunks):
            if chunk == first_chunk or self.chunk_path(video, chunk).exists():
                continue
            last = self.last_chunk(video)
            if chunk < last:
                reason = "no such file: this chunk is missing, though later ones are there"
                raise VideoError(self.chunk_path(video, chunk), reason)
            after = chunks > last
            return np.where(after, last, chunks), np.where(after, np.iinfo(np.int64).max, places)
        return chunks, places

    def _read_chunk(self, video: str, chunk: int, reader: VideoReader, places: np.ndarray) -> tuple[np.ndarray, int]:
        """places: frame numbers in this chunk, possibly past its end -> frames (n, H, W, 3), number clamped."""
        late = int((places >= reader.num_frames).sum())
        if late:
            path = self.chunk_path(video, chunk)
            if self.chunked and self.chunk_path(video, chunk + 1).exists():
                due = self.chunk_length * reader.fps
                if reader.num_frames < due - TOLERANCE_S * reader.fps:
                    reason = f"is cut short: {reader.num_frames} frames, {due:.0f} are due and a later chunk exists"
                    raise VideoError(path, reason)
            elif late == len(places) and places.min() - reader.num_frames > TOLERANCE_S * reader.fps:
                raise VideoError(path, f"the clip starts after the video's end ({reader.num_frames} frames here)")
        return reader.get_frames(np.minimum(places, reader.num_frames - 1)), late


def _frame_ids(
    start: float,
    end: float,
    fps: float,
    num_frames: int,
    rng: np.random.Generator | None,
    sampling: str,
    stride: int,
    views: int = 1,
) -> np.ndarray:
    """Frame numbers in the whole video, those of each view ascending. -> (views · num_frames,) int64"""
    if num_frames < 1 or stride < 1 or views < 1:
        raise UserError(f"clip length {num_frames}, clip stride {stride} and views {views} must be at least 1")
    assert rng is None or views == 1, "several views are for evaluation, which draws nothing"
    first = max(round(start * fps), 0)
    last = max(round(end * fps), first + num_frames)
    if sampling == "uniform":
        return uniform_frame_ids(first, last, num_frames * views, rng).reshape(num_frames, views).T.ravel()
    if sampling == "strided":
        middle = strided_frame_ids(first, last, num_frames, stride, rng)
        if views == 1:
            return middle
        room = max((last - first) - ((num_frames - 1) * stride + 1), 0)
        offsets = [(2 * v + 1) * room // (2 * views) - room // 2 for v in range(views)]
        return np.concatenate([middle + offset for offset in offsets])
    raise UserError(f"frame sampling: {sampling!r} is not one of {', '.join(SAMPLINGS)}")
