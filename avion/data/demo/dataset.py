"""Makes the demo dataset, once: films the videos, writes the annotations, puts the folder in its place."""

import fcntl
import hashlib
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from avion.data.demo.annotations import (
    EvaluationClip,
    sentence_csv,
    write_classes,
    write_evaluation,
    write_narrations,
    write_reversed_pairs,
)
from avion.data.demo.film import FRAME_RATES, Clip, film_video, write_chunks
from avion.data.demo.vocabulary import LABELS, Label, training_sentence
from avion.errors import UserError

logger = logging.getLogger(__name__)

STAMP = "demo.json"
_SPLITS = ("train", "val")


@dataclass(frozen=True)
class DemoSize:
    """How much is filmed. Every take gives two clips, one in each direction.

    train_takes, val_takes: per noun of a pair (there are 17 such combinations); labels: only the first so many
    combinations (None: all).
    """

    train_takes: int = 50
    val_takes: int = 6
    takes_per_video: int = 10
    labels: int | None = None


@dataclass(frozen=True)
class DemoPaths:
    """Where things are under `root`."""

    root: Path

    @property
    def train_pickle(self) -> Path:
        """Ego4D narrations: a pickled list of (video_uid, start_sec, end_sec, narration)."""
        return self.root / "ego4d_train.pkl"

    @property
    def train_videos(self) -> Path:
        """{video_uid}.mp4/{start}.mp4"""
        return self.root / "videos_train"

    @property
    def val_videos(self) -> Path:
        """{participant}/{video}.MP4/{start}.MP4"""
        return self.root / "videos_val"

    @property
    def annotations(self) -> Path:
        return self.root / "epic-kitchens-100-annotations"

    @property
    def val_csv(self) -> Path:
        return self.annotations / "retrieval_annotations" / "EPIC_100_retrieval_test.csv"

    @property
    def val_sentences(self) -> Path:
        return sentence_csv(self.val_csv)

    @property
    def relevancy(self) -> Path:
        return self.val_csv.parent / "relevancy" / "caption_relevancy_EPIC_100_retrieval_test.pkl"

    @property
    def verb_classes(self) -> Path:
        return self.annotations / "EPIC_100_verb_classes.csv"

    @property
    def noun_classes(self) -> Path:
        return self.annotations / "EPIC_100_noun_classes.csv"

    @property
    def reversed_pairs(self) -> Path:
        """A list of {narration_id, text, partner_text}, one per evaluation clip."""
        return self.root / "reversed_pairs.json"

    @property
    def stamp(self) -> Path:
        return self.root / STAMP


def ensure_demo_dataset(
    root: str | os.PathLike, *, seed: int = 0, size: DemoSize | None = None, workers: int | None = None
) -> DemoPaths:
    """The demo dataset under `root`, made first where it is missing or was made by another generator.

    The folder appears complete or not at all, and processes that call this at once wait for the first. The same
    seed and size give the same annotations and frames, whatever the number of workers.

    Args:
        root: the dataset's folder; beside it a lock file, `{root}.lock`, is left.
        seed: another seed films other videos.
        size: how much to film; default: DemoSize().
        workers: processes to film with; default: one per core, two at most.

    Raises:
        UserError: `root` holds something that this function did not make, or cannot be written.
    """
    root = Path(root)
    size = size or DemoSize()
    stamp = {"generator": _fingerprint(), "seed": seed, **asdict(size)}
    paths = DemoPaths(root)
    if _read_stamp(paths) == stamp:
        return paths
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with _lock(root.with_name(root.name + ".lock")):
            if _read_stamp(paths) != stamp:
                _replace(paths, stamp, seed, size, workers)
    except OSError as e:
        reason = f"{e.filename or root}: {e.strerror or e}"
        raise UserError(f"demo dataset: {reason}; give a folder that can be written") from e
    return paths


def _replace(paths: DemoPaths, stamp: dict, seed: int, size: DemoSize, workers: int | None) -> None:
    root = paths.root
    if root.exists() and not (root.is_dir() and (paths.stamp.is_file() or not any(root.iterdir()))):
        raise UserError(f"demo dataset: {root} holds something else; remove it or give another folder")
    started = time.monotonic()
    logger.info("making the demo dataset in %s (once)", root)
    # Under the lock no one else writes here: what is found was left by a process that died.
    draft, old = (root.with_name(f".{root.name}.{kind}") for kind in ("draft", "old"))
    for leftover in (draft, old):
        shutil.rmtree(leftover, ignore_errors=True)
    draft.mkdir()
    try:
        _make(DemoPaths(draft), seed, size, workers)
        (draft / STAMP).write_text(json.dumps(stamp, indent=1) + "\n", encoding="utf-8")
        if root.exists():
            root.rename(old)
        draft.rename(root)
    finally:
        for leftover in (draft, old):
            shutil.rmtree(leftover, ignore_errors=True)
    megabytes = sum(p.stat().st_size for p in root.rglob("*") if p.is_file()) / 1e6
    logger.info("demo dataset: %.1f MB in %.0f s", megabytes, time.monotonic() - started)


