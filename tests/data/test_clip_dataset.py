import pickle
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from avion.data.clip_dataset import ClipDataset
from avion.data.narrations import TableBuilder
from avion.data.tokenizer import tokenize
from avion.data.transforms import EvalTransform, TrainTransform
from avion.data.video import VideoError, VideoStore, uniform_frame_ids
from avion.errors import UserError
from tests.videos import read_barcode, write_video

ROWS = [
    ("abc", 1.0, 6.0, "take the cup"),
    ("abc", 13.0, 17.0, ["put the cup", "place the cup", "set the cup down"]),
    ("gone", 1.0, 2.0, "read a video that is not there"),
    ("abc", 20.0, 29.0, "open the door"),
    ("abc", 32.0, 36.0, "run past the end"),
]


def table_of(rows):
    builder = TableBuilder()
    for row in rows:
        builder.add(*row)
    return builder.build()


@pytest.fixture
def make(chunked):
    def make(train=True, rows=ROWS, fused=True, transform=None, tokenizer=tokenize, **kwargs):
        default = TrainTransform(32, fused=fused) if train else EvalTransform(32, fused=fused)
        store = VideoStore(chunked.avion, decoder=kwargs.pop("decoder", "auto"))
        return ClipDataset(
            table_of(rows),
            store,
            num_frames=kwargs.pop("num_frames", 4),
            transform=transform or default,
            tokenizer=tokenizer,
            train=train,
            **kwargs,
        )

    return make


def whole_frames(frames, rng):
    """A transform that changes nothing, so that barcodes can be read."""
    return torch.from_numpy(frames).permute(3, 0, 1, 2)


def barcodes(sample) -> list[int]:
    return [read_barcode(frame.permute(1, 2, 0).numpy()) for frame in sample["video"].unbind(1)]


def same(a: dict, b: dict) -> bool:
    equal = {k: torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a}
    return a.keys() == b.keys() and all(equal.values())


class TestSamples:
    @pytest.mark.parametrize("fused, dtype", [(True, torch.uint8), (False, torch.float32)])
    @pytest.mark.parametrize("train", [True, False])
    def test_fields(self, make, train, fused, dtype):
        sample = make(train, fused=fused)[0]
        assert sample["video"].shape == (3, 4, 32, 32) and sample["video"].dtype == dtype
        assert torch.equal(sample["tokens"], tokenize("take the cup")[0])
        rest = {k: sample[k] for k in ("index", "error", "replaced_by", "clamped")}
        assert rest == {"index": 0, "error": "", "replaced_by": -1, "clamped": 0}
        assert all(type(sample[k]) is int for k in ("index", "replaced_by", "clamped"))

    def test_no_tokenizer_no_tokens(self, make):
        assert "tokens" not in make(tokenizer=None)[0]
        assert "tokens" not in make(False, tokenizer=None)[2]

    def test_evaluation_takes_the_middle_frames_and_the_first_wording(self, make):
        dataset = make(False, transform=whole_frames)
        assert barcodes(dataset[1]) == [135, 145, 155, 165]  # 10 fps, [13, 17) in quarters
        for epoch in range(4):
            assert torch.equal(dataset[(epoch, 1)]["tokens"], tokenize("put the cup")[0])
            assert torch.equal(dataset[(epoch, 1)]["video"], dataset[1]["video"])

    def test_training_draws_wording_then_frames_from_seed_epoch_and_index(self, make):
        dataset = make(transform=whole_frames, seed=5)
        for epoch in range(3):
            rng = np.random.default_rng((5, epoch, 1))
            text = ROWS[1][3][rng.integers(3)]
            sample = dataset[(epoch, 1)]
            assert torch.equal(sample["tokens"], tokenize(text)[0])
            assert barcodes(sample) == uniform_frame_ids(130, 170, 4, rng).tolist()

    def test_every_wording_is_drawn_over_epochs(self, make):
        dataset = make(transform=whole_frames)
        drawn = {tuple(dataset[(epoch, 1)]["tokens"].tolist()) for epoch in range(25)}
        assert drawn == {tuple(row.tolist()) for row in tokenize(ROWS[1][3])}

    def test_strided(self, make):
        dataset = make(False, transform=whole_frames, sampling="strided", stride=3)
        assert barcodes(dataset[0]) == [30, 33, 36, 39]  # window 10 in 10 to 59

    def test_clamped_frames_are_counted(self, make):
        assert make(False)[4]["clamped"] == 2  # middles 325 335 345 355 of 340

    def test_out_of_range(self, make):
        for index in (5, -1):
            with pytest.raises(IndexError):
                make()[index]


