"""Fine-tuning for multi-instance retrieval: a max-margin loss on clips and the sentences relevant to them."""

import logging
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from avion.data.clip_dataset import ClipDataset
from avion.data.ek100 import check_ids_differ, load_relevancy, read_ek100_retrieval, sentence_path, sentence_texts
from avion.data.retrieval_dataset import ClipsWithPositives
from avion.data.transforms import TrainTransform
from avion.engine.build import build_finetuned
from avion.engine.demo_data import use_demo_dataset
from avion.engine.distributed import World
from avion.engine.steps import contrastive_step
from avion.errors import UserError
from avion.losses import MaxMarginRankingLoss
from avion.weights import Checkpoint

from .mir import RetrievalTask

logger = logging.getLogger(__name__)

_DEMO_FILES = {
    "train_metadata": "train_csv", "train_relevancy_path": "train_relevancy",
    "val_metadata": "val_csv", "relevancy_path": "relevancy",
}  # fmt: skip
_TRAIN_RELEVANCY = "caption_relevancy_EPIC_100_retrieval_train.pkl"


class FinetuneRetrieval(RetrievalTask):
    """Each clip of the train split with one of its relevant sentences, drawn anew in every epoch."""

    def __init__(self, args: Any, world: World):
        if args.dataset == "demo":
            use_demo_dataset(args, "ek100_videos", **_DEMO_FILES)
        super().__init__(
            args, world, root=args.root, root_flag="--root", clips=args.val_metadata,
            relevancy=relevancy_file(args.relevancy_path, "test"),
        )  # fmt: skip
        self.loss = MaxMarginRankingLoss(
            args.margin, local_loss=args.local_loss, gather_with_grad=args.gather_with_grad, rank=world.rank,
            world_size=world.size, weighted=args.relevancy_weighting,
        )  # fmt: skip
        if args.use_multi_epochs_loader:
            logger.info("--use-multi-epochs-loader: workers live as long as the run with or without it")
        self.pairs = None if args.evaluate else self._read_pairs()

    def _read_pairs(self) -> ClipsWithPositives:
        a = self.args
        clips = read_ek100_retrieval(a.train_metadata)
        check_ids_differ(clips.narration_ids, f"annotations {a.train_metadata}")
        sentences = sentence_texts(clips, sentence_path(a.train_metadata))
        path = a.train_relevancy_path or relevancy_file(a.relevancy_path, "train")
        relevancy = load_relevancy(path, len(clips), len(sentences))
        pairs = ClipsWithPositives(clips, sentences, relevancy, a.relevancy_threshold)
        if len(pairs) == 0:
            raise UserError(
                f"relevancy {path}: no clip of {a.train_metadata} has a sentence of relevancy above "
                f"{a.relevancy_threshold:g}; lower --relevancy-threshold or give the train split's file"
            )
        logger.info(
            "%d training clips with %.1f sentences of relevancy above %g each; %d without any are skipped",
            len(pairs), pairs.positives / len(pairs), a.relevancy_threshold, pairs.skipped,
        )  # fmt: skip
        return pairs

    def facts(self) -> dict[str, Any]:
        if self.pairs is None:
            return super().facts()
        return {"training clips": len(self.pairs), "positives": self.pairs.positives, **super().facts()}

    def build_model(self, checkpoint: Checkpoint | None) -> nn.Module:
        model = build_finetuned(self.args, checkpoint)
        model.logit_scale.requires_grad_(False)  # the loss knows no temperature
        self.args.model = model.config.name  # of which model the checkpoints of this run are
        return self.fit_inputs(model)

    def train_dataset(self) -> Dataset:
        a = self.args
        return ClipDataset(
            self.pairs, self.store(a.root, "--root"), num_frames=self.num_frames,
            transform=TrainTransform(
                self.img_size, scale=tuple(a.scale_range), norm_style=a.norm_style, fused=a.fused_decode_crop
            ),
            tokenizer=self.tokenizer, train=True, seed=a.seed, sampling=a.frame_sampling, stride=a.clip_stride,
            max_replacements=0 if a.strict_data else 10, captions=self.pairs.draw,
        )  # fmt: skip

    def step(self, model, micro_batches, precision, scale):
        def loss(video, text, _temperature, batch):
            return self.loss(video, text, batch["relevancy"] if self.args.relevancy_weighting else None)

        return contrastive_step(model, micro_batches, loss, precision, scale)


def relevancy_file(path: str, split: str) -> str:
    """The relevancy file of "train" or "test" that `--relevancy-path` means.

    `{}` in it stands for the split. Without, it is the test split's, and the train split's lies beside it: the same
    name with train for (the last) test, or the name of EPIC-KITCHENS' own file.
    """
    if "{}" in path or split == "test":
        return path.replace("{}", split)
    name = Path(path).name
    before, test, after = name.rpartition("test")
    return str(Path(path).with_name(before + "train" + after if test else _TRAIN_RELEVANCY))
