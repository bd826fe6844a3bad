"""What differs between the tasks: data, model, loss, figures. The trainer serves all of them."""

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from avion.data.clip_dataset import ClipDataset
from avion.data.demo import ensure_demo_dataset
from avion.data.ego4d import read_ego4d
from avion.data.ek100 import load_relevancy, read_ek100_retrieval, read_sentences, sentence_path
from avion.data.tokenizer import tokenize
from avion.data.transforms import EvalTransform, TrainTransform
from avion.data.video_store import VideoStore
from avion.errors import UserError
from avion.evaluation.ek100_mir import retrieval_metrics
from avion.losses import ClipLoss

from . import encode
from .build import build_model
from .distributed import World
from .logging import table
from .steps import Precision, contrastive_step

logger = logging.getLogger(__name__)

# Errors of single clips are logged one by one up to here, then only counted.
_SHOWN_ERRORS = 20

# Natural logarithms of 1 and 100, between which CLIP keeps its logit scale.
_LOG_TEMPERATURE_RANGE = (0.0, 4.6052)


class Task:
    """One entry point's data, model, loss and figures.

    `metric` names the figure that decides which model is best (higher is better).
    """

    metric: str

    def __init__(self, args: Any, world: World):
        self.args, self.world = args, world
        self.replaced = 0

    def build_model(self, source: str | None) -> nn.Module:
        """The model with the weights of a checkpoint, or with those it is trained from."""
        return build_model(self.args, source)

    def facts(self) -> dict[str, Any]:
        """What all processes must have in common."""
        raise NotImplementedError

    def train_dataset(self) -> Dataset:
        raise NotImplementedError

    def step(
        self, model: nn.Module, micro_batches: list[dict[str, Any]], precision: Precision, scale: Callable
    ) -> dict[str, torch.Tensor]:
        """Leave the gradients of one optimizer step in `.grad`; return its figures, `loss` among them."""
        raise NotImplementedError

    def after_step(self, model: nn.Module) -> None:
        """Keep parameters in their range."""

    def evaluate(self, model: nn.Module, precision: Precision) -> dict[str, float]:
        """Figures of the evaluation data, the same on all processes."""
        raise NotImplementedError

    def summary(self, figures: dict[str, float]) -> str:
        """The figures on one line."""
        raise NotImplementedError

    def table(self, figures: dict[str, float]) -> str:
        """The figures as a table."""
        raise NotImplementedError

    def report(self, micro_batches: list[dict[str, Any]]) -> None:
        """Name the clips that could not be read and were replaced by others."""
        for batch in micro_batches:
            for error in filter(None, batch["error"]):
                self.replaced += 1
                if self.replaced <= _SHOWN_ERRORS:
                    logger.warning("clip replaced by another one: %s", error)
                if self.replaced == _SHOWN_ERRORS:
                    logger.warning("further clips that cannot be read are replaced without a word")


def _folder(path: str, name: str) -> str:
    if not Path(path).is_dir():
        raise UserError(f"--{name} {path}: no such folder; give the folder that the videos are in")
    return path


