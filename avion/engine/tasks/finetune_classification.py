"""Fine-tuning for action recognition: one head over all actions; verbs and nouns by summing their actions."""

import hashlib
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from avion.data.clip_dataset import ClipDataset
from avion.data.ek100 import EK100Table
from avion.data.ek100_actions import (
    action_list,
    action_numbers,
    read_ek100_actions,
    read_participants,
    read_tail_classes,
    split_actions,
)
from avion.data.labelled_clips import ClipViews, LabelledClips
from avion.data.mixup import VideoMixup
from avion.data.transforms import CropsTransform, TrainTransform
from avion.engine import encode, predictions
from avion.engine.build import build_classifier
from avion.engine.console import table
from avion.engine.demo_data import use_demo_dataset
from avion.engine.distributed import World
from avion.engine.steps import Precision, supervised_step
from avion.errors import UserError
from avion.evaluation.ek100_cls import KINDS, action_marginals, action_metrics
from avion.evaluation.submission import SLS, action_submission
from avion.weights import Checkpoint

from .base import Task

logger = logging.getLogger(__name__)

# AVION's and the paper's learning rates are those of a global batch of so many clips.
_BASE_BATCH = 128


class FinetuneClassification(Task):
    """A video tower with one head; accuracies of actions, verbs and nouns, averaged over several views of a clip."""

    metric = "action_top1"

    def __init__(self, args: Any, world: World):
        if args.dataset == "demo":
            use_demo_dataset(
                args, "ek100_videos", train_metadata="action_train_csv", val_metadata="action_validation_csv",
                tail_verbs="tail_verbs", tail_nouns="tail_nouns", unseen_participants="unseen_participants",
            )  # fmt: skip
        super().__init__(args, world)
        if world.is_main and args.pickle_filename is not None:
            predictions.check_target(args.pickle_filename, "--pickle-filename")
        if world.is_main and args.submission is not None:
            predictions.check_target(args.submission, "--submission", ".zip")
        if args.frame_sampling == "uniform" and "clip_stride" in args.given:
            logger.info("--clip-stride has no effect with --frame-sampling uniform (nor had it in AVION)")
        if args.use_multi_epochs_loader:
            logger.info("--use-multi-epochs-loader: workers live as long as the run with or without it")
        self.clips = read_ek100_actions(args.val_metadata)
        self.subsets = self._subsets()
        self.actions: tuple[str, ...] | None = None
        self.train_clips = None
        if not args.evaluate:
            _labelled(self.clips, args.val_metadata)
            self.train_clips = _labelled(read_ek100_actions(args.train_metadata), args.train_metadata)
            self.actions = self._actions_of_annotations()
            peak, start, end = self.learning_rates()
            logger.info(
                "learning rates x global batch %d / %d: %g (--lr %g), from %g, to %g",
                self._global_batch, _BASE_BATCH, peak, args.lr, start, end,
            )  # fmt: skip

    # ---- actions and model -------------------------------------------------------------------

    def _actions_of_annotations(self) -> tuple[str, ...]:
        """The list of actions of the annotations; what `--num-classes` says about it must be so."""
        a = self.args
        known = {a.val_metadata: self.clips}
        if self.train_clips is not None:
            known[a.train_metadata] = self.train_clips
        paths = a.action_metadata or [a.train_metadata, a.val_metadata]
        tables = [_labelled(known.get(p) or read_ek100_actions(p), p) for p in paths]
        actions = action_list(*tables)
        if "num_classes" in a.given and a.num_classes != len(actions):
            raise UserError(
                f"--num-classes {a.num_classes}: {' and '.join(map(str, paths))} hold {len(actions)} actions; leave "
                "the flag out, or give the annotations that belong to it"
            )
        return actions

    def _settle_actions(self, checkpoint: Checkpoint | None) -> None:
        """The list that scores follow: a checkpoint's own, which the annotations of a training run must agree with."""
        if checkpoint is None:
            self.actions = self.actions or self._actions_of_annotations()
            return
        head, source = checkpoint.head, checkpoint.path
        if self.actions is None and self.args.action_metadata:
            self.actions = self._actions_of_annotations()
        if "num_classes" in self.args.given and self.args.num_classes != head.num_classes:
            raise UserError(f"--num-classes {self.args.num_classes}: {source} has a head of {head.num_classes} classes")
        if head.actions is None:
            self.actions = self.actions or self._actions_of_annotations()
            if len(self.actions) != head.num_classes:
                raise UserError(
                    f"{source}: has a head of {head.num_classes} classes and no list of them, the annotations hold "
                    f"{len(self.actions)} actions; give the --train-metadata and --val-metadata it was trained with"
                )
        elif self.actions not in (None, head.actions):
            raise UserError(
                f"{source}: its list of {len(head.actions)} actions is not that of the annotations "
                f"({len(self.actions)} actions); give the annotations it was trained with"
            )
        else:
            self.actions = head.actions

    def facts(self) -> dict[str, Any]:
        facts = {"evaluation clips": len(self.clips)}
        if self.train_clips is not None:
            digest = hashlib.sha256(",".join(self.actions).encode()).hexdigest()[:16]
            facts |= {"training clips": len(self.train_clips), "actions": f"{len(self.actions)}, {digest}"}
        return facts

    def build_model(self, checkpoint: Checkpoint | None) -> nn.Module:
        a = self.args
        self._settle_actions(checkpoint)
        self.columns = split_actions(
            self.actions, f"{checkpoint.path if checkpoint else 'annotations'}: list of actions"
        )
        if self.clips.verb_class is not None and (unknown := int((action_numbers(self.actions, self.clips) < 0).sum())):
            logger.warning(
                "%d of %d clips to evaluate are of actions that are not in the list: counted as wrong",
                unknown, len(self.clips),
            )  # fmt: skip
        model = build_classifier(a, checkpoint, self.actions)
        a.model, a.num_classes = model.config.name, len(self.actions)  # of which model this run's checkpoints are
        self.img_size = model.config.img_size
        self.num_frames = a.clip_length if "clip_length" in a.given else model.config.num_frames
        self.mixup = None if a.evaluate else self._mixup()
        return model

    def _mixup(self) -> VideoMixup | None:
        a = self.args
        if not (a.mixup or a.cutmix or a.cutmix_minmax):
            return None
        return VideoMixup(
            len(self.actions), mixup=a.mixup, cutmix=a.cutmix, cutmix_minmax=tuple(a.cutmix_minmax) or None,
            prob=a.mixup_prob, switch_prob=a.mixup_switch_prob, mode=a.mixup_mode, smoothing=a.smoothing,
        )  # fmt: skip

    # ---- training ----------------------------------------------------------------------------

    @property
    def _global_batch(self) -> int:
        return self.args.batch_size * self.args.update_freq * self.world.size

    def learning_rates(self) -> tuple[float, float, float]:
        peak, start, end = (rate * self._global_batch / _BASE_BATCH for rate in super().learning_rates())
        return peak, start, end

    def train_dataset(self) -> Dataset:
        a = self.args
        clips = ClipDataset(
            self.train_clips, self.store(a.root, "--root"), num_frames=self.num_frames,
            transform=TrainTransform(
                self.img_size, scale=tuple(a.scale_range), norm_style=a.norm_style, fused=a.fused_decode_crop
            ),
            tokenizer=None, train=True, seed=a.seed, sampling=a.frame_sampling, stride=a.clip_stride,
            max_replacements=0 if a.strict_data else 10,
        )  # fmt: skip
        return LabelledClips(clips, action_numbers(self.actions, self.train_clips))

    def step(self, model, micro_batches, precision, scale: Callable) -> dict[str, torch.Tensor]:
        mixed = [self._mixed(batch) for batch in micro_batches]
        return supervised_step(model, mixed, self._loss, precision, scale)

    def _mixed(self, batch: dict[str, Any]) -> dict[str, Any]:
        if self.mixup is None:
            return batch
        video, target = self.mixup(batch["video"], batch["label"])
        return {**batch, "video": video, "target": target}

    def _loss(self, logits: torch.Tensor, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """logits (b, classes) float32. `acc1`: the best class is the right one, or that of most weight in a mixture."""
        if "target" in batch:
            loss, right = F.cross_entropy(logits, batch["target"]), batch["target"].argmax(dim=1)
        else:
            loss = F.cross_entropy(logits, batch["label"], label_smoothing=self.args.smoothing)
            right = batch["label"]
        return {"loss": loss, "acc1": (logits.argmax(dim=1) == right).float().mean()}

    # ---- evaluation --------------------------------------------------------------------------

    def _subsets(self) -> dict[str, np.ndarray]:
        """The official subsets that lists were given for, as `action_metrics` takes them."""
        a = self.args
        given = {}
        if a.tail_verbs is not None:
            given["tail_verbs"] = read_tail_classes(a.tail_verbs, "verb")
        if a.tail_nouns is not None:
            given["tail_nouns"] = read_tail_classes(a.tail_nouns, "noun")
        if a.unseen_participants is not None:
            given["unseen"] = read_participants(a.unseen_participants, self.clips)
        return given

    def val_dataset(self, num_frames: int | None = None) -> ClipViews:
        """All views of the evaluation clips, in the order of their CSV; of `num_frames` if not the model's."""
        a = self.args
        return ClipViews(
            self.clips, self.store(a.root, "--root"), num_frames=num_frames or self.num_frames, num_clips=a.num_clips,
            transform=CropsTransform(
                self.img_size, a.num_crops, norm_style=a.norm_style, fused=a.fused_decode_crop
            ),
            sampling=a.frame_sampling, stride=a.clip_stride,
        )  # fmt: skip

    def evaluate(self, model: nn.Module, precision: Precision, *, one_frame: bool = False) -> dict[str, float]:
        """one_frame: each view is its middle frame over and over, a control that cannot see motion."""
        dataset, prepare = self.val_dataset(1 if one_frame else None), None
        if one_frame:
            prepare = lambda video: video.expand(-1, -1, -1, self.num_frames, -1, -1)  # noqa: E731  (B, V, 3, T, H, W)
        scores = encode.encode_clips(
            _MeanOverViews(model), dataset, self.world, precision, prepare=prepare, **encode.settings(self.args)
        )
        figures: dict[str, float] = {}
        with self.world.together("computing the accuracies"):
            self.leave_out_unreadable(scores, "--root", self.args.root)
            if self.world.is_main:
                self._write(scores)
                figures = self._figures(scores)
        return self.world.broadcast(figures)

    def _figures(self, scores: encode.Features) -> dict[str, float]:
        figures = {"clips": len(scores.readable), "unreadable": len(scores.errors)}
        if self.clips.verb_class is None:
            return figures
        rows = scores.readable
        subsets = dict(self.subsets)
        if "unseen" in subsets:
            subsets["unseen"] = subsets["unseen"][rows]
        probs, verbs, nouns = scores.values[rows], self.clips.verb_class[rows], self.clips.noun_class[rows]
        return figures | action_metrics(probs, self.columns, verbs, nouns, **subsets)

    def _write(self, scores: encode.Features) -> None:
        """The files of predictions that were asked for. A clip that cannot be read gets the same score for all
        actions: the server wants every clip."""
        a = self.args
        if a.pickle_filename is None and a.submission is None:
            return
        probs, ids = scores.values.copy(), list(self.clips.narration_ids)
        probs[list(scores.errors)] = 1 / probs.shape[1]
        verbs, nouns = action_marginals(probs, self.columns)
        if a.pickle_filename is not None:
            content = {
                "narration_id": np.array(ids), "verb_output": verbs, "noun_output": nouns, "action_output": probs,
                "actions": list(self.actions), "verb_class": self.clips.verb_class,
                "noun_class": self.clips.noun_class, "errors": {ids[i]: e for i, e in scores.errors.items()},
            }  # fmt: skip
            predictions.write_whole(a.pickle_filename, predictions.portable_pickle(content), "--pickle-filename")
            logger.info("predictions of %d clips written to %s", len(ids), a.pickle_filename)
        if a.submission is not None:
            content = action_submission(ids, verbs, nouns, {name: getattr(a, name) for name in SLS})
            predictions.write_whole(a.submission, predictions.action_zip(content), "--submission")
            logger.info("submission of %d clips written to %s", len(ids), a.submission)

    def summary(self, figures: dict[str, float]) -> str:
        left_out = f", {figures['unreadable']} clips unreadable" if figures["unreadable"] else ""
        if "action_top1" not in figures:
            return f"predictions for {figures['clips']} clips without labels{left_out}"
        top1, top5 = ("/".join(f"{100 * figures[f'{k}_top{n}']:.2f}" for k in KINDS) for n in (1, 5))
        return f"verb/noun/action top-1 {top1}, top-5 {top5} on {figures['clips']} clips{left_out}"

    def table(self, figures: dict[str, float]) -> str:
        left_out = f" ({figures['unreadable']} could not be read)" if figures["unreadable"] else ""
        if "action_top1" not in figures:
            return f"{figures['clips']} clips{left_out} without labels: no figures"
        columns = {"top-1": "top1", "top-5": "top5", "class mean": "mean_class"}
        rows = {kind: {label: figures[f"{kind}_{name}"] for label, name in columns.items()} for kind in KINDS}
        parts = [table(f"{figures['clips']} clips{left_out}", rows)]
        for subset, count in (("tail", "tail_{}_clips"), ("unseen", "unseen_clips")):
            rows = {
                f"{kind} ({figures[count.format(kind)]} clips)": {
                    f"top-{n}": figures[f"{subset}_{kind}_top{n}"] for n in (1, 5)
                }
                for kind in KINDS
                if f"{subset}_{kind}_top1" in figures
            }
            if rows:
                parts.append(table({"tail": "tail classes", "unseen": "unseen participants"}[subset], rows))
        return "\n\n".join(parts)


class _MeanOverViews(nn.Module):
    """Action probabilities averaged over a clip's views, in the shape in which `encode_clips` asks for features."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def encode_image(self, views: torch.Tensor) -> torch.Tensor:
        """(B, V, 3, T, H, W) → (B, classes) float32. One view at a time, for its memory."""
        probs = [self.model(video).float().softmax(dim=1) for video in views.unbind(1)]
        return torch.stack(probs).mean(dim=0)


def _labelled(clips: EK100Table, path: str) -> EK100Table:
    if clips.verb_class is None:
        raise UserError(
            f"annotations {path}: has no columns verb_class and noun_class, which training and the list of actions "
            "need; unlabelled clips can only be predicted (--evaluate), by a checkpoint with a list of actions"
        )
    return clips
