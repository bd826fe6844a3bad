"""From flags to a model with weights: registered sizes, `--model-args`, a checkpoint or a zoo."""

import logging
from collections.abc import Sequence
from typing import Any

from torch import nn

from avion.errors import UserError
from avion.models import create_model
from avion.models.clip import VideoClassifier
from avion.weights import Checkpoint, load_pretrained
from avion.weights.facts import CheckpointFacts

from .options.model_args import behaviour, sizes

logger = logging.getLogger(__name__)


def build_model(args: Any, checkpoint: Checkpoint | None) -> nn.Module:
    """The two-tower model of a run on the CPU, with the weights it starts from.

    `checkpoint` is the one to go on from or to evaluate. Without `--model` on the command line, the model is what the
    checkpoint says it is; with it, the checkpoint must fit. Without a checkpoint the weights come from
    `--pretrain-zoo`.
    """
    if checkpoint is not None:
        return _from_checkpoint(args, checkpoint)
    model = create_model(args.model, **sizes(args), num_frames=args.clip_length, **behaviour(args))
    logger.info("%s", load_pretrained(model, args.pretrain_zoo, args.pretrain_path))
    return model


def build_finetuned(args: Any, checkpoint: Checkpoint | None) -> nn.Module:
    """The same for fine-tuning: without a `checkpoint`, the model and its weights are `--pretrain-model`'s.

    Its number of frames becomes `--clip-length`, which resizes a temporal embedding; a checkpoint that is gone on
    from or evaluated keeps its own unless `--clip-length` was given.
    """
    if checkpoint is not None:
        _refuse_pretraining(args, checkpoint)
        return _from_checkpoint(args, checkpoint)
    if not args.pretrain_model:
        raise UserError(
            "--pretrain-model: not given; name the pretrained checkpoint to start from (a path or "
            "hf:owner/repo/file), or a fine-tuned one as --resume"
        )
    return _from_checkpoint(args, Checkpoint.open(args.pretrain_model), num_frames=args.clip_length)


def _refuse_pretraining(args: Any, checkpoint: Checkpoint) -> None:
    """A run goes on with the optimizer and the epoch of a checkpoint; those of pretraining are another run's."""
    if not args.evaluate and checkpoint.training is not None and "pretrain_model" not in checkpoint.args:
        raise UserError(
            f"{checkpoint.path}: was written in pretraining, and fine-tuning cannot go on from it; give it as "
            "--pretrain-model, with an --output-dir that holds no checkpoint.pt of another run"
        )


def build_as_saved(args: Any, checkpoint: Checkpoint, frames: int | None = None) -> nn.Module:
    """The two-tower model that a checkpoint is, for use without training; `--model` where the file does not say it.

    `--model-args` override fields of its configuration. frames: of the clips that it will see, if that was asked for;
    it is the model's number of frames where the file says none.
    """
    checkpoint.check_norm_style(args.norm_style)
    model = checkpoint.build(name=args.model, **_running(args, checkpoint, frames))
    logger.info("%s", model.load_report)
    return model


def _running(args: Any, checkpoint: Checkpoint, frames: int | None) -> dict[str, Any]:
    unsaid = {"num_frames": frames} if checkpoint.facts.num_frames is None and frames is not None else {}
    return {**unsaid, **behaviour(args)}


def build_any_as_saved(args: Any, checkpoint: Checkpoint, frames: int | None = None) -> nn.Module:
    """`build_as_saved`, or where the checkpoint is a fine-tuned classifier's, that."""
    if not checkpoint.is_classifier:
        return build_as_saved(args, checkpoint, frames)
    checkpoint.check_norm_style(args.norm_style)
    model = checkpoint.build_classifier(name=args.model, **_running(args, checkpoint, frames))
    logger.info("%s", model.load_report)
    return model


def build_classifier(args: Any, checkpoint: Checkpoint | None, actions: Sequence[str] | None) -> VideoClassifier:
    """The classifier of a checkpoint, or without one a new head for `actions` on `--pretrain-model`'s tower.

    `--model` names the model where a checkpoint does not say which it is. The list of actions is the checkpoint's;
    the given one where the checkpoint has none.
    """
    if checkpoint is None:
        towers = build_finetuned(args, None)
        return VideoClassifier(towers.visual, args.dropout_rate, len(actions), config=towers.config, actions=actions)
    checkpoint.check_norm_style(args.norm_style)
    fields = behaviour(args) | ({"num_frames": args.clip_length} if "clip_length" in args.given else {})
    name = args.model if "model" in args.given else None
    model = checkpoint.build_classifier(name=name, dropout=args.dropout_rate, **fields)
    logger.info("%s", model.load_report)
    if model.actions is None and actions is not None:
        model.actions = tuple(actions)
    return model


def _from_checkpoint(args: Any, checkpoint: Checkpoint, **overrides: Any) -> nn.Module:
    if "clip_length" in args.given:
        overrides["num_frames"] = args.clip_length
    facts = checkpoint.facts
    checkpoint.check_norm_style(args.norm_style)
    unsaid = facts.num_frames is None and "clip_length" not in args.given
    if unsaid and (args.evaluate or "num_frames" not in overrides):
        raise UserError(
            f"{checkpoint.path}: does not say with how many frames it was trained, and another number gives worse "
            "results: give --clip-length"
        )
    if "model" in args.given or facts.model_name is None:
        overrides.setdefault("num_frames", args.clip_length)
        model = create_model(args.model, **sizes(args), **overrides, **behaviour(args))
        logger.info("%s%s", checkpoint.load(model), _inflation(facts, model))
        return model
    given = {name: value for name, value in sizes(args).items() if name in args.given}
    model = checkpoint.build(**given, **overrides, **behaviour(args))
    logger.info("%s%s", model.load_report, _inflation(facts, model))
    return model


def _inflation(facts: CheckpointFacts, model: nn.Module) -> str:
    """What to add to a load report where clips get another length; not every model has a parameter that shows it."""
    before, after = facts.num_frames, model.config.num_frames
    if before in (None, after):
        return ""
    return f"; frames {'inflated' if after > before else 'reduced'} {before} -> {after}"
