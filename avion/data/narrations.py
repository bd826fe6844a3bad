"""Narrated clips as a table of columns.

Four million rows as Python tuples take gigabytes, and forked DataLoader workers copy them page by page as reference
counts change. Numpy columns and one UTF-8 blob for all texts take a few hundred megabytes and stay shared.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from avion.errors import UserError

_MAX_SECONDS = 1e6  # eleven days
_MAX_TEXT = 100_000  # characters; the text tower reads 77 tokens
# How long the texts of a file may be when they are written out, beside the bytes of the file. Ego4D's rows take 30
# bytes and more, and 100 characters of text.
_SHARED_BYTES, _SHARED_TIMES = 32_000_000, 20
TEXTS_TOO_LONG = "the texts up to here are much longer than the file; write a text of its own into each row"
_MAX_NAME = 200  # bytes; file systems allow 255, some of which the extension takes


@dataclass(frozen=True)
class Narration:
    """One clip, and what is said about it.

    Attributes:
        video: The path of the video below the video root, without extension.
        start: Where the clip begins, in seconds.
        end: Where the clip ends, in seconds; infinity means the end of the video.
        texts: One or several wordings of the narration.
        narration_id: The id of the clip, or None.
    """

    video: str
    start: float
    end: float
    texts: tuple[str, ...]
    narration_id: str | None


class StringColumn(Sequence):
    """Strings in one blob.

    Args:
        blob: The bytes of all strings, in UTF-8.
        ends: The position after the last byte of each string, (n,) int64.
    """

    def __init__(self, blob: bytes, ends: np.ndarray):
        self._blob, self._ends = blob, ends

    @classmethod
    def of(cls, strings: Sequence[str]) -> StringColumn:
        encoded = [s.encode() for s in strings]
        return cls(b"".join(encoded), np.cumsum([len(e) for e in encoded], dtype=np.int64))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, i: int) -> str:
        i = range(len(self._ends))[i]
        start = self._ends[i - 1] if i > 0 else 0
        return self._blob[start : self._ends[i]].decode()

    def hash_into(self, digest: hashlib.blake2b) -> None:
        """Let a digest follow from the strings and their order."""
        digest.update(self._blob)
        digest.update(np.ascontiguousarray(self._ends).view(np.uint8))

    @property
    def nbytes(self) -> int:
        return len(self._blob) + self._ends.nbytes


class NarrationTable(Sequence):
    """A read-only sequence of `Narration`s, kept as columns.

    Args:
        videos: The distinct names of videos.
        video: The number of each row's video, (n,) int32.
        start: (n,) float64, in seconds.
        end: (n,) float64, in seconds.
        texts: All wordings.
        text_ends: The position in `texts` after the last wording of each row, (n,) int64.
        narration_ids: One id per row, or None.
    """

    def __init__(
        self,
        videos: list[str],
        video: np.ndarray,
        start: np.ndarray,
        end: np.ndarray,
        texts: StringColumn,
        text_ends: np.ndarray,
        narration_ids: StringColumn | None = None,
    ):
        assert len(video) == len(start) == len(end) == len(text_ends), "columns of different lengths"
        assert narration_ids is None or len(narration_ids) == len(video), "columns of different lengths"
        self.videos, self.video, self.start, self.end = videos, video, start, end
        self.texts, self.text_ends, self.narration_ids = texts, text_ends, narration_ids

    def __len__(self) -> int:
        return len(self.video)

    def __getitem__(self, i: int) -> Narration:
        i = range(len(self))[i]  # raises IndexError and takes negative numbers, as a list does
        first = int(self.text_ends[i - 1]) if i > 0 else 0
        return Narration(
            video=self.videos[self.video[i]],
            start=float(self.start[i]),
            end=float(self.end[i]),
            texts=tuple(self.texts[j] for j in range(first, int(self.text_ends[i]))),
            narration_id=None if self.narration_ids is None else self.narration_ids[i],
        )

    def where(self, rows: np.ndarray) -> NarrationTable:
        """Return the rows for which `rows` (n,) bool is True, in order."""
        (kept,) = np.nonzero(rows)
        used, video = np.unique(self.video[kept], return_inverse=True)
        texts = [self[int(i)].texts for i in kept]
        return NarrationTable(
            [self.videos[v] for v in used],
            video.astype(np.int32).reshape(-1),
            self.start[kept],
            self.end[kept],
            StringColumn.of([text for row in texts for text in row]),
            np.cumsum([len(row) for row in texts], dtype=np.int64),
            None if self.narration_ids is None else StringColumn.of([self.narration_ids[int(i)] for i in kept]),
        )

    def fingerprint(self) -> str:
        """A text that changes with the clips, their order and their texts; it takes a second per GB."""
        digest = hashlib.blake2b("\0".join(self.videos).encode(), digest_size=16)
        for column in (self.video, self.start, self.end, self.text_ends):
            digest.update(np.ascontiguousarray(column).view(np.uint8))
        for texts in (self.texts, self.narration_ids):
            if texts is not None:
                texts.hash_into(digest)
        return digest.hexdigest()

    def __iter__(self) -> Iterator[Narration]:
        return (self[i] for i in range(len(self)))

    @property
    def nbytes(self) -> int:
        """The memory of the columns, in bytes."""
        columns = (self.video, self.start, self.end, self.text_ends, self.texts, self.narration_ids)
        return sum(column.nbytes for column in columns if column is not None)


def texts_allowed(size: int) -> int:
    """Return how many characters of text a file of `size` bytes may hold, where rows can share texts."""
    return _SHARED_BYTES + _SHARED_TIMES * size


class TableBuilder:
    """Collects rows and checks them.

    Real annotations hold rows that are odd but usable. They are mended, and counted in `mended`: a start before 0, an
    end that is not after the start (such a clip is read from its start on), an empty text among others.
    """

    def __init__(self):
        self._number_of: dict[str, int] = {}
        self._video, self._start, self._end = array("i"), array("d"), array("d")
        self._text_blob, self._text_ends, self._row_ends = bytearray(), array("q"), array("q")
        self._ids: list[str] = []
        self._allowed = math.inf
        self.mended = {"start before 0": 0, "end not after its start": 0, "empty wording": 0}

    def __len__(self) -> int:
        return len(self._video)

    def begin_file(self, size: int) -> None:
        """Say that the next rows come from a file of `size` bytes.

        Rows that share their texts, as pickles and Parquet files can have them, would make gigabytes of a few bytes:
        `add` refuses the row with which the texts of the file become too long for it.
        """
        self._allowed = self._volume() + texts_allowed(size)

    def _volume(self) -> int:
        return len(self._text_blob) + len(self._text_ends)

    def add(self, video: object, start: object, end: object, texts: object, narration_id: str | None = None) -> None:
        """Add a row.

        Args:
            video: The path of the video below the video root, without extension.
            start: In seconds.
            end: In seconds; None means the end of the video.
            texts: A text or a list of texts.
            narration_id: The id of the row, or None.

        Raises:
            ValueError: A field is wrong. The message is one clause, such as "end is nan, ...".
        """
        number = self._number_of.get(video) if type(video) is str else None
        if number is None:
            number = self._number_of[_checked_video(video)] = len(self._number_of)
        start = _checked_seconds("start", start)
        end = math.inf if end is None else _checked_seconds("end", end)
        wordings = self._checked_texts(texts)
        if start < 0.0:
            start = 0.0
            self.mended["start before 0"] += 1
        if end <= start:
            end = start
            self.mended["end not after its start"] += 1
        self._video.append(number)
        self._start.append(start)
        self._end.append(end)
        for wording in wordings:
            self._text_blob += wording
            self._text_ends.append(len(self._text_blob))
        self._row_ends.append(len(self._text_ends))
        if narration_id is not None:
            self._ids.append(narration_id)

    def _checked_texts(self, texts: object) -> list[bytes]:
        if type(texts) is str:
            texts = (texts,)
        elif not isinstance(texts, (list, tuple)):
            raise ValueError(f"narration is of type {type(texts).__name__}, a text or a list of texts is required")
        if self._volume() + len(texts) > self._allowed:
            raise ValueError(TEXTS_TOO_LONG)
        wordings = []
        for text in texts:
            if not isinstance(text, str):
                raise ValueError(f"narration holds a {type(text).__name__}, texts are required")
            if len(text) > _MAX_TEXT:
                raise ValueError(f"narration is a text of {len(text)} characters, at most {_MAX_TEXT} are read")
            try:
                encoded = text.strip().encode()
            except UnicodeEncodeError:
                raise ValueError("narration is not valid Unicode text") from None
            if encoded:
                wordings.append(encoded)
        if not wordings:
            raise ValueError("narration is empty, a text is required")
        self.mended["empty wording"] += len(texts) - len(wordings)
        return wordings

    def build(self) -> NarrationTable:
        assert not self._ids or len(self._ids) == len(self), "narration ids on some rows only"
        return NarrationTable(
            videos=list(self._number_of),
            video=np.frombuffer(self._video, dtype=np.int32).copy() if self._video else np.empty(0, np.int32),
            start=np.array(self._start, dtype=np.float64),
            end=np.array(self._end, dtype=np.float64),
            texts=StringColumn(bytes(self._text_blob), np.array(self._text_ends, dtype=np.int64)),
            text_ends=np.array(self._row_ends, dtype=np.int64),
            narration_ids=StringColumn.of(self._ids) if self._ids else None,
        )

    def report(self) -> str:
        """Return what was mended, as one clause; "" if nothing was mended."""
        return ", ".join(f"{count} x {what}" for what, count in self.mended.items() if count)


def _checked_video(video: object) -> str:
    """Return a path below the video root; a row must not lead out of this folder."""
    if not isinstance(video, str):
        raise ValueError(f"video is of type {type(video).__name__}, a text is required")
    parts = video.split("/")
    if any(len(part.encode(errors="replace")) > _MAX_NAME for part in parts):
        raise ValueError(f"video is a name of {len(video)} characters, longer than file names can be")
    if not video or "\0" in video or "\\" in video or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"video is {video[:80]!r}, a name or a relative path below the video root is required")
    return video


def _checked_seconds(field: str, value: object) -> float:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise ValueError(f"{field} is of type {type(value).__name__}, a number of seconds is required")
    try:
        seconds = float(value)
    except OverflowError:
        seconds = math.inf
    if not math.isfinite(seconds):
        raise ValueError(f"{field} is {seconds}, a finite number of seconds is required")
    if abs(seconds) > _MAX_SECONDS:
        raise ValueError(f"{field} is {seconds:g} seconds, longer than videos can be")
    return seconds


def checked_not_empty(table: NarrationTable, source: str) -> NarrationTable:
    if len(table) == 0:
        raise UserError(f"{source}: holds no clips")
    return table
