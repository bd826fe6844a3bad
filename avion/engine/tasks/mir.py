"""Tasks that are judged by EPIC-KITCHENS-100 multi-instance retrieval."""

import io
import logging
from typing import Any, TypeVar

import numpy as np
from torch import nn

from avion.data.clip_dataset import ClipDataset
from avion.data.ek100 import check_ids_differ, load_relevancy, read_ek100_retrieval, sentence_path, sentence_texts
from avion.data.transforms import EvalTransform
from avion.engine import encode, predictions
from avion.engine.console import table
from avion.engine.distributed import World
from avion.engine.inputs import ModelInputs
from avion.engine.options import TrainingOptions
from avion.engine.steps import Precision
from avion.evaluation.ek100_mir import retrieval_metrics
from avion.weights import Checkpoint

from .base import Task

logger = logging.getLogger(__name__)

T = TypeVar("T", bound=TrainingOptions)


class RetrievalTask(Task[T]):
    """A two-tower model, judged by mAP and nDCG of a retrieval split in both directions.

    Args:
        root: The folder of the videos of the split.
        root_flag: The flag that gives the folder, for errors.
        clips: The CSV of the clips; the CSV of the sentences is beside it.
        relevancy: The pickle of the relevancies.
        similarity_file: The file that the similarities of an evaluation are written to, if there is one.
    """

    metric = "avg_map"

    def __init__(
        self,
        options: T,
        world: World,
        checkpoint: Checkpoint | None = None,
        *,
        root: str,
        root_flag: str,
        clips: str,
        relevancy: str,
        similarity_file: str | None,
    ):
        super().__init__(options, world, checkpoint)
        if options.frame_sampling == "uniform" and options.was_given("clip_stride"):
            logger.info("--clip-stride has no effect with --frame-sampling uniform (nor had it in AVION)")
        if world.is_main and similarity_file is not None:
            predictions.check_target(similarity_file, "--similarity-filename", ".npy")
        self.similarity_file = similarity_file
        self.eval_root, self.eval_root_flag = root, root_flag
        self.clips = read_ek100_retrieval(clips)
        check_ids_differ(self.clips.narration_ids, f"annotations {clips}")
        self.sentences = sentence_texts(self.clips, sentence_path(clips))
        self.relevancy = load_relevancy(relevancy, len(self.clips), len(self.sentences))

    def facts(self) -> dict[str, Any]:
        return {"evaluation clips": len(self.clips), "sentences": len(self.sentences)}

    def val_dataset(self, inputs: ModelInputs) -> ClipDataset:
        """The evaluation clips in the order of their CSV, without texts."""
        options = self.options
        return ClipDataset(
            self.clips, self.store(self.eval_root, self.eval_root_flag), num_frames=inputs.num_frames,
            transform=EvalTransform(inputs.img_size, norm_style=options.norm_style, fused=options.fused_decode_crop),
            tokenizer=None, train=False, sampling=options.frame_sampling, stride=options.clip_stride,
        )  # fmt: skip

    def evaluate(self, model: nn.Module, precision: Precision) -> dict[str, float]:
        inputs = ModelInputs.of(model.config, self.options)
        clips = encode.encode_clips(
            model, self.val_dataset(inputs), self.world, precision, **encode.settings(self.options)
        )
        texts = encode.encode_texts(model, self.sentences, inputs.tokens, self.world, precision)
        metrics: dict[str, float] = {}
        with self.world.together("computing the retrieval metrics"):
            self.leave_out_unreadable(clips, self.eval_root_flag, self.eval_root)
            if self.world.is_main:
                similarity = (encode.cosine(clips.values, texts.values) + 1) / 2  # 0.5 for what cannot be read
                self._write(similarity)
                metrics = retrieval_metrics(similarity[clips.readable], self.relevancy[clips.readable])
                metrics |= {"clips": len(clips.readable), "unreadable": len(clips.errors)}
        return self.world.broadcast(metrics)

    def _write(self, similarity: np.ndarray) -> None:
        path = self.similarity_file
        if path is not None:
            content = io.BytesIO()
            np.save(content, similarity)
            predictions.write_whole(path, content.getvalue(), "--similarity-filename")
            logger.info("similarities of %d clips and %d sentences written to %s", *similarity.shape, path)

    def summary(self, metrics: dict[str, float]) -> str:
        def row(kind: str) -> str:
            return "/".join(f"{100 * metrics[f'{side}_{kind}']:.2f}" for side in ("vis", "txt", "avg"))

        left_out = f", {metrics['unreadable']} clips unreadable" if metrics["unreadable"] else ""
        return f"V2T/T2V/avg mAP {row('map')}, nDCG {row('ndcg')} on {metrics['clips']} clips{left_out}"

    def table(self, metrics: dict[str, float]) -> str:
        rows = {
            name: {label: metrics[f"{side}_{kind}"] for label, side in (("V2T", "vis"), ("T2V", "txt"), ("Avg", "avg"))}
            for name, kind in (("mAP", "map"), ("nDCG", "ndcg"))
        }
        left_out = f" ({metrics['unreadable']} could not be read)" if metrics["unreadable"] else ""
        return table(f"{metrics['clips']} clips{left_out}", rows)
