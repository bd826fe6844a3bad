"""Indexes for the tests of the search: made up, and of small videos by a small model."""

import json
from pathlib import Path

import numpy as np
import torch

from avion.constants import NORM_STYLES
from avion.search.index import SearchIndex, open_index
from avion.weights import save_weights
from tests.models.tiny import tiny_model
from tests.videos import write_video

PREPROCESS = {"norm_style": "openai", **NORM_STYLES["openai"]._asdict()}
FACTS = {
    "format": "avion-search", "version": 1, "root": "videos", "video_layout": "whole", "video_chunk_length": 15,
    "checkpoint": "checkpoint.pt", "model": None, "model_args": [], "norm_style": "openai", "frames": 4,
    "weights": "abc", "window": 2.0, "stride": 1.0,
}  # fmt: skip


def write_made_up(folder: Path, counts: dict[str, int], rows: np.ndarray, **facts) -> Path:
    """An index of windows of 2 s, one each second; rows (n, E)."""
    folder.mkdir(parents=True, exist_ok=True)
    starts = np.concatenate([np.arange(n, dtype=np.float64) for n in counts.values()])
    np.save(folder / "windows-1.npy", rows.astype(np.float16))
    np.save(folder / "times-1.npy", np.stack([starts, starts + 2], axis=1))
    about = {
        **FACTS,
        "files": {"windows": "windows-1.npy", "times": "times-1.npy"},
        "videos": list(counts),
        "counts": list(counts.values()),
        "rows": len(rows),
        "width": rows.shape[1],
        **facts,
    }
    (folder / "search.json").write_text(json.dumps(about))
    return folder


def made_up(folder: Path, counts: dict[str, int], rows: np.ndarray) -> SearchIndex:
    return open_index(write_made_up(folder, counts, rows))


def write_data(root: Path) -> Path:
    """videos/a.mp4 (8 s), videos/deep/b.mp4 (5 s), chunks/ with the same in chunks of 3 s, and checkpoint.pt."""
    for v, (name, count) in enumerate((("a", 80), ("deep/b", 50))):
        write_video(root / f"videos/{name}.mp4", count, first=200 * v, fps=10)
        for k, first in enumerate(range(0, count, 30)):
            some = min(30, count - first)
            write_video(root / f"chunks/{name}.mp4/{3 * k}.mp4", some, first=200 * v + first, fps=10)
    torch.manual_seed(11)
    save_weights(tiny_model("TIMEMAMBA_VITB16"), root / "checkpoint.pt", PREPROCESS)
    return root
