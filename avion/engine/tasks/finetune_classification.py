"""Fine-tuning for action recognition with one head over all actions.

The probability of a verb or a noun is the sum over the probabilities of its actions.
"""

import dataclasses
import hashlib
import logging
import zlib
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
from avion.engine.demo_data import on_demo_dataset
from avion.engine.distributed import World
from avion.engine.inputs import ModelInputs
from avion.engine.options import FinetuneClassificationOptions
from avion.engine.precision import Precision
from avion.engine.steps import Supervised
from avion.errors import UserError
from avion.evaluation.ek100_cls import KINDS, action_marginals, action_metrics
from avion.evaluation.submission import SLS, action_submission
from avion.weights import Checkpoint

from .base import Task

logger = logging.getLogger(__name__)

# The learning rates of AVION and of the paper are for a global batch of this many clips.
_BASE_BATCH = 128


class FinetuneClassification(Task[FinetuneClassificationOptions]):
    """A video tower with one head, evaluated by the accuracies of actions, verbs and nouns.

    The probabilities of a clip are means over several views of the clip.
    """

    metric = "action_top1"

    def __init__(self, options: FinetuneClassificationOptions, world: World, checkpoint: Checkpoint | None = None):
        if options.dataset == "demo":
            options = on_demo_dataset(
                options,
                "ek100_videos",
                train_metadata="action_train_csv",
                val_metadata="action_validation_csv",
                tail_verbs="tail_verbs",
                tail_nouns="tail_nouns",
                unseen_participants="unseen_participants",
            )
        super().__init__(options, world, checkpoint)
        if world.is_main:
            predictions.check_run_target(options, options.pickle_filename, "--pickle-filename")
            predictions.check_run_target(options, options.submission, "--submission", ".zip")
            if options.submission is not None and options.submission == options.pickle_filename:
                raise UserError(f"--submission {options.submission}: is --pickle-filename too; give two names")
        if options.frame_sampling == "uniform" and options.was_given("clip_stride"):
            logger.info("--clip-stride has no effect with --frame-sampling uniform (nor had it in AVION)")
        if options.use_multi_epochs_loader:
            logger.info("--use-multi-epochs-loader: workers live as long as the run with or without it")
        self.clips = read_ek100_actions(options.val_metadata)
        self.subsets = self._subsets()
        self.train_clips = None
        if not options.evaluate:
            _labelled(self.clips, options.val_metadata)
            self.train_clips = _labelled(read_ek100_actions(options.train_metadata), options.train_metadata)
        self.actions = self._settled_actions()
        source = "annotations" if checkpoint is None else checkpoint.path
        self.columns = split_actions(self.actions, f"{source}: list of actions")
        self.mixup = self._mixup()
        self.objective = Supervised(self.loss, self.mixed if self.mixup is not None else None)
        if not options.evaluate:
            peak, start, end = self.learning_rates()
            logger.info(
                "learning rates x global batch %d / %d: %g (--lr %g), from %g, to %g",
                self._global_batch,
                _BASE_BATCH,
                peak,
                options.lr,
                start,
                end,
            )

    # ---- actions and model -------------------------------------------------------------------

    def _actions_of_annotations(self) -> tuple[str, ...]:
        """Return the list of actions of the annotations. `--num-classes`, where it was given, must be its length."""
        options = self.options
        known = {options.val_metadata: self.clips}
        if self.train_clips is not None:
            known[options.train_metadata] = self.train_clips
        paths = options.action_metadata or [options.train_metadata, options.val_metadata]
        tables = [_labelled(known.get(p) or read_ek100_actions(p), p) for p in paths]
        actions = action_list(*tables)
        if options.was_given("num_classes") and options.num_classes != len(actions):
            raise UserError(
                f"--num-classes {options.num_classes}: {' and '.join(map(str, paths))} hold {len(actions)} actions; "
                "leave the flag out, or give the annotations that belong to it"
            )
        return actions

    def _settled_actions(self) -> tuple[str, ...]:
        """Return the list of actions that the scores follow.

        It is the list of the checkpoint, with which the annotations of a training must agree. Where there is no
        checkpoint, or no list in it, it is the list of the annotations.
        """
        options, checkpoint = self.options, self.checkpoint
        if checkpoint is None:
            return self._actions_of_annotations()
        head, source = checkpoint.head, checkpoint.path
        needed = not options.evaluate or options.action_metadata or head.actions is None
        actions = self._actions_of_annotations() if needed else None
        if options.was_given("num_classes") and options.num_classes != head.num_classes:
            raise UserError(f"--num-classes {options.num_classes}: {source} has a head of {head.num_classes} classes")
        if head.actions is None:
            if len(actions) != head.num_classes:
                raise UserError(
                    f"{source}: has a head of {head.num_classes} classes and no list of them, the annotations hold "
                    f"{len(actions)} actions; give the --train-metadata and --val-metadata it was trained with"
                )
            return actions
        if actions not in (None, head.actions):
            raise UserError(
                f"{source}: its list of {len(head.actions)} actions is not that of the annotations "
                f"({len(actions)} actions); give the annotations it was trained with"
            )
        return head.actions

    def facts(self) -> dict[str, Any]:
        facts = {"evaluation clips": len(self.clips)}
        if self.train_clips is not None:
            digest = hashlib.sha256(",".join(self.actions).encode()).hexdigest()[:16]
            facts |= {"training clips": len(self.train_clips), "actions": f"{len(self.actions)}, {digest}"}
        return facts

    def data(self) -> dict[str, str]:
        def mark(clips: EK100Table) -> str:
            classes = [*clips.verb_class.tolist(), *clips.noun_class.tolist()]
            return f"{clips.fingerprint()} {zlib.crc32(repr(classes).encode()):08x}"

        return {"train-metadata": mark(self.train_clips), "val-metadata": mark(self.clips)}

    def build_model(self) -> nn.Module:
        if self.clips.verb_class is not None and (unknown := int((action_numbers(self.actions, self.clips) < 0).sum())):
            logger.warning(
                "%d of %d clips to evaluate are of actions that are not in the list: counted as wrong",
                unknown,
                len(self.clips),
            )
        return build_classifier(self.options, self.checkpoint, self.actions)

    def saved_flags(self, model: nn.Module) -> dict[str, Any]:
        return {**super().saved_flags(model), "model": model.config.name, "num_classes": len(self.actions)}

    def _mixup(self) -> VideoMixup | None:
        options = self.options
        if options.evaluate or not (options.mixup or options.cutmix or options.cutmix_minmax):
            return None
        return VideoMixup(
            len(self.actions),
            mixup=options.mixup,
            cutmix=options.cutmix,
            cutmix_minmax=tuple(options.cutmix_minmax) or None,
            prob=options.mixup_prob,
            switch_prob=options.mixup_switch_prob,
            mode=options.mixup_mode,
            smoothing=options.smoothing,
        )

    # ---- training ----------------------------------------------------------------------------

    @property
    def _global_batch(self) -> int:
        return self.options.batch_size * self.options.update_freq * self.world.size

    def learning_rates(self) -> tuple[float, float, float]:
        peak, start, end = (rate * self._global_batch / _BASE_BATCH for rate in super().learning_rates())
        return peak, start, end

    def train_dataset(self, inputs: ModelInputs) -> Dataset:
        options = self.options
        clips = ClipDataset(
            self.train_clips,
            self.store(options.root, "--root"),
            num_frames=inputs.num_frames,
            transform=TrainTransform(
                inputs.img_size,
                scale=tuple(options.scale_range),
                norm_style=options.norm_style,
                fused=options.fused_decode_crop,
            ),
            tokenizer=None,
            train=True,
            seed=options.seed,
            sampling=options.frame_sampling,
            stride=options.clip_stride,
            max_replacements=0 if options.strict_data else 10,
        )
        return LabelledClips(clips, action_numbers(self.actions, self.train_clips))

    def mixed(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Mix the clips of a batch by mixup and cutmix.

        Args:
            batch: `video` (b, 3, T, H, W) and `label` (b,) int64.

        Returns:
            The batch with mixed `video`, and with `target` (b, classes), the weights of the classes of each clip.
        """
        video, target = self.mixup(batch["video"], batch["label"])
        return {**batch, "video": video, "target": target}

    def loss(self, logits: torch.Tensor, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Compute the cross-entropy of a batch and its top-1 accuracy.

        Args:
            logits: (b, classes) float32.
            batch: `label` (b,) int64, and `target` (b, classes) where clips are mixed.

        Returns:
            `loss` and `acc1`, 0-d. A mixed clip counts as right where the class of its highest logit has the largest
            weight.
        """
        if "target" in batch:
            loss, right = F.cross_entropy(logits, batch["target"]), batch["target"].argmax(dim=1)
        else:
            loss = F.cross_entropy(logits, batch["label"], label_smoothing=self.options.smoothing)
            right = batch["label"]
        return {"loss": loss, "acc1": (logits.argmax(dim=1) == right).float().mean()}

    # ---- evaluation --------------------------------------------------------------------------

    def _subsets(self) -> dict[str, np.ndarray]:
        """Return the official subsets of classes and clips whose lists were given, as `action_metrics` takes them."""
        options = self.options
        given = {}
        if options.tail_verbs is not None:
            given["tail_verbs"] = read_tail_classes(options.tail_verbs, "verb")
        if options.tail_nouns is not None:
            given["tail_nouns"] = read_tail_classes(options.tail_nouns, "noun")
        if options.unseen_participants is not None:
            given["unseen"] = read_participants(options.unseen_participants, self.clips)
        return given

    def val_dataset(self, inputs: ModelInputs) -> ClipViews:
        """Build the dataset of all views of the evaluation clips, in the order of their CSV."""
        options = self.options
        return ClipViews(
            self.clips,
            self.store(options.root, "--root"),
            num_frames=inputs.num_frames,
            num_clips=options.num_clips,
            transform=CropsTransform(
                inputs.img_size, options.num_crops, norm_style=options.norm_style, fused=options.fused_decode_crop
            ),
            sampling=options.frame_sampling,
            stride=options.clip_stride,
        )

    def evaluate(self, model: nn.Module, precision: Precision, *, one_frame: bool = False) -> dict[str, float]:
        """Compute the accuracies on the evaluation clips.

        Args:
            model: The classifier, on the device.
            precision: The settings of autocast.
            one_frame: Whether each view repeats its middle frame. Such a view shows no motion, and serves as a control.

        Returns:
            The metrics by name, the same on all processes.
        """
        inputs, prepare = ModelInputs.of(model.config, self.options), None
        dataset = self.val_dataset(dataclasses.replace(inputs, num_frames=1) if one_frame else inputs)
        if one_frame:

            def prepare(video: torch.Tensor) -> torch.Tensor:  # (B, V, 3, T, H, W)
                return video.expand(-1, -1, -1, inputs.num_frames, -1, -1)

        scores = encode.encode_clips(
            _MeanOverViews(model), dataset, self.world, precision, prepare=prepare, **encode.settings(self.options)
        )
        metrics: dict[str, float] = {}
        with self.world.together("computing the accuracies"):
            self.leave_out_unreadable(scores, "--root", self.options.root)
            if self.world.is_main:
                self._write(scores)
                metrics = self._metrics(scores)
        return self.world.broadcast(metrics)

    def _metrics(self, scores: encode.Features) -> dict[str, float]:
        metrics = {"clips": len(scores.readable), "unreadable": len(scores.errors)}
        if self.clips.verb_class is None:
            return metrics
        rows = scores.readable
        subsets = dict(self.subsets)
        if "unseen" in subsets:
            subsets["unseen"] = subsets["unseen"][rows]
        probs, verbs, nouns = scores.values[rows], self.clips.verb_class[rows], self.clips.noun_class[rows]
        return metrics | action_metrics(probs, self.columns, verbs, nouns, **subsets)

    def _write(self, scores: encode.Features) -> None:
        """Write the files of predictions that were asked for.

        A clip that cannot be read gets the same score for all actions, because the server wants every clip.
        """
        options = self.options
        if options.pickle_filename is None and options.submission is None:
            return
        probs, ids = scores.values.copy(), list(self.clips.narration_ids)
        probs[list(scores.errors)] = 1 / probs.shape[1]
        verbs, nouns = action_marginals(probs, self.columns)
        if options.pickle_filename is not None:
            content = {
                "narration_id": np.array(ids),
                "verb_output": verbs,
                "noun_output": nouns,
                "action_output": probs,
                "actions": list(self.actions),
                "verb_class": self.clips.verb_class,
                "noun_class": self.clips.noun_class,
                "errors": {ids[i]: e for i, e in scores.errors.items()},
            }
            predictions.write_of_run(
                options, options.pickle_filename, predictions.portable_pickle(content), "--pickle-filename"
            )
            logger.info("predictions of %d clips written to %s", len(ids), options.pickle_filename)
        if options.submission is not None:
            content = action_submission(ids, verbs, nouns, {name: getattr(options, name) for name in SLS})
            predictions.write_of_run(options, options.submission, predictions.action_zip(content), "--submission")
            logger.info("submission of %d clips written to %s", len(ids), options.submission)

    def summary(self, metrics: dict[str, float]) -> str:
        left_out = f", {metrics['unreadable']} clips unreadable" if metrics["unreadable"] else ""
        if "action_top1" not in metrics:
            return f"predictions for {metrics['clips']} clips without labels{left_out}"
        top1, top5 = ("/".join(f"{100 * metrics[f'{k}_top{n}']:.2f}" for k in KINDS) for n in (1, 5))
        return f"verb/noun/action top-1 {top1}, top-5 {top5} on {metrics['clips']} clips{left_out}"

    def table(self, metrics: dict[str, float]) -> str:
        left_out = f" ({metrics['unreadable']} could not be read)" if metrics["unreadable"] else ""
        if "action_top1" not in metrics:
            return f"{metrics['clips']} clips{left_out} without labels: no metrics"
        columns = {"top-1": "top1", "top-5": "top5", "class mean": "mean_class"}
        rows = {kind: {label: metrics[f"{kind}_{name}"] for label, name in columns.items()} for kind in KINDS}
        parts = [table(f"{metrics['clips']} clips{left_out}", rows)]
        for subset, count in (("tail", "tail_{}_clips"), ("unseen", "unseen_clips")):
            rows = {
                f"{kind} ({metrics[count.format(kind)]} clips)": {
                    f"top-{n}": metrics[f"{subset}_{kind}_top{n}"] for n in (1, 5)
                }
                for kind in KINDS
                if f"{subset}_{kind}_top1" in metrics
            }
            if rows:
                parts.append(table({"tail": "tail classes", "unseen": "unseen participants"}[subset], rows))
        return "\n\n".join(parts)


class _MeanOverViews(nn.Module):
    """Action probabilities, averaged over the views of a clip, which `encode_clips` takes for features."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def encode_image(self, views: torch.Tensor) -> torch.Tensor:
        """(B, V, 3, T, H, W) → (B, classes) float32. The views are computed one at a time, to save memory."""
        probs = [self.model(video).float().softmax(dim=1) for video in views.unbind(1)]
        return torch.stack(probs).mean(dim=0)


def _labelled(clips: EK100Table, path: str) -> EK100Table:
    if clips.verb_class is None:
        raise UserError(
            f"annotations {path}: has no columns verb_class and noun_class, which training and the list of actions "
            "need; unlabelled clips can only be predicted (--evaluate), by a checkpoint with a list of actions"
        )
    return clips
