"""The packet index of a dataset: one file, read through a memory map that all processes share.

    header    magic, version, number of files, where the table begins, checksum of the table
    records   one per video, of any length (see `pack_record`)
    table     per video, sorted by hash: hash of the path below the root, where the record lies and ends, its checksum,
              size and modification time of the video; then the paths themselves

All numbers are little-endian. The index says nothing that its video does not say: deleting it loses time, not data.
Nothing in it is trusted: what lies outside its bounds is refused in one line.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from avion.errors import UserError
from avion.files import written_whole
from avion.reading import open_file, parse_json

from .columns import Column, pack
from .decode import BARE_CODECS
from .packets import MAX_FPS, MAX_PIXELS, PacketTable, first_true

INDEX_NAME = "packets.index"  # the file below a video root that readers look for
MAGIC, VERSION = b"AVIONPKT", 1
_HEAD = struct.Struct("<8sIIQQI")  # magic, version, 0, files, table begins, checksum of the table
_ENTRY = np.dtype(
    [
        ("hash", "<u8"),
        ("begin", "<u8"),
        ("end", "<u8"),
        ("size", "<u8"),
        ("stamp", "<i8"),
        ("path", "<u8"),
        ("path_end", "<u8"),
        ("crc", "<u4"),
        ("kind", "<u4"),
    ]
)
_RECORD = struct.Struct("<IQQI")  # length of the JSON part, packets, frames, key packets
PACKETS, PLAIN = 0, 1  # kinds of an entry: a packet table, or the reason why the file is read without one
_CURE = "delete it, or build it anew with tools/index_videos.py"


@dataclass(frozen=True)
class Entry:
    """What the index holds of one video. path: below the root, with "/". record: a packet table (kind PACKETS) or a
    text (PLAIN). size, stamp: of the video when it was indexed."""

    path: str
    size: int
    stamp: int
    kind: int
    record: bytes | memoryview


def pack_record(table: PacketTable) -> bytes:
    """A packet table with `offset` and `size` as bytes: a JSON object of what is said once per file, codec
    configurations, key positions (u32 or u64), and five columns."""
    facts = {
        "codec": table.codec,
        "height": table.coded_size[0],
        "width": table.coded_size[1],
        "fps": table.fps,
        "tick": table.tick,
        "end": table.end,
        "orientation": table.orientation,
        "constant": table.constant_rate,
        "configs": [len(c) for c in table.configs],
        "starts": [int(s) for s in table.config_starts],
    }
    text = json.dumps(facts, separators=(",", ":")).encode()
    columns = [table.offset, table.size, table.pts, table.flags, table.display]
    return b"".join(
        [
            _RECORD.pack(len(text), table.num_packets, table.num_frames, len(table.keys)),
            text,
            *table.configs,
            np.asarray(table.keys, dtype="<u8").tobytes(),
            *(pack(column) for column in columns),
        ]
    )


def unpack_record(record: memoryview, path: str, file_size: int) -> PacketTable:
    """The table of `pack_record`. path: the video's, for messages; file_size: its bytes. ValueError for what is no such
    record."""
    length, packets, frames, keys = _RECORD.unpack_from(record, 0)
    if not 1 <= frames <= packets <= file_size or not 1 <= keys <= packets:
        raise ValueError("counts that cannot be")
    at = _RECORD.size + length
    facts = parse_json(bytes(record[_RECORD.size : at]))
    fields = _checked(facts)
    configs = []
    for size in facts["configs"]:
        configs.append(bytes(record[at : at + size]))
        at += size
    key_array = np.frombuffer(record, "<u8", keys, at)
    at += 8 * keys
    columns = []
    for count in (packets, packets, packets, packets, frames):
        columns.append(Column(record, at, count))
        at = columns[-1].end
    offset, size, pts, flags, display = columns
    if int(key_array[-1]) >= packets:
        raise ValueError("a key packet that is not there")
    return PacketTable(
        path,
        pts=pts,
        flags=flags,
        display=display,
        keys=key_array.view("<i8"),
        configs=configs,
        offset=offset,
        size=size,
        **fields,
    )


def _checked(facts: dict) -> dict:
    """The fields of a record's JSON part that go into a PacketTable as they are. ValueError for what cannot be."""

    def number(name: str, low: float, high: float, kinds: type | tuple = int):
        value = facts.get(name)
        if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
            raise ValueError(f"{name} that cannot be")
        return value

    if not isinstance(facts, dict) or facts.get("codec") not in BARE_CODECS:
        raise ValueError("a codec that is not indexed")
    height, width = number("height", 1, MAX_PIXELS), number("width", 1, MAX_PIXELS)
    configs, starts = facts.get("configs"), facts.get("starts")
    sound = (
        isinstance(configs, list)
        and isinstance(starts, list)
        and 1 <= len(configs) == len(starts) <= 4096
        and all(type(n) is int and 0 <= n < 2**24 for n in configs)
        and all(type(n) is int and 0 <= n < 2**62 for n in starts)
        and starts[0] == 0
        and starts == sorted(starts)
    )
    if height * width > MAX_PIXELS or not sound or type(facts.get("constant")) is not bool:
        raise ValueError("fields that cannot be")
    return {
        "codec": facts["codec"],
        "coded_size": (height, width),
        "fps": float(number("fps", 1e-6, MAX_FPS, (int, float))),
        "tick": float(number("tick", 1e-12, 1e6, (int, float))),
        "end": number("end", -(2**62), 2**62),
        "orientation": number("orientation", 0, 7),
        "constant_rate": facts["constant"],
        "config_starts": np.array(starts, dtype=np.int64),
    }