class Pretrain(Task):
    """CLIP-style pretraining on narrated clips, zero-shot multi-instance retrieval for evaluation."""

    metric = "avg_map"

    def __init__(self, args: Any, world: World):
        super().__init__(args, world)
        if args.dataset == "demo":
            self._use_demo_dataset()
        if args.frame_sampling == "uniform" and "clip_stride" in args.given:
            logger.info("--clip-stride has no effect with --frame-sampling uniform (nor had it in AVION)")
        self.tokenizer = functools.partial(tokenize, context_length=args.context_length)
        self.loss = ClipLoss(local_loss=args.local_loss, gather_with_grad=args.gather_with_grad)
        self.clips = read_ek100_retrieval(args.val_metadata)
        _, self.sentences = read_sentences(sentence_path(args.val_metadata))
        self.relevancy = load_relevancy(args.relevancy_path, len(self.clips), len(self.sentences))
        self.narrations = None if args.evaluate else read_ego4d(args.train_metadata, *args.train_metadata_aux)

    def _use_demo_dataset(self) -> None:
        """The demo dataset's own files wherever no other was asked for; it is generated where it is missing."""
        root = self.args.root if "root" in self.args.given else "datasets/demo"
        paths = ensure_demo_dataset(root)
        files = {
            "root": paths.train_videos, "train_metadata": paths.train_pickle, "root_val": paths.val_videos,
            "val_metadata": paths.val_csv, "relevancy_path": paths.relevancy,
        }  # fmt: skip
        for name, path in files.items():
            if name == "root" or name not in self.args.given:
                setattr(self.args, name, str(path))

    def facts(self) -> dict[str, Any]:
        return {
            "narrations": None if self.narrations is None else len(self.narrations),
            "evaluation clips": len(self.clips),
            "sentences": len(self.sentences),
        }

    def build_model(self, source: str | None) -> nn.Module:
        model = super().build_model(source)
        self.img_size = model.config.img_size
        self.num_frames = self.args.clip_length if "clip_length" in self.args.given else model.config.num_frames
        self.tokenizer = functools.partial(tokenize, context_length=model.config.context_length)
        return model

    def _store(self, root: str) -> VideoStore:
        a = self.args
        return VideoStore(
            root,
            chunk_length=a.video_chunk_length,
            layout=a.video_layout,
            decoder=a.decoder,
            threads=a.decode_threads,
        )

    def train_dataset(self) -> Dataset:
        a = self.args
        return ClipDataset(
            self.narrations, self._store(_folder(a.root, "root")), num_frames=self.num_frames,
            transform=TrainTransform(
                self.img_size, scale=tuple(a.scale_range), norm_style=a.norm_style, fused=a.fused_decode_crop
            ),
            tokenizer=self.tokenizer, train=True, seed=a.seed, sampling=a.frame_sampling, stride=a.clip_stride,
            max_replacements=0 if a.strict_data else 10,
        )  # fmt: skip

    def val_dataset(self, num_frames: int | None = None) -> ClipDataset:
        """The evaluation clips, in the order of their CSV, without texts; `num_frames` if not the model's."""
        a = self.args
        return ClipDataset(
            self.clips, self._store(_folder(a.root_val, "root-val")), num_frames=num_frames or self.num_frames,
            transform=EvalTransform(self.img_size, norm_style=a.norm_style, fused=a.fused_decode_crop),
            tokenizer=None, train=False, sampling=a.frame_sampling, stride=a.clip_stride,
        )  # fmt: skip

    def step(self, model, micro_batches, precision, scale):
        return contrastive_step(
            model, micro_batches, lambda video, text, temperature, _: self.loss(video, text, temperature),
            precision, scale,
        )  # fmt: skip

    def after_step(self, model: nn.Module) -> None:
        with torch.no_grad():
            model.logit_scale.clamp_(*_LOG_TEMPERATURE_RANGE)

    def evaluate(self, model: nn.Module, precision: Precision) -> dict[str, float]:
        clips = encode.encode_clips(model, self.val_dataset(), self.world, precision, **encode.settings(self.args))
        texts = encode.encode_texts(model, self.sentences, self.tokenizer, self.world, precision)
        figures: dict[str, float] = {}
        with self.world.together("computing the retrieval figures"):
            if clips.errors:
                logger.warning(
                    "%d of %d clips cannot be read and are left out of the figures: %s",
                    len(clips.errors), len(self.clips), encode.describe(clips.errors),
                )  # fmt: skip
            if len(clips.readable) == 0:
                raise UserError(
                    f"--root-val {self.args.root_val}: no clip can be read: {encode.describe(clips.errors, 1)}"
                )
            if self.world.is_main:
                similarity = (encode.cosine(clips.values[clips.readable], texts.values) + 1) / 2
                figures = retrieval_metrics(similarity, self.relevancy[clips.readable])
                figures |= {"clips": len(clips.readable), "unreadable": len(clips.errors)}
        return self.world.broadcast(figures)

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
