"""A small demo dataset's size, and readers of its files that know nothing of the project."""

import csv
import functools
import io
import re
from pathlib import Path

import av
import numpy as np

from avion.data.demo import DemoSize

# Four combinations; three videos for training and one for evaluation, each longer than a chunk; one EgoSchema scene.
SMALL = DemoSize(train_takes=3, val_takes=1, takes_per_video=4, labels=4, egoschema_scenes=1)
TINY = DemoSize(train_takes=1, val_takes=1, takes_per_video=1, labels=1, egoschema_scenes=0)


@functools.cache
def decode(folder: Path) -> tuple[np.ndarray, list[int], float]:
    """All frames of a chunked video (F, H, W, 3), the frames of each chunk, the frame rate; with PyAV alone."""
    frames, counts, rates = [], [], set()
    for path in sorted(folder.iterdir(), key=lambda p: int(p.stem)):
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            rates.add(float(stream.average_rate))
            found = [f.to_ndarray(format="rgb24") for f in container.decode(stream)]
        frames += found
        counts.append(len(found))
    assert len(rates) == 1
    return np.stack(frames), counts, rates.pop()


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))


def seconds(stamp: str) -> float:
    assert re.fullmatch(r"\d\d:\d\d:\d\d\.\d\d\d?", stamp)
    h, m, s = stamp.split(":")
    return 3600 * int(h) + 60 * int(m) + float(s)


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
