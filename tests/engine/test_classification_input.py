"""Mistakes with action recognition: one line that says where, what and how to mend it; exit status 2."""

import re
import shutil

import pytest
import torch

import main_finetune_classification
import main_finetune_retrieval
from tests.engine.actions import TRAIN, VAL, csv_text
from tests.engine.test_finetune_classification import train, without


@pytest.fixture(scope="module")
def checkpoint(tiny_actions, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    train(tiny_actions.flags, folder, "--epochs", "1")
    return folder / "checkpoint.pt"


@pytest.fixture
def fails(tiny_actions, tmp_path, capsys):
    """Run the entry point with these flags after the usual ones, and return its one line."""

    def run(*more, drop=(), main=main_finetune_classification.main) -> str:
        words = [*without(tiny_actions.flags, *drop), "--output-dir", str(tmp_path / "run"), *map(str, more)]
        status = main(words)
        captured = capsys.readouterr()
        error = [line for line in captured.err.splitlines() if not re.match(r"\d\d:\d\d:\d\d [IW] ", line)]
        assert status == 2, captured.err
        assert "Traceback" not in captured.err and captured.out == "" and len(error) == 1, captured.err
        assert ": error: " in error[0]
        return error[0]

    return run


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--num-crops 2", r"--num-crops: invalid choice: 2"),
        ("--num-clips 0", "--num-clips: found '0', expected a whole number from 1"),
        ("--batch-size 3", "--batch-size 3: mixup and cutmix take clips in pairs"),
        ("--mixup -1", "--mixup: found '-1', expected a number from 0 to 1000"),
        ("--cutmix inf", "--cutmix: found 'inf'"),
        ("--cutmix-minmax 0.3", "--cutmix-minmax 0.3: two shares are required"),
        ("--cutmix-minmax 0.8 0.2", "two shares are required, the smaller one first"),
        ("--mixup-prob 1.5", "--mixup-prob: found '1.5', expected a number from 0 to 1"),
        ("--mixup-switch-prob nan", "--mixup-switch-prob: found 'nan'"),
        ("--mixup-mode half", "--mixup-mode: invalid choice"),
        ("--smoothing 1", "--smoothing: found '1', expected a number from 0 to below 1"),
        ("--dropout-rate 1", "--dropout-rate: found '1'"),
        ("--num-classes 3806.0", "--num-classes: found '3806.0', expected a whole number"),
        ("--num-classes 3806", r"--num-classes 3806: .*train.csv and .*val.csv hold 6 actions"),
        ("--sls-pt 6", "--sls-pt: found '6', expected a whole number from 0 to 5"),
        ("--submission out.tar", "--submission out.tar: .*ends in .zip"),
        ("--pickle-filename /proc/none/p.pkl", "--pickle-filename /proc/none/p.pkl: /proc/none cannot be made"),
        ("--dataset ek100_mir", "--dataset: invalid choice"),
        ("--root nowhere", "--root nowhere: no such folder"),
        ("--train-metadata nowhere.csv", "nowhere.csv: no such file"),
        ("--val-metadata nowhere.csv", "nowhere.csv: no such file"),
        ("--pretrain-model nowhere.pt", "nowhere.pt: no such file"),
        ("--resume nowhere.pt", "nowhere.pt: no such file"),
        ("--tail-verbs nowhere.csv", "nowhere.csv: no such file"),
    ],
)
def test_flags(flags, message, fails):
    assert re.search(message, fails(*flags.split()))


def test_no_pretrained_model(fails):
    assert "--pretrain-model: not given" in fails(drop=["--pretrain-model"])


def test_odd_batches_are_fine_without_mixing(tiny_actions, tmp_path):
    checkpoint = train(tiny_actions.flags, tmp_path, *"--batch-size 3 --mixup 0 --cutmix 0 --epochs 1".split())
    assert checkpoint["epoch"] == 1


@pytest.mark.parametrize(
    "flag, name, old, new, message",
    [
        ("--train-metadata", "train.csv", "verb_class", "verb_number", "'verb_class' is missing, though 'noun_class'"),
        (
            "--train-metadata",
            "train.csv",
            ",noun10,10,",
            ",noun10,300,",
            "line 4: noun_class: class 300 does not exist",
        ),
        ("--val-metadata", "val.csv", ",verb96,96,", ",verb96,97,", "line 7: verb_class: class 97 does not exist"),
        ("--val-metadata", "val.csv", "stop_timestamp", "end", "'stop_timestamp' is missing"),
        ("--val-metadata", "val.csv", "P01_01_v1", "P01_01_v0", "'P01_01_v0' stands in line 2 already"),
        ("--tail-nouns", "tail_nouns.csv", "1", "300", "tail_nouns.csv: line 2: noun: class 300 does not exist"),
        ("--tail-verbs", "tail_verbs.csv", "96", "take", "'take' is not a class number"),
        ("--unseen-participants", "unseen.csv", "P02", "P37", "'P37' has no clip in the evaluation data"),
    ],
)
def test_annotations(flag, name, old, new, message, fails, tiny_actions, tmp_path):
    text = (tiny_actions.root / name).read_text()
    assert old in text
    (tmp_path / name).write_text(text.replace(old, new, 1))
    line = fails(flag, tmp_path / name)
    assert message in line and name in line


