import numpy as np
import pytest

from avion.errors import UserError
from avion.evaluation.submission import action_submission, check_same_ids, retrieval_submission

SLS = {"sls_pt": 2, "sls_tl": 3, "sls_td": 3}
IDS = ["P01_11_0", "P01_11_1"]


@pytest.fixture
def scores(rng):
    return rng.dirichlet(np.ones(97), 2).astype(np.float32), rng.dirichlet(np.ones(300), 2).astype(np.float32)


def test_content_of_the_action_file(scores):
    content = action_submission(IDS, *scores, SLS)
    assert {k: v for k, v in content.items() if k != "results"} == {
        "version": "0.2",
        "challenge": "action_recognition",
        "sls_pt": 2,
        "sls_tl": 3,
        "sls_td": 3,
    }
    assert list(content["results"]) == IDS
    for i, name in enumerate(IDS):
        for kind, matrix in zip(("verb", "noun"), scores, strict=True):
            result = content["results"][name][kind]
            assert list(result) == [str(c) for c in range(matrix.shape[1])]
            assert all(type(v) is float for v in result.values())
            assert list(result.values()) == pytest.approx(matrix[i].tolist(), abs=1e-8)


def test_content_of_the_retrieval_file(rng):
    similarity = rng.random((2, 3))
    content = retrieval_submission(similarity, IDS, ["a", "b", "c"], SLS)
    assert content.pop("sim_mat") == pytest.approx(similarity.astype(np.float32))
    assert content == {
        "version": "0.1",
        "challenge": "multi_instance_retrieval",
        **SLS,
        "vis_ids": IDS,
        "txt_ids": ["a", "b", "c"],
    }


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda v, n: (IDS, v[:, :96], n, SLS), r"verb scores: float32 of shape \(2, 96\), expected .* 97 classes"),
        (lambda v, n: (IDS, v, n[:1], SLS), r"noun scores: .*\(1, 300\)"),
        (lambda v, n: (IDS, v.astype(str), n, SLS), "verb scores: <U"),
        (lambda v, n: (IDS, v, np.where(n > -1, np.nan, n), SLS), "noun scores: hold values that are not numbers"),
        (lambda v, n: (IDS, v - 1, n, SLS), "verb scores: run from -"),
        (lambda v, n: (IDS, 3 + v, n, SLS), "0 to 1 is required"),
        (lambda v, n: ([IDS[0], IDS[0]], v, n, SLS), "P01_11_0 comes twice"),
        (lambda v, n: ([IDS[0], 7], v, n, SLS), "7 is no id"),
        (lambda v, n: ([IDS[0], ""], v, n, SLS), "'' is no id"),
        (lambda v, n: ([], v[:0], n[:0], SLS), "narration ids: there are none"),
        (lambda v, n: (IDS, v, n, {**SLS, "sls_td": 6}), "sls_td: a level from 0 to 5 is required, found 6"),
        (lambda v, n: (IDS, v, n, {**SLS, "sls_tl": True}), "sls_tl"),
        (lambda v, n: (IDS, v, n, {"sls_pt": 0, "sls_tl": 1}), "sls_td: .* found None"),
    ],
)
def test_what_the_action_server_would_refuse(scores, change, message):
    with pytest.raises(UserError, match=message) as error:
        action_submission(*change(*scores))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "similarity, message",
    [
        (np.zeros((3, 2)), r"shape \(3, 2\), expected numbers for 2 clips x 3 sentences"),
        (np.array([[0.1, 0.2, -0.3], [0.0, 0.0, 0.0]]), r"from -0.3 to 0.2, 0 to 1 is required; \(cosine \+ 1\) / 2"),
        (np.full((2, 3), np.inf), "not numbers"),
        (np.zeros(6), "shape"),
    ],
)
def test_what_the_retrieval_server_would_refuse(similarity, message):
    with pytest.raises(UserError, match=message):
        retrieval_submission(similarity, IDS, ["a", "b", "c"], SLS)


def test_ids_of_another_split():
    check_same_ids(["b", "a"], ["a", "b"], "p.pkl")
    with pytest.raises(UserError, match=r"p.pkl: narration ids: 1 missing \(c\) and 2 too many \(a\)"):
        check_same_ids(["a", "b", "d"], ["c", "d"], "p.pkl")
