"""Recall and ranks by hand, and against a slow count."""

import numpy as np
import pytest

from avion.errors import UserError
from avion.evaluation.recall import recall_metrics, text_ranks, video_ranks

# Three videos; texts 0 and 1 are of video 0, text 2 of video 1, texts 3 and 4 of video 2.
VIDEO_OF = np.array([0, 0, 1, 2, 2])
SIMILARITY = np.array(
    [
        [0.1, 0.6, 0.9, 0.7, 0.2],
        [0.3, 0.5, 0.4, 0.1, 0.0],
        [0.2, 0.8, 0.3, 0.9, 0.1],
    ]
)


def test_ranks_by_hand():
    # Video 0: its best text has 0.6, behind 0.9 and 0.7 of others. Video 1: 0.4 behind 0.5. Video 2: first.
    assert video_ranks(SIMILARITY, VIDEO_OF).tolist() == [3, 2, 1]
    # Text 0: 0.1 of video 0, behind 0.3 and 0.2. Text 1: 0.6 behind 0.8. Text 2: 0.4 behind 0.9. Text 3: first.
    # Text 4: 0.1 behind 0.2.
    assert text_ranks(SIMILARITY, VIDEO_OF).tolist() == [3, 2, 2, 1, 2]


def test_metrics_by_hand():
    found = recall_metrics(SIMILARITY, VIDEO_OF)
    assert found["vis_r1"] == pytest.approx(1 / 3) and found["txt_r1"] == pytest.approx(1 / 5)
    assert found["vis_r5"] == found["vis_r10"] == found["txt_r5"] == found["txt_r10"] == 1.0
    assert (found["vis_median_rank"], found["vis_mean_rank"]) == (2.0, 2.0)
    assert (found["txt_median_rank"], found["txt_mean_rank"]) == (2.0, 2.0)
    assert found["avg_recall"] == pytest.approx((1 / 3 + 1 / 5 + 4) / 6)


def test_a_perfect_model_and_one_that_tells_nothing_apart():
    assert recall_metrics(np.eye(20), np.arange(20))["avg_recall"] == 1.0
    found = recall_metrics(np.zeros((20, 20)), np.arange(20))
    assert (found["avg_recall"], found["txt_mean_rank"], found["vis_median_rank"]) == (0.0, 20.0, 20.0)


def test_own_texts_do_not_stand_in_each_others_way():
    similarity = np.array([[0.9, 0.9, 0.1], [0.0, 0.0, 0.5]])
    assert video_ranks(similarity, np.array([0, 0, 1])).tolist() == [1, 1]


def test_against_a_slow_count():
    rng = np.random.default_rng()
    videos, texts = 1100, 2300  # more than a block
    video_of = np.concatenate([np.arange(videos), rng.integers(0, videos, texts - videos)])
    rng.shuffle(video_of)
    similarity = rng.integers(0, 200, (videos, texts)) / 200  # with ties
    columns = rng.choice(texts, 50, replace=False)
    slow = [
        1 + sum(similarity[v, t] >= similarity[video_of[t], t] for v in range(videos) if v != video_of[t])
        for t in columns
    ]
    assert text_ranks(similarity, video_of)[columns].tolist() == slow
    rows = rng.choice(videos, 50, replace=False)
    slow = []
    for v in rows:
        best = max(similarity[v, t] for t in range(texts) if video_of[t] == v)
        slow.append(1 + sum(similarity[v, t] >= best for t in range(texts) if video_of[t] != v))
    assert video_ranks(similarity, video_of)[rows].tolist() == slow


def test_nan_is_told():
    with pytest.raises(UserError, match="NaN"):
        recall_metrics(np.array([[np.nan, 1.0], [0.0, 1.0]]), np.arange(2))
