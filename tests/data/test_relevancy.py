import pickle
from fractions import Fraction

import numpy as np
import pytest

from avion.data.ek100 import load_relevancy, read_ek100_retrieval
from avion.data.relevancy import (
    Classes,
    clip_classes,
    differences,
    relevancy_blocks,
    sentence_classes,
    write_relevancy,
)
from avion.errors import UserError


def by_hand(clips: Classes, sentences: Classes) -> np.ndarray:
    def cell(i, j):
        a, b = set(clips.nouns[i]), set(sentences.nouns[j])
        share = Fraction(len(a & b), len(a | b)) if a | b else 0
        return float(Fraction(int(clips.verbs[i] == sentences.verbs[j]), 2) + share / 2)

    return np.array([[cell(i, j) for j in range(len(sentences))] for i in range(len(clips))])


def draw(rng, count, verbs=5, nouns=12):
    sets = [tuple(rng.integers(nouns, size=rng.integers(1, 5)).tolist()) for _ in range(count)]
    return Classes(rng.integers(verbs, size=count), sets)


def matrix(clips, sentences):
    return np.concatenate(list(relevancy_blocks(clips, sentences)))


def test_known_cells():
    clips = Classes(np.array([0, 1, 7]), [(2,), (2, 3), (900000, 2)])
    sentences = Classes(np.array([0, 1]), [(2, 3, 4), (3, 3, 2)])  # a class that is there twice counts once
    expected = [[0.5 + 0.5 / 3, 0.25], [0.5 * 2 / 3, 1.0], [0.125, 0.5 / 3]]
    result = matrix(clips, sentences)
    assert result.dtype == np.float64
    np.testing.assert_allclose(result, expected, rtol=1e-15)


def test_no_nouns_have_nothing_in_common():
    empty = Classes(np.array([0, 1]), [(), (3,)])
    np.testing.assert_array_equal(matrix(empty, empty), [[0.5, 0.0], [0.0, 1.0]])


def test_random_classes_in_blocks(rng, monkeypatch):
    monkeypatch.setattr("avion.data.relevancy.BLOCK_ELEMENTS", 130)
    clips, sentences = draw(rng, 61), draw(rng, 40)
    assert [len(block) for block in relevancy_blocks(clips, sentences)] == [3] * 20 + [1]
    np.testing.assert_allclose(matrix(clips, sentences), by_hand(clips, sentences), rtol=1e-15)


class TestSentences:
    HEADER = "narration_id,participant_id,video_id,start_timestamp,stop_timestamp,narration,verb_class,all_noun_classes"

    @pytest.fixture
    def read(self, tmp_path):
        def read(*ids, header=self.HEADER):
            rows = [f'{name},P01,P01_1,00:00:01,00:00:02,cut,{k},"[{k}, 9]"' for k, name in enumerate(ids)]
            (tmp_path / "clips.csv").write_text("\n".join([header, *rows]) + "\n")
            return read_ek100_retrieval(tmp_path / "clips.csv")

        return read

    def test_they_have_the_classes_of_their_clips(self, read):
        table = read("a", "b", "c")
        classes = sentence_classes(table, clip_classes(table, "clips.csv"), ["c", "a"], "clips.csv", "s.csv")
        assert classes.verbs.tolist() == [2, 0] and classes.nouns == [(2, 9), (0, 9)]

    def test_a_sentence_without_its_clip(self, read):
        table = read("a", "b")
        with pytest.raises(UserError, match=r"s.csv: 4 of 5 .* not in clips.csv \(w, x, y, \.\.\.\)"):
            sentence_classes(table, clip_classes(table, ""), ["a", "w", "x", "y", "z"], "clips.csv", "s.csv")

    def test_an_id_that_two_clips_have(self, read):
        table = read("a", "b", "a")
        with pytest.raises(UserError, match="clips.csv: narration_id 'a' is there twice"):
            sentence_classes(table, clip_classes(table, ""), ["b"], "clips.csv", "s.csv")

    @pytest.mark.parametrize("column", ["verb_class", "all_noun_classes"])
    def test_a_missing_column(self, read, column):
        table = read("a", header=self.HEADER.replace(column, "x"))
        with pytest.raises(UserError, match=f"clips.csv: the column '{column}' is missing"):
            clip_classes(table, "clips.csv")


class TestFile:
    def test_it_is_the_pickle_of_the_array(self, rng, tmp_path):
        array = rng.random((7, 5))
        write_relevancy(tmp_path / "r.pkl", iter([array[:3], array[3:4].astype(">f8"), array[4:]]), (7, 5))
        loaded = pickle.loads((tmp_path / "r.pkl").read_bytes())
        assert type(loaded) is np.ndarray and loaded.dtype == np.float64 and loaded.flags.c_contiguous
        np.testing.assert_array_equal(loaded, array)
        np.testing.assert_array_equal(load_relevancy(tmp_path / "r.pkl", 7, 5), array.astype(np.float32))
        # Again from what was loaded, by pickle itself.
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(loaded)), array)

    @pytest.mark.parametrize("shape", [(1, 1), (300, 70), (70000, 1)])
    def test_shapes(self, rng, tmp_path, shape):
        array = rng.random(shape)
        write_relevancy(tmp_path / "r.pkl", iter([array]), shape)
        np.testing.assert_array_equal(pickle.loads((tmp_path / "r.pkl").read_bytes()), array)

    def test_a_failed_write_leaves_the_old_file_and_no_partial_one(self, tmp_path):
        (tmp_path / "r.pkl").write_bytes(b"old")

        def blocks():
            yield np.zeros((1, 2))
            raise OSError(28, "No space left on device")

        with pytest.raises(UserError, match=r"r.pkl: cannot be written \(No space left on device\)"):
            write_relevancy(tmp_path / "r.pkl", blocks(), (2, 2))
        assert (tmp_path / "r.pkl").read_bytes() == b"old"
        assert [p.name for p in tmp_path.iterdir()] == ["r.pkl"]


def test_differences_are_counted_and_the_first_named(rng):
    clips, sentences = draw(rng, 9), draw(rng, 6)
    exact = by_hand(clips, sentences)
    found = exact.astype(np.float32)
    assert differences(found, relevancy_blocks(clips, sentences), 1e-4, 3) == (0, [])
    cells = [(0, 5), (4, 1), (4, 2), (8, 0)]
    for cell in cells:
        found[cell] += 0.3
    count, first = differences(found, iter(np.split(exact, [2, 5])), 1e-4, 3)
    assert count == 4 and first == [(r, c, exact[r, c]) for r, c in cells[:3]]