class PacketIndex:
    """An index file, open for reading. It can be handed to other processes, which map the same pages."""

    def __init__(self, path: str | os.PathLike):
        """UserError where the file is no index of this version, or damaged."""
        self.path = os.fspath(path)
        self._open()

    def _open(self) -> None:
        try:
            with open_file(self.path) as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise self._damaged("it is empty") from None
        except OSError as error:
            raise UserError(f"packet index {self.path}: cannot be read ({error.strerror})") from None
        self._view = memoryview(self._map)
        try:
            magic, version, _, count, begin, crc = _HEAD.unpack_from(self._view, 0)
        except struct.error:
            raise self._damaged("it is cut short") from None
        if magic != MAGIC:
            raise self._damaged("it is no packet index")
        if version != VERSION:
            raise self._damaged(f"it is of version {version}, this program reads version {VERSION}")
        if begin + count * _ENTRY.itemsize > len(self._view) or zlib.crc32(self._view[begin:]) != crc:
            raise self._damaged("it is cut short or damaged")
        self._entries = np.frombuffer(self._view, _ENTRY, count, begin)
        self._hashes = self._entries["hash"]
        self._checked: set[int] = set()

    def __getstate__(self):
        return {"path": self.path}

    def __setstate__(self, state) -> None:
        self.path = state["path"]
        self._open()

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, path: str) -> Entry | None:
        """The entry of a video, by its path below the root."""
        name = path.encode("utf-8", "surrogateescape")
        key = _hash(name)
        place = first_true(len(self._entries), lambda i: int(self._hashes[i]) >= key)
        while place < len(self._entries) and int(self._hashes[place]) == key:
            entry = self._entries[place]
            if bytes(self._bytes(entry["path"], entry["path_end"])) == name:
                return self._entry(place, path)
            place += 1
        return None

    def entries(self) -> Iterable[Entry]:
        """All of them."""
        for place in range(len(self._entries)):
            entry = self._entries[place]
            name = bytes(self._bytes(entry["path"], entry["path_end"]))
            yield self._entry(place, name.decode("utf-8", "surrogateescape"))

    def _entry(self, place: int, path: str) -> Entry:
        entry = self._entries[place]
        record = self._bytes(entry["begin"], entry["end"])
        if place not in self._checked:
            if zlib.crc32(record) != int(entry["crc"]):
                raise self._damaged(f"its record of {path} is damaged")
            self._checked.add(place)
        return Entry(path, int(entry["size"]), int(entry["stamp"]), int(entry["kind"]), record)

    def _bytes(self, begin, end) -> memoryview:
        begin, end = int(begin), int(end)
        if not begin <= end <= len(self._view):
            raise self._damaged("it points outside of itself")
        return self._view[begin:end]

    def table(self, entry: Entry, path: str, file_size: int) -> PacketTable:
        """The packet table of an entry of kind PACKETS. path: of the video, for messages."""
        try:
            return unpack_record(entry.record, path, file_size)
        except (ValueError, struct.error, KeyError, TypeError, RecursionError, OverflowError) as error:
            raise self._damaged(f"its record of {entry.path} is damaged: {str(error)[:80]}") from None

    def damaged(self, entry_path: str, error: BaseException) -> UserError:
        """The error for a record that contradicts itself or its video."""
        return self._damaged(f"its record of {entry_path} is damaged: {str(error)[:80]}")

    def _damaged(self, why: str) -> UserError:
        return UserError(f"packet index {self.path}: {why}; {_CURE}")


def is_index(path: str | os.PathLike) -> bool:
    """Whether a file begins as an index does; an index may be replaced by another one."""
    try:
        with open_file(path) as file:
            return file.read(_HEAD.size)[: len(MAGIC)] == MAGIC
    except OSError:
        return False


def write_index(path: str | os.PathLike, entries: Iterable[Entry]) -> int:
    """Write an index, whole or not at all -> how many entries. One record at a time is in memory."""
    rows, names, at_name = [], [], 0
    with written_whole(path, cure="choose another place with --index") as file:
        file.write(bytes(_HEAD.size))
        at = _HEAD.size
        for entry in entries:
            name = entry.path.encode("utf-8", "surrogateescape")
            file.write(entry.record)
            end = at + len(entry.record)
            crc = zlib.crc32(entry.record)
            rows.append((_hash(name), at, end, entry.size, entry.stamp, at_name, at_name + len(name), crc, entry.kind))
            names.append(name)
            at, at_name = end, at_name + len(name)
        table = np.array(rows, dtype=_ENTRY)
        table = table[np.argsort(table["hash"], kind="stable")]
        first_name = at + table.nbytes
        table["path"] += np.uint64(first_name)
        table["path_end"] += np.uint64(first_name)
        body = table.tobytes() + b"".join(names)
        file.write(body)
        file.seek(0)
        file.write(_HEAD.pack(MAGIC, VERSION, 0, len(rows), at, zlib.crc32(body)))
    return len(rows)


def _hash(name: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")
