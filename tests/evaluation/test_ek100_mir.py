import math

import numpy as np
import pytest

from avion.errors import UserError
from avion.evaluation import ek100_mir
from avion.evaluation.ek100_mir import get_mAP, get_nDCG, retrieval_metrics

LOG3 = math.log2(3)

# Two clips, three sentences.
#   clip 0 ranks s0 (relevancy 1/2), s1 (1), s2 (0):  AP = (1/2 + 1)/2 = 3/4, textbook 1/2
#   clip 1 ranks s2 (1), s1 (0), s0 (1):              AP = (1/1 + 2/3)/2 = 5/6, textbook the same
#   s0 ranks clip 0 (1/2), clip 1 (1):                AP = 3/4, textbook 1/2
#   s1 ranks clip 0 (1), clip 1 (0):                  AP = 1
#   s2 ranks clip 1 (1), clip 0 (0):                  AP = 1
SIMILARITY = [[0.9, 0.5, 0.1], [0.2, 0.3, 0.8]]
RELEVANCY = [[0.5, 1.0, 0.0], [1.0, 0.0, 1.0]]


def test_map_by_hand():
    figures = get_mAP(SIMILARITY, RELEVANCY)
    assert figures == pytest.approx((19 / 24, 11 / 12, (19 / 24 + 11 / 12) / 2), rel=1e-15)


def test_textbook_map_by_hand():
    figures = get_mAP(SIMILARITY, RELEVANCY, graded_precision=False)
    assert figures == pytest.approx((2 / 3, 5 / 6, 3 / 4), rel=1e-15)


def test_ndcg_by_hand():
    # clip 0, cut 2: (1/2 + 1/log2 3) / (1 + 1/2/log2 3). clip 1, cut 2: its second hit, at rank 3, is cut
    # off: 1 / (1 + 1/log2 3). s0 as clip 0; s1 and s2 have one relevant clip each, first.
    swapped = (0.5 + 1 / LOG3) / (1 + 0.5 / LOG3)
    vis = (swapped + 1 / (1 + 1 / LOG3)) / 2
    txt = (swapped + 2) / 3
    assert get_nDCG(SIMILARITY, RELEVANCY) == pytest.approx((vis, txt, (vis + txt) / 2), rel=1e-15)


def test_all_figures_under_their_names():
    figures = retrieval_metrics(np.float32(SIMILARITY), np.float32(RELEVANCY))
    names = ("vis_map", "txt_map", "avg_map", "vis_ndcg", "txt_ndcg", "avg_ndcg")
    assert tuple(figures) == names
    expected = (*get_mAP(SIMILARITY, RELEVANCY), *get_nDCG(SIMILARITY, RELEVANCY))
    assert tuple(figures.values()) == pytest.approx(expected, rel=1e-15)
    assert all(type(value) is float for value in figures.values())


def test_perfect_ranking_is_exactly_one():
    relevancy = np.random.default_rng(0).choice([0, 0.25, 1 / 3, 0.5, 1], (37, 23))
    relevancy[np.arange(37), np.arange(37) % 23] = 1
    assert get_nDCG(relevancy, relevancy) == (1, 1, 1)
    assert get_mAP(relevancy, relevancy) == (1, 1, 1)


def test_ties_go_to_the_lower_index():
    # Four equal similarities (one of them -0.0), the relevant item third: precision 1/3 in its row.
    similarity = np.array([[0.0, -0.0, 0.0, -0.0]])
    relevancy = np.array([[0.0, 0.0, 1.0, 0.0]])
    for dtype in (np.float16, np.float32, np.float64):
        assert get_mAP(similarity.astype(dtype), relevancy)[0] == pytest.approx(1 / 3, rel=1e-15)


def test_float64_similarities_are_told_apart_to_the_last_bit():
    one = np.nextafter(0.5, 1)
    similarity = np.array([[0.5, one, np.nextafter(one, 1), -one, -0.5]])
    # Falling: items 2, 1, 0, 4, 3.
    for item, rank in enumerate((3, 2, 1, 5, 4)):
        relevancy = np.eye(5)[[item]]
        assert get_mAP(similarity, relevancy)[0] == pytest.approx(1 / rank, rel=1e-15)


