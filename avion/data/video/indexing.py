"""Building the packet index of a dataset: once per dataset, in parallel, so that training reads only what it needs."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import mmap
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from avion.errors import UserError
from avion.processes import pool
from avion.remote import cache_root

from .decode import BARE_CODECS
from .errors import VideoError, one_line
from .index_file import INDEX_NAME, PACKETS, PLAIN, Entry, PacketIndex, pack_record, unpack_record, write_index
from .indexed_reader import IndexedReader
from .layout import VIDEO_EXTENSIONS
from .pyav_reader import PyAVReader
from .reader import check_file
from .storage import Storage, is_remote, storage_of

_JOURNAL = struct.Struct("<IIQQqI")  # lengths of path and record, kind, size, stamp, checksum of path and record
_FARTHEST_START = 64  # bytes between where a demuxer says that a packet lies and its first byte


@dataclass(frozen=True)
class IndexSummary:
    """What `index_videos` did."""

    path: Path | str  # of the index file, or its URL
    files: int  # in the index now
    reused: int  # of them, entries that stood before and are still right
    frames: int  # shown frames of all files together
    plain: dict[str, str]  # relative path -> why the file is read without the index (damaged, MPEG-TS, ...)


def index_videos(
    root: str | os.PathLike[str],
    paths: Iterable[str | os.PathLike[str]] | None = None,
    *,
    index: str | os.PathLike[str] | None = None,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> IndexSummary:
    """Index the videos below `root`, and write the index whole or not at all.

    Entries of an index that exists are kept where size and modification time of their file are unchanged. Work that a
    killed process had done is kept too (`{index}.journal`), so that the same call goes on.

    Args:
        root: Folder of the videos, in any layout.
        paths: The files to index, relative to `root` or below it; None: all video files below `root`. An index that
            exists keeps its entries of other files that still exist.
        index: The index file; None: `{root}/packets.index`, where readers look for it.
        workers: Processes; 0: this one.
        progress: Is called with (files done, files in all) after each file.

    Returns:
        A summary. A file that cannot be indexed is no error: it is listed in `plain` and read in the plain way.

    Raises:
        UserError: The root does not exist, a path lies outside it, or the index cannot be written.
    """
    storage = storage_of(root)
    if not storage.is_dir(storage.root):
        raise UserError(f"video root {root}: no such folder")
    names = sorted(_video_files(storage)) if paths is None else sorted({_below(storage, p) for p in paths})
    if not names:
        raise UserError(f"video root {root}: holds no videos ({', '.join(VIDEO_EXTENSIONS)})")
    if storage.remote and index is None:
        with _brought_back(storage) as target:
            made = _build(storage, names, paths is None, target, workers, progress)
        return dataclasses.replace(made, path=storage.join(storage.root, INDEX_NAME))
    target = Path(index) if index is not None else Path(storage.root) / INDEX_NAME
    return _build(storage, names, paths is None, target, workers, progress)


@contextlib.contextmanager
def _brought_back(storage: Storage) -> Iterator[Path]:
    """A file here for the index of a remote root: the index that is there, to begin with; put there at the end.

    Its name is the same each time, so that its journal is found again."""
    name = hashlib.blake2b(storage.root.encode(), digest_size=16).hexdigest()
    here, there = cache_root() / "indexes" / name, storage.join(storage.root, INDEX_NAME)
    here.parent.mkdir(parents=True, exist_ok=True)
    try:
        if storage.exists(there):
            shutil.copyfile(storage.local_copy(there), here)
        yield here
        storage.put(str(here), there)
    except OSError as error:
        raise UserError(f"{there}: cannot be written ({error.strerror}); choose another place with --index") from error


def _build(
    storage: Storage, names: list[str], every: bool, target: Path, workers: int, progress: Callable | None
) -> IndexSummary:
    """names: of the files to index; every: they are all there are."""
    with _journal(target) as journal:
        known = _known_entries(target)
        known.update(journal.entries)
        fresh = {name: entry for name, entry in known.items() if _is_fresh(storage, entry)}
        due = [name for name in names if name not in fresh]
        reused = sum(name in fresh for name in names)
        done = len(names) - len(due)
        for entry in _indexed(storage, due, workers):
            journal.add(entry)
            fresh[entry.path] = entry
            done += 1
            if progress is not None:
                progress(done, len(names))
        if every:
            fresh = {name: fresh[name] for name in names if name in fresh}
        write_index(target, (fresh[name] for name in sorted(fresh)))
        journal.finish()
    return _summary(target, fresh.values(), reused)


def index_file(path: str, name: str) -> Entry:
    """Index one video. path: of the file; name: its path below the root."""
    try:
        found = check_file(path)
    except VideoError as error:
        return Entry(name, 0, 0, PLAIN, error.reason.encode())
    facts = (found.st_size, found.st_mtime_ns)
    try:
        with PyAVReader(path, threads=1) as reader:
            table = reader.table
            if table.codec not in BARE_CODECS:
                return Entry(name, *facts, PLAIN, f"its codec {table.codec} is not indexed".encode())
            located = _locate(reader, path)
            if located is None:
                return Entry(name, *facts, PLAIN, b"its packets do not lie in one piece each")
            table.offset, table.size = located
            table.orientation = reader.orientation
            record = pack_record(table)
            if not _reads_the_same(reader, record, path, found.st_size):
                return Entry(name, *facts, PLAIN, b"its packets alone decode to other pictures")
            return Entry(name, *facts, PACKETS, record)
    except (VideoError, OSError) as error:
        return Entry(name, *facts, PLAIN, getattr(error, "reason", one_line(error)).encode())


def _locate(reader: PyAVReader, path: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Where each packet's bytes lie: (n,) offsets, (n,) sizes. None where they do not lie in the file as they are."""
    stated = reader.demuxed.file_positions
    offsets = np.zeros(len(stated), dtype=np.int64)
    sizes = np.array([size for _, size in stated], dtype=np.int64)
    usual = 0
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for position, packet in enumerate(reader.demuxed.packets()):
            at, body = stated[position][0], bytes(packet)
            if at < 0:
                return None
            if data[at + usual : at + usual + len(body)] != body:
                found = data.find(body, at, at + len(body) + _FARTHEST_START)
                if found < 0:
                    return None
                usual = found - at
            offsets[position] = at + usual
    return offsets, sizes


