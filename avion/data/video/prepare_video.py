"""One raw video becomes one file or one folder of chunks, complete and compared with its source, or nothing."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from avion.errors import UserError

from .errors import VideoError, one_line
from .prepare_encode import Encoder
from .prepare_plan import Raw, Settings
from .prepare_source import RawVideo, Shot
from .prepare_verify import StreamCheck

# Errors of the target's file system, which every further video would meet too.
_TARGET_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE)
_REPORT_EVERY = 32  # frames


def prepare_video(
    raw: Raw, settings: Settings, folder: Path, threads: int, report: Callable[[float], None]
) -> dict[str, object]:
    """Prepare one video.

    Args:
        raw: The video.
        settings: How.
        folder: Where to write, under a name of its own; on the file system of the target.
        threads: Of the decoder and of x264.
        report: Is called now and then with the share that is done.

    Returns:
        What there is to say about it, of JSON's types: `partial`, the name in `folder` of the file or folder to be
        moved to its place; `files`, [name, frames, bytes] each, and the facts that the manifest holds.

    Raises:
        VideoError: It cannot be read to its end, or what was written is not what was read. Nothing is left behind.
        UserError: The target cannot be written.
    """
    begin = time.process_time()
    partial = f"{secrets.token_hex(8)}{settings.extension if not settings.chunked else ''}"
    place = folder / partial
    try:
        if settings.chunked:
            place.mkdir()
        video = RawVideo(raw.path, settings.short_side, threads)
        with contextlib.closing(video):
            files = _write(video, raw.name, settings, place, threads, report)
            _sync(place)
            facts = _facts(raw, video)
    except BaseException as error:
        _remove(place)
        if isinstance(error, OSError) and error.errno in _TARGET_ERRORS:
            raise _unwritable(folder, error) from error
        raise
    quality = [f.pop("quality") for f in files]
    return {
        **facts,
        "partial": partial,
        "files": [[f["name"], f["frames"], f["bytes"]] for f in files],
        "bytes": sum(f["bytes"] for f in files),
        "psnr": round(sum(q.mean * f["frames"] for q, f in zip(quality, files, strict=True)) / facts["frames"], 2),
        "least_psnr": round(min(q.least for q in quality), 2),
        "compared_with_source": sum(q.samples for q in quality),
        "cpu_seconds": round(time.process_time() - begin, 2),
    }


def _facts(raw: Raw, video: RawVideo) -> dict:
    return {
        "video": raw.name,
        "source": raw.path,
        "source_bytes": raw.size,
        "source_stamp": raw.stamp,
        "frames": video.num_frames,
        "seconds": round(video.seconds, 6),
        "fps": str(video.rate),
        "size": list(video.size),
        "source_size": list(video.stored_size),
        "notes": video.notes,
    }


def _write(video: RawVideo, name: str, settings: Settings, place: Path, threads: int, report: Callable) -> list[dict]:
    files: list[dict] = []
    part: _Part | None = None
    done = 0
    try:
        for shot in video.shots():
            chunk = settings.chunk_of(shot.time, video.ticks)
            if part is None or chunk != part.chunk:
                if part is not None:
                    files.append(part.finish())
                part = None
                part = _Part(video, name, settings, place, chunk, threads)
            part.add(shot)
            done += 1
            if done % _REPORT_EVERY == 0:
                report(done / video.num_frames)
        files.append(part.finish())
        part = None
    finally:
        if part is not None:
            part.abandon()
    gaps = [b["chunk"] - a["chunk"] - 1 for a, b in zip(files, files[1:], strict=False)]
    if sum(gaps):
        video.notes.append(f"{sum(gaps)} chunks without a frame, in which nothing new is shown")
    return files


class _Part:
    """A file being written: a chunk, or the whole video."""

    def __init__(self, video: RawVideo, name: str, settings: Settings, place: Path, chunk: int, threads: int):
        self.chunk, self._ticks = chunk, video.ticks
        self._start = chunk * settings.chunk_length * video.ticks if settings.chunked else 0
        self._end = self._start + settings.chunk_length * video.ticks if settings.chunked else None
        self._usual = round(video.ticks / video.rate)
        self._name = settings.chunk_name(chunk) if settings.chunked else os.path.basename(settings.target(name))
        self.path = place / self._name if settings.chunked else place
        self._check = StreamCheck(str(self.path), video.size)
        with _of_target(self.path):
            self._encoder = Encoder(
                str(self.path), video.size, video.ticks, video.rate, settings.encoding, video.colours, threads
            )

    def add(self, shot: Shot) -> None:
        duration = shot.duration
        if self._end is not None and shot.time + duration > self._end + self._usual:
            duration = max(self._end - shot.time, 1)  # the rest is no part of this chunk
        time = shot.time - self._start
        self._check.expect(time, shot.picture, shot.sample)
        with _of_target(self.path):
            packets = self._encoder.add(shot.picture, time, duration)
        self._check.packets(packets, self._encoder.config)

    def finish(self) -> dict:
        with _of_target(self.path):
            config, packets = self._encoder.config, self._encoder.close()
        self._check.packets(packets, config)
        quality = self._check.finish()
        with _of_target(self.path):
            _sync(self.path)
        self._check.check_file(str(self.path), self._ticks)
        return {
            "name": self._name,
            "chunk": self.chunk,
            "frames": len(self._check.times),
            "bytes": self.path.stat().st_size,
            "quality": quality,
        }

    def abandon(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # what it was abandoned for is being told
            self._encoder.abandon()


@contextlib.contextmanager
def _of_target(path: Path):
    """Errors of writing: of the file system, or of an encoder that cannot take such pictures."""
    try:
        yield
    except OSError as error:
        if error.errno in _TARGET_ERRORS:
            raise _unwritable(path.parent, error) from error
        raise VideoError(path, f"cannot be encoded ({one_line(error)})") from error


def _unwritable(folder: Path, error: OSError) -> UserError:
    reason = os.strerror(error.errno)
    return UserError(f"TARGET {folder}: cannot be written ({reason}); mend that, and the same command goes on")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place, ignore_errors=True)
    else:
        place.unlink(missing_ok=True)
