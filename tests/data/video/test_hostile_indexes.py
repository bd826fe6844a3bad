"""Index files of any content: one line that names the file, or frames of the video."""

import json
import math
import re
import struct
import time

import numpy as np
import pytest

from avion.data.video import INDEX_NAME, VideoStore, index_videos
from avion.data.video.columns import Column
from avion.data.video.index_file import _RECORD, Entry, PacketIndex, write_index
from avion.data.video.picture import Scaling
from avion.errors import UserError
from tests.videos import read_barcode


def column_heads(record) -> list[int]:
    """Where the five columns of a record begin."""
    length, packets, frames, keys = _RECORD.unpack_from(record)
    at = _RECORD.size + length
    facts = json.loads(bytes(record[_RECORD.size : at]))
    at += sum(facts["configs"]) + 8 * keys
    heads = []
    for count in (packets, packets, packets, packets, frames):
        heads.append(at)
        at = Column(memoryview(bytes(record)), at, count).end
    return heads


def random_bytes(record: bytes, rng) -> bytes:
    changed = bytearray(record)
    for place in rng.integers(0, len(changed), int(rng.integers(1, 6))):
        changed[place] = int(rng.integers(256))
    return bytes(changed)


def other_columns(record: bytes, rng) -> bytes:
    """Base or slope of one or two columns: a number of any size."""
    changed = bytearray(record)
    for at in rng.choice(column_heads(record), int(rng.integers(1, 3))):
        value = int(rng.integers(-(2 ** int(rng.integers(1, 62))), 2 ** int(rng.integers(1, 62))))
        struct.pack_into("<q", changed, at + 1 + 8 * int(rng.integers(2)), value)
    return bytes(changed)


def other_facts(record: bytes, rng) -> bytes:
    """One to three numbers of the JSON part: numbers of any size."""
    length, *counts = _RECORD.unpack_from(record)
    facts = json.loads(record[_RECORD.size : _RECORD.size + length])
    for name in rng.choice(
        ["height", "width", "fps", "tick", "end", "orientation", "constant"], int(rng.integers(1, 4))
    ):
        value = float(10 ** rng.uniform(-12, 19))
        facts[name] = bool(rng.integers(2)) if name == "constant" else value if name in ("fps", "tick") else int(value)
    text = json.dumps(facts).encode()
    return _RECORD.pack(len(text), *counts) + text + record[_RECORD.size + length :]


class TestHostileIndexes:
    """Whatever is in an index file: one line that names it, or frames of the video; never a traceback, never memory
    without end."""

    def read(self, root):
        clip = VideoStore(root).read_clip("a", 3.0, 4.0, 1)
        return read_barcode(clip.frames[0])

    @pytest.mark.parametrize("damage, reason", [
        (lambda d: b"", "it is empty"), (lambda d: b"AVION", "cut short"), (lambda d: b"x" + d[1:], "no packet index"),
        (lambda d: d[:8] + b"\x07" + d[9:], "version 7"), (lambda d: d[:-1], "cut short or damaged"),
        (lambda d: d[:-9] + bytes([d[-9] ^ 1]) + d[-8:], "cut short or damaged"),
        (lambda d: d[: len(d) // 2], "cut short or damaged"),
    ])  # fmt: skip
    def test_files(self, dataset, damage, reason):
        path = dataset / INDEX_NAME
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(UserError, match=f"packet index .*{INDEX_NAME}.*{reason}.*tools/index_videos.py") as caught:
            VideoStore(dataset)
        assert "\n" not in str(caught.value)
        index_videos(dataset)  # mends it
        assert self.read(dataset) == 35

    def test_a_bit_that_fell_over_in_a_record(self, dataset):
        path = dataset / INDEX_NAME
        data = bytearray(path.read_bytes())
        data[60:300] = bytes(240)
        path.write_bytes(bytes(data))
        with pytest.raises(UserError, match="record of .* is damaged"):
            for video in "ab":
                for second in (3.0, 18.0):
                    VideoStore(dataset).read_clip(video, second, second + 1, 1)

    def test_records_of_any_content_with_right_checksums(self, dataset):
        """Random content of the records, checksums made to fit: nothing but frames, VideoErrors and UserErrors."""
        rng = np.random.default_rng()
        entries = list(PacketIndex(dataset / INDEX_NAME).entries())
        entries = [Entry(e.path, e.size, e.stamp, e.kind, bytes(e.record)) for e in entries]
        outcomes = {"read": 0, "refused": 0}
        started = time.process_time()
        for _ in range(150):
            damage = [random_bytes, other_columns, other_facts][rng.integers(3)]
            changed = [Entry(e.path, e.size, e.stamp, e.kind, damage(e.record, rng)) for e in entries]
            write_index(dataset / INDEX_NAME, changed)
            store = VideoStore(dataset)
            for read in (
                lambda s: s.read_clip("a", 3.0, 4.0, 1),
                lambda s: s.read_clip("b", 13.0, 17.0, 4, rng=rng, sampling="strided", stride=3),
                lambda s: s.read_clip("b", 1.0, math.inf, 3),
                lambda s: s.read_clip("a", 2.0, 4.0, 2, scaling=lambda h, w: Scaling((0, 0, h, w), (8, 8))),
                lambda s: s.length_of("a"),
            ):
                try:
                    read(store)
                    outcomes["read"] += 1
                except UserError as error:
                    assert "\n" not in str(error)
                    outcomes["refused"] += 1
        assert min(outcomes.values()) > 0
        assert time.process_time() - started < 60

    @pytest.mark.parametrize("column", range(5))
    def test_a_column_that_begins_far_away(self, dataset, column):
        """Offsets, sizes, times, flags, places of the frames: each in turn."""
        far = []
        for e in PacketIndex(dataset / INDEX_NAME).entries():
            record = bytearray(e.record)
            at = column_heads(record)[column]
            struct.pack_into("<q", record, at + 1, 2555904)
            far.append(Entry(e.path, e.size, e.stamp, e.kind, bytes(record)))
        write_index(dataset / INDEX_NAME, far)
        try:
            assert self.read(dataset) == 35 and column in (2, 3), "a time and a flag may be any number"
        except UserError as error:
            assert re.search("record of .* is damaged|a.mp4", str(error)) and "\n" not in str(error)

    @pytest.mark.parametrize("field, value", [
        ("height", 10**6), ("width", -1), ("fps", 0), ("fps", "30"), ("tick", 1e300), ("codec", "rawvideo"),
        ("configs", [10**12]), ("configs", "abc"), ("starts", [5]), ("orientation", 9), ("orientation", True),
        ("end", 1e5),
    ])  # fmt: skip
    def test_fields_that_cannot_be(self, dataset, field, value):
        changed = []
        for e in PacketIndex(dataset / INDEX_NAME).entries():
            record = bytes(e.record)
            length, *counts = _RECORD.unpack_from(record)
            facts = json.loads(record[_RECORD.size : _RECORD.size + length])
            assert field in facts
            text = json.dumps({**facts, field: value}).encode()
            record = _RECORD.pack(len(text), *counts) + text + record[_RECORD.size + length :]
            changed.append(Entry(e.path, e.size, e.stamp, e.kind, record))
        write_index(dataset / INDEX_NAME, changed)
        with pytest.raises(UserError, match="record of .* is damaged"):
            self.read(dataset)
