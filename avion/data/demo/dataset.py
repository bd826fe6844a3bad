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
    EK100Clip,
    write_classes,
    write_clips,
    write_narrations,
    write_participants,
    write_retrieval,
    write_reversed_pairs,
    write_tail,
)
from avion.data.demo.benchmarks import write_benchmarks
from avion.data.demo.egoschema import SceneTask, write_questions
from avion.data.demo.film import FRAME_RATES, Clip, film_video, write_chunks
from avion.data.demo.paths import STAMP, DemoPaths
from avion.data.demo.vocabulary import LABELS, Label, joined_sentence, training_sentence
from avion.errors import UserError

logger = logging.getLogger(__name__)

_SPLITS = ("train", "val")
# Of EPIC-KITCHENS-100. P04 has evaluation videos alone.
_TRAIN_PARTICIPANTS = ("P01", "P02", "P03", "P05", "P06")
_VAL_PARTICIPANTS = ("P01", "P02", "P03", "P04")


@dataclass(frozen=True)
class DemoSize:
    """How much is filmed. Every take gives two clips, one in each direction.

    train_takes, val_takes: per noun of a pair (there are 17 such combinations); labels: only the first so many
    combinations (None: all). egoschema_scenes: each gives five videos with a question; all is balanced for multiples
    of eight.
    """

    train_takes: int = 50
    val_takes: int = 6
    takes_per_video: int = 10
    labels: int | None = None
    egoschema_scenes: int = 8


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
    files = {(stat.st_dev, stat.st_ino): stat.st_size for stat in (p.stat() for p in root.rglob("*") if p.is_file())}
    logger.info("demo dataset: %.1f MB in %.0f s", sum(files.values()) / 1e6, time.monotonic() - started)


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

    def film(self) -> tuple[Clip, ...]:
        video = film_video(list(self.labels), self.rng(), self.fps)
        write_chunks(self.folder, video)
        return video.clips


def film(task: VideoTask | SceneTask) -> tuple[Clip, ...]:
    """Writes the task's video files and returns the clips to annotate."""
    return task.film()


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
            participant = _VAL_PARTICIPANTS[index % len(_VAL_PARTICIPANTS)]
            video = f"{participant}_{101 + index // len(_VAL_PARTICIPANTS)}"
            folder = paths.ek100_videos / participant / f"{video}.MP4"
        tasks.append(VideoTask(split, index, tuple(dealt[first : first + size.takes_per_video]), seed, folder))
    return tasks


def _make(paths: DemoPaths, seed: int, size: DemoSize, workers: int | None) -> None:
    train, val = (_plan(split, seed, size, paths) for split in _SPLITS)
    scenes = [SceneTask(i, seed, paths.egoschema_videos) for i in range(size.egoschema_scenes)]
    clips = _film_all([*scenes, *train, *val], min(2, os.cpu_count() or 1) if workers is None else workers)
    clips = clips[len(scenes) :]
    shot = list(zip(train, clips, strict=False))

    _narrate(paths, shot, seed)
    training = _ek100_clips([(*_under_ek100_name(task, paths), task.fps, found) for task, found in shot])
    write_retrieval(training, paths.train_csv, paths.train_sentences, paths.train_relevancy)
    write_clips(paths.action_train_csv, training)
    write_tail(paths.tail_verbs, paths.tail_nouns, training)

    shot = sorted(zip(val, clips[len(train) :], strict=True), key=lambda pair: pair[0].folder)
    evaluation = _ek100_clips([(t.folder.parent.name, t.folder.stem, t.fps, found) for t, found in shot])
    write_retrieval(evaluation, paths.val_csv, paths.val_sentences, paths.relevancy)
    write_clips(paths.action_validation_csv, evaluation)
    write_participants(paths.unseen_participants, sorted({*_VAL_PARTICIPANTS} - {*_TRAIN_PARTICIPANTS}))
    write_classes(paths.verb_classes, paths.noun_classes)
    write_reversed_pairs(paths.reversed_pairs, evaluation)
    write_benchmarks(paths, evaluation, scenes, seed)
    write_questions(scenes, paths.egoschema_questions, paths.egoschema_answers, paths.uid_to_ego4d)


def _narrate(paths: DemoPaths, shot: list[tuple[VideoTask, tuple[Clip, ...]]], seed: int) -> None:
    """Writes the Ego4D narrations of the training videos: each clip's, and of every two clips in a row together."""
    single, long = [], []
    for task, clips in shot:
        rng = np.random.default_rng((seed, 0, 2, task.index))
        for clip in clips:
            text = training_sentence(clip.label, rng)
            single.append((task.folder.stem, round(clip.start, 3), round(clip.stop, 3), text))
        rng = np.random.default_rng((seed, 0, 3, task.index))
        for one, two in zip(clips[::2], clips[1::2], strict=False):
            text = joined_sentence(one.label, two.label, rng)
            long.append((task.folder.stem, round(one.start, 3), round(two.stop, 3), text))
    write_narrations(paths.train_pickle, single)
    write_narrations(paths.long_train_pickle, long)


def _under_ek100_name(task: VideoTask, paths: DemoPaths) -> tuple[str, str]:
    """Shows a training video under an EK-100 name as well, (participant, video): links where there can be links."""
    count = len(_TRAIN_PARTICIPANTS)
    participant = _TRAIN_PARTICIPANTS[task.index % count]
    video = f"{participant}_{1 + task.index // count:02d}"
    folder = paths.ek100_videos / participant / f"{video}.MP4"
    folder.mkdir(parents=True)
    for chunk in task.folder.iterdir():
        target = folder / f"{chunk.stem}.MP4"
        try:
            os.link(chunk, target)
        except OSError:  # a file system without hard links, or one that counts them
            shutil.copyfile(chunk, target)
    return participant, video


def _ek100_clips(videos: list[tuple[str, str, int, tuple[Clip, ...]]]) -> list[EK100Clip]:
    """The clips of (participant, video, frame rate, clips), named as EK-100 does."""
    return [
        EK100Clip(f"{video}_{i}", participant, video, fps, clip)
        for participant, video, fps, clips in videos
        for i, clip in enumerate(clips)
    ]


def _film_all(tasks: list[VideoTask | SceneTask], workers: int) -> list[tuple[Clip, ...]]:
    if workers <= 1 or len(tasks) == 1:
        return [film(task) for task in tasks]
    # Not multiprocessing: fork is unsafe beside torch's threads, and spawn imports the caller's main module again.
    with ThreadPoolExecutor(workers) as threads:
        parts = list(threads.map(_film_elsewhere, [tasks[i::workers] for i in range(workers)]))
    return [parts[i % workers][i // workers] for i in range(len(tasks))]


def _film_elsewhere(tasks: list[VideoTask | SceneTask]) -> list[tuple[Clip, ...]]:
    """Films in a process of its own: `python -m avion.data.demo`."""
    project = str(Path(__file__).resolve().parents[3])
    path = os.pathsep.join([project, os.environ["PYTHONPATH"]]) if os.environ.get("PYTHONPATH") else project
    command = [sys.executable, "-m", "avion.data.demo"]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, input=pickle.dumps(tasks), stdout=subprocess.PIPE, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"demo dataset: {' '.join(command)} ended with status {done.returncode}; its error is above")
    return pickle.loads(done.stdout)
