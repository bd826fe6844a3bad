"""The index on disk: what is refused, and that nothing in it is trusted."""

import json
import os
import shutil

import numpy as np
import pytest

from avion.errors import UserError
from avion.search.index import open_index, unit_rows
from tests.search.case import made_up, write_made_up

COUNTS = {"a": 3, "deep/b": 2}


@pytest.fixture
def folder(tmp_path, rng):
    return write_made_up(tmp_path / "index", COUNTS, rng.standard_normal((5, 4)))


def test_rows_and_videos(tmp_path, rng):
    rows = rng.standard_normal((5, 4))
    index = made_up(tmp_path, COUNTS, rows)
    assert [index.video_of(i) for i in range(5)] == [0, 0, 0, 1, 1]
    assert [index.rows_of(v) for v in range(2)] == [range(0, 3), range(3, 5)]
    assert isinstance(index.windows, np.memmap) and isinstance(index.times, np.memmap)
    np.testing.assert_array_equal(index.windows, rows.astype(np.float16))


def test_unit_rows():
    found = unit_rows(np.array([[3, 4], [0, 0]], dtype=np.float16))
    assert found[0].tolist() == pytest.approx([0.6, 0.8]) and np.isnan(found[1]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "is no search index"),
        ({"version": 2}, "is of version 2, this program reads 1"),
        ({"videos": ["../up", "b"]}, "holds values that cannot be"),
        ({"videos": ["/etc/passwd", "b"]}, "holds values that cannot be"),
        ({"videos": ["a", "a"]}, "holds values that cannot be"),
        ({"videos": ["a", 7]}, "holds values that cannot be"),
        ({"counts": [3, -1]}, "holds values that cannot be"),
        ({"counts": [3, 1]}, "holds values that cannot be"),
        ({"counts": None}, "holds values that cannot be"),
        ({"rows": 10**15}, "holds values that cannot be"),
        ({"width": True}, "holds values that cannot be"),
        ({"width": 8}, "is float16 (5, 4), expected float16 (5, 8)"),
        ({"frames": 0}, "holds values that cannot be"),
        ({"window": float("nan")}, "holds values that cannot be"),
        ({"root": 3}, "holds values that cannot be"),
        ({"model_args": [1]}, "holds values that cannot be"),
        ({"files": {"windows": "../windows-1.npy", "times": "times-1.npy"}}, "names the file '../windows-1.npy'"),
        ({"files": {"windows": "windows-9.npy", "times": "times-1.npy"}}, "windows-9.npy: no such file"),
        ({"files": []}, "names the file 'None'"),
    ],
)
def test_values_that_cannot_be(folder, change, message):
    path = folder / "search.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError) as caught:
        open_index(folder)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 200_000, "\x00"])
def test_json_that_is_none(folder, text):
    (folder / "search.json").write_text(text)
    with pytest.raises(UserError, match="is no search index"):
        open_index(folder)


@pytest.mark.parametrize("kind", ["pickle", "text", "short", "type", "order", "pipe"])
def test_arrays_that_are_none(folder, kind, capsys):
    path = folder / "windows-1.npy"
    if kind == "pickle":
        np.save(path, np.array([{"a": 1}], dtype=object))
    elif kind == "text":
        path.write_bytes(b"no array")
    elif kind == "pipe":
        path.unlink()
        os.mkfifo(path)
    elif kind == "short":
        path.write_bytes(path.read_bytes()[:-3])
    elif kind == "type":
        np.save(path, np.load(path).astype(np.float32))
    else:
        np.save(path, np.asfortranarray(np.load(path)))
    with pytest.raises(UserError, match=r"windows-1.npy: (is|cannot be read)"):
        open_index(folder)


def test_no_index(tmp_path, folder):
    with pytest.raises(UserError, match=r"no such file; make the index with `tools/search_videos.py index"):
        open_index(tmp_path / "gone")
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="no such file"):
        open_index(folder)