def _reads_the_same(reader: PyAVReader, record: bytes, path: str, file_size: int) -> bool:
    """Whether the first frames come out of the index as they come out of the container."""
    frames = list(range(min(2, reader.num_frames)))
    expected = reader.get_frames(frames)
    table = unpack_record(memoryview(record), path, file_size)
    with IndexedReader(table, Storage(os.path.dirname(path)).open_ranges(path), 1, lambda error: error) as indexed:
        try:
            return np.array_equal(indexed.get_frames(frames), expected)
        except (VideoError, ValueError):
            return False


def _indexed(storage: Storage, names: list[str], workers: int) -> Iterator[Entry]:
    work = functools.partial(_index_below, storage)
    if workers < 1 or len(names) < 2:
        yield from map(work, names)
        return
    try:
        with pool(min(workers, len(names))) as processes:
            yield from processes.map(work, names, chunksize=max(1, min(16, len(names) // (4 * workers))))
    except BrokenProcessPool:
        raise UserError(
            "a process that indexed videos was killed (is there memory enough?); what is done is kept, run it again "
            "with fewer --workers"
        ) from None


def _index_below(storage: Storage, name: str) -> Entry:
    path = storage.join(storage.root, name)
    if not storage.remote:
        return index_file(path, name)
    try:
        facts = storage.facts(path)
        with storage.temporary_copy(path) as copy:
            entry = index_file(copy.name, name)
    except OSError as error:
        return Entry(name, 0, 0, PLAIN, one_line(error).encode())
    return dataclasses.replace(entry, size=facts.size, stamp=facts.stamp)


def _video_files(storage: Storage, below: str = "", above: tuple[str, ...] = ()) -> Iterator[str]:
    """The paths of all videos below the root, or below its folder `below`. Links to folders are followed, but never
    back to one of the folders `above`. A folder that cannot be listed is handed on as if it were a video: it is then
    told among the files without an index."""
    folder = storage.join(storage.root, below) if below else storage.root
    real = folder if storage.remote else os.path.realpath(folder)
    if real in above:
        return
    try:
        entries = storage.entries(folder)
    except OSError as error:
        if not below:
            raise UserError(f"video root {folder}: cannot be listed ({error.strerror})") from error
        yield below
        return
    for name, is_folder in entries:
        path = f"{below}/{name}" if below else name
        if is_folder:
            yield from _video_files(storage, path, (*above, real))
        elif os.path.splitext(name)[1].lower() in VIDEO_EXTENSIONS:
            yield path


def _below(storage: Storage, path: str | os.PathLike[str]) -> str:
    """The path of a video below the root. UserError for one that lies elsewhere."""
    root, name = storage.root, os.fspath(path)
    if storage.remote:
        name = name.removeprefix(f"{root}/")
    elif os.path.isabs(name):
        name = os.path.relpath(name, os.path.abspath(root))
    name = os.path.normpath(name)
    if name == ".." or name.startswith(("../", "/")) or is_remote(name):
        raise UserError(f"{path}: does not lie below the video root {root}")
    return name


def _is_fresh(storage: Storage, entry: Entry) -> bool:
    try:
        facts = storage.facts(storage.join(storage.root, entry.path))
    except OSError:
        return False
    return (facts.size, facts.stamp) == (entry.size, entry.stamp)


def _known_entries(target: Path) -> dict[str, Entry]:
    if not target.exists():
        return {}
    try:
        return {e.path: e for e in PacketIndex(target).entries()}
    except UserError:  # damaged, or of another version: built anew
        return {}


def _summary(target: Path, entries: Iterable[Entry], reused: int) -> IndexSummary:
    files, frames, plain = 0, 0, {}
    for entry in entries:
        files += 1
        if entry.kind == PLAIN:
            plain[entry.path] = bytes(entry.record).decode("utf-8", "replace")
        else:
            frames += unpack_record(memoryview(entry.record), entry.path, entry.size).num_frames
    return IndexSummary(target, files, reused, frames, plain)


class _Journal:
    """What has been indexed so far, appended video by video: a killed run goes on from there."""

    def __init__(self, path: Path):
        self._path = path
        self._file = open(path, "ab+")  # noqa: SIM115  closed by `close`
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise UserError(f"{path}: another process is building this index; wait for it") from error
        self.entries: dict[str, Entry] = {}
        self._file.seek(0)
        self._file.truncate(self._read(self._file.read()))

    def _read(self, data: bytes) -> int:
        """Takes in the entries -> where the last whole one ends."""
        at = 0
        while at + _JOURNAL.size <= len(data):
            name_size, record_size, kind, size, stamp, crc = _JOURNAL.unpack_from(data, at)
            begin, end = at + _JOURNAL.size, at + _JOURNAL.size + name_size + record_size
            if end > len(data) or zlib.crc32(data[begin:end]) != crc:
                break
            name = data[begin : begin + name_size].decode("utf-8", "surrogateescape")
            self.entries[name] = Entry(name, size, stamp, kind, data[begin + name_size : end])
            at = end
        return at

    def add(self, entry: Entry) -> None:
        name = entry.path.encode("utf-8", "surrogateescape")
        body = name + entry.record
        head = _JOURNAL.pack(len(name), len(entry.record), entry.kind, entry.size, entry.stamp, zlib.crc32(body))
        self._file.write(head + body)
        self._file.flush()

    def finish(self) -> None:
        self._path.unlink(missing_ok=True)

    def close(self) -> None:
        self._file.close()


@contextlib.contextmanager
def _journal(target: Path) -> Iterator[_Journal]:
    path = target.with_name(target.name + ".journal")
    try:
        journal = _Journal(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another place with --index") from error
    try:
        yield journal
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); free space, and run it again") from error
    finally:
        journal.close()
