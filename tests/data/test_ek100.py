import logging
import pickle

import numpy as np
import pytest

from avion.data.ek100 import (
    check_ids_differ,
    load_relevancy,
    parse_timestamp,
    read_ek100_retrieval,
    read_sentences,
    sentence_path,
    sentence_texts,
)
from avion.errors import UserError

HEADER = (
    "narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,start_frame,stop_frame,"
    "narration,verb,verb_class,noun,noun_class,all_nouns,all_noun_classes"
)
ROWS = [
    'P01_11_0,P01,P01_11,00:00:00.560,00:00:00.00,00:00:01.89,1,113,take plate,take,0,plate,2,[\'plate\'],[2]',
    "P02_03_7,P02,P02_03,01:02:03.50,01:02:03.04,01:02:04.5,1,9,\"put knife, then fork\",put,1,knife,4,"
    "\"['knife', 'fork']\",\"[4, 5]\"",
]  # fmt: skip


@pytest.fixture
def write(tmp_path):
    def write(*lines, name="EPIC_100_retrieval_test.csv", encoding="utf-8"):
        (tmp_path / name).write_text("".join(line + "\n" for line in lines), encoding=encoding)
        return tmp_path / name

    return write


class TestTimestamps:
    @pytest.mark.parametrize(
        "text, seconds",
        [
            ("00:00:00.00", 0.0),
            ("00:00:01.89", 1.89),
            ("01:02:03.5", 3723.5),
            ("10:59:59", 39599.0),
            ("0:1:2.25", 62.25),
        ],
    )
    def test_by_hand(self, text, seconds):
        assert parse_timestamp(text) == pytest.approx(seconds, abs=1e-9)

    @pytest.mark.parametrize("text", ["", "12.5", "00:00", "00:60:00", "00:00:61", "-1:00:00", "aa:bb:cc", "00:00:nan"])
    def test_malformed(self, text):
        with pytest.raises(ValueError, match="not a timestamp"):
            parse_timestamp(text)


class TestClips:
    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
    def test_rows(self, write, encoding):
        table = read_ek100_retrieval(write(HEADER, *ROWS, encoding=encoding))
        first, second = table
        assert (first.video, first.texts, first.narration_id) == ("P01/P01_11", ("take plate",), "P01_11_0")
        assert (first.start, first.end) == (0.0, 1.89)
        assert second.texts == ("put knife, then fork",) and second.start == pytest.approx(3723.04)
        assert table.verb_class.tolist() == [0, 1] and table.noun_class.tolist() == [2, 4]
        assert table.all_noun_classes == [(2,), (4, 5)]

    def test_class_columns_are_optional(self, write):
        columns = ["narration_id", "participant_id", "video_id", "start_timestamp", "stop_timestamp", "narration"]
        table = read_ek100_retrieval(write(",".join(columns), "P01_1_0,P01,P01_1,00:00:01,00:00:02,cut"))
        assert len(table) == 1 and table.verb_class is None and table.all_noun_classes is None

    @pytest.mark.parametrize("column", ["narration_id", "video_id", "start_timestamp", "narration", "participant_id"])
    def test_a_missing_column_is_named(self, write, column):
        path = write(HEADER.replace(column + ",", "x,", 1), *ROWS)
        with pytest.raises(UserError, match=f"{path}: the column '{column}' is missing; found .*x"):
            read_ek100_retrieval(path)

    @pytest.mark.parametrize(
        "old, new, message",
        [
            ("00:00:01.89", "1.89", "line 2: stop_timestamp: '1.89' is not a timestamp"),
            ("00:00:00.00", "", "line 2: start_timestamp: '' is not a timestamp"),
            ("take plate,", ",", "line 2: clip: narration is empty"),
            (",0,plate", ",take,plate", "line 2: verb_class: 'take' is not a class number"),
            (",0,plate", ",1234567,plate", "line 2: verb_class: '1234567' is not a class number"),
            ("[2]", "[99999999999999999999]", "line 2: all_noun_classes: '[99999999999999999999]' is not a list"),
            ("[2]", "2;3", "line 2: all_noun_classes: '2;3' is not a list"),
            ("P01_11,", "../x,", "line 2: clip: video is 'P01/../x'"),
            (",[2]", "", "line 2: does not have the header's 15 fields"),
            ("[2]", "[2],9", "line 2: does not have the header's 15 fields"),
        ],
    )
    def test_a_malformed_field_is_named(self, write, old, new, message):
        assert old in ROWS[0]
        path = write(HEADER, ROWS[0].replace(old, new, 1), ROWS[1])
        with pytest.raises(UserError) as caught:
            read_ek100_retrieval(path)
        assert str(path) in str(caught.value) and message in str(caught.value) and "\n" not in str(caught.value)

    def test_bad_files(self, write, tmp_path):
        with pytest.raises(UserError, match="the file is empty"):
            read_ek100_retrieval(write())
        with pytest.raises(UserError, match="holds no clips"):
            read_ek100_retrieval(write(HEADER))
        with pytest.raises(UserError, match="no such file"):
            read_ek100_retrieval(tmp_path / "gone.csv")
        with pytest.raises(UserError, match="cannot be read"):
            read_ek100_retrieval(tmp_path)
        (tmp_path / "binary.csv").write_bytes(HEADER.encode() + b"\n\xff\xfe\x00")
        with pytest.raises(UserError, match="is not a CSV in UTF-8"):
            read_ek100_retrieval(tmp_path / "binary.csv")

    def test_a_backward_clip_is_mended_and_reported(self, write, caplog):
        path = write(HEADER, ROWS[0].replace("00:00:00.00", "00:00:05.00"))
        with caplog.at_level(logging.WARNING):
            table = read_ek100_retrieval(path)
        assert (table[0].start, table[0].end) == (5.0, 5.0)
        assert "1 x end not after its start" in caplog.text