def _read_stamp(paths: DemoPaths) -> dict | None:
    try:
        return json.loads(paths.stamp.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def _fingerprint() -> str:
    """Changes when the generator does: a hash of its source files."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


@contextmanager
def _lock(path: Path):
    """One process at a time; the lock goes with the process that holds it, however that ends."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@dataclass(frozen=True)
class VideoTask:
    """One video to film: everything about it follows from here, so that workers may take them in any order."""

    split: str
    index: int
    labels: tuple[Label, ...]
    seed: int
    folder: Path

    @property
    def fps(self) -> int:
        return FRAME_RATES[self.index % len(FRAME_RATES)]

    def rng(self) -> np.random.Generator:
        return np.random.default_rng((self.seed, _SPLITS.index(self.split), 1, self.index))


def film(task: VideoTask) -> tuple[Clip, ...]:
    video = film_video(list(task.labels), task.rng(), task.fps)
    write_chunks(task.folder, video)
    return video.clips


def _plan(split: str, seed: int, size: DemoSize, paths: DemoPaths) -> list[VideoTask]:
    """Deals out the takes of a split to its videos."""
    rng = np.random.default_rng((seed, _SPLITS.index(split), 0))
    takes = size.train_takes if split == "train" else size.val_takes
    forward = [label for label in LABELS if not label.backward][: size.labels]
    dealt = [forward[i] for i in rng.permutation(np.repeat(np.arange(len(forward)), takes))]
    tasks = []
    for index, first in enumerate(range(0, len(dealt), size.takes_per_video)):
        if split == "train":
            folder = paths.train_videos / f"{uuid.UUID(bytes=rng.bytes(16), version=4)}.mp4"
        else:
            participant = f"P{index % 4 + 1:02d}"
            folder = paths.val_videos / participant / f"{participant}_{101 + index // 4}.MP4"
        tasks.append(VideoTask(split, index, tuple(dealt[first : first + size.takes_per_video]), seed, folder))
    return tasks


def _make(paths: DemoPaths, seed: int, size: DemoSize, workers: int | None) -> None:
    train, val = (_plan(split, seed, size, paths) for split in _SPLITS)
    clips = _film_all(train + val, min(2, os.cpu_count() or 1) if workers is None else workers)

    narrations = []
    for task, found in zip(train, clips, strict=False):
        rng = np.random.default_rng((seed, 0, 2, task.index))
        for clip in found:
            text = training_sentence(clip.label, rng)
            narrations.append((task.folder.stem, round(clip.start, 3), round(clip.stop, 3), text))
    write_narrations(paths.train_pickle, narrations)

    evaluation = []
    for task, found in sorted(zip(val, clips[len(train) :], strict=True), key=lambda pair: pair[0].folder):
        video, participant = task.folder.stem, task.folder.parent.name
        for i, clip in enumerate(found):
            evaluation.append(EvaluationClip(f"{video}_{i}", participant, video, task.fps, clip))
    write_evaluation(evaluation, paths.val_csv, paths.relevancy)
    write_classes(paths.verb_classes, paths.noun_classes)
    write_reversed_pairs(paths.reversed_pairs, evaluation)


def _film_all(tasks: list[VideoTask], workers: int) -> list[tuple[Clip, ...]]:
    if workers <= 1 or len(tasks) == 1:
        return [film(task) for task in tasks]
    # Not multiprocessing: fork is unsafe beside torch's threads, and spawn imports the caller's main module again.
    with ThreadPoolExecutor(workers) as threads:
        parts = list(threads.map(_film_elsewhere, [tasks[i::workers] for i in range(workers)]))
    return [parts[i % workers][i // workers] for i in range(len(tasks))]


def _film_elsewhere(tasks: list[VideoTask]) -> list[tuple[Clip, ...]]:
    """Films in a process of its own: `python -m avion.data.demo`."""
    project = str(Path(__file__).resolve().parents[3])
    path = os.pathsep.join([project, os.environ["PYTHONPATH"]]) if os.environ.get("PYTHONPATH") else project
    command = [sys.executable, "-m", "avion.data.demo"]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, input=pickle.dumps(tasks), stdout=subprocess.PIPE, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"demo dataset: {' '.join(command)} ended with status {done.returncode}; its error is above")
    return pickle.loads(done.stdout)
