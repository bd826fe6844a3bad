"""AVION's datasets as people's scripts call them."""

import argparse
import inspect
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from avion.data.clip_dataset import VideoCaptionDatasetCLIP, VideoClassyDataset, get_downstream_dataset
from avion.data.tokenizer import tokenize
from avion.errors import UserError
from tests.videos import read_barcode

EGO4D = [
    ("abc", 1.0, 6.0, "take the cup"),
    ("abc", 13.0, 17.0, ["put the cup", "place the cup", "set the cup down"]),
    ("abc", 20.0, 29.0, "open the door"),
    ("abc", 32.0, 36.0, "run past the end"),
]
COLUMNS = (
    "narration_id participant_id video_id narration_timestamp start_timestamp stop_timestamp start_frame stop_frame "
    "narration verb verb_class noun noun_class all_nouns all_noun_classes"
).split()
# (start, stop, narration, verb class, noun class)
CLIPS = [
    (13.0, 17.0, "put cup", 1, 4),
    (1.0, 3.0, "take cup", 0, 4),
    (4.0, 6.0, "wash pan", 2, 13),
    (20.0, 22.0, "take cup", 0, 4),
]
SENTENCES = ["put the cup", "take a cup", "wash the pan", "take the pan"]
RELEVANCY = np.array([[1.0, 0.5, 0.0, 0.0], [0.5, 1.0, 0.0, 0.3], [0.1, 0.0, 0.1, 0.0], [0.0, 0.75, 0.0, 0.1]])


@pytest.fixture
def ego4d(tmp_path):
    path = tmp_path / "ego4d_train.pkl"
    path.write_bytes(pickle.dumps(EGO4D))
    return path


@pytest.fixture
def split(tmp_path):
    """A function that writes a split of EPIC-KITCHENS-100 as its files are; returns the CSV."""

    def write(name="EPIC_100_retrieval_train", relevancy=RELEVANCY):
        rows = [",".join(COLUMNS)]
        for i, (start, stop, narration, verb, noun) in enumerate(CLIPS):
            word, thing = narration.split()
            times = f"00:00:00.00,00:00:{start:05.2f},00:00:{stop:05.2f},{10 * start:.0f},{10 * stop:.0f}"
            rows.append(f"P01_01_{i},P01,P01_01,{times},{narration},{word},{verb},{thing},{noun},['{thing}'],[{noun}]")
        path = tmp_path / f"{name}.csv"
        path.write_text("\n".join(rows) + "\n")
        sentences = [f"P01_01_{i},{text}" for i, text in enumerate(SENTENCES)]
        (tmp_path / f"{name}_sentence.csv").write_text("\n".join(["narration_id,narration", *sentences]) + "\n")
        folder = tmp_path / "relevancy"
        folder.mkdir(exist_ok=True)
        kind = name.rpartition("_")[2]
        (folder / f"caption_relevancy_EPIC_100_retrieval_{kind}.pkl").write_bytes(pickle.dumps(relevancy))
        return path

    return write


def test_arguments_stand_where_avions_stand():
    parameters = list(inspect.signature(VideoCaptionDatasetCLIP).parameters.values())
    assert {p.name: p.default for p in parameters[3:]} == {
        "transform": None,
        "is_training": True,
        "tokenizer": None,
        "chunk_len": 300,
        "clip_length": 32,
        "clip_stride": 2,
        "threads": 1,
        "fast_rrc": False,
        "rrc_params": (224, (0.5, 1.0)),
        "fast_rcc": False,
        "rcc_params": (224,),
        "subsample_stride": None,
    }
    assert [p.name for p in parameters[:3]] == ["dataset", "root", "metadata"]


# ---- Ego4D -------------------------------------------------------------------------------------


def test_plain_frames_tokens_and_no_relevancy(chunked, ego4d):
    dataset = VideoCaptionDatasetCLIP(
        "ego4d", chunked.avion, ego4d, is_training=False, tokenizer=tokenize, chunk_len=15, clip_length=4
    )
    frames, tokens, relevancy = dataset[0]
    assert len(dataset) == 4
    assert frames.shape == (4, 64, 96, 3) and frames.dtype == torch.float32
    assert [read_barcode(f.numpy()) for f in frames] == [16, 28, 41, 53]  # middles of [10, 60)
    assert torch.equal(tokens, tokenize("take the cup")[0])
    assert relevancy == 0.0 and type(relevancy) is float


def test_transform_and_text_without_tokenizer(chunked, ego4d):
    dataset = VideoCaptionDatasetCLIP(
        "ego4d", chunked.avion, ego4d, transform=lambda x: x.permute(3, 0, 1, 2) / 255, chunk_len=15, clip_length=2
    )
    frames, text, _ = dataset[0]
    assert frames.shape == (3, 2, 64, 96) and frames.min() >= 0 and frames.max() <= 1
    assert text == "take the cup"


