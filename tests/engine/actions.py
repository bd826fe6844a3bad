"""A small action-recognition dataset in the real formats, on the videos of `tiny_data`, and models to start from."""

import csv
import io
from pathlib import Path
from types import SimpleNamespace

import torch

from avion.constants import NORM_STYLES
from avion.models import create_model
from avion.weights import save_weights

COLUMNS = (
    "narration_id participant_id video_id narration_timestamp start_timestamp stop_timestamp start_frame stop_frame "
    "narration verb verb_class noun noun_class all_nouns all_noun_classes"
).split()
# (video, start, stop, verb class, noun class)
TRAIN = [
    ("P01_01", 0.0, 1.0, 0, 2), ("P01_01", 0.5, 2.0, 12, 1), ("P01_01", 1.5, 3.0, 12, 10), ("P01_01", 2.0, 3.5, 0, 1),
    ("P01_01", 3.0, 4.0, 0, 2), ("P02_07", 0.0, 1.5, 3, 10), ("P02_07", 1.0, 2.5, 12, 1), ("P02_07", 2.0, 3.0, 3, 10),
    ("P02_07", 2.5, 4.0, 0, 1), ("P02_07", 3.5, 5.0, 12, 10), ("P02_07", 4.0, 5.5, 0, 2), ("P01_01", 4.0, 5.5, 12, 1),
]  # fmt: skip
# Seven clips divide by no number of processes; 96:299 is not among the training clips.
VAL = [
    ("P01_01", 0.2, 1.2, 0, 2), ("P01_01", 1.0, 2.5, 12, 1), ("P01_01", 2.5, 4.0, 12, 10), ("P02_07", 0.5, 1.5, 3, 10),
    ("P02_07", 1.5, 3.5, 0, 1), ("P02_07", 4.0, 5.5, 96, 299), ("P02_07", 3.0, 4.5, 0, 2),
]  # fmt: skip
ACTIONS = ["0:1", "0:2", "12:1", "12:10", "3:10", "96:299"]
TINY = {
    "img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "text_width": 32, "text_heads": 2, "text_layers": 1,
    "context_length": 12, "vocab_size": 64, "project_embed_dim": 16, "num_frames": 2,
}  # fmt: skip


def csv_text(clips, prefix: str, columns=COLUMNS) -> str:
    """The annotations of clips; their narration ids count up from "{video}_{prefix}0"."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, extrasaction="ignore")
    writer.writeheader()
    for i, (video, start, stop, verb, noun) in enumerate(clips):
        values = [
            f"{video}_{prefix}{i}",
            video[:3],
            video,
            "00:00:00.00",
            f"00:00:{start:05.2f}",
            f"00:00:{stop:05.2f}",
            0,
            1,
            f"do {verb} to {noun}",
            f"verb{verb}",
            verb,
            f"noun{noun}",
            noun,
            f"['noun{noun}']",
            f"[{noun}]",
        ]
        writer.writerow(dict(zip(COLUMNS, values, strict=True)))
    return text.getvalue()


def pretrained(path: Path, name: str = "TIMEMAMBA_VITT16", **overrides) -> Path:
    """A checkpoint of a tiny two-tower model with open gates."""
    torch.manual_seed(11)
    model = create_model(name, **{**TINY, **overrides})
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("alpha_timeattn"):
                parameter.fill_(0.7)
    save_weights(model, path, {"norm_style": "openai", **NORM_STYLES["openai"]._asdict()})
    return path


def write_actions(root: Path, videos: Path, chunk_s: int) -> SimpleNamespace:
    """Annotations under `root`, and the flags that point the entry point at them."""
    root.mkdir()
    (root / "train.csv").write_text(csv_text(TRAIN, ""))
    (root / "val.csv").write_text(csv_text(VAL, "v"))
    (root / "test.csv").write_text(csv_text(VAL, "t", COLUMNS[:8]))
    (root / "tail_verbs.csv").write_text("verb\n3\n96\n")
    (root / "tail_nouns.csv").write_text("noun\n1\n")
    (root / "unseen.csv").write_text("participant_id\nP02\n")
    flags = [
        "--root",
        videos,
        "--train-metadata",
        root / "train.csv",
        "--val-metadata",
        root / "val.csv",
        "--video-chunk-length",
        chunk_s,
        "--pretrain-model",
        pretrained(root / "pretrained.pt"),
    ]
    flags += "--batch-size 4 --epochs 2 --warmup-epochs 1 --eval-freq 1 --lr 0.5 --workers 0 --device cpu".split()
    flags += "--clip-length 4 --print-freq 2".split()
    return SimpleNamespace(root=root, flags=[str(f) for f in flags])
