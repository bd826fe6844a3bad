"""All six benchmarks, small, in the formats of the real ones, with videos whose frames differ."""

import csv
import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from tests.data.test_charades_ego import HEADER
from tests.data.test_egomcq import question
from tests.engine.egoschema.case import write_checkpoint
from tests.videos import write_video

ALL = ("ek100_mir", "ek100_cls", "egtea", "charades_ego", "egomcq", "retrieval")
COLUMNS = (
    "narration_id participant_id video_id narration_timestamp start_timestamp stop_timestamp start_frame stop_frame "
    "narration verb verb_class noun noun_class all_nouns all_noun_classes"
).split()
NAMES = {"0:2": ("take plate", "pick up plate"), "1:2": ("put down plate",), "3:10": ("open drawer", "open the drawer")}
EGTEA = ("Take_plate", "Put plate", "Open drawer")
CHARADES = ("Holding a plate", "Opening a drawer", "Sitting on a chair", "Standing up")
CHUNK_S = 2


def write_benchmarks(root: Path) -> SimpleNamespace:
    """`root`, `flags` of a complete run but for --dataset and --output-dir, and `checkpoint`."""
    flags = [*_ek100(root), *_egtea(root), *_charades(root), *_egomcq(root), *_retrieval(root)]
    checkpoint = write_checkpoint(root / "model.pt", "TIMEMAMBA_VITT16")
    flags += ["--pretrain-model", checkpoint, "--video-chunk-length", CHUNK_S, "--device", "cpu", "--workers", 0]
    return SimpleNamespace(root=root, flags=[str(flag) for flag in flags], checkpoint=checkpoint)


def _film(path: Path, frames: int, first: int) -> None:
    write_video(path, frames, first=first, fps=10, width=48, height=36)


def _csv(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def _ek100(root: Path) -> list:
    """Seven clips of two videos, of three actions of validation and one that only training has."""
    for k, video in enumerate(("P01/P01_11", "P02/P02_09")):
        for chunk in range(3):
            _film(root / f"ek100/{video}.MP4/{CHUNK_S * chunk}.MP4", 20, 100 * k + 20 * chunk)
    rows, actions = [], list(NAMES)
    for i in range(7):
        participant = f"P0{1 + i % 2}"
        video, action = f"{participant}_{'11' if i % 2 == 0 else '09'}", actions[i % 3]
        text = NAMES[action][i // 3 % len(NAMES[action])]
        verb, noun = action.split(":")
        times = [f"00:00:0{0.3 + 0.6 * i:.2f}", f"00:00:0{0.3 + 0.6 * i:.2f}", f"00:00:0{1.2 + 0.6 * i:.2f}"]
        words = [text.split()[0], verb, text.split()[-1], noun, f"['{text.split()[-1]}']", f"[{noun}]"]
        rows.append([f"{video}_{i}", participant, video, *times, 1, 2, text, *words])
    folder = root / "annotations"
    extra = ["P03_01_0", "P03", "P03_01", *["00:00:01.00"] * 3, 1, 2, "wash pan", "wash", 2, "pan", 5, "['pan']", "[5]"]
    _csv(folder / "EPIC_100_validation.csv", [COLUMNS, *rows])
    _csv(folder / "EPIC_100_train.csv", [COLUMNS, extra])
    split = folder / "retrieval_annotations"
    _csv(split / "EPIC_100_retrieval_test.csv", [COLUMNS, *rows])
    sentences = {row[8]: row for row in reversed(rows)}
    ids = [["narration_id", "narration"], *([row[0], text] for text, row in sentences.items())]
    _csv(split / "EPIC_100_retrieval_test_sentence.csv", ids)
    same = [[0.5 * (a[10] == b[10]) + 0.5 * (a[12] == b[12]) for b in sentences.values()] for a in rows]
    target = split / "relevancy/caption_relevancy_EPIC_100_retrieval_test.pkl"
    target.parent.mkdir()
    target.write_bytes(pickle.dumps(np.array(same)))
    return ["--ek100-root", root / "ek100", "--ek100-annotations", folder]


def _egtea(root: Path) -> list:
    lines = []
    for i, frames in enumerate((61, 34, 9, 48, 32)):
        name = f"OP0{i}-R01-Pizza-{i}00-{i}90-F000001-F0000{frames}"
        _film(root / f"egtea/OP0{i}-R01-Pizza/{name}.mp4", frames, 300 + 70 * i)
        lines.append(f"{name} {1 + i % 3} 1 2 \n")
    (root / "split.txt").write_text("".join(lines))
    (root / "action_idx.txt").write_text("".join(f"{name} {i}\n" for i, name in enumerate(EGTEA, 1)))
    return [
        "--egtea-root",
        root / "egtea",
        "--egtea-split",
        root / "split.txt",
        "--egtea-classes",
        root / "action_idx.txt",
    ]


def _charades(root: Path) -> list:
    rows, actions = [HEADER], ("c000 0.00 2.10;c002 1.00 3.00", "", "c001 0.00 1.00", "c003 1 2;c000 0 1")
    for i, text in enumerate(actions):
        _film(root / f"charades/VID{i}EGO.mp4", 40 + i, 700 + 50 * i)
        rows.append(
            [f"VID{i}EGO", "S", "Kitchen", 7, 7, "Yes", "a, b", "", "", text, f"{4 + i / 10:.2f}", "Yes", f"VID{i}"]
        )
    _csv(root / "charades.csv", rows)
    (root / "charades.txt").write_text("".join(f"c{i:03d} {name}\n" for i, name in enumerate(CHARADES)))
    split = ["--charades-split", root / "charades.csv", "--charades-classes", root / "charades.txt"]
    return ["--charades-root", root / "charades", *split]


def _egomcq(root: Path) -> list:
    for video in range(3):
        for chunk in range(3):
            _film(root / f"ego4d/uid{video}.mp4/{CHUNK_S * chunk}.mp4", 20, 1000 + 100 * video + 20 * chunk)
    texts = ("#C C opens the drawer", "#C C takes a plate", "#C C takes a plate", "#O man X sits")
    content = {}
    for i, text in enumerate(texts):
        clips = [
            {
                "video_uid": f"uid{(k if i % 2 else 0) % 3}",
                "clip_start": 0.4 * k + 0.1 * i,
                "clip_end": 0.4 * k + 1.3,
                "clip_text": "#C C waits",
            }
            for k in range(5)
        ]
        content[str(i)] = question((2 * i) % 5, 1 + i % 2, clips) | {"query": {"clip_text": text}}
    (root / "egomcq.json").write_text(json.dumps(content))
    return ["--egomcq-root", root / "ego4d", "--egomcq-questions", root / "egomcq.json"]


def _retrieval(root: Path) -> list:
    rows = [("video", "start", "end", "caption")]
    rows += [(f"uid{i % 3}", 0.5 * i, 0.5 * i + 1.5, f"clip number {i}") for i in range(6)]
    rows += [("uid0", 0.0, 1.5, "a second sentence")]
    return ["--retrieval-root", root / "ego4d", "--retrieval-captions", _csv(root / "captions.csv", rows)]
