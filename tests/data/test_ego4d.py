import logging
import os
import pickle

import pytest

from avion.data.ego4d import read_ego4d
from avion.errors import UserError

PLAIN = [("uid-1", 0.5, 2.5, "#C C picks up a knife"), ("uid-2", 10, 12.25, "#C C cuts")]
REPHRASED = [("uid-1", 3.0, 5.0, ["#C C takes a knife", "#C C grabs a knife"])]
NARRATED = [("uid-3", 1.0, 2.0, ["#C C washes", "#O a man X talks"], [0.7, 1.9])]


@pytest.fixture
def write(tmp_path):
    def write(rows, name="train.pkl"):
        (tmp_path / name).write_bytes(pickle.dumps(rows))
        return tmp_path / name

    return write


def test_the_three_kinds_one_after_the_other(write):
    table = read_ego4d(write(PLAIN), write(REPHRASED, "rephraser.pkl"), write(NARRATED, "narrator.pkl"))
    rows = [(n.video, n.start, n.end, n.texts) for n in table]
    assert rows == [
        ("uid-1", 0.5, 2.5, ("#C C picks up a knife",)),
        ("uid-2", 10.0, 12.25, ("#C C cuts",)),
        ("uid-1", 3.0, 5.0, ("#C C takes a knife", "#C C grabs a knife")),
        ("uid-3", 1.0, 2.0, ("#C C washes", "#O a man X talks")),
    ]
    assert table.videos == ["uid-1", "uid-2", "uid-3"] and table[0].narration_id is None


@pytest.mark.parametrize(
    "row, message",
    [
        (("uid", 0.0, 1.0), "found 3 fields"),
        (("uid", 0.0, 1.0, ["a"], [0.1], 2), "found 6 fields"),
        ("uid", "found str"),
        ({"video": "uid"}, "found dict"),
        (("uid", 0.0, float("nan"), "a"), "end is nan"),
        (("uid", "x", 1.0, "a"), "start is of type str"),
        ((7, 0.0, 1.0, "a"), "video is of type int"),
        (("uid", 0.0, 1.0, ""), "narration is empty"),
    ],
    ids=repr,
)
def test_a_bad_row_is_named(write, row, message):
    path = write([*PLAIN, row])
    with pytest.raises(UserError) as caught:
        read_ego4d(path)
    text = str(caught.value)
    assert str(path) in text and "row 2" in text and message in text and "\n" not in text


def test_bad_files(write, tmp_path):
    with pytest.raises(UserError, match="holds no clips"):
        read_ego4d(write([]))
    with pytest.raises(UserError, match="a list of rows is required, the pickle holds a dict"):
        read_ego4d(write({"a": 1}))
    with pytest.raises(UserError, match="no such file"):
        read_ego4d(tmp_path / "gone.pkl")
    with pytest.raises(UserError, match="aux.pkl: row 0"):
        read_ego4d(write(PLAIN), write([("uid", 0.0, 1.0, 5)], "aux.pkl"))
    path = write(PLAIN)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="cut"):
        read_ego4d(path)


def test_code_in_the_pickle_does_not_run(write, tmp_path):
    class Runs:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'was_here'}",)

    with pytest.raises(UserError, match="not plain data"):
        read_ego4d(write([("uid", 0.0, 1.0, Runs())]))
    assert not (tmp_path / "was_here").exists()


def test_known_oddities_are_mended_and_reported_once(write, caplog):
    with caplog.at_level(logging.WARNING):
        table = read_ego4d(write([("u", 5.0, 5.0, "a"), ("u", 4.0, 3.0, "b"), *PLAIN]))
    assert [(n.start, n.end) for n in table][:2] == [(5.0, 5.0), (4.0, 4.0)]
    (record,) = caplog.records
    assert "mended of 4: 2 x end not after its start" in record.getMessage()
