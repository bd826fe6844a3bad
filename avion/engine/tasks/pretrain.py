"""Pretraining: CLIP's loss on clips with narrations or captions. The evaluation is retrieval."""

from typing import Any

from torch import nn
from torch.utils.data import Dataset

from avion.data.captions import Columns
from avion.data.clip_dataset import ClipDataset
from avion.data.mixture import Mixture
from avion.data.transforms import TrainTransform
from avion.engine.build import build_model
from avion.engine.demo_data import on_demo_dataset
from avion.engine.distributed import World
from avion.engine.inputs import ModelInputs, warn_of_small_vocabulary
from avion.engine.options import PretrainOptions
from avion.engine.steps import Contrastive
from avion.losses import ClipLoss
from avion.weights import Checkpoint

from .evaluations import CaptionEvaluation, Evaluation, evaluation_of
from .mir import RetrievalTask
from .sources import Source, hold_out, read_sources

# CLIP keeps its logit scale between 1 and 100; these are the natural logarithms.
_LOG_SCALE_RANGE = (0.0, 4.6052)
_SEED_STEP = 1_000_003  # between the seeds of sources: rows of the same number are not augmented alike


class Pretrain(RetrievalTask[PretrainOptions]):
    """CLIP-style pretraining on clips with narrations or captions, with retrieval as its evaluation."""

    def __init__(self, options: PretrainOptions, world: World, checkpoint: Checkpoint | None = None):
        if options.dataset == "demo":
            options = on_demo_dataset(
                options,
                "train_videos",
                train_metadata="train_pickle",
                root_val="val_videos",
                val_metadata="val_csv",
                relevancy_path="relevancy",
            )
        self.check_similarity_file(options, options.similarity_filename, world)
        self.sources, evaluation = _read(options)
        super().__init__(options, world, checkpoint, evaluation=evaluation, similarity_file=options.similarity_filename)
        loss = ClipLoss(
            local_loss=options.local_loss,
            gather_with_grad=options.gather_with_grad,
            cache_labels=True,
            rank=world.rank,
            world_size=world.size,
        )
        self.objective = Contrastive(
            lambda video, text, logit_scale, _: loss(video, text, logit_scale), log_scale_range=_LOG_SCALE_RANGE
        )

    def facts(self) -> dict[str, Any]:
        return {"narrations": [len(source.table) for source in self.sources], **super().facts()}

    def data(self) -> dict[str, str]:
        marks = (f"{source.table.fingerprint()} x {source.weight:g}" for source in self.sources)
        return {"train-metadata": ", ".join(marks), **super().data()}

    def build_model(self) -> nn.Module:
        model = build_model(self.options, self.checkpoint)
        warn_of_small_vocabulary(model.config)
        return model

    def train_dataset(self, inputs: ModelInputs) -> Dataset:
        seed = self.options.seed
        parts = [self._part(source, inputs, seed + _SEED_STEP * k) for k, source in enumerate(self.sources)]
        return parts[0] if len(parts) == 1 else Mixture(parts, [source.weight for source in self.sources])

    def _part(self, source: Source, inputs: ModelInputs, seed: int) -> ClipDataset:
        options = self.options
        return ClipDataset(
            source.table,
            self.store(source.root, source.flag),
            num_frames=inputs.num_frames,
            transform=TrainTransform(
                inputs.img_size,
                scale=tuple(options.scale_range),
                norm_style=options.norm_style,
                fused=options.fused_decode_crop,
            ),
            tokenizer=inputs.tokens,
            train=True,
            seed=seed,
            sampling=options.frame_sampling,
            stride=options.clip_stride,
            max_replacements=0 if options.strict_data else 10,
        )


def _read(options: PretrainOptions) -> tuple[list[Source], Evaluation]:
    """Read the clips to train on (none with `--evaluate`), and the evaluation."""
    if options.val_fraction:
        sources, held_out = hold_out(read_sources(options), options.val_fraction)
        return [] if options.evaluate else sources, CaptionEvaluation(options.root, "--root", held_out)
    columns = Columns.parse(options.caption_columns)
    evaluation = evaluation_of(options.val_metadata, options.root_val, "--root-val", options.relevancy_path, columns)
    return [] if options.evaluate else read_sources(options), evaluation
