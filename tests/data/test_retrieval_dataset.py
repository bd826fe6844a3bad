from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from avion.data.clip_dataset import ClipDataset
from avion.data.narrations import TableBuilder
from avion.data.retrieval_dataset import ClipsWithPositives
from avion.data.tokenizer import tokenize
from avion.data.transforms import TrainTransform
from avion.data.video import VideoStore
from avion.errors import UserError

SENTENCES = ["take cup", "put cup", "open door", "wash pan", "take pan"]
#                       take cup  put  open  wash  take pan
RELEVANCY = np.array(
    [
        [1.0, 0.5, 0.0, 0.0, 0.5],
        [0.1, 0.0, 0.1, 0.0, 0.0],  # 0.1 is not above 0.1
        [0.0, 0.0, 1.0, 0.25, 0.0],
        [0.0, 0.0, 0.0, 0.0, 0.0],
        [0.125, 0.0, 0.0, 0.0, 0.0],
    ],
    dtype=np.float32,
)
KEPT = [0, 2, 4]


def clips(videos=("a", "b", "c", "d", "e")):
    builder = TableBuilder()
    for i, video in enumerate(videos):
        builder.add(video, 2.0 * i, 2.0 * i + 1.5, f"narration {i}")
    return builder.build()


def test_clips_without_positives_are_left_out_and_counted():
    pairs = ClipsWithPositives(clips(), SENTENCES, RELEVANCY)
    assert len(pairs) == 3 and pairs.skipped == 2 and pairs.positives == 6
    assert [pairs[i].video for i in range(3)] == ["a", "c", "e"]
    assert len(ClipsWithPositives(clips(), SENTENCES, RELEVANCY, 0.0)) == 4
    assert len(ClipsWithPositives(clips(), SENTENCES, RELEVANCY, 0.99)) == 2


def test_positives_are_drawn_evenly_with_their_relevancies():
    pairs = ClipsWithPositives(clips(), SENTENCES, RELEVANCY)
    rng = np.random.default_rng()
    for i, row in enumerate(KEPT):
        drawn = Counter()
        for _ in range(600):
            text, fields = pairs.draw(i, rng)
            assert fields["relevancy"].shape == () and fields["relevancy"].dtype is torch.float32
            assert float(fields["relevancy"]) == RELEVANCY[row, SENTENCES.index(text)]
            drawn[text] += 1
        expected = {SENTENCES[j] for j in range(5) if RELEVANCY[row, j] > 0.1}
        assert drawn.keys() == expected
        # 600 fair draws: five standard deviations are less than 60.
        assert all(abs(n - 600 / len(expected)) < 60 for n in drawn.values())


def test_many_clips_and_sentences(rng):
    """More clips than are looked at at a time, more sentences than a byte can number."""
    relevancy = (rng.random((2500, 700)) ** 8).astype(np.float32)
    relevancy[rng.integers(2500, size=40)] = 0.0
    table, sentences = clips([f"v{i}" for i in range(2500)]), [f"s{j}" for j in range(700)]
    pairs = ClipsWithPositives(table, sentences, relevancy, threshold=0.5)
    kept = [i for i in range(2500) if (relevancy[i] > 0.5).any()]
    assert [pairs[i].video for i in range(len(pairs))] == [f"v{i}" for i in kept]
    assert pairs.skipped == 2500 - len(kept) and pairs.positives == (relevancy > 0.5).sum()
    for i in [0, len(kept) - 1, *rng.integers(len(kept), size=200)]:
        text, fields = pairs.draw(int(i), rng)
        assert relevancy[kept[i], int(text[1:])] == float(fields["relevancy"]) > 0.5


@pytest.mark.parametrize("threshold", [-0.1, 1.0, 1.5, float("nan")])
def test_a_threshold_that_nothing_or_everything_passes(threshold):
    with pytest.raises(UserError, match="relevancy threshold"):
        ClipsWithPositives(clips(), SENTENCES, RELEVANCY, threshold)


@pytest.fixture
def dataset(chunked):
    def make(seed=0):
        pairs = ClipsWithPositives(clips(["abc"] * 5), SENTENCES, RELEVANCY)
        return ClipDataset(
            pairs,
            VideoStore(chunked.avion),
            num_frames=2,
            transform=TrainTransform(32, fused=True),
            tokenizer=tokenize,
            train=True,
            seed=seed,
            captions=pairs.draw,
        )

    return make


def test_samples_pair_the_clip_with_a_positive_and_its_relevancy(dataset):
    tokens = {tuple(tokenize(text)[0].tolist()): j for j, text in enumerate(SENTENCES)}
    seen = Counter()
    for epoch in range(40):
        for i, row in enumerate(KEPT):
            sample = dataset()[(epoch, i)]
            j = tokens[tuple(sample["tokens"].tolist())]
            assert float(sample["relevancy"]) == RELEVANCY[row, j] > 0.1
            seen[row, j] += 1
    assert seen.keys() == {(0, 0), (0, 1), (0, 4), (2, 2), (2, 3), (4, 0)}  # over the epochs, all of them


def test_what_is_drawn_depends_on_seed_epoch_and_index_only(dataset):
    keys = [(epoch, i) for epoch in range(6) for i in range(3)]
    alone = {key: dataset()[key] for key in keys}
    backwards, same = dataset(), dataset()
    for key in reversed(keys):
        assert torch.equal(backwards[key]["tokens"], alone[key]["tokens"])
    for batch in DataLoader(same, batch_sampler=[keys[:7], keys[7:]], num_workers=2):
        for i, (tokens, relevancy) in enumerate(zip(batch["tokens"], batch["relevancy"], strict=True)):
            key = keys[:7][i] if len(batch["tokens"]) == 7 else keys[7:][i]
            assert torch.equal(tokens, alone[key]["tokens"]) and relevancy == alone[key]["relevancy"]
    other = dataset(seed=1)
    assert any(not torch.equal(other[key]["tokens"], alone[key]["tokens"]) for key in keys)


def test_a_replaced_clip_brings_its_own_positive(chunked):
    pairs = ClipsWithPositives(clips(["gone", "gone", "abc", "gone", "gone"]), SENTENCES, RELEVANCY)
    dataset = ClipDataset(
        pairs,
        VideoStore(chunked.avion),
        num_frames=2,
        transform=TrainTransform(32, fused=True),
        tokenizer=tokenize,
        train=True,
        captions=pairs.draw,
        max_replacements=50,
    )
    sample = dataset[(0, 0)]
    assert sample["replaced_by"] == 1 and "gone" in sample["error"]
    assert float(sample["relevancy"]) in (1.0, 0.25)
