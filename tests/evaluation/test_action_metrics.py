"""Accuracies of verbs, nouns and actions: cases worked out by hand, and a second way of computing them."""

import numpy as np
import pytest

from avion.errors import UserError
from avion.evaluation.ek100_cls import action_marginals, action_metrics, label_ranks, mean_class_accuracy

# Actions 0:1, 0:2, 3:1, 3:4 and 5:2.
ACTIONS = (np.array([0, 0, 3, 3, 5]), np.array([1, 2, 1, 4, 2]))


class TestRanks:
    def test_by_hand(self):
        scores = [[0.1, 0.6, 0.3], [0.1, 0.6, 0.3], [0.5, 0.5, 0.5], [0.5, 0.5, 0.5], [1.0, 0.0, 0.0]]
        assert label_ranks(scores, np.array([1, 0, 0, 2, -1])).tolist() == [0, 2, 0, 2, 3]

    def test_against_a_sort(self, rng):
        scores = rng.integers(0, 6, (3000, 40)) / 6  # with many ties, over several blocks
        labels = rng.integers(-1, 40, 3000)
        order = np.argsort(-scores, axis=1, kind="stable")
        expected = [40 if c < 0 else np.flatnonzero(row == c)[0] for row, c in zip(order, labels, strict=True)]
        assert label_ranks(scores.astype(np.float32), labels).tolist() == expected

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_scores_that_are_no_numbers_are_not_counted_as_right(self, bad, rng):
        scores = rng.random((2000, 4))
        scores[1500, 2] = bad
        with pytest.raises(UserError, match="row 1500 holds values that are not numbers"):
            label_ranks(scores, np.zeros(2000, dtype=np.int64))

    @pytest.mark.parametrize("labels", [[4, 0], [-2, 0], [0.0, 1.0], [0]])
    def test_bad_labels(self, labels):
        with pytest.raises(UserError, match="label"):
            label_ranks(np.zeros((2, 4)), np.array(labels))


def test_actions_are_ranked_by_their_own_probability():
    """Of 0:1, 3:4 and 0:4 the first is likeliest; by verb times noun, as the challenge ranks, it would be 0:4."""
    actions, probs = (np.array([0, 3, 0]), np.array([1, 4, 4])), np.array([[0.4, 0.3, 0.3]])
    verbs, nouns = action_marginals(probs, actions)
    product = verbs[0, actions[0]] * nouns[0, actions[1]]
    assert product == pytest.approx([0.7 * 0.4, 0.3 * 0.6, 0.7 * 0.6]) and product.argmax() == 2
    assert action_metrics(probs, actions, [0], [1])["action_top1"] == 1.0
    assert action_metrics(probs, actions, [0], [4])["action_top1"] == 0.0


def test_mean_class_accuracy_by_hand():
    # Class 7: right, wrong, wrong; class 2: right; class 9 does not occur.
    assert mean_class_accuracy([0, 1, 5, 0], [7, 7, 7, 2]) == pytest.approx((1 / 3 + 1) / 2)


def test_marginals_have_every_class_and_zeros_where_no_action_is():
    verbs, nouns = action_marginals(np.array([[0.1, 0.2, 0.3, 0.15, 0.25]]), ACTIONS)
    assert verbs.shape == (1, 97) and nouns.shape == (1, 300)
    assert dict(enumerate(verbs[0])) == pytest.approx({**dict.fromkeys(range(97), 0.0), 0: 0.3, 3: 0.45, 5: 0.25})
    assert nouns[0, [1, 2, 4]] == pytest.approx([0.4, 0.45, 0.15]) and nouns.sum() == pytest.approx(1)


