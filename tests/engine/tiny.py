"""A dataset in the real formats, small enough to train on within a test, and the flags to do so."""

import csv
import pickle
from pathlib import Path

import numpy as np

from tests.videos import write_video

CHUNK_S, FPS, CHUNKS = 3, 10, 2
CSV_COLUMNS = (
    "narration_id participant_id video_id narration_timestamp start_timestamp stop_timestamp start_frame stop_frame "
    "narration verb verb_class noun noun_class all_nouns all_noun_classes"
).split()
# (narration id, video, start, stop, verb class, noun class); seven clips divide by no number of processes.
EVAL_CLIPS = [
    ("P01_01_0", "P01_01", 0.0, 1.0, 0, 0),
    ("P01_01_1", "P01_01", 1.0, 2.5, 0, 1), ("P01_01_2", "P01_01", 2.5, 4.0, 1, 0),
    ("P02_07_0", "P02_07", 0.5, 1.5, 1, 1),
    ("P02_07_1", "P02_07", 1.5, 3.5, 2, 2), ("P02_07_2", "P02_07", 4.0, 5.5, 0, 0),
    ("P02_07_3", "P02_07", 3.0, 4.5, 2, 0),
]  # fmt: skip
VERBS, NOUNS = ("open", "close", "wash"), ("door", "drawer", "pan")
# Clips of the same two videos to fine-tune on: of 14 there are sentences that fit 12.
TRAIN_CLIPS = [
    (f"{v}_9{i}", v, 0.4 * i, 0.4 * i + 1.1, i % 3, (i + k) % 3)
    for k, v in enumerate(("P01_01", "P02_07"))
    for i in range(6)
]
ODD_CLIPS = [("P01_01_80", "P01_01", 1.0, 2.0, 3, 3), ("P02_07_80", "P02_07", 2.0, 3.0, 3, 3)]


def _write_chunks(folder: Path, first: int) -> None:
    for k in range(CHUNKS):
        count = CHUNK_S * FPS
        name = f"{k * CHUNK_S}{folder.suffix}"
        write_video(folder / name, count, first=first + k * count, fps=FPS, width=48, height=40)


def write_split(root: Path, name: str, clips: list[tuple], unspoken: tuple[int, ...] = ()) -> None:
    """{name}.csv, {name}_sentence.csv without the sentences of verb classes `unspoken`, {name}_relevancy.pkl"""
    verbs, nouns = (*VERBS, "dance"), (*NOUNS, "floor")
    rows = []
    for narration_id, video, start, stop, verb, noun in clips:
        values = [
            narration_id,
            video[:3],
            video,
            "00:00:00.00",
            f"00:00:{start:05.2f}",
            f"00:00:{stop:05.2f}",
            0,
            1,
            f"{verbs[verb]} {nouns[noun]}",
            verbs[verb],
            verb,
            nouns[noun],
            noun,
            f"['{nouns[noun]}']",
            f"[{noun}]",
        ]
        rows.append(dict(zip(CSV_COLUMNS, values, strict=True)))
    unique = {row["narration"]: row for row in reversed(rows) if row["verb_class"] not in unspoken}
    sentences = sorted(unique.values(), key=lambda row: row["narration_id"])
    for suffix, columns, content in (("", CSV_COLUMNS, rows), ("_sentence", ["narration_id", "narration"], sentences)):
        with open(root / f"{name}{suffix}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(content)
    relevancy = np.array([[((a["verb"] == b["verb"]) + (a["noun"] == b["noun"])) / 2 for b in sentences] for a in rows])
    (root / f"{name}_relevancy.pkl").write_bytes(pickle.dumps(relevancy))


def _write_annotations(root: Path) -> None:
    write_split(root, "val", EVAL_CLIPS)
    (root / "val_relevancy.pkl").rename(root / "relevancy.pkl")
    narrations = [
        (f"video{v}", 0.7 * i, 0.7 * i + 1.2, f"#C C {VERBS[i % 3]}s the {NOUNS[v % 3]}")
        for v in range(4)
        for i in range(6)
    ]
    (root / "train.pkl").write_bytes(pickle.dumps(narrations))


MODEL = (
    "--model TIMEMAMBA_VITT16 --model-args img_size=32 embed_dim=32 depth=2 num_heads=2 text_width=32 text_heads=2 "
    "text_layers=1 --context-length 12 --project-embed-dim 16 --pretrain-zoo none --clip-length 2"
).split()
SCHEDULE = "--batch-size 4 --epochs 2 --lr 1e-3 --workers 0 --print-freq 2 --device cpu".split()
# A complete, quick training run, but for the data and `--output-dir`.
RUN = [*MODEL, *SCHEDULE]


def write_tiny_data(root: Path) -> list[str]:
    """Write 24 training clips, 7 evaluation clips and 6 sentences. Returns the flags that name them."""
    for v in range(4):
        _write_chunks(root / f"train/video{v}.mp4", first=100 * v)
    for v, video in enumerate(("P01_01", "P02_07")):
        _write_chunks(root / f"val/{video[:3]}/{video}.MP4", first=1000 + 100 * v)
    _write_annotations(root)
    flags = [
        "--root",
        root / "train",
        "--root-val",
        root / "val",
        "--train-metadata",
        root / "train.pkl",
        "--val-metadata",
        root / "val.csv",
        "--relevancy-path",
        root / "relevancy.pkl",
        "--video-chunk-length",
        CHUNK_S,
    ]
    return [str(f) for f in flags]
