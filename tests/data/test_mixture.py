"""Several sources in one epoch."""

import numpy as np
import pytest

from avion.data.mixture import Mixture, drawn_rows, rows_per_epoch
from avion.engine.loader import TrainBatchSampler


def epochs(sources, number, seed=0):
    return [drawn_rows(sources, seed, e) for e in range(number)]


def test_a_weight_of_one_takes_every_row_once_an_epoch():
    for rows, copies in epochs([(13, 1.0), (5, 1.0)], 3):
        assert sorted(rows.tolist()) == list(range(18)) and not copies.any()


def test_half_of_a_source_comes_every_second_epoch():
    (a, _), (b, _), (c, _), (d, _) = epochs([(4, 1.0), (10, 0.5)], 4)
    small = [set(x[x >= 4].tolist()) for x in (a, b, c, d)]
    assert [len(s) for s in small] == [5, 5, 5, 5]
    assert small[0] | small[1] == small[2] | small[3] == set(range(4, 14))
    assert all(set(x[x < 4].tolist()) == set(range(4)) for x in (a, b, c, d))


def test_a_row_that_comes_again_is_another_sample():
    ((rows, copies),) = epochs([(3, 2.5)], 1)
    assert len(rows) == 8 and set(rows.tolist()) == {0, 1, 2}
    pairs = list(zip(rows.tolist(), copies.tolist(), strict=True))
    assert len(set(pairs)) == 8 and max(copies) == 2
    assert np.bincount(rows, minlength=3).min() >= 2


@pytest.mark.parametrize("weight", [0.001, 0.37, 1.0, 1.5, 3.0])
def test_an_epoch_has_its_size_and_rows_come_equally_often(weight):
    sources, number = [(50, weight)], 40
    found = np.concatenate([rows for rows, _ in epochs(sources, number)])
    assert len(found) == number * rows_per_epoch(sources)
    counts = np.bincount(found, minlength=50)
    assert counts.max() - counts.min() <= 1


def test_the_sampler_gives_the_same_rows_to_any_number_of_processes():
    sources = [(20, 1.0), (30, 0.4), (4, 3.0)]
    one = TrainBatchSampler(0, 12, sources=sources)
    two = [TrainBatchSampler(0, 3, update_freq=2, rank=r, size=2, sources=sources) for r in range(2)]
    for sampler in (one, *two):
        sampler.set_position(2)
    assert one.count == 20 + 12 + 12 and one.steps == 3
    shared = [list(s) for s in two]
    together = [sum((p[2 * k] + p[2 * k + 1] for p in shared), []) for k in range(3)]
    assert together == list(one)
    keys = sum(together, [])
    assert len(set(keys)) == 36, "no key twice: a row that comes again has another one"
    assert any(len(key) == 3 and key[1] >= 50 for key in keys)


class Part:
    def __init__(self, name, count):
        self.name, self.count = name, count

    def __len__(self):
        return self.count

    def __getitem__(self, key):
        return {"index": key[1], "key": (self.name, *key), "replaced_by": 1 if key[1] == 0 else -1}


def test_a_mixture_finds_the_part_of_a_row():
    mixture = Mixture([Part("a", 3), Part("b", 2)], [1.0, 2.0])
    assert len(mixture) == 5 and mixture.sources == [(3, 1.0), (2, 2.0)]
    assert mixture[(7, 2)] == {"index": 2, "key": ("a", 7, 2), "replaced_by": -1}
    assert mixture[(7, 3, 1)] == {"index": 3, "key": ("b", 7, 0, 1), "replaced_by": 4}
