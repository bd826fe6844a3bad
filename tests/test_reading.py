"""avion.reading: texts and files from outside are read in bounded time, or refused."""

import datetime
import json
import os
import socket

import numpy as np
import pytest
import yaml

from avion.reading import check_nesting, open_file, parse_json, parse_yaml, read_npy, read_text


def test_regular_files_are_read_as_open_reads_them(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("﻿é\r\nb".encode())
    with open_file(path) as file:
        assert file.read() == path.read_bytes()
    with open_file(path, "r", newline="", encoding="utf-8-sig") as file:
        assert file.read() == "é\r\nb"
    assert read_text(path, encoding="utf-8-sig") == "é\nb"
    with pytest.raises(UnicodeDecodeError):
        path.write_bytes(b"\xff")
        read_text(path)


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(tmp_path)  # the address of a socket may have 100 characters only
        server.bind("socket")
        found = {}
        for name in ("pipe", "socket", ".", "missing"):
            with pytest.raises(OSError) as caught:
                open_file(tmp_path / name)
            found[name] = caught.value.strerror
    assert found["pipe"] == "it is a named pipe, a regular file is required"
    assert found["."] == "Is a directory" and found["missing"] == "No such file or directory"
    with pytest.raises(OSError, match="it is a device"):
        open_file("/dev/zero")
    assert not [fd for fd in os.listdir("/proc/self/fd") if os.path.realpath(f"/proc/self/fd/{fd}") == "/dev/zero"]


@pytest.mark.parametrize("value", [1, -1.5, True, None, "é", [1, [2, {"a": [3]}]], {"a": {"b": 10**39}}])
def test_json_as_it_is(value):
    assert parse_json(json.dumps(value)) == value
    assert parse_json('{"a": 1, "a": 2}', pairs=list) == [("a", 1), ("a", 2)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * 100_000, "nested more than 100 deep"), ("[" * 101 + "]" * 101, "nested more than 100 deep"),
        ("1" * 1001, "an integer of 1001 digits"), ("[NaN]", "NaN is no number"), ("-Infinity", "-Infinity"),
        ("[1", "delimiter"),
    ],
)  # fmt: skip
def test_json_that_is_refused(text, says):
    with pytest.raises(ValueError, match=says):
        parse_json(text)


def test_python_writes_nan():
    assert np.isnan(parse_json("[NaN]", nan=True)[0])


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\nb: [x, 1.5, true, null]", "lr: 1.0e-3\nx: .inf", "a: 2024-05-01", "a: {b: {c: d}}", "a: 0x1F", "a: 1:30",
        "- |\n  two\n  lines", "a: '0123'", "",
    ],
)  # fmt: skip
def test_yaml_as_it_is(text):
    assert parse_yaml(text) == yaml.safe_load(text)


def test_yaml_dates():
    assert parse_yaml("2024-05-01") == datetime.date(2024, 5, 1)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: &x 1\nb: *x", r"line 2: the alias \*x"), ("a: " + "[" * 21, "line 1: more than 20 mappings"),
        ("a: " + "1" * 1001, "line 1: an integer of 1001"), ("a: 2001-13-45", "month must be in"), ("a: [", "line 1"),
        ("a: !!python/name:os.system", "tag"), ("a" * 100_001, "at most 100000"), ("\x1b", "character"),
    ],
)  # fmt: skip
def test_yaml_that_is_refused(text, says):
    with pytest.raises(ValueError, match=says) as caught:
        parse_yaml(text)
    assert not isinstance(caught.value, yaml.YAMLError) and "\n" not in str(caught.value)


@pytest.mark.parametrize("depth", [99, 100])
@pytest.mark.parametrize("wrap", [lambda v: [v], lambda v: (v,), lambda v: {"a": v}, lambda v: [v, v]])
def test_nesting_is_counted(depth, wrap):
    value = 1
    for _ in range(depth):
        value = wrap(value)
    check_nesting(value)
    with pytest.raises(ValueError, match="more than 100 deep"):
        check_nesting([[value]])


@pytest.mark.parametrize("dtype", ["f4", ">f8", "u1", "i8"])
@pytest.mark.parametrize("order", "CF")
def test_npy_as_numpy_reads_it(tmp_path, dtype, order):
    array = np.asarray(np.random.default_rng().random((3, 5)) * 100, dtype=dtype, order=order)
    np.save(tmp_path / "a.npy", array)
    with open_file(tmp_path / "a.npy") as file:
        np.testing.assert_array_equal(read_npy(file, os.path.getsize(tmp_path / "a.npy")), array)
    with open_file(tmp_path / "a.npy") as file, pytest.raises(ValueError, match="the header says"):
        read_npy(file, os.path.getsize(tmp_path / "a.npy") - 1)
