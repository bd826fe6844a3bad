import numpy as np
import pytest

from avion.errors import UserError
from avion.evaluation.ek100_cls import get_marginal_indexes, get_mean_accuracy, marginalize

# Four actions; no action has verb 1, noun 0 or noun 3.
ACTIONS = {"verb": [0, 2, 2, 0], "noun": [1, 1, 2, 4]}


def test_marginal_indexes_by_hand():
    verbs = get_marginal_indexes(ACTIONS, "verb")
    assert [v.tolist() for v in verbs] == [[0, 3], [], [1, 2]]
    nouns = get_marginal_indexes(ACTIONS, "noun", num_classes=6)
    assert [n.tolist() for n in nouns] == [[], [0, 1], [2], [], [3], []]


def test_a_class_without_actions_scores_zero():
    probs = np.array([[0.5, 0.25, 0.125, 0.125], [0.0, 0.0, 1.0, 0.0]], np.float32)
    verbs = marginalize(probs, get_marginal_indexes(ACTIONS, "verb"))
    assert verbs.tolist() == [[0.625, 0.0, 0.375], [0.0, 0.0, 1.0]]
    assert verbs.dtype == np.float32
    nouns = marginalize(probs, get_marginal_indexes(ACTIONS, "noun", num_classes=6))
    assert nouns.tolist() == [[0, 0.75, 0.125, 0, 0.125, 0], [0, 0, 1, 0, 0, 0]]


def test_probabilities_keep_their_sum(rng):
    actions = {"verb": rng.integers(0, 97, 300), "noun": rng.integers(0, 300, 300)}
    probs = rng.dirichlet(np.ones(300), 20)
    for mode, classes in (("verb", 97), ("noun", 300)):
        scores = marginalize(probs, get_marginal_indexes(actions, mode, num_classes=classes))
        assert scores.shape == (20, classes)
        np.testing.assert_allclose(scores.sum(axis=1), 1, rtol=1e-12)


def test_mean_accuracy_by_hand():
    # Class 0: 3 of 4; class 1: 1 of 2; class 2 has no samples.
    mean, overall = get_mean_accuracy([[3, 1, 0], [0, 1, 1], [0, 0, 0]])
    assert mean == pytest.approx(100 * (0.75 + 0.5 + 0) / 3)
    assert overall == pytest.approx(100 * 4 / 6)


def test_bad_input_is_one_line():
    cases = {
        "no column 'action', found verb, noun": lambda: get_marginal_indexes(ACTIONS, "action"),
        "from 0 to 2, expected 0 to 1": lambda: get_marginal_indexes(ACTIONS, "verb", num_classes=2),
        "from -1 to 3": lambda: get_marginal_indexes({"verb": [-1, 3]}, "verb"),
        "one integer class per action": lambda: get_marginal_indexes({"verb": []}, "verb"),
        "expected a square one": lambda: get_mean_accuracy(np.ones((2, 3))),
        "at least one sample": lambda: get_mean_accuracy(np.zeros((2, 2))),
    }
    for message, call in cases.items():
        with pytest.raises(UserError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
