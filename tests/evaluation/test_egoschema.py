import numpy as np
import pytest

from avion.evaluation.egoschema import accuracy, choose, wilson_interval


def test_the_highest_score_wins_and_of_equal_ones_the_lowest_number():
    scores = [[0.1, 0.5, 0.2, 0.5, 0.5], [0, 0, 0, 0, 0], [-3, -2, -1, -2, -3], [1, 2, 3, 4, 5]]
    assert choose(np.array(scores)).tolist() == [1, 0, 2, 4]


@pytest.mark.parametrize("scores", [np.zeros((3, 4)), np.zeros(5), np.full((1, 5), np.nan)])
def test_scores_of_another_kind(scores):
    with pytest.raises(ValueError, match="choose"):
        choose(scores)


@pytest.mark.parametrize(
    "correct, total, low, high",
    [
        # By the formula, to four digits, with the quantile 1.96: (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n)
        (193, 500, 0.3444, 0.4294),
        (5, 10, 0.2366, 0.7634),
        (1, 3, 0.0615, 0.7923),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson_intervals(correct, total, low, high):
    assert wilson_interval(correct, total) == pytest.approx((low, high), abs=5e-5)


def test_wilson_bounds_solve_their_equation(rng):
    """The bounds are the p at which the measured share is 1.96 standard deviations away."""
    for _ in range(20):
        total = int(rng.integers(2, 1000))
        correct = int(rng.integers(1, total))
        for bound in wilson_interval(correct, total):
            deviation = np.sqrt(bound * (1 - bound) / total)
            assert abs(correct / total - bound) == pytest.approx(1.959963984540054 * deviation, rel=1e-9)


def test_more_right_than_there_are():
    with pytest.raises(ValueError, match="3 of 2"):
        wilson_interval(3, 2)


def test_accuracy():
    figures = accuracy(np.array([0, 1, 2, 3]), np.array([0, 1, 2, 4]))
    assert (figures["accuracy"], figures["correct"], figures["total"]) == (0.75, 3, 4)
    assert (figures["low"], figures["high"]) == wilson_interval(3, 4)
    assert accuracy(np.zeros(0), np.zeros(0))["accuracy"] is None
    with pytest.raises(ValueError, match="one length"):
        accuracy(np.zeros(3), np.zeros(2))
