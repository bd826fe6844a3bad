"""Charades-Ego: classes and a split in the form of the released files."""

import csv
import math

import pytest

from avion.data.charades_ego import read_charades_classes, read_charades_ego
from avion.errors import UserError

HEADER = (
    "id,subject,scene,quality,relevance,verified,script,objects,descriptions,actions,length,egocentric,charades_video"
).split(",")
SOME = {
    "c000": "Holding some clothes", "c015": "Holding a phone/camera", "c092": "Holding a blanket",
    "c106": "Drinking from a cup/glass/bottle", "c147": "Someone is going from standing to sitting",
    "c156": "Someone is eating something",
}  # fmt: skip
CLASSES = {f"c{i:03d}": SOME.get(f"c{i:03d}", f"Doing thing number {i}") for i in range(157)}
ROWS = [
    ["00HFPEGO", "SNKE", "Living room", "6", "7", "Yes", 'A person, "tired", sits.\nThen they sleep.', "blanket;sofa",
     "a;b", "c092 11.90 21.20;c147 0.00 12.60;c092 25.00 30.00", "30.46", "Yes", "00HFP"],
    ["0BZAEEGO", "6JE2", "Kitchen", "5", "7", "Yes", "Nothing happens.", "", "x", "", "12.00", "Yes", "0BZAE"],
    ["ZZ9Z9EGO", "PKND", "Bedroom", "", "", "No", "Eats", "sandwich", "", "c156 0.00 33.00", "33.25", "Yes", "ZZ9Z9"],
]  # fmt: skip


def write_classes(path, classes=CLASSES):
    path.write_text("".join(f"{code} {name}\n" for code, name in classes.items()))
    return path


def write_rows(path, rows=ROWS, header=HEADER):
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\r\n").writerows([header, *rows])
    return path


def test_classes_keep_their_order_and_names(tmp_path):
    found = read_charades_classes(write_classes(tmp_path / "c.txt"))
    assert found == CLASSES and list(found) == list(CLASSES) and len(found) == 157


def test_videos_and_their_classes(tmp_path):
    found = read_charades_ego(write_rows(tmp_path / "v.csv"), CLASSES)
    assert [row.video for row in found.videos] == ["00HFPEGO", "0BZAEEGO", "ZZ9Z9EGO"]
    assert all(row.start == 0 and row.end == math.inf for row in found.videos)  # the whole video
    assert found.labels.shape == (3, 157)
    assert [row.nonzero()[0].tolist() for row in found.labels] == [[92, 147], [], [156]]


def test_columns_are_found_by_their_place_where_the_header_has_other_names(tmp_path):
    header = [*HEADER[:9], "acts", "seconds", *HEADER[11:]]
    found = read_charades_ego(write_rows(tmp_path / "v.csv", header=header), CLASSES)
    assert found.labels.sum() == 3


@pytest.mark.parametrize(
    "column, value, what",
    [
        (0, "../x", "id: a name"), (0, "00HFPEGO", "id: each video only once"),
        (9, "c999 1 2", "actions: a class and two times"),
        (9, "c092 1", "actions: a class and two times"), (9, "c092 1 nan", "actions: a number of seconds"),
        (10, "long", "length: a number of seconds"), (10, "-1", "length: a number"), (10, "inf", "length: a number"),
    ],
)  # fmt: skip
def test_damaged_rows_cost_a_line(tmp_path, column, value, what):
    row = list(ROWS[1])
    row[column] = value
    with pytest.raises(UserError, match=f"line 4: {what}"):  # the first row has two lines
        read_charades_ego(write_rows(tmp_path / "v.csv", [ROWS[0], row]), CLASSES)


def test_damaged_files_cost_a_line(tmp_path):
    path = tmp_path / "v.csv"
    for content, what in (
        (b"", "empty"),
        (b"id,a\n", "columns id, actions and length are required"),
        (b"\xff\xfe", "UTF-8"),
        (",".join(HEADER).encode() + b"\n", "no videos"),
        (",".join(HEADER).encode() + b"\na,b\n", "2 fields"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=what):
            read_charades_ego(path, CLASSES)
    for text, what in (("", "empty"), ("c00 X\n", "line 1"), ("c000 X\nc000 Y\n", "line 2: each class only once")):
        path.write_text(text)
        with pytest.raises(UserError, match=what):
            read_charades_classes(path)
    with pytest.raises(UserError, match="no such file"):
        read_charades_classes(tmp_path / "none.txt")
