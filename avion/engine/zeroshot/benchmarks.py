"""The benchmarks: what each reads, the protocol by which LaViLa evaluates its models on it, and its metrics.

A benchmark holds clips and texts. The features of the clips are (n, V, E), for V views (windows · crops) of each clip.
"""

import dataclasses
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from avion.constants import EGOMCQ_INTER
from avion.data.captions import Columns, read_narrations
from avion.data.charades_ego import read_charades_classes, read_charades_ego
from avion.data.egomcq import read_egomcq
from avion.data.egtea import TrimmedClips, read_egtea_classes, read_egtea_split
from avion.data.ek100_actions import action_list, action_names, action_numbers, read_ek100_actions
from avion.data.labelled_clips import ClipViews
from avion.data.transforms import CropsTransform
from avion.data.video import VideoStore, is_remote
from avion.engine.options import ZeroShotOptions
from avion.engine.tasks.evaluations import CaptionEvaluation, Ek100Evaluation, Evaluation
from avion.errors import UserError
from avion.evaluation.charades import charades_metrics
from avion.evaluation.egomcq import egomcq_metrics
from avion.evaluation.egtea import best_view_scores, class_metrics
from avion.evaluation.recall import LEVELS
from avion.evaluation.vectors import unit
from avion.remote import joined

from .classes import PLAIN, class_texts, mean_of_units, rows_of

Metrics = dict[str, float]
Files = dict[str, bytes]


@dataclass(frozen=True)
class Protocol:
    """How clips are shown to the model.

    Attributes:
        frames: Frames per view; None: as many as the checkpoint says.
        stride: The distance between the frames of a view in frames of the video; 0: the frames are spread evenly.
        windows: Windows of a clip along its time.
        crops: Crops of each window.
    """

    frames: int | None
    stride: int = 0
    windows: int = 1
    crops: int = 1

    @property
    def views(self) -> int:
        """The number of views of a clip."""
        return self.windows * self.crops

    def with_flags(self, options: ZeroShotOptions) -> "Protocol":
        """Return the same protocol with the changes that the flags ask for."""
        given = {
            "frames": options.clip_length,
            "windows": options.num_clips,
            "crops": options.num_crops,
            "stride": options.clip_stride if self.stride else None,
        }
        return dataclasses.replace(self, **{name: value for name, value in given.items() if value is not None})


class Benchmark:
    """Clips, texts, and the metrics of their features.

    Attributes:
        name: The value of `--dataset`.
        protocol: How clips are shown.
        root: The folder of the videos.
        flag: The flag that names the folder, for messages.
        clips: The clips that are encoded.
        texts: The texts that are encoded, each once.
        headline: The metrics of the printed table: the name in `eval_log.txt`, and the name for people.
    """

    name: str
    protocol: Protocol
    root: str
    flag: str
    clips: Sequence[Any]
    texts: list[str]
    headline: dict[str, str]

    def __init__(self, options: ZeroShotOptions):
        self.options = options
        self.protocol = type(self).protocol.with_flags(options)

    def dataset(self, size: int, frames: int) -> Dataset:
        """Build the dataset of the views of each clip, (V, 3, T, size, size) uint8.

        Args:
            size: Height and width of a frame in pixels.
            frames: Frames per view.

        Returns:
            The dataset.
        """
        return ClipViews(
            self.clips,
            self._store(self.options.video_layout),
            num_frames=frames,
            num_clips=self.protocol.windows,
            transform=CropsTransform(size, self.protocol.crops, fused=True),
        )

    def clip_facts(self) -> list[Any]:
        """Return what identifies the clips, as JSON values."""
        return [(clip.video, clip.start, clip.end) for clip in self.clips]

    def judge(self, clips: np.ndarray, texts: np.ndarray, readable: np.ndarray) -> tuple[Metrics, Files]:
        """Compute the metrics and the contents of the files of predictions.

        Args:
            clips: (n, V, E), features as the model gives them; zeros where a clip cannot be read.
            texts: (texts, E), features as the model gives them.
            readable: The numbers of the clips that could be read, ascending; at least one.

        Returns:
            The metrics by name, and the contents of the files by their names.
        """
        raise NotImplementedError

    def digest(self) -> str:
        """Return a text that changes with the clips."""
        return hashlib.sha256(json.dumps(self.clip_facts()).encode()).hexdigest()[:32]

    def _store(self, layout: str) -> VideoStore:
        options = self.options
        if not is_remote(self.root) and not Path(self.root).is_dir():
            raise UserError(f"{self.flag} {self.root}: no such folder; give the folder that the videos are in")
        return VideoStore(
            self.root,
            chunk_length=options.video_chunk_length,
            layout=layout,
            decoder=options.decoder,
            threads=options.decode_threads,
            index={"auto": "auto", "off": None}.get(options.video_index, options.video_index),
        )


