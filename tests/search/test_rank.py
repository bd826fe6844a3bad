"""Similarities and exact ranking against float64 and against NumPy's sort."""

import numpy as np
import pytest
import torch

from avion.search import rank
from avion.search.rank import ranked, similarities, top_k


@pytest.mark.parametrize("count", [0, 1, 7, 1000, 4099])
@pytest.mark.parametrize("threads", [1, 3])
def test_similarities(tmp_path, rng, count, threads, monkeypatch):
    monkeypatch.setattr(rank, "BLOCK_BYTES", 4 * 24 * 100)  # blocks of 100 rows
    rows = rng.standard_normal((count, 24)).astype(np.float16)
    query = rng.standard_normal(24).astype(np.float32)
    np.save(tmp_path / "rows.npy", rows)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        if count:
            mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
            assert not mapped.flags.writeable
            found = similarities(query, mapped)
            np.testing.assert_array_equal(mapped, rows)
        found = similarities(query, rows)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert found.shape == (count,) and found.dtype == np.float32
    np.testing.assert_allclose(found, rows.astype(np.float64) @ query.astype(np.float64), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("first", [1, 3, 256])
def test_ranking_is_a_stable_sort(rng, first):
    scores = rng.integers(0, 9, 500).astype(np.float32)  # many that are equal
    scores[rng.integers(0, 500, 60)] = -np.inf
    wanted = [int(i) for i in np.argsort(-scores, kind="stable") if scores[i] > -np.inf]
    assert list(ranked(scores, first)) == wanted
    assert top_k(scores, 10).tolist() == wanted[:10] and top_k(scores, 1000).tolist() == wanted
    assert top_k(scores, 0).tolist() == [] and list(ranked(np.full(4, -np.inf, dtype=np.float32))) == []


def test_the_best_of_many_are_those_of_float64(rng):
    rows = rng.standard_normal((20_000, 32))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)
    query = rng.standard_normal(32).astype(np.float32)
    exact = rows.astype(np.float64) @ query.astype(np.float64)
    found = top_k(similarities(query, rows), 50)
    np.testing.assert_allclose(exact[found], np.sort(exact)[::-1][:50], atol=1e-6)