class TestFigures:
    """Four clips. Verb sums (0, 3, 5), noun sums (1, 2, 4) of each row stand behind it."""

    PROBS = np.array(
        [
            [0.40, 0.30, 0.10, 0.10, 0.10],  # .7 .2 .1    .5 .4 .1
            [0.30, 0.05, 0.25, 0.30, 0.10],  # .35 .55 .1  .55 .15 .3
            [0.05, 0.10, 0.35, 0.10, 0.40],  # .15 .45 .4  .4 .5 .1
            [0.20, 0.20, 0.20, 0.21, 0.19],  # .4 .41 .19  .4 .39 .21
        ]
    )
    VERBS = np.array([0, 3, 5, 0])
    NOUNS = np.array([1, 4, 2, 7])  # the last clip's noun, and so its action, is in no action of the list

    def figures(self, **subsets):
        return action_metrics(self.PROBS, ACTIONS, self.VERBS, self.NOUNS, **subsets)

    def test_by_hand(self):
        figures = self.figures()
        assert figures == pytest.approx(
            {
                "verb_top1": 2 / 4,  # clips 0 and 1; clip 2 says 3, clip 3 says 3
                "verb_top5": 1.0,
                "verb_mean_class": (1 / 2 + 1 + 0) / 3,
                "noun_top1": 2 / 4,  # clips 0 and 2
                "noun_top5": 3 / 4,
                "noun_mean_class": (1 + 0 + 1 + 0) / 4,
                "action_top1": 2 / 4,  # clip 0 and clip 2; clip 1's equals action 0's, which comes first
                "action_top5": 3 / 4,
                "action_mean_class": (1 + 0 + 1 + 0) / 4,
            }
        )

    def test_a_class_without_actions_ranks_by_its_zero(self):
        # Noun 7 scores zero as 297 others do: behind three nouns and the zeros before it (0, 3, 5, 6).
        _, nouns = action_marginals(self.PROBS, ACTIONS)
        assert label_ranks(nouns, self.NOUNS)[3] == 7

    def test_tail_and_unseen_by_hand(self):
        figures = self.figures(tail_verbs=[5], tail_nouns=[4, 9], unseen=np.array([False, True, True, False]))
        expected = {
            "tail_verb_top1": 0.0,
            "tail_verb_top5": 1.0,
            "tail_verb_clips": 1,  # clip 2
            "tail_noun_top1": 0.0,
            "tail_noun_top5": 1.0,
            "tail_noun_clips": 1,  # clip 1
            "tail_action_top1": 1 / 2,
            "tail_action_top5": 1.0,
            "tail_action_clips": 2,  # clips 1 and 2
            "unseen_verb_top1": 1 / 2,
            "unseen_verb_top5": 1.0,
            "unseen_noun_top1": 1 / 2,
            "unseen_noun_top5": 1.0,
            "unseen_action_top1": 1 / 2,
            "unseen_action_top5": 1.0,
            "unseen_clips": 2,
        }
        assert {k: v for k, v in figures.items() if k.startswith(("tail", "unseen"))} == pytest.approx(expected)

    def test_one_list_alone_decides_no_tail_actions(self):
        names = [name for name in self.figures(tail_verbs=[0]) if name.startswith("tail")]
        assert names == ["tail_verb_top1", "tail_verb_top5", "tail_verb_clips"]

    def test_a_subset_without_clips_has_no_accuracy(self):
        figures = self.figures(tail_verbs=[96], tail_nouns=[299], unseen=np.zeros(4, dtype=bool))
        subset = {k: v for k, v in figures.items() if k.startswith(("tail", "unseen"))}
        assert subset == {"tail_verb_clips": 0, "tail_noun_clips": 0, "tail_action_clips": 0, "unseen_clips": 0}

    def test_wrong_class_counts(self):
        with pytest.raises(UserError, match=r"shape \(4, 5\), expected clips x 4 actions"):
            action_metrics(self.PROBS, (ACTIONS[0][:4], ACTIONS[1][:4]), self.VERBS, self.NOUNS)
        with pytest.raises(UserError, match="labels run from 0 to 97"):
            action_metrics(self.PROBS, ACTIONS, np.array([0, 3, 97, 0]), self.NOUNS)
        with pytest.raises(UserError, match="shape"):
            action_metrics(self.PROBS[:0], ACTIONS, self.VERBS[:0], self.NOUNS[:0])


def test_against_plain_loops_in_float64(rng):
    """Random data with every figure computed again, clip by clip."""
    pairs = sorted({(int(v), int(n)) for v, n in zip(rng.integers(0, 97, 60), rng.integers(0, 300, 60), strict=True)})
    verbs, nouns = (np.array(column) for column in zip(*pairs, strict=True))
    probs = rng.dirichlet(np.ones(len(pairs)), 200)
    own = rng.integers(0, len(pairs), 200)
    probs[np.arange(200), own] += 0.03  # some are right
    tail_verbs, tail_nouns, unseen = [3, *verbs[:20]], nouns[20:40].tolist(), rng.random(200) < 0.3
    figures = action_metrics(
        probs, (verbs, nouns), verbs[own], nouns[own], tail_verbs=tail_verbs, tail_nouns=tail_nouns, unseen=unseen
    )
    hits = {"verb": [], "noun": [], "action": []}
    for row, action in zip(probs, own, strict=True):
        for kind, column, classes in (("verb", verbs, 97), ("noun", nouns, 300), ("action", range(len(pairs)), None)):
            sums = [sum(p for p, c in zip(row, column, strict=True) if c == k) for k in range(classes or len(pairs))]
            order = sorted(range(len(sums)), key=lambda k: (-sums[k], k))
            hits[kind].append([column[action] == order[0], column[action] in order[:5]])
    in_tail = {"verb": np.isin(verbs[own], tail_verbs), "noun": np.isin(nouns[own], tail_nouns)}
    in_tail["action"] = in_tail["verb"] | in_tail["noun"]
    for kind, found in hits.items():
        found = np.array(found)
        for i, k in enumerate((1, 5)):
            assert figures[f"{kind}_top{k}"] == pytest.approx(found[:, i].mean())
            assert figures[f"tail_{kind}_top{k}"] == pytest.approx(found[in_tail[kind], i].mean())
            assert figures[f"unseen_{kind}_top{k}"] == pytest.approx(found[unseen, i].mean())
