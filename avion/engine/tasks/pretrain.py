"""Pretraining: CLIP's loss on narrated clips, zero-shot retrieval for evaluation."""

from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from avion.data.clip_dataset import ClipDataset
from avion.data.ego4d import read_ego4d
from avion.data.transforms import TrainTransform
from avion.engine.demo_data import use_demo_dataset
from avion.engine.distributed import World
from avion.engine.steps import contrastive_step
from avion.losses import ClipLoss

from .mir import RetrievalTask

# Natural logarithms of 1 and 100, between which CLIP keeps its logit scale.
_LOG_TEMPERATURE_RANGE = (0.0, 4.6052)


class Pretrain(RetrievalTask):
    """CLIP-style pretraining on narrated clips, zero-shot multi-instance retrieval for evaluation."""

    def __init__(self, args: Any, world: World):
        if args.dataset == "demo":
            use_demo_dataset(
                args, "train_videos", train_metadata="train_pickle", root_val="val_videos", val_metadata="val_csv",
                relevancy_path="relevancy",
            )  # fmt: skip
        super().__init__(
            args, world, root=args.root_val, root_flag="--root-val", clips=args.val_metadata,
            relevancy=args.relevancy_path,
        )  # fmt: skip
        self.loss = ClipLoss(
            local_loss=args.local_loss, gather_with_grad=args.gather_with_grad, cache_labels=True, rank=world.rank,
            world_size=world.size,
        )  # fmt: skip
        self.narrations = None if args.evaluate else read_ego4d(args.train_metadata, *args.train_metadata_aux)

    def facts(self) -> dict[str, Any]:
        return {"narrations": None if self.narrations is None else len(self.narrations), **super().facts()}

    def train_dataset(self) -> Dataset:
        a = self.args
        return ClipDataset(
            self.narrations, self.store(a.root, "--root"), num_frames=self.num_frames,
            transform=TrainTransform(
                self.img_size, scale=tuple(a.scale_range), norm_style=a.norm_style, fused=a.fused_decode_crop
            ),
            tokenizer=self.tokenizer, train=True, seed=a.seed, sampling=a.frame_sampling, stride=a.clip_stride,
            max_replacements=0 if a.strict_data else 10,
        )  # fmt: skip

    def step(self, model, micro_batches, precision, scale):
        return contrastive_step(
            model, micro_batches, lambda video, text, temperature, _: self.loss(video, text, temperature),
            precision, scale,
        )  # fmt: skip

    def after_step(self, model: nn.Module) -> None:
        with torch.no_grad():
            model.logit_scale.clamp_(*_LOG_TEMPERATURE_RANGE)
