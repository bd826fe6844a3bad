"""Clips out of a folder of videos: which frames they are, where those lie, and what to do at the edges."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from avion.errors import UserError

from .errors import VideoError, refused
from .index_file import INDEX_NAME, PACKETS, PacketIndex
from .indexed_reader import IndexedReader
from .layout import VIDEO_EXTENSIONS, find_layout, other_extensions
from .picture import Scaling
from .reader import VideoReader, open_video, resolve_decoder
from .sampling import clip_frame_ids, clip_seconds
from .storage import is_remote, storage_of

logger = logging.getLogger(__name__)

TOLERANCE_S = 1.0  # by how much annotations and cuts may disagree with a video before it counts as damaged
_AFTER_THE_END = 2**52  # a place that no file reaches; exact as a float


@dataclass(frozen=True)
class ClipFrames:
    frames: np.ndarray  # (T, H, W, 3) uint8, RGB; of a clip that was scaled, (T, 3, h, w) uint8
    clamped: int  # how many of the T lie after the video's last frame and show that one instead


@dataclass(frozen=True)
class _Moments:
    """Where a clip's frames lie. chunk: (n,) int64. place: (n,), in its chunk: the number of a frame at the rate `fps`,
    or (fps None) a time in seconds."""

    chunk: np.ndarray
    place: np.ndarray
    fps: float | None


class VideoStore:
    """The videos under one root. Holds no open file, so that it can be handed to DataLoader workers.

    root: folder of the videos. chunk_length: seconds per chunk (its file names count in it), ignored for whole
    files. layout: "auto", one of LAYOUTS, or "files": a video's name is then the path of its file, below the root or
    absolute. decoder, threads: as in `open_video`.
    index: the packet index of these videos; "auto": `packets.index` in the root, where there is one; None: no index. A
    file that it does not know as it is now is read without it: `unindexed` counts those readings, the log says so once.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        *,
        chunk_length: int = 15,
        layout: str = "auto",
        decoder: str = "auto",
        threads: int = 1,
        index: str | os.PathLike | None = "auto",
    ):
        self.storage = storage_of(root)
        self.root = self.storage.root if self.storage.remote else Path(root)
        self.decoder = resolve_decoder(decoder)
        self.threads = threads
        self.layout = find_layout(root, layout)
        if self.chunked and (chunk_length != int(chunk_length) or chunk_length < 1):
            raise UserError(f"video chunk length: {chunk_length} is not a whole number of seconds, at least 1")
        self.chunk_length = int(chunk_length)
        self._short_names: dict[str, str] = {}
        self.unindexed = 0
        self._index = self._find_index(index)
        logger.info("videos in %s: layout %s (%s), decoder %s", root, self.layout.kind, self.pattern, self.decoder)

    @property
    def pattern(self) -> str:
        return self.layout.pattern()

    @property
    def chunked(self) -> bool:
        return self.layout.kind in ("avion", "vms")

    def chunk_index(self, second: float) -> int:
        """The number of the chunk that holds this second of a video; 0 for whole files."""
        return int(max(second, 0.0) // self.chunk_length) if self.chunked else 0

    def chunk_path(self, video: str, chunk: int) -> Path | str:
        """The file that holds chunk number `chunk` (counted from 0) of `video`; of a remote root, its URL."""
        path = self._chunk_path(video, chunk)
        return path if self.storage.remote else Path(path)

    def has_chunk(self, video: str, chunk: int) -> bool:
        """Whether this file is there. VideoError where the operating system does not tell."""
        path = self._chunk_path(video, chunk)
        try:
            return self.storage.exists(path)
        except OSError as error:
            raise refused(path, error) from error

    def last_chunk(self, video: str) -> int | None:
        """The highest chunk number that `video` has on disk, None if it has no chunk at all.

        VideoError where its folder cannot be listed.
        """
        if not self.chunked:
            return 0 if self.has_chunk(video, 0) else None
        folder = os.path.dirname(self._chunk_path(video, 0))
        try:
            names = [name for name, _ in self.storage.entries(folder)]
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise refused(folder, error) from error
        unit = self.chunk_length if self.layout.kind == "avion" else 1
        stems = [stem for stem, extension in map(os.path.splitext, names) if extension.lower() in VIDEO_EXTENSIONS]
        return max((int(stem) // unit for stem in stems if stem.isdigit()), default=None)

    def length_of(self, video: str) -> float:
        """Seconds from the beginning of a video to the end of its last frame. VideoError if it cannot be read."""
        last = self.last_chunk(video)
        with self._open_first(video, last or 0) as reader:
            before = last * self.chunk_length if self.chunked and last else 0
            return before + reader.seconds_of(reader.num_frames)

    def _chunk_path(self, video: str, chunk: int) -> str:
        if self.layout.kind == "files":
            return self.storage.join(self.storage.root, video)
        return self._there(self._path(self._name(video), chunk))

    def _path(self, name: str, chunk: int) -> str:
        start = chunk * self.chunk_length
        return self.storage.join(self.storage.root, self.pattern.format(video=name, start=start, chunk=chunk))

    def _there(self, path: str) -> str:
        """The file of this name, or the one that differs from it in its extension alone."""
        try:
            if self.storage.exists(path):
                return path
            folder, name = os.path.split(path)
            folders = [folder]
            if self.layout.kind == "avion" and not self.storage.is_dir(folder):
                parent, folder_name = os.path.split(folder)
                others = (self.storage.join(parent, n) for n in other_extensions(folder_name))
                folders = [f for f in others if self.storage.is_dir(f)]
            for folder in folders:
                for other in (name, *other_extensions(name)):
                    candidate = self.storage.join(folder, other)
                    if self.storage.exists(candidate):
                        return candidate
        except OSError:  # opening the file will say why
            pass
        return path

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
        path = self._there(self._path(name, 0))
        try:
            return self.storage.is_dir(os.path.dirname(path)) if self.chunked else self.storage.exists(path)
        except OSError:  # it is there, and cannot be read
            return True

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
        scaling: Callable[[int, int], Scaling] | None = None,
    ) -> ClipFrames:
        """Read `num_frames` frames of the seconds [start, end) of a video.

        An infinite end is that of the video. sampling: "uniform" over the span, or "strided", `stride` frames apart.
        rng: None for the fixed frames of evaluation, a Generator for training's jitter. views: so many times
        `num_frames`, one view after the other, fixed frames only: `uniform` view v takes the middle of the v-th of
        `views` equal parts of each segment, `strided` view v has its window in the middle of the v-th part of the room
        that there is.
        scaling: (height, width) of the upright pictures -> what to cut out of each and the size to bring it to, in one
        pass with the conversion from the codec's colours. It is called once, after rng has drawn the frames.
        A span of fewer than `num_frames` frames is widened to that many. The frame rate is the file's; where frames are
        shown for unequal times, a moment shows the frame whose display interval holds it. Frames after the video's end
        show its last frame and are counted. Raises VideoError for a missing, damaged or cut-short file, and for a clip
        that starts more than a second after the video's end.
        """
        end = self.length_of(video) if end == math.inf else end
        first_chunk = self.chunk_index(start)
        once = None if scaling is None else _OneScaling(scaling)
        with self._open_first(video, first_chunk) as reader:
            moments, order = self._moments(start, end, num_frames, reader, first_chunk, rng, sampling, stride, views)
            moments = self._mind_the_end(video, first_chunk, moments)
            pieces, clamped = [], 0
            for chunk in np.unique(moments.chunk):  # places ascend, so do the pieces
                wanted = moments.place[moments.chunk == chunk]
                with contextlib.nullcontext(reader) if chunk == first_chunk else self._open(video, chunk) as part:
                    piece, late = self._read_chunk(video, chunk, part, wanted, moments.fps, once)
                    if pieces and piece.shape[1:] != pieces[0].shape[1:]:
                        raise _other_size(part.path, *piece.shape[1:3])
                pieces.append(piece)
                clamped += late
        frames = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        return ClipFrames(frames if order is None else frames[order], clamped)

    def read_clips(
        self,
        video: str,
        spans: Sequence[tuple[float, float]],
        num_frames: int,
        *,
        scaling: Callable[[int, int], Scaling] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Read several clips of one video, the frames that `read_clip` gives of each, and decode each frame once.

        Args:
            video: The name of the video.
            spans: (start, end) of each clip in seconds; at least one.
            num_frames: Frames per clip.
            scaling: As in `read_clip`.

        Returns:
            Frames (n, T, H, W, 3) uint8, or with `scaling` (n, T, 3, h, w); and by clip how many of its frames lie
            after the end of the video, (n,) int64.

        Raises:
            VideoError: As `read_clip`, for any of the clips.
        """
        once = None if scaling is None else _OneScaling(scaling)
        clamped = np.zeros(len(spans), dtype=np.int64)
        places: dict[int, list[tuple[int, np.ndarray, np.ndarray]]] = {}  # by chunk: clip, positions in it, frame ids
        with contextlib.ExitStack() as stack:
            readers: dict[int, VideoReader] = {}

            def reader_of(chunk: int, opened: Callable[[str, int], VideoReader]) -> VideoReader:
                if chunk not in readers:
                    readers[chunk] = stack.enter_context(opened(video, chunk))
                return readers[chunk]

            for clip, (start, end) in enumerate(spans):
                first = self.chunk_index(start)
                reader = reader_of(first, self._open_first)
                moments, _ = self._moments(start, end, num_frames, reader, first, None, "uniform", 1, 1)
                moments = self._mind_the_end(video, first, moments)
                for chunk in map(int, np.unique(moments.chunk)):
                    (here,) = np.nonzero(moments.chunk == chunk)
                    part = reader_of(chunk, self._open)
                    ids, late = self._ids_in_chunk(video, chunk, part, moments.place[here], moments.fps)
                    places.setdefault(chunk, []).append((clip, here, ids))
                    clamped[clip] += late
            return self._frames_of_clips(readers, places, (len(spans), num_frames), once), clamped

    def _frames_of_clips(
        self,
        readers: dict[int, VideoReader],
        places: dict[int, list[tuple[int, np.ndarray, np.ndarray]]],
        shape: tuple[int, int],
        scaling: _OneScaling | None,
    ) -> np.ndarray:
        """-> (n, T, ...): the frames at these places."""
        frames: np.ndarray | None = None
        for chunk in sorted(places):
            reader, at = readers[chunk], 0
            found = self._decode(reader, np.concatenate([ids for _, _, ids in places[chunk]]), scaling)
            if frames is None:
                frames = np.empty((*shape, *found.shape[1:]), dtype=np.uint8)
            elif frames.shape[2:] != found.shape[1:]:
                raise _other_size(reader.path, *found.shape[1:3])
            for clip, here, ids in places[chunk]:
                frames[clip, here] = found[at : at + len(ids)]
                at += len(ids)
        assert frames is not None, "no clips"
        return frames

    def _moments(
        self,
        start: float,
        end: float,
        num_frames: int,
        reader: VideoReader,
        first_chunk: int,
        rng: np.random.Generator | None,
        sampling: str,
        stride: int,
        views: int,
    ) -> tuple[_Moments, np.ndarray | None]:
        """-> where the clip's frames lie, ascending, and which of them the clip's first, second, ... frame is (None:
        in the order in which they lie). reader: of the first chunk."""
        length = self.chunk_length if self.chunked else np.inf
        if reader.constant_rate:
            what: np.ndarray = clip_frame_ids(start, end, reader.fps, num_frames, rng, sampling, stride, views)
            length, fps = length * reader.fps, reader.fps
        else:
            offset = first_chunk * length if self.chunked else 0.0
            what = clip_seconds(start, end, reader, num_frames, rng, sampling, stride, views, offset)
            fps = None
        order = None
        if views > 1:  # neither ascending nor distinct
            what, order = np.unique(what, return_inverse=True)
        chunk = (what // length).astype(np.int64)
        if not self.chunked:
            place = what
        elif fps is not None:
            place = np.floor(what - chunk * length + 1e-6)
        else:
            place = what - chunk * length
        return _Moments(chunk, place, fps), order

    def _find_index(self, index: str | os.PathLike | None) -> PacketIndex | None:
        if index is None or self.decoder != "pyav":
            if index not in (None, "auto"):
                raise UserError(f"packet index {index}: is used by the decoder pyav only, not by {self.decoder}")
            return None
        path = self.storage.join(self.storage.root, INDEX_NAME) if index == "auto" else os.fspath(index)
        try:
            if index == "auto" and not self.storage.exists(path):
                return None
            found = PacketIndex(self.storage.local_copy(path) if index == "auto" or is_remote(path) else path)
        except OSError as error:
            raise UserError(f"packet index {path}: cannot be read ({error.strerror})") from error
        logger.info("packet index %s: %d files", path, len(found))
        return found

    def _open(self, video: str, chunk: int) -> VideoReader:
        path = self._chunk_path(video, chunk)
        reader = None if self._index is None else self._open_indexed(self._index, path)
        return open_video(path, self.decoder, self.threads) if reader is None else reader

    def _open_indexed(self, index: PacketIndex, path: str) -> VideoReader | None:
        """A reader that needs no container; None where the index does not hold this file as it is now."""
        entry = index.find(path[len(self.storage.root) :].lstrip("/"))
        if entry is None:
            try:
                return self._not_indexed(path, "is not in it") if self.storage.exists(path) else None
            except OSError:
                return None
        try:
            file = self.storage.open_ranges(path)
        except OSError:
            return None  # opened the plain way, it will be told
        facts = file.facts()
        if (facts.size, facts.stamp) != (entry.size, entry.stamp):
            file.close()
            return self._not_indexed(path, "was written since")
        if entry.kind != PACKETS:
            file.close()
            return None  # the index says why, and was built knowing it
        try:
            return IndexedReader(
                index.table(entry, path, facts.size), file, self.threads, functools.partial(index.damaged, entry.path)
            )
        except BaseException:
            file.close()
            raise

    def _not_indexed(self, path: str, why: str) -> None:
        self.unindexed += 1
        if self.unindexed == 1:
            logger.warning(
                "packet index %s: %s %s; such files are read without it, which is slow (said once); "
                "tools/index_videos.py brings it up to date",
                self._index.path,
                path,
                why,
            )

    def _open_first(self, video: str, chunk: int) -> VideoReader:
        try:
            return self._open(video, chunk)
        except VideoError as error:
            if error.unreadable or self.has_chunk(video, chunk):
                raise
        last, path = self.last_chunk(video), self.chunk_path(video, chunk)
        if last is None:
            raise VideoError(path, "no such file, and none else of this video")
        if last < chunk:
            raise VideoError(path, f"no such file: the clip starts after the video's last chunk (number {last})")
        raise VideoError(path, "no such file: this chunk is missing, though later ones are there")

    def _mind_the_end(self, video: str, first_chunk: int, moments: _Moments) -> _Moments:
        """Move frames of chunks after the last one to the (never reached) end of the last one; a chunk that is
        missing before that is an error."""
        for chunk in np.unique(moments.chunk):
            if chunk == first_chunk or self.has_chunk(video, chunk):
                continue
            last = self.last_chunk(video)
            if last is None or chunk < last:
                reason = "no such file: this chunk is missing, though later ones are there"
                raise VideoError(self.chunk_path(video, chunk), reason)
            after = moments.chunk > last
            return _Moments(
                np.where(after, last, moments.chunk), np.where(after, _AFTER_THE_END, moments.place), moments.fps
            )
        return moments

    def _read_chunk(
        self,
        video: str,
        chunk: int,
        reader: VideoReader,
        places: np.ndarray,
        fps: float | None,
        scaling: _OneScaling | None,
    ) -> tuple[np.ndarray, int]:
        """places: as in `_Moments`, possibly past the chunk's end -> frames, number clamped."""
        ids, late = self._ids_in_chunk(video, chunk, reader, places, fps)
        return self._decode(reader, ids, scaling), late

    def _ids_in_chunk(
        self, video: str, chunk: int, reader: VideoReader, places: np.ndarray, fps: float | None
    ) -> tuple[np.ndarray, int]:
        """places: as in `_Moments`, possibly past the chunk's end -> frame numbers of the file, number clamped."""
        ids = _frames_at(reader, places, fps, self._begin_of(reader))
        late = int((ids >= reader.num_frames).sum())
        if late:
            path = self.chunk_path(video, chunk)
            if self.chunked and self.has_chunk(video, chunk + 1):
                due = self.chunk_length * reader.fps
                if reader.num_frames < due - TOLERANCE_S * reader.fps and self._is_short(reader):
                    reason = (
                        f"is cut short: {reader.num_frames} frames, {due:.0f} are expected, since a later chunk exists"
                    )
                    raise VideoError(path, reason)
            elif late == len(ids) and ids.min() - reader.num_frames > TOLERANCE_S * reader.fps:
                raise VideoError(path, f"the clip starts after the video's end ({reader.num_frames} frames here)")
        return np.minimum(ids, reader.num_frames - 1), late

    @staticmethod
    def _decode(reader: VideoReader, ids: np.ndarray, scaling: _OneScaling | None) -> np.ndarray:
        if scaling is None:
            return reader.get_frames(ids)
        scaling.path = reader.path
        return reader.get_scaled(ids, scaling)

    def _begin_of(self, reader: VideoReader) -> float:
        """How many seconds after a chunk's begin its first frame begins, where its container says so.

        A frame that is shown across the cut lies in the chunk before. More than a second is another way of counting.
        """
        return reader.begin if self.chunked and 0.0 <= reader.begin < TOLERANCE_S else 0.0

    def _is_short(self, reader: VideoReader) -> bool:
        return reader.seconds_of(reader.num_frames) < self.chunk_length - TOLERANCE_S


def _frames_at(reader: VideoReader, places: np.ndarray, fps: float | None, begin: float) -> np.ndarray:
    """The numbers of a file's frames at these places (see `_Moments`). begin: of the first frame. -> (n,) int64"""
    if fps is not None and reader.constant_rate:
        return places.astype(np.int64)
    # A frame of a constant rate is looked for in the middle of its time: rounded times may lie just after a tick.
    seconds = places if fps is None else (places + 0.5) / fps
    return np.array([reader.frame_at(float(s) - begin) for s in seconds], dtype=np.int64)


class _OneScaling:
    """The same cut for all pieces of a clip. They must be of one size."""

    def __init__(self, scaling: Callable[[int, int], Scaling]):
        self.path = ""  # of the piece that is read
        self._scaling = scaling
        self._size: tuple[int, int] | None = None
        self._plan: Scaling | None = None

    def __call__(self, height: int, width: int) -> Scaling:
        if self._plan is None:
            self._size, self._plan = (height, width), self._scaling(height, width)
        if (height, width) != self._size:
            raise _other_size(self.path, height, width)
        return self._plan


def _other_size(path: str | os.PathLike, height: int, width: int) -> VideoError:
    return VideoError(path, f"has frames of {width} x {height}, unlike the chunk before it")