def test_one_of_several_wordings_is_drawn_in_training(chunked, ego4d):
    training = VideoCaptionDatasetCLIP("ego4d", chunked.avion, ego4d, chunk_len=15, clip_length=1)
    assert {training[1][1] for _ in range(40)} == set(EGO4D[1][3])
    evaluation = VideoCaptionDatasetCLIP("ego4d", chunked.avion, ego4d, is_training=False, chunk_len=15, clip_length=1)
    assert {evaluation[1][1] for _ in range(5)} == {"put the cup"}


@pytest.mark.parametrize(
    "crop", [{"fast_rrc": True, "rrc_params": (24, (0.5, 1.0))}, {"fast_rcc": True, "rcc_params": (24,)}]
)
def test_fast_crops(chunked, ego4d, crop):
    dataset = VideoCaptionDatasetCLIP("ego4d", chunked.avion, ego4d, chunk_len=15, clip_length=4, **crop)
    frames, _, _ = dataset[0]
    assert frames.shape == (4, 24, 24, 3) and frames.dtype == torch.float32


def test_whole_files_and_torch_seed(chunked, ego4d):
    dataset = VideoCaptionDatasetCLIP("ego4d", chunked.whole, ego4d, chunk_len=-1, clip_length=4)
    torch.manual_seed(3)
    first = dataset[3][0]
    second = dataset[3][0]
    torch.manual_seed(3)
    assert torch.equal(dataset[3][0], first) and not torch.equal(first, second)


@pytest.mark.parametrize("stride", [1, 2, 3, 9])
def test_every_so_manyth_clip(chunked, ego4d, stride):
    dataset = VideoCaptionDatasetCLIP(
        "ego4d", chunked.avion, ego4d, is_training=False, chunk_len=15, clip_length=1, subsample_stride=stride
    )
    wanted = [row[3] if isinstance(row[3], str) else row[3][0] for row in EGO4D[::stride]]
    assert [text for _, text, _ in (dataset[i] for i in range(len(dataset)))] == wanted
    assert [row.texts[0] for row in dataset.samples] == wanted
    with pytest.raises(IndexError):
        dataset[len(wanted)]


# ---- EPIC-KITCHENS-100 -------------------------------------------------------------------------


def test_evaluation_is_the_clips_own_narration(chunked, split):
    """No sentences and no relevancy are looked for."""
    path = split("EPIC_100_retrieval_test")
    (path.parent / "EPIC_100_retrieval_test_sentence.csv").unlink()
    dataset = VideoCaptionDatasetCLIP("ek100_mir", chunked.ek, path, is_training=False, chunk_len=15, clip_length=4)
    frames, text, relevancy = dataset[0]
    assert [read_barcode(f.numpy()) for f in frames] == [135, 145, 155, 165]
    assert text == "put cup" and relevancy == 1 and len(dataset) == 4


@pytest.mark.parametrize("stride", [None, 2, 3])
def test_training_draws_a_sentence_of_relevancy_above_a_tenth(chunked, split, stride, caplog):
    """Of the sentence list's own text, each as likely, with its relevancy; clip 2 has none, and is left out."""
    dataset = VideoCaptionDatasetCLIP(
        "ek100_mir", chunked.ek, split(), chunk_len=15, clip_length=1, subsample_stride=stride
    )
    taken = [i for i in range(0, 4, stride or 1) if i != 2]
    assert len(dataset) == len(taken)
    if stride != 3:
        assert "1 clips without a relevant sentence are left out" in caplog.text
    for place, clip in enumerate(taken):
        drawn = Counter((text, relevancy) for _, text, relevancy in (dataset[place] for _ in range(60)))
        positives = {(SENTENCES[j], RELEVANCY[clip, j]) for j in range(4) if RELEVANCY[clip, j] > 0.1}
        assert {text for text, _ in drawn} == {text for text, _ in positives}
        assert sorted(r for _, r in drawn) == pytest.approx(sorted(r for _, r in positives))
        # 60 fair draws: five deviations are less than 20.
        assert all(abs(count - 60 / len(positives)) < 20 for count in drawn.values())
        assert dataset[place - len(dataset)][1] in {text for text, _ in positives}


def test_a_sentence_too_many_in_the_relevancy_is_never_drawn(chunked, split):
    """As in LaViLa's copy of the train split."""
    path = split(relevancy=np.hstack([RELEVANCY, np.ones((4, 1))]))
    dataset = VideoCaptionDatasetCLIP("ek100_mir", chunked.ek, path, chunk_len=15, clip_length=1)
    assert {dataset[0][1] for _ in range(30)} == {"put the cup", "take a cup"}


def test_batches_of_a_loader(chunked, split):
    dataset = VideoCaptionDatasetCLIP("ek100_mir", chunked.ek, split(), tokenizer=tokenize, chunk_len=15, clip_length=2)
    frames, tokens, relevancy = next(iter(DataLoader(dataset, batch_size=3, num_workers=1, timeout=60)))
    assert frames.shape == (3, 2, 64, 96, 3) and tokens.shape == (3, 77)
    assert relevancy.shape == (3,) and relevancy.dtype is torch.float64 and (relevancy > 0.1).all()


