"""From raw videos and a table of captions to recall: preparation, training, validation."""

import csv
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest

import main_finetune_retrieval
import main_pretrain
from avion.commands import prepare_videos
from avion.engine.args import parse
from avion.engine.distributed import World
from avion.engine.options import PretrainOptions
from avion.engine.tasks.evaluations import CaptionEvaluation
from avion.engine.tasks.pretrain import Pretrain
from avion.engine.tasks.sources import parse_weighted
from avion.errors import UserError
from tests.videos import barcode_frame, write_video

MODEL = (
    "--model TIMEMAMBA_VITB16 --model-args depth=2 embed_dim=32 num_heads=2 img_size=32 text_width=32 text_heads=2 "
    "text_layers=1 --clip-length 2 --project-embed-dim 16 --context-length 16 --pretrain-zoo none --device cpu "
    "--workers 0 --batch-size 4 --print-freq 1 --fix-lr --lr 1e-3 --fused-decode-crop"
).split()
SIZES = [(64, 96), (97, 65), (120, 90), (75, 101)]  # height, width


def write_odd(path, index):
    """Raw videos of every kind: sizes (odd ones in 4:4:4), rates, rotations, containers, sound."""
    height, width = SIZES[index % len(SIZES)]
    if height % 2 == 0 and width % 2 == 0:
        rotation = (0, 90, 180, 270)[index % 4]
        return write_video(
            path,
            60,
            first=100 * index,
            fps=(30, 25, 12)[index % 3],
            height=height,
            width=width,
            rotation=rotation,
            with_audio=index % 2 == 0,
        )
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv444p"
        for i in range(50):
            picture = barcode_frame(100 * index + i, height, width)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Twelve raw videos, one of them broken, prepared; captions of all of them as a CSV."""
    root = tmp_path_factory.mktemp("own")
    rows = []
    (root / "raw" / "day2").mkdir(parents=True)
    for i in range(12):
        name = f"{'day2/' if i % 2 else ''}v{i}"
        path = root / "raw" / f"{name}.{('mp4', 'mkv', 'mov')[i % 3] if i % 4 in (0, 2) else 'mkv'}"
        write_odd(path, i)
        if i == 7:
            path.write_bytes(path.read_bytes()[:900])
        rows.append([path.relative_to(root / "raw"), 0.2, 1.4, f"a person opens door {i}"])
        rows.append([path.relative_to(root / "raw"), 0.2, 1.4, f"door number {i} is being opened"])
        rows.append([path.relative_to(root / "raw"), "", "", f"a film about door {i}"])
    with open(root / "captions.csv", "w", newline="") as file:
        csv.writer(file).writerows([["video", "start", "end", "caption"], *rows])
    status = prepare_videos.main([str(root / "raw"), str(root / "videos"), "--short-side", "48"])
    return SimpleNamespace(root=root, status=status, captions=str(root / "captions.csv"), videos=str(root / "videos"))


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def pretrain(own, output, *flags):
    words = [*MODEL, "--root", own.videos, "--train-metadata", own.captions, "--output-dir", str(output), *flags]
    return main_pretrain.main(words)


def test_from_raw_videos_to_recall(own, tmp_path, capsys):
    assert own.status == 1, "one of the raw videos is broken, which is said and costs nothing else"
    assert len(list(Path(own.videos).rglob("*.mp4"))) == 11
    flags = ["--root-val", own.videos, "--val-metadata", own.captions, "--epochs", "2"]
    assert pretrain(own, tmp_path, *flags) == 0
    epochs, evaluations = lines(tmp_path / "log.txt"), lines(tmp_path / "eval_log.txt")
    assert len(epochs) == len(evaluations) == 2
    last = evaluations[-1]
    assert (last["clips"], last["unreadable"]) == (22, 2)
    assert 0 <= last["vis_r1"] <= last["vis_r5"] <= last["vis_r10"] <= 1 <= last["txt_median_rank"] <= 33
    assert epochs[-1]["test_avg_recall"] == last["avg_recall"] and epochs[-1]["train_replaced_clips"] >= 0
    assert (tmp_path / "checkpoint_best.pt").exists()
    assert "packet index" in (tmp_path / "train.log").read_text()
    words = "--clip-length 2 --device cpu --workers 0 --batch-size 4 --fused-decode-crop --evaluate".split()
    words += ["--root-val", own.videos, "--val-metadata", own.captions]
    capsys.readouterr()
    assert main_pretrain.main([*words, "--resume", str(tmp_path / "checkpoint.pt")]) == 0
    printed = capsys.readouterr().out
    assert "R@1" in printed and "median" in printed and "22 clips (2 could not be read)" in printed


def test_without_validation(own, tmp_path):
    assert pretrain(own, tmp_path, "--val-metadata", "none", "--epochs", "1") == 0
    (row,) = lines(tmp_path / "log.txt")
    assert not [name for name in row if name.startswith("test_")]
    assert (tmp_path / "checkpoint.pt").exists() and not (tmp_path / "checkpoint_best.pt").exists()
    assert not (tmp_path / "eval_log.txt").exists() or not lines(tmp_path / "eval_log.txt")


def test_held_out_videos(own, tmp_path):
    task = make_task(own, "--val-fraction", "0.25")
    (source,), held = task.sources, task.evaluation.clips
    assert isinstance(task.evaluation, CaptionEvaluation) and len(set(held.videos)) == 3
    assert not set(held.videos) & set(source.table.videos) and len(held) + len(source.table) == 24
    again = make_task(own, "--val-fraction", "0.25", "--seed", "5")
    assert again.evaluation.clips.videos == held.videos, "the seed of training does not change what is held out"
    aux = make_task(own, "--val-fraction", "0.25", "--train-metadata-aux", f"{own.captions}:0.5")
    assert not [v for s in aux.sources for v in s.table.videos if v in held.videos], "neither do other files leak them"
    assert pretrain(own, tmp_path, "--val-fraction", "0.25", "--epochs", "1") == 0
    assert lines(tmp_path / "eval_log.txt")[0]["clips"] <= 6


def make_task(own, *flags):
    words = [*MODEL, "--root", own.videos, "--train-metadata", own.captions, *flags]
    return Pretrain(parse(PretrainOptions, words, "main_pretrain.py", ""), World())


def test_mixed_sources_of_two_roots(own, tmp_path):
    other = tmp_path / "other"
    write_video(other / "x.mp4", 60, first=3000)
    shutil.copy(own.captions, tmp_path / "more.csv")
    rows = [{"clip": "x", "said": ["one", "two"], "from": 0.1 * i} for i in range(8)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    same = [{"clip": f"v{i}", "said": "again", "from": 0} for i in (0, 2)]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in same))
    with open(tmp_path / "main.jsonl", "w") as file:
        file.writelines(json.dumps({"clip": f"v{i}", "said": f"film {i}", "from": 0}) + "\n" for i in (0, 2, 4, 6, 8))
    flags = [
        "--train-metadata",
        str(tmp_path / "main.jsonl"),
        "--caption-columns",
        "video=clip",
        "caption=said",
        "start=from",
        "--train-metadata-aux",
        str(tmp_path / "s.jsonl"),
        f"{tmp_path / 'x.jsonl'}:1.5",
        "--root-aux",
        "-",
        str(other),
        "--val-metadata",
        "none",
        "--epochs",
        "1",
    ]
    task = make_task(own, *flags)
    assert [(len(s.table), s.root, s.weight) for s in task.sources] == [(7, own.videos, 1.0), (8, str(other), 1.5)]
    assert pretrain(own, tmp_path / "out", *flags) == 0
    (row,) = lines(tmp_path / "out" / "log.txt")
    assert row["global_step"] == (7 + 12) // 4 and row["train_replaced_clips"] == 0


def test_retrieval_fine_tuning_on_captions(own, tmp_path, capsys):
    assert pretrain(own, tmp_path / "a", "--val-metadata", "none", "--epochs", "1") == 0
    words = [
        "--pretrain-model",
        str(tmp_path / "a" / "checkpoint.pt"),
        "--root",
        own.videos,
        "--train-metadata",
        own.captions,
        "--clip-length",
        "2",
        "--epochs",
        "1",
        "--batch-size",
        "4",
        "--workers",
        "0",
        "--device",
        "cpu",
    ]
    for name, flags in (("b", ["--val-metadata", own.captions]), ("c", ["--val-fraction", "0.3"])):
        assert main_finetune_retrieval.main([*words, *flags, "--output-dir", str(tmp_path / name)]) == 0
        assert 0 <= lines(tmp_path / name / "eval_log.txt")[0]["avg_recall"] <= 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--val-fraction", "0.2", "--val-metadata", "x.csv"], "--val-fraction and --val-metadata"),
        (["--evaluate", "--val-metadata", "none"], "there is nothing to evaluate on"),
        (["--val-metadata", "there.txt"], "--val-metadata there.txt: is neither"),
        (["--val-metadata", "x.jsonl"], "--val-metadata x.jsonl: no such file"),
        (["--val-fraction", "0.999"], "cannot be shared out"),
        (["--train-metadata-aux", "x.csv:often"], "the weight behind the colon"),
        (["--train-metadata-aux", "x.csv:-1"], "the weight behind the colon"),
        (["--root-aux", "videos"], "1 folders for 0 files"),
        (["--caption-columns", "text"], "--caption-columns text"),
        (["--val-metadata", "none", "--root", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_cost_one_line(own, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.txt").write_text("x")
    if "--val-metadata" not in flags and "--val-fraction" not in flags:
        flags = [*flags, "--val-metadata", "none"]
    assert pretrain(own, tmp_path / "out", *flags, "--epochs", "1") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error


def test_a_weight_is_told_from_a_name(tmp_path):
    assert parse_weighted("a.csv") == ("a.csv", 1.0) and parse_weighted("a.csv:0.25") == ("a.csv", 0.25)
    (tmp_path / "a:2").write_text("x")
    assert parse_weighted(str(tmp_path / "a:2")) == (str(tmp_path / "a:2"), 1.0)
    assert parse_weighted("s3://bucket/a.csv") == ("s3://bucket/a.csv", 1.0)
    with pytest.raises(UserError):
        parse_weighted("a.csv:0")


def test_a_clip_that_cannot_be_read_takes_its_texts_with_it():
    evaluation = CaptionEvaluation.__new__(CaptionEvaluation)
    evaluation.clips, evaluation.clip_of = range(3), np.array([0, 1, 1, 2])
    similarity = np.array([[0.9, 0.0, 0.0, 0.1], [0.5, 0.5, 0.5, 0.5], [0.2, 0.99, 0.99, 0.3]])
    found = evaluation.metrics(similarity, np.array([0, 2]))
    # Clips 0 and 2 against texts 0 and 3: 0.9 over 0.1; 0.3 over 0.2. Text 0: 0.9 over 0.2; text 3: 0.3 over 0.1.
    assert found["vis_r1"] == found["txt_r1"] == 1.0
