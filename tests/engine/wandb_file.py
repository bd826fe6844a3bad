"""Reads what `wandb` writes offline: its record log, in LevelDB's format, of protobuf messages."""

import json
import struct
import time
from pathlib import Path
from types import SimpleNamespace

_BLOCK, _CHUNK_HEADER = 32768, struct.Struct("<IHB")  # checksum, length, kind
_FULL, _LAST = 1, 4


def read_wandb(path: Path, patience: float = 60.0) -> SimpleNamespace:
    """`id`, `project`, `name`, `config`, `exit_code`, and `history`: a dict of values per step.

    A process of wandb's own writes the file, and on a busy machine may not be done when the run is: wait for its end.
    """
    deadline = time.monotonic() + patience
    while (found := _read(path.read_bytes())).exit_code is None:
        assert time.monotonic() < deadline, f"{path}: its run has not ended after {patience} s"
        time.sleep(0.2)
    return found


def _read(content: bytes) -> SimpleNamespace:
    from wandb.proto import wandb_internal_pb2

    assert content[:4] == b":W&B"
    found = SimpleNamespace(history={}, exit_code=None)
    position, message = 7, b""
    while position + _CHUNK_HEADER.size <= len(content):
        left = _BLOCK - position % _BLOCK
        if left < _CHUNK_HEADER.size:
            position += left
            continue
        _, length, kind = _CHUNK_HEADER.unpack_from(content, position)
        position += _CHUNK_HEADER.size
        message += content[position : position + length]
        position += length
        if kind in (_FULL, _LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(message)
            message = b""
            _take(record, found)
    return found


def _take(record, found: SimpleNamespace) -> None:
    kind = record.WhichOneof("record_type")
    if kind == "run":
        found.id, found.project, found.name = record.run.run_id, record.run.project, record.run.display_name
        found.config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
    elif kind == "exit":
        found.exit_code = record.exit.exit_code
    elif kind == "history":
        values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        assert record.history.step.num not in found.history, "a step is there twice"
        found.history[record.history.step.num] = {k: v for k, v in values.items() if not k.startswith("_")}
