"""Pretraining: CLIP's loss on narrated clips; the evaluation is zero-shot retrieval."""

from typing import Any

from torch import nn
from torch.utils.data import Dataset

from avion.data.clip_dataset import ClipDataset
from avion.data.ego4d import read_ego4d
from avion.data.transforms import TrainTransform
from avion.engine.build import build_model
from avion.engine.demo_data import on_demo_dataset
from avion.engine.distributed import World
from avion.engine.inputs import ModelInputs, warn_of_small_vocabulary
from avion.engine.options import PretrainOptions
from avion.engine.steps import Contrastive
from avion.losses import ClipLoss
from avion.weights import Checkpoint

from .mir import RetrievalTask

# Natural logarithms of 1 and 100, between which CLIP keeps its logit scale.
_LOG_SCALE_RANGE = (0.0, 4.6052)


class Pretrain(RetrievalTask[PretrainOptions]):
    """CLIP-style pretraining on narrated clips, with zero-shot multi-instance retrieval as its evaluation."""

    def __init__(self, options: PretrainOptions, world: World, checkpoint: Checkpoint | None = None):
        if options.dataset == "demo":
            options = on_demo_dataset(
                options, "train_videos", train_metadata="train_pickle", root_val="val_videos", val_metadata="val_csv",
                relevancy_path="relevancy",
            )  # fmt: skip
        super().__init__(
            options, world, checkpoint, root=options.root_val, root_flag="--root-val", clips=options.val_metadata,
            relevancy=options.relevancy_path, similarity_file=options.similarity_filename,
        )  # fmt: skip
        loss = ClipLoss(
            local_loss=options.local_loss, gather_with_grad=options.gather_with_grad, cache_labels=True,
            rank=world.rank, world_size=world.size,
        )  # fmt: skip
        self.objective = Contrastive(
            lambda video, text, logit_scale, _: loss(video, text, logit_scale), log_scale_range=_LOG_SCALE_RANGE
        )
        self.narrations = None if options.evaluate else read_ego4d(options.train_metadata, *options.train_metadata_aux)

    def facts(self) -> dict[str, Any]:
        return {"narrations": None if self.narrations is None else len(self.narrations), **super().facts()}

    def build_model(self) -> nn.Module:
        model = build_model(self.options, self.checkpoint)
        warn_of_small_vocabulary(model.config)
        return model

    def train_dataset(self, inputs: ModelInputs) -> Dataset:
        options = self.options
        return ClipDataset(
            self.narrations, self.store(options.root, "--root"), num_frames=inputs.num_frames,
            transform=TrainTransform(
                inputs.img_size, scale=tuple(options.scale_range), norm_style=options.norm_style,
                fused=options.fused_decode_crop,
            ),
            tokenizer=inputs.tokens, train=True, seed=options.seed, sampling=options.frame_sampling,
            stride=options.clip_stride, max_replacements=0 if options.strict_data else 10,
        )  # fmt: skip
