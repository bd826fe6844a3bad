import pickle

import numpy as np
import pytest

from avion.data.narrations import StringColumn, TableBuilder


def random_rows(n: int, rng: np.random.Generator) -> list[tuple]:
    words = ["#C C picks", "köök", "手", "a 'knife'", "x" * 200]
    rows = []
    for _ in range(n):
        start = float(rng.uniform(0, 3000))
        texts = tuple(str(w) for w in rng.choice(words, rng.integers(1, 4)))
        rows.append((f"video{rng.integers(5)}", start, start + float(rng.uniform(0.1, 9)), texts))
    return rows


def build(rows, ids=None):
    builder = TableBuilder()
    for i, row in enumerate(rows):
        builder.add(*row, narration_id=None if ids is None else ids[i])
    return builder.build()


class TestTable:
    def test_rows_come_back_as_they_went_in(self):
        rows = random_rows(200, np.random.default_rng())
        table = build(rows, ids=[f"P01_{i}" for i in range(200)])
        assert len(table) == 200
        for i, (row, narration) in enumerate(zip(rows, table, strict=True)):
            assert (narration.video, narration.start, narration.end, narration.texts) == row
            assert narration.narration_id == f"P01_{i}"
        assert table[-1] == table[199]

    def test_without_ids_and_out_of_range(self):
        table = build([("v", 0.0, 1.0, "a")])
        assert table[0].narration_id is None and table[0].texts == ("a",)
        for i in (1, -2):
            with pytest.raises(IndexError):
                table[i]

    def test_empty(self):
        table = TableBuilder().build()
        assert len(table) == 0 and list(table) == []

    def test_compact_and_free_of_python_objects(self):
        """A row costs its text plus 36 bytes of columns (and no Python object that workers would touch)."""
        n, text = 5000, "#C C picks up the knife"
        table = build([(f"video{i % 50}", float(i), i + 1.0, text) for i in range(n)])
        assert table.nbytes == n * (len(text) + 4 + 8 + 8 + 8 + 8)
        assert len(pickle.dumps(table)) < table.nbytes + 3000
        assert len(table.videos) == 50 and table.video.dtype == np.int32

    def test_survives_pickling_to_a_worker(self):
        table = build(random_rows(20, np.random.default_rng()))
        assert list(pickle.loads(pickle.dumps(table))) == list(table)


class TestStringColumn:
    def test_texts_of_any_length(self):
        strings = ["", "a", "", "öß手", "b" * 1000]
        column = StringColumn.of(strings)
        assert list(column) == strings and column[-1] == strings[-1] and len(column) == 5
        with pytest.raises(IndexError):
            column[5]


class TestChecks:
    @pytest.mark.parametrize(
        "row, message",
        [
            ((None, 0.0, 1.0, "a"), "video is of type NoneType"),
            (("", 0.0, 1.0, "a"), "video is ''"),
            (("/etc/x", 0.0, 1.0, "a"), "video is '/etc/x'"),
            (("../x", 0.0, 1.0, "a"), "relative path below the video root"),
            (("a/../../x", 0.0, 1.0, "a"), "relative path below the video root"),
            (("a\0b", 0.0, 1.0, "a"), "relative path"),
            (("手" * 100, 0.0, 1.0, "a"), "video is a name of 100 characters"),
            (("v", "0", 1.0, "a"), "start is of type str"),
            (("v", 0.0, 1e9, "a"), "end is 1e.09 seconds, longer than"),
            (("v", True, 1.0, "a"), "start is of type bool"),
            (("v", 0.0, float("nan"), "a"), "end is nan"),
            (("v", float("inf"), 1.0, "a"), "start is inf"),
            (("v", 0, 10**400, "a"), "end is inf"),
            (("v", 0.0, 1.0, None), "narration is of type NoneType"),
            (("v", 0.0, 1.0, b"a"), "narration is of type bytes"),
            (("v", 0.0, 1.0, ["a", 3]), "narration holds a int"),
            (("v", 0.0, 1.0, "  \n"), "narration is empty"),
            (("v", 0.0, 1.0, ["", " "]), "narration is empty"),
            (("v", 0.0, 1.0, []), "narration is empty"),
            (("v", 0.0, 1.0, "\ud800"), "not valid Unicode"),
        ],
        ids=repr,
    )
    def test_bad_fields(self, row, message):
        builder = TableBuilder()
        with pytest.raises(ValueError, match=message):
            builder.add(*row)
        builder.add("v", 0.0, 1.0, "fine")  # nothing of the bad row is left behind
        (narration,) = builder.build()
        assert (narration.video, narration.texts) == ("v", ("fine",))

    def test_what_is_odd_is_mended_and_counted(self):
        builder = TableBuilder()
        builder.add("v", -2.0, 1.0, "a")
        builder.add("v", 5.0, 4.0, ["b ", "", "c"])
        builder.add("v", 6.0, 6.0, "d")
        builder.add("v", np.float32(1.5), np.int64(3), "e")
        assert builder.report() == "1 x start before 0, 2 x end not after its start, 1 x empty wording"
        assert [(n.start, n.end, n.texts) for n in builder.build()] == [
            (0.0, 1.0, ("a",)),
            (5.0, 5.0, ("b", "c")),
            (6.0, 6.0, ("d",)),
            (1.5, 3.0, ("e",)),
        ]
        assert TableBuilder().report() == ""


def table(rows):
    builder = TableBuilder()
    for row in rows:
        builder.add(*row)
    return builder.build()


ROWS = [("a", 0.0, 1.0, "C opens"), ("b", 1.0, 2.0, ["C closes", "C shuts"]), ("a", 2.0, None, "C waits")]


def test_the_fingerprint_is_that_of_the_clips():
    assert table(ROWS).fingerprint() == table(ROWS).fingerprint()
    renamed = {"a": "x", "b": "y"}
    others = [
        ROWS[:2],
        ROWS[::-1],
        [(renamed[v], *rest) for v, *rest in ROWS],
        [*ROWS[:2], ("b", *ROWS[2][1:])],
        [("a", 0.5, 1.0, "C opens"), *ROWS[1:]],
        [*ROWS[:2], ("a", 2.0, 3.0, "C waits")],
        [("a", 0.0, 1.0, "C open"), *ROWS[1:]],
        [ROWS[0], ("b", 1.0, 2.0, "C closesC shuts"), ROWS[2]],
        [ROWS[0], ("b", 1.0, 2.0, ["C close", "sC shuts"]), ROWS[2]],
        [(*row, str(i)) for i, row in enumerate(ROWS)],
        [(*row, str(i + 1)) for i, row in enumerate(ROWS)],
    ]
    marks = [table(rows).fingerprint() for rows in [ROWS, *others]]
    assert len(set(marks)) == len(marks)