class TestSentences:
    def test_in_order(self, write):
        path = write("narration_id,narration", "P01_11_0,take plate", 'P01_11_1,"put plate, down"')
        assert read_sentences(path) == (["P01_11_0", "P01_11_1"], ["take plate", "put plate, down"])

    def test_bad_files(self, write):
        with pytest.raises(UserError, match="the column 'narration' is missing"):
            read_sentences(write("narration_id,text", "a,b"))
        with pytest.raises(UserError, match="holds no sentences"):
            read_sentences(write("narration_id,narration"))
        with pytest.raises(UserError, match="line 3: narration: is empty"):
            read_sentences(write("narration_id,narration", "a,b", "c, "))

    def test_texts_are_those_of_the_clips_of_the_same_id(self, write, caplog):
        """As the published figures are computed; the released list says otherwise in six rows."""
        clips = read_ek100_retrieval(write(HEADER, *ROWS))
        path = write(
            "narration_id,narration", "P02_03_7,take plate", "P01_11_0,take plate", "P09_9_9,cut", name="s.csv"
        )
        with caplog.at_level(logging.INFO):
            assert sentence_texts(clips, path) == ["put knife, then fork", "take plate", "cut"]
        assert "1 of 3 read otherwise" in caplog.text

    def test_where_they_lie(self):
        path = sentence_path("some/retrieval_annotations/EPIC_100_retrieval_test.csv")
        assert str(path) == "some/retrieval_annotations/EPIC_100_retrieval_test_sentence.csv"


class TestRelevancy:
    @pytest.fixture
    def save(self, tmp_path):
        def save(value):
            (tmp_path / "relevancy.pkl").write_bytes(pickle.dumps(value))
            return tmp_path / "relevancy.pkl"

        return save

    @pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, np.int64])
    def test_any_number_becomes_float32(self, save, dtype):
        matrix = np.random.default_rng().integers(0, 2, (5, 7)).astype(dtype)
        loaded = load_relevancy(save(matrix), 5, 7)
        assert loaded.dtype == np.float32 and loaded.flags.c_contiguous
        np.testing.assert_array_equal(loaded, matrix)

    def test_one_sentence_too_many_is_cut_off_with_a_warning(self, save, caplog):
        matrix = np.random.default_rng().random((5, 8))
        loaded = load_relevancy(save(matrix), 5, 7)
        np.testing.assert_array_equal(loaded, matrix[:, :7].astype(np.float32))
        assert "one sentence more" in caplog.text

    @pytest.mark.parametrize("shape", [(5, 6), (5, 9), (4, 7), (6, 7), (7, 5)])
    def test_another_shape_is_an_error(self, save, shape):
        with pytest.raises(UserError, match=f"its shape is {shape[0]} x {shape[1]}, .* 5 clips and 7 sentences"):
            load_relevancy(save(np.zeros(shape)), 5, 7)

    @pytest.mark.parametrize(
        "value, message",
        [
            (np.full((5, 7), np.nan), "values outside 0 to 1"),
            (np.full((5, 7), 1.5), "values outside 0 to 1"),
            (np.full((5, 7), -0.1), "values outside 0 to 1"),
            (np.zeros((5, 7, 1)), "a numeric matrix .* found shape"),
            (np.full((5, 7), "a"), "a numeric matrix"),
            ([[0.0] * 7] * 5, "a numeric matrix .* found list"),
        ],
        ids=["nan", "large", "negative", "cube", "texts", "list"],
    )
    def test_other_contents_are_errors(self, save, value, message):
        with pytest.raises(UserError, match=message):
            load_relevancy(save(value), 5, 7)

    def test_a_missing_file(self, tmp_path):
        with pytest.raises(UserError, match="relevancy .*no such file"):
            load_relevancy(tmp_path / "gone.pkl", 5, 7)


class TestRepeats:
    def test_a_column_that_is_there_twice(self, tmp_path):
        path = tmp_path / "clips.csv"
        header = "narration_id,participant_id,video_id,start_timestamp,stop_timestamp,narration,narration"
        path.write_text(f"{header}\na,P01,P01_01,00:00:01.00,00:00:02.00,wash pan,dry pan\n")
        with pytest.raises(UserError, match="clips.csv: the column 'narration' is there twice"):
            read_ek100_retrieval(path)

    def test_ids_of_sentences(self, tmp_path):
        path = tmp_path / "sentences.csv"
        path.write_text("narration_id,narration\na,wash pan\nb,dry pan\na,cut onion\n")
        with pytest.raises(UserError, match="sentences.csv: narration_id 'a' is there twice"):
            read_sentences(path)

    def test_ids_of_clips(self):
        check_ids_differ(["a", "b"], "x.csv")
        with pytest.raises(UserError, match="x.csv: narration_id 'b' is there twice"):
            check_ids_differ(["a", "b", "b"], "x.csv")
