"""The evaluations of a two-tower model: EPIC-KITCHENS-100's retrieval, the user's own captions, or none."""

import hashlib
import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from avion.data.captions import Columns, is_caption_file, read_narrations
from avion.data.ek100 import (
    check_ids_differ,
    is_ek100_file,
    load_relevancy,
    read_ek100_retrieval,
    sentence_path,
    sentence_texts,
)
from avion.data.narrations import NarrationTable
from avion.engine import encode, predictions
from avion.engine.console import table
from avion.engine.inputs import ModelInputs
from avion.engine.options.shared import TrainingOptions
from avion.engine.precision import Precision
from avion.errors import UserError
from avion.evaluation.ek100_mir import retrieval_metrics
from avion.evaluation.recall import LEVELS, recall_metrics
from avion.reading import file_exists

logger = logging.getLogger(__name__)


class Evaluation:
    """Clips, texts, and the metrics of their similarities.

    Args:
        root: The folder of the videos.
        flag: The flag that names the folder, for messages.

    Attributes:
        metric: The name of the metric that decides which model is best (higher is better); None where nothing is
            evaluated.
        clips: The evaluation clips.
        texts: The texts that the clips are compared with.
    """

    metric: str | None = None
    clips: NarrationTable
    texts: list[str]

    def __init__(self, root: str, flag: str):
        self.root, self.flag = root, flag

    def facts(self) -> dict[str, Any]:
        """Return what all processes must have in common, by name."""
        return {"evaluation clips": len(self.clips), "sentences": len(self.texts)}

    def data(self) -> dict[str, str]:
        """Return the entry of `Task.data` for the evaluation clips and the texts."""
        digest = hashlib.blake2b("\0".join(self.texts).encode(), digest_size=16)
        digest.update(self.clips.fingerprint().encode())
        return {"val-metadata": digest.hexdigest()}

    def metrics(self, similarity: np.ndarray, readable: np.ndarray) -> dict[str, float]:
        """Compute the metrics.

        Args:
            similarity: (clips, texts) float, in [0, 1].
            readable: The numbers of the clips that could be read.

        Returns:
            The metrics by name.
        """
        raise NotImplementedError

    def summary(self, metrics: dict[str, float]) -> str:
        """Format the metrics on one line."""
        raise NotImplementedError

    def table(self, metrics: dict[str, float]) -> str:
        """Format the metrics as a table."""
        raise NotImplementedError

    def run(self, task: Any, model: nn.Module, precision: Precision) -> dict[str, float]:
        """Encode the clips and the texts with a model, and compute the metrics.

        Args:
            task: The RetrievalTask whose model this is.
            model: The model on the device.
            precision: The settings of autocast.

        Returns:
            The metrics by name, the same on all processes.
        """
        world, inputs = task.world, ModelInputs.of(model.config, task.options)
        clips = encode.encode_clips(model, task.val_dataset(inputs), world, precision, **encode.settings(task.options))
        texts = encode.encode_texts(model, self.texts, inputs.tokens, world, precision)
        metrics: dict[str, float] = {}
        with world.together("computing the retrieval metrics"):
            task.leave_out_unreadable(clips, self.flag, self.root)
            if world.is_main:
                similarity = (encode.cosine(clips.values, texts.values) + 1) / 2  # 0.5 for what cannot be read
                _write(task.options, task.similarity_file, similarity)
                metrics = self.metrics(similarity, clips.readable)
                metrics |= {"clips": len(clips.readable), "unreadable": len(clips.errors)}
        return world.broadcast(metrics)


class Ek100Evaluation(Evaluation):
    """mAP and nDCG of a retrieval split of EPIC-KITCHENS-100.

    Args:
        root: The folder of the videos.
        flag: The flag that names the folder, for messages.
        clips: The CSV of the split; the CSV of its sentences lies beside it.
        relevancy: The pickle of the relevancies.
    """

    metric = "avg_map"

    def __init__(self, root: str, flag: str, clips: str, relevancy: str):
        super().__init__(root, flag)
        self.clips = read_ek100_retrieval(clips)
        check_ids_differ(self.clips.narration_ids, f"annotations {clips}")
        self.texts = sentence_texts(self.clips, sentence_path(clips))
        self.relevancy = load_relevancy(relevancy, len(self.clips), len(self.texts))

    def metrics(self, similarity, readable):
        return retrieval_metrics(similarity[readable], self.relevancy[readable])

    def summary(self, metrics):
        def row(kind: str) -> str:
            return "/".join(f"{100 * metrics[f'{side}_{kind}']:.2f}" for side in ("vis", "txt", "avg"))

        return f"V2T/T2V/avg mAP {row('map')}, nDCG {row('ndcg')} on {_count(metrics, ', ', ' clips unreadable')}"

    def table(self, metrics):
        rows = {
            name: {label: metrics[f"{side}_{kind}"] for label, side in (("V2T", "vis"), ("T2V", "txt"), ("Avg", "avg"))}
            for name, kind in (("mAP", "map"), ("nDCG", "ndcg"))
        }
        return table(_count(metrics, " (", " could not be read)"), rows)