class TestRandomness:
    def test_reproducible_and_new_in_each_epoch_and_for_each_seed(self, make):
        first, again, other = make(seed=1), make(seed=1), make(seed=2)
        for index in (0, 3):
            assert same(first[(2, index)], again[(2, index)])
            assert same(first[(0, index)], first[index])
            assert not torch.equal(first[(2, index)]["video"], first[(3, index)]["video"])
            assert not torch.equal(first[(2, index)]["video"], other[(2, index)]["video"])

    def test_global_generators_are_neither_used_nor_touched(self, make):
        dataset = make()
        torch.manual_seed(0)
        np.random.seed(0)
        expected = dataset[(0, 0)]
        states = torch.get_rng_state(), np.random.get_state()[1].copy()
        torch.manual_seed(1)
        np.random.seed(1)
        assert same(dataset[(0, 0)], expected)
        torch.manual_seed(0)
        np.random.seed(0)
        dataset[(0, 1)]
        assert torch.equal(torch.get_rng_state(), states[0])
        np.testing.assert_array_equal(np.random.get_state()[1], states[1])

    @pytest.mark.parametrize("decoder", ["pyav", "decord"])
    def test_the_same_samples_with_0_1_and_3_workers(self, make, decoder):
        pytest.importorskip({"pyav": "av"}.get(decoder, decoder))
        dataset = make(decoder=decoder, tokenizer=partial(tokenize, context_length=16))
        keys = [(epoch, index) for epoch in (0, 1) for index in (4, 2, 0, 1, 3)]

        def samples(workers):
            loader = DataLoader(dataset, batch_size=None, sampler=keys, num_workers=workers, timeout=60 * (workers > 0))
            return list(loader)

        expected = samples(0)
        assert [s["index"] for s in expected] == [4, 2, 0, 1, 3] * 2
        for workers in (1, 3):
            for sample, reference in zip(samples(workers), expected, strict=True):
                assert same(sample, reference)

    def test_the_same_samples_after_pickling(self, make):
        """Where workers are spawned rather than forked."""
        dataset = make()
        assert same(pickle.loads(pickle.dumps(dataset))[(1, 3)], dataset[(1, 3)])

    def test_default_collation(self, make):
        batch = next(iter(DataLoader(make(), batch_size=3)))
        assert batch["video"].shape == (3, 3, 4, 32, 32) and batch["video"].dtype == torch.uint8
        assert batch["tokens"].shape == (3, 77) and batch["index"].tolist() == [0, 1, 2]
        assert [bool(error) for error in batch["error"]] == [False, False, True]


class TestUnreadableClips:
    def test_training_replaces_clip_and_text_and_says_so(self, make):
        dataset = make(transform=whole_frames)
        seen = set()
        for epoch in range(12):
            sample = dataset[(epoch, 2)]
            row = sample["replaced_by"]
            assert sample["index"] == 2 and row in (0, 1, 3, 4)
            assert "gone.mp4" in sample["error"] and "no such file" in sample["error"]
            texts = ROWS[row][3] if isinstance(ROWS[row][3], list) else [ROWS[row][3]]
            assert tuple(sample["tokens"].tolist()) in {tuple(t.tolist()) for t in tokenize(texts)}
            low, high = 10 * ROWS[row][1], min(10 * ROWS[row][2], 340)
            assert all(low <= code < high for code in barcodes(sample))
            seen.add(row)
        assert len(seen) > 1

    def test_training_gives_up_after_so_many(self, make):
        rows = [("gone", 0.0, 1.0, "a"), ("lost", 0.0, 1.0, "b")]
        with pytest.raises(VideoError, match="clip 1 and 3 drawn in its place") as caught:
            make(rows=rows, max_replacements=3)[1]
        assert "\n" not in str(caught.value)
        with pytest.raises(VideoError, match="lost.mp4/0.mp4: no such file"):
            make(rows=rows, max_replacements=0)[1]

    def test_giving_up_in_a_worker_reaches_the_caller_as_one_line(self, make):
        dataset = make(rows=[("gone", 0.0, 1.0, "a")], max_replacements=1)
        loader = DataLoader(dataset, batch_size=None, sampler=[(0, 0)], num_workers=1, timeout=60)
        with pytest.raises(VideoError) as caught:
            list(loader)
        assert "gone.mp4" in str(caught.value) and "\n" not in str(caught.value)

    @pytest.mark.parametrize("fused, dtype", [(True, torch.uint8), (False, torch.float32)])
    def test_evaluation_gives_zeros_and_the_reason(self, make, fused, dtype):
        sample = make(False, fused=fused)[2]
        assert sample["video"].shape == (3, 4, 32, 32) and sample["video"].dtype == dtype
        assert not sample["video"].any()
        assert "gone.mp4" in sample["error"] and sample["replaced_by"] == -1 and sample["index"] == 2
        assert torch.equal(sample["tokens"], tokenize(ROWS[2][3])[0])

    def test_a_damaged_file_in_a_real_loader(self, tmp_path, make):
        write_video(tmp_path / "good.mp4/0.mp4", 40, fps=10)
        damaged = write_video(tmp_path / "bad.mp4/0.mp4", 40, fps=10)
        damaged.write_bytes(damaged.read_bytes()[:1500])
        table = table_of([("good", 0.0, 3.0, "a"), ("bad", 0.0, 3.0, "b")])
        dataset = ClipDataset(
            table, VideoStore(tmp_path), num_frames=2, transform=TrainTransform(16), tokenizer=None, train=True
        )
        loader = DataLoader(dataset, batch_size=None, sampler=[(0, 1), (0, 0)], num_workers=2, timeout=60)
        first, second = loader
        assert "bad.mp4/0.mp4" in first["error"] and first["replaced_by"] == 0
        assert second["error"] == ""

    def test_other_errors_are_not_swallowed(self, make):
        def broken(frames, rng):
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            make(transform=broken)[0]


class TestBadArguments:
    @pytest.mark.parametrize(
        "kwargs, message",
        [
            ({"rows": []}, "the dataset is empty"),
            ({"num_frames": 0}, "clip length 0"),
            ({"stride": 0}, "clip stride 0"),
            ({"sampling": "dense"}, "'dense' is not one of"),
            ({"seed": -1}, "seed -1"),
            ({"max_replacements": -1}, "max replacements -1"),
        ],
        ids=str,
    )
    def test_user_errors(self, make, kwargs, message):
        with pytest.raises(UserError, match=message):
            make(**kwargs)


def test_importing_the_dataset_loads_no_decoder():
    """A process that forks workers should not have run a decoder, and `--help` should not wait for one."""
    code = "import sys, avion.data.clip_dataset; print([m for m in ('av', 'decord', 'open_clip') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"