def plain_scores(similarity, relevancy, graded):
    """AP and nDCG of each row in plain Python, None where undefined."""
    scores = []
    for row, gains in zip(similarity.tolist(), relevancy.tolist(), strict=True):
        ranked = [gains[j] for j in sorted(range(len(row)), key=lambda j: (-row[j], j))]
        hits = [k for k, gain in enumerate(ranked) if gain == 1]
        precision = [math.fsum(g if graded else g == 1 for g in ranked[: k + 1]) / (k + 1) for k in hits]
        cut = sum(gain > 0 for gain in ranked)
        dcg, ideal = (
            math.fsum(gain / math.log2(j + 2) for j, gain in enumerate(order[:cut]))
            for order in (ranked, sorted(ranked, reverse=True))
        )
        scores.append((math.fsum(precision) / len(hits) if hits else None, dcg / ideal if cut else None))
    return scores


def plain_mean(values):
    values = [value for value in values if value is not None]
    return math.fsum(values) / len(values)


@pytest.mark.parametrize("graded", [True, False])
@pytest.mark.parametrize("block_elements", [1, 50, 1 << 20])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_against_plain_python(dtype, block_elements, graded, monkeypatch, rng):
    monkeypatch.setattr(ek100_mir, "BLOCK_ELEMENTS", block_elements)
    for decimals in (1, 6):  # with many ties, and with few
        similarity = rng.normal(size=(31, 17)).round(decimals).astype(dtype)
        relevancy = rng.choice([0, 0, 0, 1 / 6, 0.5, 2 / 3, 1], (31, 17)).astype(np.float32)
        relevancy[3] = 0  # a clip with nothing relevant
        relevancy[7] = np.minimum(relevancy[7], 0.5)  # one with nothing at relevancy 1
        relevancy[:, 5] = 0
        figures = retrieval_metrics(similarity, relevancy, graded_precision=graded)
        for side, s, r in (("vis", similarity, relevancy), ("txt", similarity.T, relevancy.T)):
            ap, ndcg = zip(*plain_scores(s, r, graded), strict=True)
            assert figures[f"{side}_map"] == pytest.approx(plain_mean(ap), rel=1e-12)
            assert figures[f"{side}_ndcg"] == pytest.approx(plain_mean(ndcg), rel=1e-12)


def test_a_monotone_scale_changes_nothing_and_inputs_are_left_alone():
    rng = np.random.default_rng(1)
    cosine = rng.uniform(-1, 1, (9, 11))
    relevancy = rng.choice([0, 0.5, 1], (9, 11))
    before = cosine.copy(), relevancy.copy()
    assert retrieval_metrics(cosine, relevancy) == retrieval_metrics((cosine + 1) / 2, relevancy)
    assert (cosine == before[0]).all() and (relevancy == before[1]).all()


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("figures", [retrieval_metrics, get_mAP, get_nDCG])
def test_wrong_shapes_are_named(figures):
    with pytest.raises(UserError) as error:
        figures(np.ones((3, 4)), np.ones((4, 3)))
    assert "(4, 3)" in one_line(error) and "(3, 4)" in one_line(error)
    for empty in (np.ones((0, 4)), np.ones(3)):
        with pytest.raises(UserError, match="similarity: shape"):
            figures(empty, empty)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_located(bad):
    broken = np.ones((3, 4), np.float32)
    broken[1, 2] = bad
    with pytest.raises(UserError, match=r"similarity: -?(nan|inf) at clip 1, sentence 2") as error:
        retrieval_metrics(broken, np.ones((3, 4)))
    one_line(error)
    with pytest.raises(UserError, match=r"relevancy: .* at clip 1, sentence 2"):
        retrieval_metrics(np.ones((3, 4)), broken)


def test_relevancy_out_of_range_or_of_another_type_is_refused():
    with pytest.raises(UserError, match="from 0 to 2") as error:
        retrieval_metrics(np.ones((2, 2)), [[0, 2], [1, 1]])
    one_line(error)
    with pytest.raises(UserError, match="from -1 to 1"):
        retrieval_metrics(np.ones((2, 2)), [[0, -1], [1, 1]])
    with pytest.raises(UserError, match="real numbers"):
        retrieval_metrics(np.ones((2, 2)), [["a", "b"], ["c", "d"]])


def test_nothing_relevant_at_all_is_an_error_not_nan():
    half = np.full((2, 3), 0.5)
    assert get_nDCG(np.ones((2, 3)), half) == (1, 1, 1)
    with pytest.raises(UserError, match="no clip has a counterpart of relevancy 1") as error:
        get_mAP(np.ones((2, 3)), half)
    one_line(error)
    with pytest.raises(UserError, match="above 0"):
        get_nDCG(np.ones((2, 3)), np.zeros((2, 3)))