class CaptionEvaluation(Evaluation):
    """Recall at 1, 5 and 10, and the ranks of clips among their captions."""

    metric = "avg_recall"

    def __init__(self, root: str, flag: str, clips: NarrationTable):
        super().__init__(root, flag)
        self.clips = clips
        rows = [clips[i].texts for i in range(len(clips))]
        self.texts = [text for row in rows for text in row]
        self.clip_of = np.repeat(np.arange(len(rows)), [len(row) for row in rows])  # (texts,)

    def metrics(self, similarity, readable):
        number = np.full(len(self.clips), -1)
        number[readable] = np.arange(len(readable))
        clip_of = number[self.clip_of]  # a clip that could not be read takes its texts with it
        return recall_metrics(similarity[readable][:, clip_of >= 0], clip_of[clip_of >= 0])

    def summary(self, metrics):
        def row(side: str) -> str:
            return "/".join(f"{100 * metrics[f'{side}_r{level}']:.2f}" for level in LEVELS)

        ranks = "/".join(f"{metrics[f'{side}_median_rank']:g}" for side in ("vis", "txt"))
        count = _count(metrics, ", ", " clips unreadable")
        return f"R@1/5/10 V2T {row('vis')}, T2V {row('txt')}, median rank V2T/T2V {ranks} on {count}"

    def table(self, metrics):
        sides = (("V2T", "vis"), ("T2V", "txt"))
        shares = {label: {f"R@{k}": metrics[f"{side}_r{k}"] for k in LEVELS} for label, side in sides}
        ranks = {label: {k: metrics[f"{side}_{k}_rank"] for k in ("median", "mean")} for label, side in sides}
        title = _count(metrics, " (", " could not be read)")
        return f"{table(title, shares)}\n{table('rank', ranks, scale=1.0)}"


class NoEvaluation(Evaluation):
    """A training without an evaluation."""

    def __init__(self):
        super().__init__("", "")

    def facts(self):
        return {"evaluation clips": 0}

    def data(self):
        return {"val-metadata": "none"}


def evaluation_of(path: str, root: str, flag: str, relevancy: str, columns: Columns) -> Evaluation:
    """Choose the evaluation that a file stands for.

    Args:
        path: The value of `--val-metadata`; "none" for no evaluation.
        root: The folder of the videos.
        flag: The flag that names the folder, for messages.
        relevancy: The pickle of the relevancies, for a split of EPIC-KITCHENS-100.
        columns: The names of the columns of a file of captions.

    Returns:
        The evaluation.

    Raises:
        UserError: The file does not exist, or is of another kind.
    """
    if path == "none":
        return NoEvaluation()
    if is_ek100_file(path):
        return Ek100Evaluation(root, flag, path, relevancy)
    try:
        found = file_exists(path)
    except OSError as error:
        raise UserError(f"--val-metadata {path}: cannot be read ({error.strerror})") from error
    if not found:
        raise UserError(f"--val-metadata {path}: no such file; none for no validation")
    if not is_caption_file(path) and Path(path).suffix.lower() not in (".pkl", ".pickle"):
        raise UserError(
            f"--val-metadata {path}: is neither a CSV of EPIC-KITCHENS-100 nor captions (.csv, .jsonl, .json, "
            ".parquet, .pkl); none for no validation"
        )
    return CaptionEvaluation(root, flag, read_narrations([path], columns))


def _count(metrics: dict[str, float], before: str, after: str) -> str:
    left_out = f"{before}{metrics['unreadable']}{after}" if metrics["unreadable"] else ""
    return f"{metrics['clips']} clips{left_out}"


def _write(options: TrainingOptions, path: str | None, similarity: np.ndarray) -> None:
    if path is not None:
        content = io.BytesIO()
        np.save(content, similarity)
        predictions.write_of_run(options, path, content.getvalue(), "--similarity-filename")
        logger.info("similarities of %d clips and %d sentences written to %s", *similarity.shape, path)
