"""Fine-tuning for multi-instance retrieval: a max-margin loss on clips and the sentences that are relevant to them."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from avion.data.captions import Columns, read_narrations
from avion.data.clip_dataset import ClipDataset
from avion.data.ek100 import (
    check_ids_differ,
    is_ek100_file,
    load_relevancy,
    read_ek100_retrieval,
    sentence_path,
    sentence_texts,
)
from avion.data.narrations import Narration
from avion.data.retrieval_dataset import ClipsWithPositives
from avion.data.transforms import TrainTransform
from avion.engine.build import build_finetuned
from avion.engine.demo_data import on_demo_dataset
from avion.engine.distributed import World
from avion.engine.inputs import ModelInputs, warn_of_small_vocabulary
from avion.engine.options import FinetuneRetrievalOptions
from avion.engine.steps import Contrastive
from avion.errors import UserError
from avion.losses import MaxMarginRankingLoss
from avion.remote import neighbour
from avion.weights import Checkpoint

from .evaluations import CaptionEvaluation, Evaluation, evaluation_of
from .mir import RetrievalTask
from .sources import Source, hold_out

logger = logging.getLogger(__name__)

DEMO_FILES = {
    "train_metadata": "train_csv", "train_relevancy_path": "train_relevancy",
    "val_metadata": "val_csv", "relevancy_path": "relevancy",
}  # fmt: skip
_TRAIN_RELEVANCY = "caption_relevancy_EPIC_100_retrieval_train.pkl"


class FinetuneRetrieval(RetrievalTask[FinetuneRetrievalOptions]):
    """Trains on the clips of the train split.

    In every epoch, one of the relevant sentences of each clip, or one of its captions, is drawn anew.
    """

    def __init__(self, options: FinetuneRetrievalOptions, world: World, checkpoint: Checkpoint | None = None):
        if options.dataset == "demo":
            options = on_demo_dataset(options, "ek100_videos", **DEMO_FILES)
        self.check_similarity_file(options, options.similarity_filename, world)
        self.pairs, evaluation = _read(options)
        super().__init__(options, world, checkpoint, evaluation=evaluation, similarity_file=options.similarity_filename)
        loss = MaxMarginRankingLoss(
            options.margin,
            local_loss=options.local_loss,
            gather_with_grad=options.gather_with_grad,
            rank=world.rank,
            world_size=world.size,
            weighted=options.relevancy_weighting,
        )
        self.objective = Contrastive(
            lambda video, text, _, batch: loss(video, text, batch["relevancy"] if options.relevancy_weighting else None)
        )
        if options.use_multi_epochs_loader:
            logger.info("--use-multi-epochs-loader: workers live as long as the run with or without it")

    def facts(self) -> dict[str, Any]:
        if self.pairs is None:
            return super().facts()
        positives = self.pairs.positives if isinstance(self.pairs, ClipsWithPositives) else None
        return {"training clips": len(self.pairs), "positives": positives, **super().facts()}

    def data(self) -> dict[str, str]:
        clips = self.pairs.clips if isinstance(self.pairs, ClipsWithPositives) else self.pairs
        return {"train-metadata": clips.fingerprint(), **super().data()}

    def build_model(self) -> nn.Module:
        model = build_finetuned(self.options, self.options.pretrain_model, self.checkpoint)
        model.logit_scale.requires_grad_(False)  # the loss has no temperature
        warn_of_small_vocabulary(model.config)
        return model

    def saved_flags(self, model: nn.Module) -> dict[str, Any]:
        return {**super().saved_flags(model), "model": model.config.name}

    def train_dataset(self, inputs: ModelInputs) -> Dataset:
        options = self.options
        return ClipDataset(
            self.pairs,
            self.store(options.root, "--root"),
            num_frames=inputs.num_frames,
            transform=TrainTransform(
                inputs.img_size,
                scale=tuple(options.scale_range),
                norm_style=options.norm_style,
                fused=options.fused_decode_crop,
            ),
            tokenizer=inputs.tokens,
            train=True,
            seed=options.seed,
            sampling=options.frame_sampling,
            stride=options.clip_stride,
            max_replacements=0 if options.strict_data else 10,
            captions=self.pairs.draw if isinstance(self.pairs, ClipsWithPositives) else None,
        )


def _read(options: FinetuneRetrievalOptions) -> tuple[Sequence[Narration] | None, Evaluation]:
    """Read the clips to train on (None with `--evaluate`), and the evaluation."""
    columns = Columns.parse(options.caption_columns)
    if options.val_fraction:
        if is_ek100_file(options.train_metadata):
            raise UserError("--val-fraction: is for captions; EPIC-KITCHENS-100 has a split of its own")
        table = read_narrations([options.train_metadata], columns)
        (source,), held_out = hold_out([Source(table, options.root, "--root", 1.0)], options.val_fraction)
        evaluation: Evaluation = CaptionEvaluation(options.root, "--root", held_out)
        return None if options.evaluate else source.table, evaluation
    relevancy = relevancy_file(options.relevancy_path, "test")
    evaluation = evaluation_of(options.val_metadata, options.root, "--root", relevancy, columns)
    if options.evaluate:
        return None, evaluation
    if is_ek100_file(options.train_metadata):
        return _read_pairs(options), evaluation
    if options.relevancy_weighting:
        raise UserError("--relevancy-weighting: captions have no relevancies; leave it away")
    return read_narrations([options.train_metadata], columns), evaluation


def _read_pairs(options: FinetuneRetrievalOptions) -> ClipsWithPositives:
    """Read the pairs of a train split of EPIC-KITCHENS-100."""
    clips = read_ek100_retrieval(options.train_metadata)
    check_ids_differ(clips.narration_ids, f"annotations {options.train_metadata}")
    sentences = sentence_texts(clips, sentence_path(options.train_metadata))
    path = options.train_relevancy_path or relevancy_file(options.relevancy_path, "train")
    relevancy = load_relevancy(path, len(clips), len(sentences))
    pairs = ClipsWithPositives(clips, sentences, relevancy, options.relevancy_threshold)
    if len(pairs) == 0:
        raise UserError(
            f"relevancy {path}: no clip of {options.train_metadata} has a sentence of relevancy above "
            f"{options.relevancy_threshold:g}; lower --relevancy-threshold or give the train split's file"
        )
    logger.info(
        "%d training clips with %.1f sentences of relevancy above %g each; %d without any are skipped",
        len(pairs),
        pairs.positives / len(pairs),
        options.relevancy_threshold,
        pairs.skipped,
    )
    return pairs


def relevancy_file(path: str, split: str) -> str:
    """Find the relevancy file of a split that `--relevancy-path` means.

    `{}` in the path stands for the split. A path without `{}` is the file of the test split. The file of the train
    split is then in the same folder: under the same name with "train" in the place of the last "test", or, where the
    name has no "test", under the name that EPIC-KITCHENS gives it.

    Args:
        path: The value of `--relevancy-path`.
        split: "train" or "test".

    Returns:
        The path of the file.
    """
    if "{}" in path or split == "test":
        return path.replace("{}", split)
    name = Path(path).name
    before, test, after = name.rpartition("test")
    return neighbour(path, before + "train" + after if test else _TRAIN_RELEVANCY)
