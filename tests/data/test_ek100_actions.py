from pathlib import Path

import pytest

from avion.data.ek100_actions import (
    action_list,
    action_numbers,
    participants,
    read_ek100_actions,
    read_participants,
    read_tail_classes,
    split_actions,
)
from avion.errors import UserError

HEADER = (
    "narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,start_frame,stop_frame,"
    "narration,verb,verb_class,noun,noun_class,all_nouns,all_noun_classes"
)
ROWS = [
    "P01_11_0,P01,P01_11,00:00:00.5,00:00:00.00,00:00:01.89,1,113,take plate,take,0,plate,2,['plate'],[2]",
    "P01_11_1,P01,P01_11,00:00:00.5,00:00:02.00,00:00:03.50,1,113,put pan,put,12,pan,1,['pan'],[1]",
    "P37_02_0,P37,P37_02,00:00:00.5,00:00:02.00,00:00:03.50,1,113,put tray,put,12,tray,10,['tray'],[10]",
    "P37_02_1,P37,P37_02,00:00:00.5,00:00:04.00,00:00:05.50,1,113,take plate,take,0,plate,2,['plate'],[2]",
]
TEST_HEADER = (
    "narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,start_frame,stop_frame"
)
REAL = Path(__file__).resolve().parents[2].parent / "shared" / "ek100" / "EPIC_100_validation.csv"


@pytest.fixture
def write(tmp_path):
    def write(*lines, name="EPIC_100_validation.csv"):
        (tmp_path / name).write_text("".join(line + "\n" for line in lines))
        return tmp_path / name

    return write


class TestReader:
    def test_rows(self, write):
        table = read_ek100_actions(write(HEADER, *ROWS))
        assert table.verb_class.tolist() == [0, 12, 12, 0] and table.noun_class.tolist() == [2, 1, 10, 2]
        assert [row.narration_id for row in table] == ["P01_11_0", "P01_11_1", "P37_02_0", "P37_02_1"]
        assert table[2].video == "P37/P37_02" and (table[0].start, table[0].end) == (0.0, 1.89)
        assert table[0].texts == ("take plate",) and participants(table) == ["P01", "P01", "P37", "P37"]

    def test_the_unlabelled_test_split(self, write):
        row = "P01_11_0,P01,P01_11,00:00:00.5,00:00:00.00,00:00:01.89,1,113"
        table = read_ek100_actions(write(TEST_HEADER, row))
        assert table.verb_class is None and table.noun_class is None and table[0].texts == ("P01_11_0",)

    @pytest.mark.parametrize(
        "row, message",
        [
            (ROWS[1].replace(",12,", ",97,"), "line 3: verb_class: class 97 does not exist, they run from 0 to 96"),
            (ROWS[1].replace(",pan,1,", ",pan,300,"), "line 3: noun_class: class 300 does not exist"),
            (ROWS[1].replace(",12,", ",-1,"), "line 3: verb_class: '-1' is not a class number"),
            (ROWS[1].replace("P01_11_1,", "P01_11_0,"), "line 3: narration_id: 'P01_11_0' stands in line 2 already"),
            (ROWS[1].replace("P01_11_1,", ","), "line 3: narration_id: is empty"),
            (ROWS[1].replace("00:00:03.50", "late"), "line 3: stop_timestamp"),
            (ROWS[1].replace("P01,P01_11", "..,P01_11"), "line 3: clip: video"),
        ],
    )
    def test_bad_rows(self, write, row, message):
        path = write(HEADER, ROWS[0], row)
        with pytest.raises(UserError, match=message) as error:
            read_ek100_actions(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)

    def test_bad_columns(self, write):
        with pytest.raises(UserError, match="'stop_timestamp' is missing"):
            read_ek100_actions(write(HEADER.replace("stop_timestamp", "stop"), *ROWS))
        with pytest.raises(UserError, match="'noun_class' is missing, though 'verb_class' is there"):
            read_ek100_actions(write(HEADER.replace("noun_class,", "n,", 1), *ROWS))
        with pytest.raises(UserError, match="no clips"):
            read_ek100_actions(write(HEADER))


class TestActions:
    def test_sorted_as_strings_over_all_tables(self, write):
        first, second = (
            read_ek100_actions(write(HEADER, *rows, name=f"{i}.csv")) for i, rows in enumerate((ROWS[:2], ROWS[1:]))
        )
        actions = action_list(first, second)
        assert actions == ("0:2", "12:1", "12:10")
        assert action_list(second, first) == actions
        assert [v.tolist() for v in split_actions(actions, "here")] == [[0, 12, 12], [2, 1, 10]]
        assert action_numbers(actions, second).tolist() == [1, 2, 0]
        assert action_numbers(("12:1", "0:3"), second).tolist() == [0, -1, -1]

    def test_strings_sort_before_numbers(self, write):
        row = ROWS[1].replace(",12,", ",2,")
        assert action_list(read_ek100_actions(write(HEADER, row, ROWS[2]))) == ("12:10", "2:1")

    @pytest.mark.parametrize(
        "actions", [[], ["0:1", "0:1"], ["97:0"], ["0:300"], ["0-1"], [3], ["01:1"], ["0:1\n"], ["٣:1"]]
    )
    def test_bad_lists(self, actions):
        with pytest.raises(UserError, match="checkpoint.pt"):
            split_actions(actions, "checkpoint.pt")


class TestSubsets:
    def test_tail_classes(self, write):
        assert read_tail_classes(write("verb", "12", "0", name="verbs.csv"), "verb").tolist() == [0, 12]
        assert read_tail_classes(write("noun,key", "299,x", "7,y", name="nouns.csv"), "noun").tolist() == [7, 299]
        assert read_tail_classes(write("number", "4", name="one.csv"), "noun").tolist() == [4]

    @pytest.mark.parametrize(
        "lines, message",
        [
            (["verb", "12", "97"], "line 3: verb: class 97 does not exist"),
            (["verb", "take"], "line 2: verb: 'take' is not a class number"),
            (["verb", "3", "3"], "line 3: verb: class 3 stands there twice"),
            (["key,instances", "take,1"], "'verb' is missing; found key, instances"),
            (["verb"], "holds no rows"),
        ],
    )
    def test_bad_tail_lists(self, write, lines, message):
        with pytest.raises(UserError, match=message):
            read_tail_classes(write(*lines, name="EPIC_100_tail_verbs.csv"), "verb")

    def test_participants(self, write):
        table = read_ek100_actions(write(HEADER, *ROWS))
        listed = write("participant_id", "P37", name="unseen.csv")
        assert read_participants(listed, table).tolist() == [False, False, True, True]
        with pytest.raises(UserError, match="'P99' has no clip in the evaluation data"):
            read_participants(write("participant_id", "P37", "P99", name="unseen.csv"), table)


@pytest.mark.skipif(not REAL.is_file(), reason="the real annotations are not here")
def test_the_real_validation_split():
    table = read_ek100_actions(REAL)
    actions = action_list(table)
    assert len(table) == 9668 and len(set(participants(table))) > 10
    assert len(actions) == len(set(zip(table.verb_class.tolist(), table.noun_class.tolist(), strict=True)))
    assert (action_numbers(actions, table) >= 0).all() and list(actions) == sorted(actions)