def test_actions_as_texts_and_as_classes(chunked, split):
    path = split()
    captions = VideoCaptionDatasetCLIP(
        "ek100_cls", chunked.ek, path, chunk_len=15, clip_length=1, subsample_stride=2, is_training=False
    )
    assert [captions[i][1:] for i in range(2)] == [("1:4", 0.0), ("2:13", 0.0)]
    plain = VideoClassyDataset("ek100_cls", chunked.ek, path, is_training=False, chunk_len=15, clip_length=4)
    frames, label = plain[0]
    assert [read_barcode(f.numpy()) for f in frames] == [135, 145, 155, 165] and label == "1:4"
    mapping = {"0:4": 0, "1:4": 1, "2:13": 2}
    classes = VideoClassyDataset(
        "ek100_cls", chunked.ek, path, lambda x: [x[:, :8], x[:, 8:16]], True, mapping, chunk_len=15, clip_length=1
    )
    assert [classes[i][1] for i in range(4)] == [1, 0, 2, 0] and len(classes[0][0]) == 2


@pytest.mark.parametrize("subset, fused", [("train", False), ("train", True), ("val", False), ("val", True)])
def test_the_downstream_datasets(chunked, split, subset, fused):
    args = argparse.Namespace(
        dataset="ek100_cls",
        root=chunked.ek,
        train_metadata=split(),
        val_metadata=split("EPIC_100_validation"),
        num_clips=1,
        video_chunk_length=15,
        clip_length=2,
        clip_stride=2,
        decode_threads=1,
        fused_decode_crop=fused,
    )
    dataset = get_downstream_dataset(None, 24, args, subset=subset, label_mapping={"0:4": 5, "1:4": 6, "2:13": 7})
    first, second = dataset[0], dataset[0]
    assert first[0].shape == ((2, 24, 24, 3) if fused else (2, 64, 96, 3)) and first[1] == 6
    assert dataset.metadata == (args.train_metadata if subset == "train" else args.val_metadata)
    assert torch.equal(first[0], second[0]) is (subset == "val")  # jitter, and a random box
    with pytest.raises(UserError, match="subset: 'test' is not one of train, val"):
        get_downstream_dataset(None, 24, args, subset="test")
    with pytest.raises(UserError, match="action '2:13' is not in label_mapping"):
        get_downstream_dataset(None, 24, args, subset=subset, label_mapping={"0:4": 5, "1:4": 6})
    args.num_clips = 3
    with pytest.raises(UserError, match="num_clips=3.*main_finetune_classification.py --num-clips"):
        get_downstream_dataset(None, 24, args, subset=subset)


# ---- what is wrong -----------------------------------------------------------------------------


def test_errors(chunked, ego4d):
    with pytest.raises(UserError, match="'kinetics' is not one of ego4d, ek100_mir, ek100_cls"):
        VideoCaptionDatasetCLIP("kinetics", chunked.avion, ego4d)
    with pytest.raises(UserError, match="only one"):
        VideoCaptionDatasetCLIP("ego4d", chunked.avion, ego4d, fast_rrc=True, fast_rcc=True)
    with pytest.raises(TypeError):
        VideoCaptionDatasetCLIP("ego4d", chunked.avion, ego4d, clip_lenght=4)
    for stride in (0, -1, 2.0, True, "2"):
        with pytest.raises(UserError, match="subsample_stride: .* is not a whole number of at least 1"):
            VideoCaptionDatasetCLIP("ego4d", chunked.avion, ego4d, subsample_stride=stride)
    with pytest.raises(UserError, match="clip_length: 0"):
        VideoCaptionDatasetCLIP("ego4d", chunked.avion, ego4d, clip_length=0)
    with pytest.raises(UserError, match="'ego4d' has no classes"):
        VideoClassyDataset("ego4d", chunked.avion, ego4d)


def test_files_that_training_needs_are_named(chunked, split, tmp_path):
    odd = split("EPIC_100_retrieval_all")
    with pytest.raises(UserError, match="its name has neither 'train' nor 'test'"):
        VideoCaptionDatasetCLIP("ek100_mir", chunked.ek, odd)
    path = split(relevancy=np.full((4, 4), 0.1))
    with pytest.raises(UserError, match="no clip of .* has a sentence of relevancy above 0.1"):
        VideoCaptionDatasetCLIP("ek100_mir", chunked.ek, path)
    (tmp_path / "relevancy/caption_relevancy_EPIC_100_retrieval_train.pkl").unlink()
    with pytest.raises(UserError, match="relevancy .*caption_relevancy_EPIC_100_retrieval_train.pkl: no such file"):
        VideoCaptionDatasetCLIP("ek100_mir", chunked.ek, path)


def test_classes_that_the_annotations_lack(chunked, split):
    path = split()
    lines = [line.split(",") for line in path.read_text().splitlines()]
    path.write_text("\n".join(",".join(cells[:9]) for cells in lines) + "\n")  # up to the narration
    with pytest.raises(UserError, match="the columns 'verb_class' and 'noun_class' are missing"):
        VideoClassyDataset("ek100_cls", chunked.ek, path)