# ---- retrieval ---------------------------------------------------------------------------------


class _Retrieval(Benchmark):
    """Clips and sentences by the similarity (cos + 1) / 2. Several views of a clip are averaged at length 1."""

    evaluation: Evaluation

    def __init__(self, options: ZeroShotOptions):
        super().__init__(options)
        self.evaluation = self._evaluation(options)
        self.root, self.flag = self.evaluation.root, self.evaluation.flag
        self.clips, self.texts = self.evaluation.clips, self.evaluation.texts

    def _evaluation(self, options: ZeroShotOptions) -> Evaluation:
        raise NotImplementedError

    def judge(self, clips, texts, readable):
        similarity = (unit(unit(clips).mean(axis=1)) @ unit(texts).T + 1) / 2
        similarity = similarity.astype(np.float32)
        return self.evaluation.metrics(similarity, readable), {f"{self.name}.npy": _npy(similarity)}


class Ek100Mir(_Retrieval):
    """Multi-instance retrieval of EPIC-KITCHENS-100."""

    name, protocol = "ek100_mir", Protocol(4)
    headline = {"avg_map": "mAP", "avg_ndcg": "nDCG"}

    def _evaluation(self, options: ZeroShotOptions) -> Evaluation:
        folder = joined(options.ek100_annotations, "retrieval_annotations")
        return Ek100Evaluation(
            options.ek100_root,
            "--ek100-root",
            joined(folder, "EPIC_100_retrieval_test.csv"),
            joined(folder, "relevancy/caption_relevancy_EPIC_100_retrieval_test.pkl"),
        )


class Captions(_Retrieval):
    """Retrieval between clips and their captions, as on MSR-VTT."""

    name, protocol = "retrieval", Protocol(None)
    headline = {
        f"{side}_r{level}": f"{label} R@{level}" for side, label in (("vis", "V2T"), ("txt", "T2V")) for level in LEVELS
    }

    def _evaluation(self, options: ZeroShotOptions) -> Evaluation:
        clips = read_narrations([options.retrieval_captions], Columns.parse(options.caption_columns))
        return CaptionEvaluation(options.retrieval_root, "--retrieval-root", clips)


# ---- classes -----------------------------------------------------------------------------------


