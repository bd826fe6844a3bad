"""The metrics of the zero-shot benchmarks, by hand and against definitions written as loops."""

import numpy as np
import pytest

from avion.errors import UserError
from avion.evaluation.charades import charades_metrics
from avion.evaluation.egomcq import egomcq_metrics
from avion.evaluation.egtea import best_view_scores, class_metrics

# ---- one class per clip ------------------------------------------------------------------------


def test_accuracies_by_hand():
    scores = np.array([[0.9, 0.1, 0, 0, 0, 0], [0.2, 0.8, 0, 0, 0, 0], [0.6, 0.5, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6]])
    found = class_metrics(scores, [0, 1, 1, 0])
    # Class 0: one of two right; class 1: one of two. The last clip's class is behind five others.
    assert found == {"top1": 0.5, "top5": 0.75, "mean_class": 0.5}
    # Class 0 is right once of three times, class 2 once of once; class 1 does not occur.
    found = class_metrics(np.eye(3)[[0, 1, 2, 2]], [0, 0, 0, 2])
    assert found["mean_class"] == pytest.approx((1 / 3 + 1) / 2) and found["top1"] == 0.5


def test_a_class_that_is_not_there_counts_as_wrong():
    assert class_metrics(np.eye(2), [0, -1]) == {"top1": 0.5, "top5": 0.5, "mean_class": 0.5}


def test_the_best_view_counts():
    classes = np.array([[1.0, 0.0], [0.0, 1.0]])
    clips = np.array([[[3.0, 4.0], [5.0, 0.0]], [[0.0, -2.0], [0.0, 0.0]]], dtype=np.float32)
    found = best_view_scores(clips, classes)
    np.testing.assert_allclose(found, [[1.0, 0.8], [0.0, 0.0]], atol=1e-7)
    rng = np.random.default_rng()
    clips, classes = rng.normal(size=(7, 5, 16)), rng.normal(size=(9, 16))
    classes /= np.linalg.norm(classes, axis=1, keepdims=True)
    for clip, row in zip(clips, best_view_scores(clips, classes), strict=True):
        wanted = [max(v @ c / np.linalg.norm(v) for v in clip) for c in classes]
        np.testing.assert_allclose(row, wanted, rtol=1e-5)


# ---- Charades-Ego ------------------------------------------------------------------------------


def test_mean_average_precision_by_hand():
    scores = np.array([[0.9, 0.1], [0.8, 0.7], [0.7, 0.9], [0.6, 0.3]])
    labels = np.array([[1, 0], [0, 1], [1, 0], [0, 1]], dtype=bool)
    # Class 0: hits at ranks 1 and 3, (1 + 2/3) / 2. Class 1: order 2, 1, 3, 0, hits at ranks 2 and 3, (1/2 + 2/3) / 2.
    found = charades_metrics(scores, labels)
    assert found["map"] == pytest.approx((5 / 6 + 7 / 12) / 2)
    assert found["weighted_map"] == pytest.approx(found["map"])


def test_a_video_without_any_action_ranks_last():
    scores = np.array([[9.0], [1.0], [2.0]])
    assert charades_metrics(scores, np.array([[False], [True], [True]]))["map"] == 1.0


def test_weights_are_the_numbers_of_videos():
    scores = np.array([[3.0, 3.0, 0], [2.0, 2.0, 0], [1.0, 1.0, 0]])
    labels = np.array([[1, 0, 0], [1, 0, 0], [1, 1, 0]], dtype=bool)  # the third class does not occur
    found = charades_metrics(scores, labels)
    assert found["map"] == pytest.approx((1 + 1 / 3) / 2)
    assert found["weighted_map"] == pytest.approx((3 * 1 + 1 * 1 / 3) / 4)


def released_map(scores, labels):
    """The released evaluation, step by step."""
    scores = scores.copy()
    scores[labels.sum(axis=1) == 0] = -np.inf
    averages, weights = [], []
    for c in range(scores.shape[1]):
        positives = labels[:, c].sum()
        if positives == 0:
            continue
        hits, total = 0, 0.0
        for rank, video in enumerate(sorted(range(len(scores)), key=lambda i: -scores[i, c]), 1):
            if labels[video, c]:
                hits += 1
                total += hits / rank
        averages.append(total / positives)
        weights.append(positives)
    return np.mean(averages), np.average(averages, weights=weights)


def test_the_released_evaluation_step_by_step():
    rng = np.random.default_rng()
    scores, labels = rng.normal(size=(60, 20)), rng.random((60, 20)) < 0.08
    labels[:, 3] = False
    found = charades_metrics(scores, labels)
    np.testing.assert_allclose([found["map"], found["weighted_map"]], released_map(scores, labels))


@pytest.mark.parametrize(
    "scores, labels, what",
    [([[np.nan]], [[1]], "not numbers"), ([[1.0]], [[0]], "no video"), ([[1.0]], [1], "both are")],
)
def test_what_has_no_mean_average_precision(scores, labels, what):
    with pytest.raises(UserError, match=what):
        charades_metrics(scores, labels)


# ---- EgoMCQ ------------------------------------------------------------------------------------


def test_accuracies_of_both_types_by_hand():
    scores = np.eye(5)[[0, 1, 2, 3, 4, 4]]
    found = egomcq_metrics(scores, [0, 1, 0, 3, 0, 4], [1, 1, 1, 2, 2, 1])
    assert found == {"intra": 0.75, "inter": 0.5, "intra_questions": 4, "inter_questions": 2}
    assert egomcq_metrics(np.ones((1, 5)), [0], [2]) == {"inter": 1.0, "inter_questions": 1, "intra_questions": 0}


def test_damaged_scores_are_refused():
    with pytest.raises(UserError, match="not numbers"):
        egomcq_metrics(np.full((1, 5), np.nan), [0], [1])
    with pytest.raises(UserError, match="are required"):
        egomcq_metrics(np.ones((2, 5)), [0], [1])
