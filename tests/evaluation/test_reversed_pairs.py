import numpy as np
import pytest

from avion.errors import UserError
from avion.evaluation.reversed_pairs import pair_accuracy

EAST, NORTH = (1.0, 0.0), (0.0, 1.0)


def test_by_hand():
    # Right, wrong, tied between the two texts: (1 + 0 + 1/2) / 3.
    video = [(3.0, 0.1), (0.1, 3.0), (1.0, 1.0)]
    assert pair_accuracy(video, [EAST] * 3, [NORTH] * 3) == {"pair_acc": 0.5, "n": 3}
    assert pair_accuracy(video[:1], [EAST], [NORTH]) == {"pair_acc": 1.0, "n": 1}
    assert pair_accuracy(video[1:], [EAST] * 2, [NORTH] * 2) == {"pair_acc": 0.25, "n": 2}


def test_a_model_blind_to_time_gets_exactly_one_half(rng):
    clips, put, take = (rng.normal(size=(50, 8)) for _ in range(3))
    figures = pair_accuracy(np.concatenate([clips, clips]), np.concatenate([put, take]), np.concatenate([take, put]))
    assert figures == {"pair_acc": 0.5, "n": 100}


def test_lengths_do_not_count_only_directions(rng):
    video, own, other = (rng.normal(size=(40, 8)) for _ in range(3))
    scale = rng.uniform(0.1, 100, (3, 40, 1))
    expected = pair_accuracy(video, own, other)
    assert 0 < expected["pair_acc"] < 1
    assert pair_accuracy(video * scale[0], own * scale[1], other * scale[2]) == expected
    swapped = pair_accuracy(video, other, own)
    assert swapped["pair_acc"] == pytest.approx(1 - expected["pair_acc"])


def test_a_zero_embedding_ties():
    assert pair_accuracy([(0.0, 0.0)], [EAST], [NORTH])["pair_acc"] == 0.5


def test_bad_input_is_one_line():
    good = np.ones((3, 4))
    broken = good.copy()
    broken[2, 0] = np.nan
    cases = {
        "differ": (good, good[:2], good),
        "own_text of clip 2 is not finite": (good, broken, good),
        "video_embed has shape": (good[:0], good[:0], good[:0]),
        "other_text has shape": (good, good, good[0]),
    }
    for message, arguments in cases.items():
        with pytest.raises(UserError, match=message) as error:
            pair_accuracy(*arguments)
        assert "\n" not in str(error.value)