class _Classes(Benchmark):
    """Clips of one or several classes, which are compared as texts.

    Attributes:
        names: The names of each class.
        labels: The classes of each clip: numbers (n,), or (n, classes) bool.
        ids: The ids of the clips.
        keys: The classes as the annotations call them.

    Raises:
        UserError: A template is malformed.
    """

    names: Sequence[str | Sequence[str]]
    labels: np.ndarray
    ids: Sequence[str]
    keys: Sequence[str]

    def __init__(self, options: ZeroShotOptions, names: Sequence[str | Sequence[str]]):
        super().__init__(options)
        self.names = names
        texts = class_texts(names, options.templates or PLAIN)
        self.texts = list(dict.fromkeys(text for own in texts for text in own))
        self._rows = rows_of(texts, self.texts)

    def judge(self, clips, texts, readable):
        classes = mean_of_units(torch.from_numpy(np.asarray(texts, dtype=np.float64)), self._rows).numpy()
        scores = best_view_scores(clips, classes)
        content = _npz(
            id=np.array(self.ids),
            scores=scores[readable],
            label=self.labels,
            readable=readable,
            class_key=np.array(self.keys),
        )
        return self._metrics(scores[readable], self.labels[readable]), {f"{self.name}.npz": content}

    def _metrics(self, scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return class_metrics(scores, labels)


class Ek100Cls(_Classes):
    """Actions of EPIC-KITCHENS-100. The names of an action are all narrations that occur for it."""

    name, protocol = "ek100_cls", Protocol(16)
    headline = {"top1": "top-1", "top5": "top-5"}

    def __init__(self, options: ZeroShotOptions):
        paths = [joined(options.ek100_annotations, f"EPIC_100_{split}.csv") for split in ("train", "validation")]
        tables = [read_ek100_actions(path) for path in paths]
        for path, table in zip(paths, tables, strict=True):
            if table.verb_class is None:
                raise UserError(f"annotations {path}: the columns verb_class and noun_class are missing")
        self.keys = action_list(*tables)
        super().__init__(options, action_names(self.keys, *tables))
        self.root, self.flag, self.clips = options.ek100_root, "--ek100-root", tables[1]
        self.labels = action_numbers(self.keys, tables[1])
        self.ids = list(tables[1].narration_ids or ())


class Egtea(_Classes):
    """Actions of EGTEA in trimmed clips, of which the model sees several windows and crops."""

    name, protocol = "egtea", Protocol(16, stride=2, windows=10, crops=3)
    headline = {"mean_class": "mean class accuracy", "top1": "top-1"}

    def __init__(self, options: ZeroShotOptions):
        self.keys = read_egtea_classes(options.egtea_classes)
        split = read_egtea_split(options.egtea_split, len(self.keys))
        super().__init__(options, self.keys)
        self.root, self.flag = options.egtea_root, "--egtea-root"
        self.ids, self.labels, self.clips = split.clips, split.labels, split.videos

    def dataset(self, size, frames):
        return TrimmedClips(
            self.clips,
            self._store("whole"),
            num_frames=frames,
            stride=self.protocol.stride,
            windows=self.protocol.windows,
            transform=CropsTransform(size, self.protocol.crops, fused=True),
        )

    def clip_facts(self):
        return list(self.clips)


class Charades(_Classes):
    """Classes of Charades-Ego, several in a video."""

    name, protocol = "charades_ego", Protocol(16)
    headline = {"map": "mAP"}

    def __init__(self, options: ZeroShotOptions):
        classes = read_charades_classes(options.charades_classes)
        split = read_charades_ego(options.charades_split, classes)
        super().__init__(options, list(classes.values()))
        self.root, self.flag, self.clips = options.charades_root, "--charades-root", split.videos
        self.keys, self.labels = list(classes), split.labels
        self.ids = list(split.videos.narration_ids or ())

    def dataset(self, size, frames):
        return ClipViews(
            self.clips,
            self._store("whole"),
            num_frames=frames,
            num_clips=self.protocol.windows,
            transform=CropsTransform(size, self.protocol.crops, fused=True),
        )

    def _metrics(self, scores, labels):
        return charades_metrics(scores, labels)


# ---- questions ---------------------------------------------------------------------------------


class EgoMcqQuestions(Benchmark):
    """Which of five clips a sentence describes. A question with a clip that cannot be read counts in no accuracy."""

    name, protocol = "egomcq", Protocol(4)
    headline = {"intra": "intra-video accuracy", "inter": "inter-video accuracy"}

    def __init__(self, options: ZeroShotOptions):
        super().__init__(options)
        self.questions = read_egomcq(options.egomcq_questions)
        self.root, self.flag, self.clips = options.egomcq_root, "--egomcq-root", self.questions.clips
        self.texts = list(dict.fromkeys(self.questions.queries))
        place = {text: i for i, text in enumerate(self.texts)}
        self._query = np.array([place[text] for text in self.questions.queries])

    def judge(self, clips, texts, readable):
        questions = self.questions
        # LaViLa compares the features without normalising them. Several views are averaged, and the length counts too.
        videos, queries = clips.mean(axis=1), np.asarray(texts)
        if self.options.egomcq_cosine:
            videos, queries = unit(unit(clips).mean(axis=1)), unit(queries)
        scores = np.einsum("qce,qe->qc", videos[questions.choices], queries[self._query])  # (n, 5)
        answered = np.isin(questions.choices, readable).all(axis=1)
        metrics = egomcq_metrics(scores[answered], questions.answers[answered], questions.types[answered])
        rows = {
            questions.ids[i]: {
                "choice": int(scores[i].argmax()),
                "answer": int(questions.answers[i]),
                "type": "inter" if questions.types[i] == EGOMCQ_INTER else "intra",
                "scores": scores[i].tolist(),
            }
            for i in np.flatnonzero(answered)
        }
        return metrics, {"egomcq.json": (json.dumps(rows) + "\n").encode()}


BENCHMARKS: dict[str, type[Benchmark]] = {
    kind.name: kind for kind in (Ek100Mir, Ek100Cls, Egtea, Charades, EgoMcqQuestions, Captions)
}


def _npy(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def _npz(**arrays: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    return content.getvalue()
