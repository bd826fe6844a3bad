"""From flags to a model with weights: registered sizes, `--model-args`, a checkpoint or a zoo."""

import logging
from collections.abc import Sequence
from typing import Any

from torch import nn

from avion.errors import UserError
from avion.models import create_model, load_checkpoint, model_from_checkpoint
from avion.models.checkpoint import (
    CheckpointFacts,
    check_preprocess,
    checkpoint_facts,
    checkpoint_state_dict,
    is_classifier,
    read_checkpoint,
)
from avion.models.checkpoint_facts import saved_args
from avion.models.classifier import classifier_from_checkpoint
from avion.models.layouts import canonical
from avion.models.model_clip import VideoClassifier
from avion.models.pretrained import load_pretrained

from .options.model_args import behaviour, sizes

logger = logging.getLogger(__name__)


def build_model(args: Any, source: str | None) -> nn.Module:
    """The two-tower model of a run on the CPU, with the weights it starts from.

    `source` is the checkpoint to go on from or to evaluate. Without `--model` on the command line, the
    model is what that checkpoint says it is; with it, the checkpoint must fit. Without a `source` the
    weights come from `--pretrain-zoo`.
    """
    if source is not None:
        return _from_checkpoint(args, source)
    model = create_model(args.model, **sizes(args), num_frames=args.clip_length, **behaviour(args))
    logger.info("%s", load_pretrained(model, args.pretrain_zoo, args.pretrain_path))
    return model


def build_finetuned(args: Any, source: str | None) -> nn.Module:
    """The same for fine-tuning: without a `source`, the model and its weights are `--pretrain-model`'s.

    Its number of frames becomes `--clip-length`, which resizes a temporal embedding; a checkpoint that is gone on
    from or evaluated keeps its own unless `--clip-length` was given.
    """
    if source is not None:
        _refuse_pretraining(args, source)
        return _from_checkpoint(args, source)
    if not args.pretrain_model:
        raise UserError(
            "--pretrain-model: not given; name the pretrained checkpoint to start from (a path or "
            "hf:owner/repo/file), or a fine-tuned one as --resume"
        )
    return _from_checkpoint(args, args.pretrain_model, num_frames=args.clip_length)


def _refuse_pretraining(args: Any, source: str) -> None:
    """A run goes on with the optimizer and the epoch of a checkpoint; those of pretraining are another run's."""
    checkpoint = read_checkpoint(source)
    if not args.evaluate and checkpoint.get("optimizer") is not None and "pretrain_model" not in saved_args(checkpoint):
        raise UserError(
            f"{source}: was written in pretraining, and fine-tuning cannot go on from it; give it as --pretrain-model, "
            "with an --output-dir that holds no checkpoint.pt of another run"
        )


def build_as_saved(args: Any, source: str) -> nn.Module:
    """The two-tower model that a checkpoint is, for use without training; `--model` where the file does not say it.

    `--model-args` override fields of its configuration.
    """
    check_preprocess(checkpoint_facts(read_checkpoint(source), source), args.norm_style)
    model = model_from_checkpoint(source, name=args.model, **behaviour(args))
    logger.info("%s", model.load_report)
    return model


def build_any_as_saved(args: Any, source: str) -> nn.Module:
    """`build_as_saved`, or where the checkpoint is a fine-tuned classifier's, that."""
    checkpoint = read_checkpoint(source)
    if not is_classifier(canonical(checkpoint_state_dict(checkpoint, source), source)):
        return build_as_saved(args, source)
    check_preprocess(checkpoint_facts(checkpoint, source), args.norm_style)
    model = classifier_from_checkpoint(source, name=args.model, **behaviour(args))
    logger.info("%s", model.load_report)
    return model


def build_classifier(args: Any, source: str | None, actions: Sequence[str] | None) -> VideoClassifier:
    """The classifier of a checkpoint, or without a `source` a new head for `actions` on `--pretrain-model`'s tower.

    `--model` names the model where a checkpoint does not say which it is. Its list of actions is the checkpoint's;
    the given one where that has none.
    """
    if source is None:
        towers = build_finetuned(args, None)
        return VideoClassifier(towers.visual, args.dropout_rate, len(actions), config=towers.config, actions=actions)
    check_preprocess(checkpoint_facts(read_checkpoint(source), source), args.norm_style)
    fields = behaviour(args) | ({"num_frames": args.clip_length} if "clip_length" in args.given else {})
    name = args.model if "model" in args.given else None
    model = classifier_from_checkpoint(source, name=name, dropout=args.dropout_rate, **fields)
    logger.info("%s", model.load_report)
    if model.actions is None and actions is not None:
        model.actions = tuple(actions)
    return model


def _from_checkpoint(args: Any, source: str, **overrides: Any) -> nn.Module:
    if "clip_length" in args.given:
        overrides["num_frames"] = args.clip_length
    facts = checkpoint_facts(read_checkpoint(source), source)
    check_preprocess(facts, args.norm_style)
    if "model" in args.given or facts.model_name is None:
        overrides.setdefault("num_frames", args.clip_length)
        model = create_model(args.model, **sizes(args), **overrides, **behaviour(args))
        logger.info("%s%s", load_checkpoint(model, source), _inflation(facts, model))
        return model
    given = {name: value for name, value in sizes(args).items() if name in args.given}
    model = model_from_checkpoint(source, **given, **overrides, **behaviour(args))
    logger.info("%s%s", model.load_report, _inflation(facts, model))
    return model


def _inflation(facts: CheckpointFacts, model: nn.Module) -> str:
    """What to add to a load report where clips get another length; not every model has a parameter that shows it."""
    before, after = facts.num_frames, model.config.num_frames
    if before in (None, after):
        return ""
    return f"; frames {'inflated' if after > before else 'reduced'} {before} -> {after}"
