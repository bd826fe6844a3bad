"""Caption files: each format, each way of saying a clip, each mistake."""

import json
import math
import pickle

import numpy as np
import pytest

from avion.data.captions import Columns, is_caption_file, read_narrations
from avion.errors import UserError

ROWS = [
    {"video": "cats/a.mp4", "start": 1.5, "end": 4, "caption": "a cat sits"},
    {"video": "cats/a", "start": 1.5, "end": 4.0, "caption": "the cat, sitting"},
    {"video": "7010", "start": None, "end": None, "caption": 'she says "no", twice'},
    {"video": "b.MOV", "start": "0:01:02.5", "end": "01:10", "caption": "ein Hund läuft"},
    {"video": "b", "start": 12, "end": None, "caption": "to the end"},
]
DUE = [
    ("cats/a", 1.5, 4.0, ("a cat sits", "the cat, sitting")),
    ("7010", 0.0, math.inf, ('she says "no", twice',)),
    ("b", 62.5, 70.0, ("ein Hund läuft",)),
    ("b", 12.0, math.inf, ("to the end",)),
]


def write(path, rows):
    import csv

    if path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False))
    elif path.suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        texts = [{k: v if k == "caption" or v is None else str(v) for k, v in row.items()} for row in rows]
        parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(texts), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    return path


def told(table):
    return [(n.video, n.start, n.end, n.texts) for n in table]


@pytest.mark.parametrize("name", ["c.csv", "c.jsonl", "c.ndjson", "c.json", "c.parquet"])
def test_every_format(tmp_path, name):
    assert is_caption_file(name)
    assert told(read_narrations([write(tmp_path / name, ROWS)])) == DUE


def test_a_list_of_captions_and_other_names(tmp_path):
    rows = [{"clip": "a", "sentences": ["one", "two"], "from": 3}, {"clip": 12, "sentences": "three", "from": 0}]
    columns = Columns.parse(["video=clip", "caption=sentences", "start=from"])
    table = read_narrations([write(tmp_path / "c.jsonl", rows)], columns)
    assert told(table) == [("a", 3.0, math.inf, ("one", "two")), ("12", 0.0, math.inf, ("three",))]
    csv = tmp_path / "c.csv"
    csv.write_text('\ufeffvideo,caption\na,"[""one"", ""two""]"\nb,[music] plays\n')
    assert told(read_narrations([csv])) == [
        ("a", 0.0, math.inf, ("one", "two")),
        ("b", 0.0, math.inf, ("[music] plays",)),
    ]


def test_parquet_with_numbers_and_lists(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"video": ["a", "b"], "start": [0.5, None], "caption": [["x", "y"], ["z"]], "more": [1, 2]})
    parquet.write_table(table, tmp_path / "c.parquet")
    assert told(read_narrations([tmp_path / "c.parquet"])) == [
        ("a", 0.5, math.inf, ("x", "y")),
        ("b", 0.0, math.inf, ("z",)),
    ]


def test_captions_beside_a_pickle(tmp_path):
    with open(tmp_path / "n.pkl", "wb") as file:
        pickle.dump([("v", 0.0, 1.0, "#C C cuts")], file)
    table = read_narrations([tmp_path / "n.pkl", write(tmp_path / "c.csv", ROWS)])
    assert told(table) == [("v", 0.0, 1.0, ("#C C cuts",)), *DUE]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.csv", "video,caption\na\n", "line 2: does not have the header's 2 fields"),
        ("c.csv", "video,text\na,b\n", "line 2: the column 'caption' is missing; found video, text; --caption-columns"),
        ("c.csv", "video,start,caption\na,soon,b\n", "line 2: start: 'soon' is no number of seconds"),
        ("c.csv", "video,end,caption\na,nan,b\n", "line 2: end: 'nan' is no number of seconds"),
        ("c.csv", "video,caption\na,\n", "line 2: narration is empty"),
        ("c.csv", "video,caption\n../a,b\n", "line 2: video is '../a', a name or a relative path"),
        ("c.csv", "video,caption\na,\"['one', 'two']\"\n", "line 2: caption: is a list as Python prints it"),
        ("c.csv", "video,caption,caption\na,b,c\n", "the column 'caption' is there twice"),
        ("c.csv", "video,caption\n", "holds no clips"),
        ("c.jsonl", '{"video": "a", "caption": "b"}\n{"video": "a"', "line 2: is not JSON"),
        ("c.jsonl", '["a", "b"]\n', "line 1: an object is required, found a list"),
        ("c.jsonl", '{"video": "a", "caption": 3}\n', "caption: a text or a list of texts is required, found '3'"),
        ("c.jsonl", '{"video": "a", "caption": "b", "end": Infinity}\n', "line 1: end: a finite number of seconds"),
        ("c.jsonl", '{"video": true, "caption": "b"}\n', "line 1: video: a text is required, found a bool"),
        ("c.json", '{"video": "a"}', "a list of objects is required, found a dict"),
        ("c.parquet", "no parquet", "is not a Parquet file that can be read"),
    ],
)
def test_mistakes_cost_one_line(tmp_path, name, text, message):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as caught:
        read_narrations([tmp_path / name])
    assert message in str(caught.value) and str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_such_file_and_not_utf8(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_narrations([tmp_path / "c.jsonl"])
    for name in ("c.csv", "c.jsonl"):
        (tmp_path / name).write_bytes(b"video,caption\na,\xff\xfe\n")
        with pytest.raises(UserError, match="UTF-8"):
            read_narrations([tmp_path / name])


def test_parquet_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setattr("avion.data.captions.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        read_narrations([tmp_path / "c.parquet"])


@pytest.mark.parametrize("words", [["caption"], ["caption="], ["text=x"], ["caption=x", "caption=y"], ["given=x"]])
def test_wrong_column_names(words):
    with pytest.raises(UserError, match="--caption-columns"):
        Columns.parse(words)


def test_a_given_column_must_be_there(tmp_path):
    path = write(tmp_path / "c.jsonl", [{"video": "a", "caption": "b"}])
    with pytest.raises(UserError, match="the column 'begin' is missing"):
        read_narrations([path], Columns.parse(["start=begin"]))


def test_some_rows_of_a_table(tmp_path):
    table = read_narrations([write(tmp_path / "c.jsonl", ROWS)])
    part = table.where(np.array([True, False, False, True]))
    assert told(part) == [DUE[0], DUE[3]] and part.videos == ["cats/a", "b"]
    assert len(table.where(np.zeros(4, bool))) == 0
