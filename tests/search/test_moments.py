"""Moments out of scores that are given by hand: merging, suppression, limits, filters."""

import numpy as np
import pytest

from avion.search.moments import find_moments
from tests.search.case import made_up

COUNTS = {"a": 10, "b": 6}


@pytest.fixture
def found(tmp_path, rng):
    """found(scores, count, …): [(video, start, end, score)]; windows of 2 s, one each second, 10 of a and 6 of b."""
    index = made_up(tmp_path, COUNTS, rng.standard_normal((16, 4)))

    def find(scores, count, **more):
        moments = find_moments(index, np.array(scores, dtype=np.float32), count, **more)
        for m in moments:
            assert m.start <= m.peak_start < m.peak_end <= m.end
        return [(m.video, m.start, m.end, round(m.score, 3)) for m in moments]

    return find


def test_neighbours_are_merged_and_each_stretch_is_found_once(found):
    #          0  1  2  3   4   5   6  7  8  9
    a = [0, 0, 0, 0.5, 0.9, 0.6, 0.1, 0, 0, 0.3]
    b = [0, 0.8, 0, 0, 0, 0]
    # The median is 0, so that a neighbour joins from half of the peak on: 3 and 5 to 4, nothing to the others.
    assert found(a + b, 5) == [
        ("a", 3, 7, 0.9),
        ("b", 1, 3, 0.8),
        ("a", 9, 11, 0.3),
        ("a", 0, 2, 0.0),
        ("a", 7, 9, 0.0),
    ]
    assert found(a + b, 1) == [("a", 3, 7, 0.9)]


def test_a_moment_has_a_longest_length_and_grows_to_the_better_side(found):
    a = [0.1, 0.7, 0.8, 0.9, 0.75, 0.6, 0, 0, 0, 0]
    assert found(a + [0] * 6, 1) == [("a", 1, 7, 0.9)]
    assert found(a + [0] * 6, 1, longest=3) == [("a", 2, 5, 0.9)]
    assert found(a + [0] * 6, 1, longest=4) == [("a", 2, 6, 0.9)]
    assert found(a + [0] * 6, 2, longest=2) == [("a", 3, 5, 0.9), ("a", 1, 3, 0.7)]


def test_moments_do_not_leave_their_video(found):
    scores = [0] * 9 + [0.9] + [0.85, 0.8, 0, 0, 0, 0]
    assert found(scores, 2) == [("a", 9, 11, 0.9), ("b", 0, 3, 0.85)]


def test_moments_do_not_overlap(found, rng):
    for _ in range(20):
        moments = found(rng.random(16), 20)
        for i, (video, start, end, _) in enumerate(moments):
            for other, a, b, _ in moments[:i]:
                assert other != video or end <= a or b <= start
        scores = [m[3] for m in moments]
        assert scores == sorted(scores, reverse=True)


def test_only_some_videos(found):
    scores = [0.9] * 10 + [0, 0, 0.5, 0, 0, 0]
    assert found(scores, 1, videos=[1]) == [("b", 2, 4, 0.5)]
    assert {m[0] for m in found(scores, 9, videos=[1])} == {"b"}
