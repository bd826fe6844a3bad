"""Computes features of windows over whole videos, or of the clips of a list, into a file per video.

A process plans ahead: it asks for the lengths of the next videos while it computes, and fills every batch with clips of
one or several videos.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch

from avion.data.transforms import normalize_clip
from avion.data.video import VideoError
from avion.data.video_list import Span, VideoList
from avion.data.windows import Block, BlockDataset, VideoFinder, windows_of

from .console import duration
from .distributed import World
from .feature_shards import STORED
from .feature_videos import VideoFiles
from .loader import batches_of, build_loader, read
from .precision import Precision
from .signals import Stopped, name

logger = logging.getLogger(__name__)

_TELL_EVERY_S = 10.0
# Encodes normalised clips (B, 3, T, height, width): (B, …) by kind.
Encoder = Callable[[torch.Tensor], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class VideoRows:
    """The videos of a list, and which rows of features are wanted of each.

    Attributes:
        videos: The names, each once.
        clips: For each video, the clips of the list in order; None: windows over the whole video.
        window: The length of a window, in seconds.
        stride: The distance from window to window, in seconds.
    """

    videos: list[str]
    clips: list[list[Span]] | None = None
    window: float = 0.0
    stride: float = 0.0

    def digest(self, number: int) -> str:
        """Return a text that changes with what the rows of a video depend on besides the settings of the run."""
        if self.clips is None:
            return ""
        spans = [(span.start, span.end, span.id) for span in self.clips[number]]
        return hashlib.sha256(repr(spans).encode()).hexdigest()[:16]

    def ids(self, number: int) -> list[str] | None:
        """Return the ids of the rows of a video, where all rows have one."""
        ids = [] if self.clips is None else [span.id for span in self.clips[number]]
        return [id for id in ids if id is not None] if ids and None not in ids else None

    def needs_length(self, number: int) -> bool:
        """Return whether the length of a video must be known to say what its rows are."""
        return self.clips is None or any(span.end is None for span in self.clips[number])

    def spans(self, number: int, length: float) -> np.ndarray:
        """Return the rows of a video.

        Args:
            number: The number of the video.
            length: The length of the video, in seconds.

        Returns:
            (n, 2) float64, begin and end of each row in seconds.
        """
        if self.clips is None:
            return windows_of(length, self.window, self.stride)
        rows = [(s.start, max(length, s.start) if s.end is None else s.end) for s in self.clips[number]]
        return np.array(rows, dtype=np.float64).reshape(-1, 2)


def windowed(spans: VideoList | Sequence[str], window: float, stride: float) -> VideoRows:
    """Return windows over the whole videos of a list, each video once."""
    names = dict.fromkeys(span if isinstance(span, str) else span.video for span in spans)
    return VideoRows(list(names), None, window, stride)


def grouped(spans: VideoList) -> VideoRows:
    """Return the clips of a list by video."""
    clips: dict[str, list[Span]] = {}
    for span in spans:
        clips.setdefault(span.video, []).append(span)
    return VideoRows(list(clips), list(clips.values()))


@dataclass
class _Open:
    """A video whose rows are being computed."""

    spans: np.ndarray
    parts: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)


class _Plan:
    """Batches of blocks, in order. Iterating opens the videos in `open`, and fails those that have no length."""

    def __init__(self, files: VideoFiles, rows: VideoRows, finder: VideoFinder, batch_size: int, ahead: int):
        self.files, self.rows, self.finder = files, rows, finder
        self.batch_size, self.ahead = batch_size, ahead
        self.open: dict[int, _Open] = {}

    def __iter__(self) -> Iterator[list[Block]]:
        batch: list[Block] = []
        room = self.batch_size
        for number, spans in self._lengths():
            self.open[number] = _Open(spans)
            at = 0
            while at < len(spans):
                some = tuple((float(a), float(b)) for a, b in spans[at : at + room])
                batch.append(Block(number, at, some))
                at, room = at + len(some), room - len(some)
                if room == 0:
                    yield batch
                    batch, room = [], self.batch_size
        if batch:
            yield batch

    def _lengths(self) -> Iterator[tuple[int, np.ndarray]]:
        todo = iter(self.files.todo())
        with ThreadPoolExecutor(max(self.ahead // 2, 1)) as pool:
            waiting: list[tuple[int, Future[float]]] = []
            try:
                while True:
                    waiting += [(n, pool.submit(self._length, n)) for n in islice(todo, self.ahead - len(waiting))]
                    if not waiting:
                        return
                    number, future = waiting.pop(0)
                    try:
                        yield number, self.rows.spans(number, future.result())
                    except (VideoError, ValueError) as error:
                        logger.warning("unreadable: %s", error)
                        self.files.fail(number, str(error))
            finally:
                for _, future in waiting:
                    future.cancel()

    def _length(self, number: int) -> float:
        if not self.rows.needs_length(number):
            return 0.0
        store, video = self.finder.find(self.rows.videos[number])
        return store.length_of(video)


def extract_rows(
    files: VideoFiles,
    rows: VideoRows,
    finder: VideoFinder,
    encode: Encoder,
    world: World,
    *,
    frames: int,
    size: int,
    norm_style: str,
    precision: Precision,
    dtype: str,
    batch_size: int,
    workers: int,
    timeout: float,
) -> None:
    """Write the features of all videos of this part that are not finished. All processes take each step together.

    Args:
        files: Where the features go.
        rows: The videos, and which rows are wanted of each.
        finder: Where the videos are.
        encode: Computes the features of normalised clips.
        world: The processes of the run.
        frames: Frames per clip.
        size: Height and width of the clips in pixels.
        norm_style: A key of NORM_STYLES.
        precision: The settings of autocast.
        dtype: One of SHARD_DTYPES, the number format of the features.
        batch_size: Clips per forward pass.
        workers: Data-loading processes.
        timeout: Seconds after which workers that send nothing are given up.

    Raises:
        UserError: A file cannot be written, or the data-loading processes failed.
        Stopped: A signal asked the run to stop; finished videos stay.
    """
    todo = len(files.todo())
    logger.info("%d videos, %d of them finished before", len(files.own()), len(files.own()) - todo)
    plan = _Plan(files, rows, finder, batch_size, ahead=2 * max(workers, 1))
    dataset = BlockDataset(rows.videos, finder, num_frames=frames, size=size)
    loader = build_loader(dataset, plan, workers=workers, device=world.device, timeout=timeout, large_samples=True)
    batches = batches_of(loader)
    started = told = time.perf_counter()
    done = clips = 0
    working = True
    while world.any(working):
        failure: Exception | None = None
        try:
            if working:
                batch = read(batches)
                with precision.autocast():
                    found = encode(normalize_clip(batch["video"].to(world.device), norm_style))
                clips += len(batch["error"])
                done += _add(files, rows, plan.open, batch, found, STORED[dtype])
        except StopIteration:
            working = False
        except Exception as e:  # raised below, once the other processes know
            failure = e
        asked = world.go_on(failure, "extracting the features")
        if asked:
            raise Stopped(f"{name(asked)} with {len(files.todo())} videos left; {files.folder} keeps the others")
        if done and time.perf_counter() - told > _TELL_EVERY_S:
            told = time.perf_counter()
            left = (told - started) / done * len(files.todo())
            logger.info("%d of %d videos, %.1f clips/s, %s left", done, todo, clips / (told - started), duration(left))


def _add(
    files: VideoFiles,
    rows: VideoRows,
    opened: dict[int, _Open],
    batch: dict,
    found: dict[str, torch.Tensor],
    dtype: torch.dtype,
) -> int:
    """Hand out the features of a batch to their videos, and write the videos that are complete. Returns how many are
    written.
    """
    at = written = 0
    values = {kind: features.to("cpu", dtype) for kind, features in found.items()}
    for block in batch["blocks"]:
        video, end = opened[block.video], at + len(block.spans)
        for kind, features in values.items():
            video.parts.setdefault(kind, []).append(features[at:end].clone())
        video.errors += batch["error"][at:end]
        at = end
        if len(video.errors) == len(video.spans):
            parts = {kind: torch.cat(some) for kind, some in video.parts.items()}
            files.write(block.video, parts, video.spans, video.errors, rows.ids(block.video))
            del opened[block.video]
            written += 1
    return written