def test_unlabelled_clips_cannot_be_trained_on_or_listed(fails, tiny_actions, tmp_path):
    test = tiny_actions.root / "test.csv"
    assert "test.csv: has no columns verb_class and noun_class" in fails("--val-metadata", test)
    assert "test.csv: has no columns verb_class" in fails("--train-metadata", test)
    assert "test.csv: has no columns verb_class" in fails("--evaluate", "--val-metadata", test)


def test_a_dual_encoder_is_no_classifier_to_go_on_from(fails, tiny_actions):
    pretrained = tiny_actions.root / "pretrained.pt"
    for more in ([], ["--evaluate"]):
        line = fails("--resume", pretrained, *more)
        assert "pretrained.pt: has no classification head" in line and "--pretrain-model" in line


def test_a_classifier_is_no_start_for_two_towers(fails, checkpoint, mir_flags):
    assert "is a fine-tuned classifier without a text tower" in fails("--pretrain-model", checkpoint)
    for flags in (["--pretrain-model", checkpoint], ["--resume", checkpoint, "--evaluate"]):
        line = fails(*mir_flags, *flags, drop=["--root"], main=_retrieval)
        assert "is a fine-tuned classifier without a text tower" in line


def _retrieval(words):
    return main_finetune_retrieval.main(words)


def test_the_annotations_of_another_list(fails, checkpoint, tmp_path):
    (tmp_path / "train.csv").write_text(csv_text([*TRAIN, ("P01_01", 0.0, 1.0, 7, 7)], ""))
    line = fails("--resume", checkpoint, "--train-metadata", tmp_path / "train.csv")
    assert "its list of 6 actions is not that of the annotations (7 actions)" in line and "checkpoint.pt" in line
    # As many actions, but others.
    (tmp_path / "val.csv").write_text(csv_text([*VAL[:5], ("P02_07", 4.0, 5.5, 96, 298), VAL[6]], "v"))
    assert "its list of 6 actions is not" in fails("--resume", checkpoint, "--val-metadata", tmp_path / "val.csv")


def test_class_counts(fails, checkpoint, tmp_path, tiny_actions):
    assert "has a head of 6 classes" in fails("--evaluate", "--resume", checkpoint, "--num-classes", "5")
    content = torch.load(checkpoint, weights_only=False)
    del content["classifier"]  # as upstream's: the list has to come from the annotations
    torch.save(content, tmp_path / "up.pt")
    for name, clips in (("train.csv", TRAIN[:3]), ("val.csv", VAL[:2])):
        (tmp_path / name).write_text(csv_text(clips, name[0]))
    annotations = ["--train-metadata", tmp_path / "train.csv", "--val-metadata", tmp_path / "val.csv"]
    line = fails("--evaluate", "--resume", tmp_path / "up.pt", *annotations)
    assert "has a head of 6 classes and no list of them, the annotations hold" in line
    test = tiny_actions.root / "test.csv"
    assert "test.csv: has no columns" in fails("--evaluate", "--resume", tmp_path / "up.pt", "--val-metadata", test)


def test_a_list_in_a_checkpoint_is_not_believed(fails, checkpoint, tmp_path):
    content = torch.load(checkpoint, weights_only=False)
    content["classifier"]["actions"][2] = "12:one"
    torch.save(content, tmp_path / "odd.pt")
    line = fails("--evaluate", "--resume", tmp_path / "odd.pt")
    assert "odd.pt: list of actions: '12:one' is not an action" in line


def test_no_clip_can_be_read(fails, tiny_actions, tmp_path, checkpoint):
    (tmp_path / "videos").mkdir()
    source = next((tiny_actions.root.parent / "val").glob("P01/*/*.MP4"))
    (tmp_path / "videos/P77/P77_01.MP4").mkdir(parents=True)
    shutil.copy(source, tmp_path / "videos/P77/P77_01.MP4/0.MP4")
    line = fails("--evaluate", "--resume", checkpoint, "--root", tmp_path / "videos")
    assert "no clip can be read" in line and "P01_01" in line
    assert "--strict-data" in fails(
        "--evaluate", "--resume", checkpoint, "--root", tmp_path / "videos", "--strict-data"
    )


def test_another_normalisation(fails, checkpoint):
    assert "give --norm-style openai" in fails("--evaluate", "--resume", checkpoint, "--norm-style", "timm")
