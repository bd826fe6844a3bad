"""Lists of videos, or of parts of them, in whatever form they come, and clips of them one by one.

Ego4D pickle    (.pkl) narrations, read by ego4d.py; videos as in a `VideoStore`
EK-100 CSV      with a column narration_id, read by ek100.py; videos as in a `VideoStore`
captions        (.jsonl, .json, .parquet, or a CSV with columns video and caption), read by captions.py; likewise
CSV             with a column video, and columns start, end (seconds or H:MM:SS) and id where they are needed; other
                columns are of no interest
anything else   a line per video: `file` or `file,start,end` (seconds); lines that begin with # are skipped

A video of the last two kinds is a file relative to the root, or else the name of a video in the layout of the root,
chunked or not.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from avion.data.captions import TO_THE_END, is_caption_file, read_narrations, read_seconds
from avion.data.ek100 import read_ek100_retrieval
from avion.data.narrations import NarrationTable
from avion.data.transforms import EvalTransform
from avion.data.video import TOLERANCE_S, VideoError, open_video, uniform_frame_ids
from avion.data.windows import VideoFinder
from avion.errors import UserError
from avion.reading import open_file


@dataclass(frozen=True)
class Span:
    """The seconds [start, end) of a video; end None stands for the last frame.

    id: The narration_id, where the list has one.
    """

    video: str
    start: float = 0.0
    end: float | None = None
    id: str | None = None


class VideoList(Sequence):
    """A read-only sequence of `Span`s. in_store: whether the videos are names in a `VideoStore` rather than files."""

    def __init__(self, rows: NarrationTable | list[Span]):
        self._rows = rows
        self.in_store = isinstance(rows, NarrationTable)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> Span:
        row = self._rows[i]
        if isinstance(row, Span):
            return row
        return Span(row.video, row.start, None if row.end == TO_THE_END else row.end, row.narration_id)


def read_video_list(path: str | os.PathLike) -> VideoList:
    """Read a list of one of these kinds.

    Raises:
        UserError: The list does not have the described form. The message has one line with file and line.
    """
    path = os.fspath(path)
    if Path(path).suffix in (".pkl", ".pickle") or (is_caption_file(path) and Path(path).suffix.lower() != ".csv"):
        return VideoList(read_narrations([path]))
    try:
        with open_file(path, "r", newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            rows = [(reader.line_num, [field.strip() for field in row]) for row in reader]
    except FileNotFoundError:
        raise UserError(f"video list {path}: no such file") from None
    except OSError as error:
        raise UserError(f"video list {path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"video list {path}: is neither a pickle (.pkl) nor text in UTF-8 ({error})") from None
    if rows and "narration_id" in rows[0][1]:
        return VideoList(read_ek100_retrieval(path))
    if rows and {"video", "caption"} <= set(rows[0][1]):
        return VideoList(read_narrations([path]))
    if rows and "video" in rows[0][1]:
        return VideoList(_named_columns(path, rows))
    rows = [(line, row) for line, row in rows if any(row) and not row[0].startswith("#")]
    if not rows:
        raise UserError(f"video list {path}: holds no videos")
    return VideoList([_span(row, f"video list {path}: line {line}") for line, row in rows])


def _named_columns(path: str, rows: list[tuple[int, list[str]]]) -> list[Span]:
    """The spans of a CSV whose first row has the names of the columns."""
    header = rows[0][1]
    repeated = [name for name in header if header.count(name) > 1]
    if repeated:
        raise UserError(f"video list {path}: the column {repeated[0][:40]!r} is there twice; remove one of the two")
    spans = []
    for line, row in rows[1:]:
        if not any(row) or row[0].startswith("#"):
            continue
        where = f"video list {path}: line {line}"
        if len(row) != len(header):
            raise UserError(f"{where}: has {len(row)} fields, the header has {len(header)}")
        fields = dict(zip(header, row, strict=True))
        if not fields["video"] or "\0" in fields["video"]:
            raise UserError(f"{where}: column 'video': a file or the name of a video is required")
        try:
            start = read_seconds(fields.get("start", ""), 0.0)
            end = read_seconds(fields.get("end", ""), math.inf)
        except ValueError as error:
            raise UserError(f"{where}: columns 'start' and 'end': {error}") from None
        if not 0 <= start < end:
            raise UserError(f"{where}: 0 <= start < end in seconds is required, found {start:g} and {end:g}")
        spans.append(Span(fields["video"], start, None if end == math.inf else end, fields.get("id") or None))
    if not spans:
        raise UserError(f"video list {path}: holds no videos")
    return spans


def _span(row: list[str], where: str) -> Span:
    if len(row) not in (1, 3) or not row[0] or "\0" in row[0]:
        raise UserError(f"{where}: `file` or `file,start,end` is required, found {','.join(row)[:80]!r}")
    if len(row) == 1:
        return Span(row[0])
    try:
        start, end = float(row[1]), float(row[2])
    except ValueError:
        start = end = math.nan
    if not 0 <= start < end < math.inf:  # NaN fails too
        raise UserError(f"{where}: 0 <= start < end in seconds is required, found {row[1][:20]!r} and {row[2][:20]!r}")
    return Span(row[0], start, end)


def read_span(
    path: str | os.PathLike,
    num_frames: int,
    transform: EvalTransform,
    *,
    start: float = 0.0,
    end: float | None = None,
    decoder: str = "auto",
    threads: int = 1,
) -> torch.Tensor:
    """Read `num_frames` frames of the seconds [start, end) of one file, the middles of equal segments.

    Pictures of full size are not kept in memory. If the span has fewer frames, some are repeated. end None stands for
    the end of the file.

    Returns:
        (3, T, size, size), as `transform` makes them.

    Raises:
        VideoError: The file cannot be read or ends before `start`.
    """
    with open_video(path, decoder, threads) as reader:
        last = reader.num_frames if end is None else min(round(end * reader.fps), reader.num_frames)
        first = round(start * reader.fps)
        if first >= reader.num_frames + TOLERANCE_S * reader.fps:
            raise VideoError(path, f"the clip starts at {start:g} s, after the video's end")
        first = min(first, reader.num_frames - 1)
        ids = uniform_frame_ids(first, max(last, first + 1), num_frames)
        needed, places = np.unique(ids, return_inverse=True)
        # A copy, as a turned picture is a view that torch cannot take.
        found = {i: transform(np.ascontiguousarray(frame)[None], None) for i, frame in reader.stream_frames(needed)}
    return torch.cat([found[int(i)] for i in needed], dim=1)[:, torch.from_numpy(places)]


class SpanDataset(Dataset):
    """Clips of a list: `dataset[i]` is {"index": i, "video": Tensor (3, T, size, size) uint8, "error": str}.

    `error` says why row i cannot be read ("" if it can be read); the video is then zeros. The frames are the middles of
    equal segments, the shorter side is resized, and the centre is cut out.

    Args:
        spans: The list.
        finder: Where the videos of the list are.
        num_frames, size: Frames per clip; height and width of the clips in pixels.
    """

    def __init__(self, spans: VideoList, finder: VideoFinder, *, num_frames: int, size: int):
        if num_frames < 1:
            raise UserError(f"number of frames: {num_frames} is not at least 1")
        self.spans, self.finder, self.num_frames = spans, finder, num_frames
        self.transform = EvalTransform(size, fused=True)

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> dict[str, object]:
        try:
            return {"index": index, "video": self._read(self.spans[index]), "error": ""}
        except VideoError as error:
            size = self.transform.crop_size
            blank = torch.zeros(3, self.num_frames, size, size, dtype=torch.uint8)
            return {"index": index, "video": blank, "error": str(error)}

    def _read(self, span: Span) -> torch.Tensor:
        store, name = self.finder.find(span.video)
        if store.layout.kind == "files":
            return read_span(
                store.chunk_path(name, 0),
                self.num_frames,
                self.transform,
                start=span.start,
                end=span.end,
                decoder=store.decoder,
                threads=store.threads,
            )
        clip = store.read_clip(name, span.start, TO_THE_END if span.end is None else span.end, self.num_frames)
        return self.transform(clip.frames, None)
