"""avion.json_lines: one reader for all logs, which passes over what a killed process left."""

import json
import os

import pytest

from avion.errors import UserError
from avion.json_lines import append_json, read_json_lines


def test_what_is_appended_is_read(tmp_path):
    path = tmp_path / "log.txt"
    rows = [{"epoch": i, "loss": 0.5 / (i + 1), "alpha": [0.0, 1e-3]} for i in range(3)]
    for row in rows:
        append_json(path, row)
    found = read_json_lines(path)
    assert found.objects == rows and [n for n, _ in found.rows] == [1, 2, 3] and found.damaged == []
    assert path.read_text() == "".join(json.dumps(row) + "\n" for row in rows)


def test_damaged_lines_are_numbered_and_passed_over(tmp_path):
    path = tmp_path / "log.txt"
    deep = "[" * 100_000 + "]" * 100_000
    path.write_bytes(b'{"a": 1}\n{"a": \n\n[1, 2]\n\xff\xfe\n' + deep.encode() + b'\n{"a": 2}\n{"a": 3}')
    found = read_json_lines(path)
    assert found.rows == [(1, {"a": 1}), (7, {"a": 2})]  # the last line has no end: it is still being written
    assert found.damaged == [2, 4, 5, 6]


def test_a_torn_line_does_not_spoil_the_next(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text('{"a": 1}\n{"a":')
    append_json(path, {"a": 3})
    assert read_json_lines(path).rows == [(1, {"a": 1}), (3, {"a": 3})]


def test_files_that_are_no_logs(tmp_path):
    assert read_json_lines(tmp_path / "missing").rows == []
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\); try another"):
        read_json_lines(tmp_path, cure="try another")
    os.mkfifo(tmp_path / "fifo")  # opening it would wait for a writer forever
    with pytest.raises(UserError, match=r"fifo: cannot be read \(it is a named pipe, a regular file is required\)"):
        read_json_lines(tmp_path / "fifo")
    with open(tmp_path / "huge", "wb") as file:
        file.truncate((1 << 30) + 1)  # sparse: takes no room on the disk
    with pytest.raises(UserError, match="huge: 1074 MB is too large for a log"):
        read_json_lines(tmp_path / "huge")
