import numpy as np
import pytest
import torch

from avion.engine.loader import EvalBatchSampler, TrainBatchSampler, build_loader, collate
from avion.errors import UserError


def global_batches(count, batch_size, *, update_freq=1, size=1, epoch=0, seed=0, clip=0):
    """The samples of every optimizer step, over all processes and micro-batches."""
    samplers = [
        TrainBatchSampler(count, batch_size, update_freq=update_freq, rank=r, size=size, seed=seed) for r in range(size)
    ]
    for sampler in samplers:
        sampler.set_position(epoch, clip)
    per_rank = [list(s) for s in samplers]
    assert all(len(p) == len(s) for p, s in zip(per_rank, samplers, strict=True))
    steps = len(per_rank[0]) // update_freq
    return [
        [key for batches in per_rank for micro in batches[s * update_freq : (s + 1) * update_freq] for key in micro]
        for s in range(steps)
    ]


def test_every_clip_once_and_the_remainder_left_out():
    keys = sum(global_batches(23, 4), [])
    assert len(keys) == 20 and len(set(keys)) == 20 and all(e == 0 and 0 <= i < 23 for e, i in keys)


def test_steps_do_not_depend_on_processes_or_micro_batches():
    one = global_batches(50, 12, epoch=3)
    assert one == global_batches(50, 6, size=2, epoch=3)
    assert one == global_batches(50, 4, update_freq=3, epoch=3)
    assert one == global_batches(50, 2, update_freq=2, size=3, epoch=3)


def test_order_changes_with_epoch_and_seed_only():
    assert global_batches(50, 5) == global_batches(50, 5)
    indices = lambda batches: [[i for _, i in b] for b in batches]  # noqa: E731
    assert indices(global_batches(50, 5, epoch=0)) != indices(global_batches(50, 5, epoch=1))
    assert indices(global_batches(50, 5, seed=0)) != indices(global_batches(50, 5, seed=1))


def test_going_on_in_the_middle_of_an_epoch():
    assert global_batches(50, 5, epoch=2, clip=40, update_freq=2) == global_batches(50, 5, epoch=2, update_freq=2)[4:]


@pytest.mark.parametrize("count, parts", [(48, [(4, 3, 2), (8, 2, 1), (2, 5, 2)]), (101, [(7, 3, 1), (5, 4, 3)])])
def test_other_batch_sizes_within_an_epoch_repeat_no_clip_and_skip_none(count, parts):
    """Each part takes some steps of (batch size, steps, processes); a last part takes the rest one by one."""
    seen, clip = [], 0
    for batch, steps, size in [*parts, (1, None, 1)]:
        sampler = TrainBatchSampler(count, batch, size=size)
        sampler.set_position(3, clip)
        taken = global_batches(count, batch, size=size, epoch=3, clip=clip)
        assert len(taken) == sampler.steps - sampler.start_step
        seen += sum(taken[:steps], [])
        clip = len(seen)
    assert sorted(seen) == [(3, i) for i in range(count)]
    assert seen == sum(global_batches(count, 1, epoch=3), [])


def test_an_epoch_of_which_no_whole_batch_is_left_has_no_step():
    sampler = TrainBatchSampler(20, 8)
    sampler.set_position(0, 16)
    assert sampler.start_step == sampler.steps == 2 and list(sampler) == []
    sampler.set_position(0, 99)  # of a larger dataset
    assert sampler.start_step == 2 and list(sampler) == []


def test_batch_larger_than_the_dataset():
    with pytest.raises(UserError, match="global batch of 24 clips .* larger than the dataset of 23"):
        TrainBatchSampler(23, 4, update_freq=3, size=2)


@pytest.mark.parametrize("count, size", [(13, 1), (13, 2), (13, 3), (2, 3), (12, 3)])
def test_evaluation_batches_are_the_same_for_any_number_of_processes(count, size):
    alone = list(EvalBatchSampler(count, 4))
    samplers = [EvalBatchSampler(count, 4, rank=r, size=size) for r in range(size)]
    shared = [list(s) for s in samplers]
    assert [len(s) for s in samplers] == [len(b) for b in shared]
    assert sorted(sum(shared, [])) == sorted(alone)
    assert set(sum(alone, [])) == set(range(count)) and all(len(b) == 4 for b in alone)


class Draws(torch.utils.data.Dataset):
    """Says which key it was asked for."""

    def __len__(self):
        return 40

    def __getitem__(self, key):
        return {"index": key[1], "key": torch.tensor(key), "error": ""}


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_epochs_reach_long_lived_workers(workers):
    sampler = TrainBatchSampler(40, 5, seed=7)
    loader = build_loader(Draws(), sampler, workers=workers, device=torch.device("cpu"))
    for epoch in (0, 1):
        sampler.set_position(epoch)
        keys = torch.cat([b["key"] for b in loader])
        order = np.random.default_rng((7, epoch)).permutation(40)
        np.testing.assert_array_equal(keys, np.stack([np.full(40, epoch), order], axis=1))


def test_starting_an_epoch_leaves_the_dropout_generator_alone():
    loader = build_loader(Draws(), TrainBatchSampler(40, 5), workers=0, device=torch.device("cpu"))
    before = torch.get_rng_state()
    next(iter(loader))
    assert torch.equal(before, torch.get_rng_state())


def test_collate_stacks_tensors_and_keeps_words():
    batch = collate(
        [{"video": torch.zeros(2), "index": 3, "error": ""}, {"video": torch.ones(2), "index": 4, "error": "x"}]
    )
    assert batch["video"].tolist() == [[0, 0], [1, 1]] and batch["index"].tolist() == [3, 4]
    assert batch["error"] == ["", "x"]
