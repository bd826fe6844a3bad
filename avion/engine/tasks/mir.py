"""Tasks that are judged by EPIC-KITCHENS-100 multi-instance retrieval."""

import functools
import io
import logging
from typing import Any

import numpy as np
from torch import nn

from avion.data.clip_dataset import ClipDataset
from avion.data.ek100 import check_ids_differ, load_relevancy, read_ek100_retrieval, sentence_path, sentence_texts
from avion.data.tokenizer import VOCAB_SIZE, tokenize
from avion.data.transforms import EvalTransform
from avion.engine import encode, predictions
from avion.engine.console import table
from avion.engine.distributed import World
from avion.engine.steps import Precision
from avion.evaluation.ek100_mir import retrieval_metrics
from avion.weights import Checkpoint

from .base import Task

logger = logging.getLogger(__name__)


class RetrievalTask(Task):
    """A two-tower model; mAP and nDCG of a retrieval split, both directions.

    root, root_flag: the split's videos, and the flag that names them in errors. clips, relevancy: its CSV, with
    the sentences' CSV beside it, and its relevancy pickle.
    """

    metric = "avg_map"

    def __init__(self, args: Any, world: World, *, root: str, root_flag: str, clips: str, relevancy: str):
        super().__init__(args, world)
        if args.frame_sampling == "uniform" and "clip_stride" in args.given:
            logger.info("--clip-stride has no effect with --frame-sampling uniform (nor had it in AVION)")
        if world.is_main and args.similarity_filename is not None:
            predictions.check_target(args.similarity_filename, "--similarity-filename", ".npy")
        self.eval_root, self.eval_root_flag = root, root_flag
        self.clips = read_ek100_retrieval(clips)
        check_ids_differ(self.clips.narration_ids, f"annotations {clips}")
        self.sentences = sentence_texts(self.clips, sentence_path(clips))
        self.relevancy = load_relevancy(relevancy, len(self.clips), len(self.sentences))

    def facts(self) -> dict[str, Any]:
        return {"evaluation clips": len(self.clips), "sentences": len(self.sentences)}

    def build_model(self, checkpoint: Checkpoint | None) -> nn.Module:
        return self.fit_inputs(super().build_model(checkpoint))

    def fit_inputs(self, model: nn.Module) -> nn.Module:
        """Clips and tokens as the model takes them."""
        config = model.config
        self.img_size = config.img_size
        self.num_frames = self.args.clip_length if "clip_length" in self.args.given else config.num_frames
        if config.vocab_size < VOCAB_SIZE:
            logger.warning(
                "the model's vocabulary of %d is smaller than the tokenizer's of %d: words share entries",
                config.vocab_size, VOCAB_SIZE,
            )  # fmt: skip
        self.tokenizer = functools.partial(
            tokenize, context_length=config.context_length, vocab_size=config.vocab_size
        )  # fmt: skip
        return model

    def val_dataset(self, num_frames: int | None = None) -> ClipDataset:
        """The evaluation clips, in the order of their CSV, without texts; `num_frames` if not the model's."""
        a = self.args
        return ClipDataset(
            self.clips, self.store(self.eval_root, self.eval_root_flag), num_frames=num_frames or self.num_frames,
            transform=EvalTransform(self.img_size, norm_style=a.norm_style, fused=a.fused_decode_crop),
            tokenizer=None, train=False, sampling=a.frame_sampling, stride=a.clip_stride,
        )  # fmt: skip

    def evaluate(self, model: nn.Module, precision: Precision) -> dict[str, float]:
        clips = encode.encode_clips(model, self.val_dataset(), self.world, precision, **encode.settings(self.args))
        texts = encode.encode_texts(model, self.sentences, self.tokenizer, self.world, precision)
        figures: dict[str, float] = {}
        with self.world.together("computing the retrieval figures"):
            self.leave_out_unreadable(clips, self.eval_root_flag, self.eval_root)
            if self.world.is_main:
                similarity = (encode.cosine(clips.values, texts.values) + 1) / 2  # 0.5 for what cannot be read
                self._write(similarity)
                figures = retrieval_metrics(similarity[clips.readable], self.relevancy[clips.readable])
                figures |= {"clips": len(clips.readable), "unreadable": len(clips.errors)}
        return self.world.broadcast(figures)

    def _write(self, similarity: np.ndarray) -> None:
        path = self.args.similarity_filename
        if path is not None:
            content = io.BytesIO()
            np.save(content, similarity)
            predictions.write_whole(path, content.getvalue(), "--similarity-filename")
            logger.info("similarities of %d clips and %d sentences written to %s", *similarity.shape, path)

    def summary(self, figures: dict[str, float]) -> str:
        def row(kind: str) -> str:
            return "/".join(f"{100 * figures[f'{side}_{kind}']:.2f}" for side in ("vis", "txt", "avg"))

        left_out = f", {figures['unreadable']} clips unreadable" if figures["unreadable"] else ""
        return f"V2T/T2V/avg mAP {row('map')}, nDCG {row('ndcg')} on {figures['clips']} clips{left_out}"

    def table(self, figures: dict[str, float]) -> str:
        rows = {
            name: {label: figures[f"{side}_{kind}"] for label, side in (("V2T", "vis"), ("T2V", "txt"), ("Avg", "avg"))}
            for name, kind in (("mAP", "map"), ("nDCG", "ndcg"))
        }
        left_out = f" ({figures['unreadable']} could not be read)" if figures["unreadable"] else ""
        return table(f"{figures['clips']} clips{left_out}", rows)
