"""Builds a model from the options, with weights that come from a checkpoint or from a zoo."""

import logging
from collections.abc import Sequence
from typing import Any

from torch import nn

from avion.errors import UserError
from avion.models import create_model
from avion.models.clip import VideoClassifier
from avion.weights import Checkpoint, load_pretrained
from avion.weights.facts import CheckpointFacts

from .options import FinetuneClassificationOptions, PretrainOptions, SavedModelOptions, TrainingOptions
from .options.model_args import behaviour, sizes

logger = logging.getLogger(__name__)


def build_model(options: PretrainOptions, checkpoint: Checkpoint | None) -> nn.Module:
    """Build the two-tower model of a pretraining, with the weights that the run starts from.

    Args:
        options: The options of the run. Without `--model`, the checkpoint says which model it is; with `--model`, the
            checkpoint must fit that model. Without a checkpoint, the weights come from `--pretrain-model` or from
            `--pretrain-zoo`. The weights of `--pretrain-model` are used with `--clip-length` frames.
        checkpoint: The checkpoint to resume or to evaluate, if there is one.

    Returns:
        The model, on the CPU.

    Raises:
        UserError: The checkpoint does not fit, or there are no such weights.
    """
    if checkpoint is not None:
        return _from_checkpoint(options, checkpoint)
    if options.pretrain_model:
        return _from_checkpoint(options, Checkpoint.open(options.pretrain_model), num_frames=options.clip_length)
    model = create_model(options.model, **sizes(options), num_frames=options.clip_length, **behaviour(options))
    logger.info("%s", load_pretrained(model, options.pretrain_zoo, options.pretrain_path))
    return model


def build_finetuned(options: TrainingOptions, pretrained: str | None, checkpoint: Checkpoint | None) -> nn.Module:
    """Build the two-tower model of a fine-tuning, with the weights that the run starts from.

    Args:
        options: The options of the run. The number of frames becomes `--clip-length`, which resizes a temporal
            embedding. A checkpoint that is resumed or evaluated keeps its number unless `--clip-length` was given.
        pretrained: The value of `--pretrain-model`, which gives model and weights where there is no checkpoint.
        checkpoint: The checkpoint to resume or to evaluate, if there is one.

    Returns:
        The model, on the CPU.

    Raises:
        UserError: Neither a checkpoint nor a pretrained model was given, or the weights do not fit.
    """
    if checkpoint is not None:
        _refuse_pretraining(options, checkpoint)
        return _from_checkpoint(options, checkpoint)
    if not pretrained:
        raise UserError(
            "--pretrain-model: not given; name the pretrained checkpoint to start from (a path or "
            "hf:owner/repo/file), or a fine-tuned one as --resume"
        )
    return _from_checkpoint(options, Checkpoint.open(pretrained), num_frames=options.clip_length)


def _refuse_pretraining(options: TrainingOptions, checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint of a pretraining: its optimizer state and its epoch are of no use in a fine-tuning."""
    pretraining = "pretrain_zoo" in checkpoint.args or "pretrain_model" not in checkpoint.args
    if not options.evaluate and checkpoint.training is not None and pretraining:
        raise UserError(
            f"{checkpoint.path}: was written in pretraining, and fine-tuning cannot go on from it; give it as "
            "--pretrain-model, with an --output-dir that holds no checkpoint.pt of another run"
        )


def build_as_saved(options: SavedModelOptions, checkpoint: Checkpoint, frames: int | None = None) -> nn.Module:
    """Build the two-tower model of a checkpoint, for use without training.

    Args:
        options: `--model` says which model it is where the checkpoint does not; `--model-args` change fields of its
            configuration.
        checkpoint: The checkpoint.
        frames: The number of frames of the clips that the model will see, where it was asked for. The model gets this
            number where the checkpoint does not say a number.

    Returns:
        The model, on the CPU.

    Raises:
        UserError: The checkpoint does not fit.
    """
    checkpoint.check_norm_style(options.norm_style)
    model = checkpoint.build(name=options.model, **_running(options, checkpoint, frames))
    logger.info("%s", model.load_report)
    return model


def _running(options: SavedModelOptions, checkpoint: Checkpoint, frames: int | None) -> dict[str, Any]:
    unsaid = {"num_frames": frames} if checkpoint.facts.num_frames is None and frames is not None else {}
    return {**unsaid, **behaviour(options)}


def build_any_as_saved(options: SavedModelOptions, checkpoint: Checkpoint, frames: int | None = None) -> nn.Module:
    """Build the classifier of a checkpoint that has one, for use without training; otherwise do as `build_as_saved`.

    Args:
        options: As in `build_as_saved`.
        checkpoint: The checkpoint.
        frames: As in `build_as_saved`.

    Returns:
        The model, on the CPU.

    Raises:
        UserError: The checkpoint does not fit.
    """
    if not checkpoint.is_classifier:
        return build_as_saved(options, checkpoint, frames)
    checkpoint.check_norm_style(options.norm_style)
    model = checkpoint.build_classifier(name=options.model, **_running(options, checkpoint, frames))
    logger.info("%s", model.load_report)
    return model


def build_classifier(
    options: FinetuneClassificationOptions, checkpoint: Checkpoint | None, actions: Sequence[str]
) -> VideoClassifier:
    """Build the classifier of an action recognition run.

    Args:
        options: The options of the run. `--model` names the model where the checkpoint does not say which model it is.
        checkpoint: The checkpoint to resume or to evaluate. Without it, the classifier is a new head on the video tower
            of `--pretrain-model`.
        actions: The list of actions, for a new head and for a checkpoint that has no list.

    Returns:
        The classifier, on the CPU.

    Raises:
        UserError: The checkpoint does not fit, or there is none.
    """
    if checkpoint is None:
        towers = build_finetuned(options, options.pretrain_model, None)
        return VideoClassifier(towers.visual, options.dropout_rate, len(actions), config=towers.config, actions=actions)
    checkpoint.check_norm_style(options.norm_style)
    fields = behaviour(options) | ({"num_frames": options.clip_length} if options.was_given("clip_length") else {})
    name = options.model if options.was_given("model") else None
    model = checkpoint.build_classifier(name=name, dropout=options.dropout_rate, **fields)
    logger.info("%s", model.load_report)
    if model.actions is None:
        model.actions = tuple(actions)
    return model


def _from_checkpoint(options: TrainingOptions, checkpoint: Checkpoint, **overrides: Any) -> nn.Module:
    if options.was_given("clip_length"):
        overrides["num_frames"] = options.clip_length
    facts = checkpoint.facts
    checkpoint.check_norm_style(options.norm_style)
    unsaid = facts.num_frames is None and not options.was_given("clip_length")
    if unsaid and (options.evaluate or "num_frames" not in overrides):
        raise UserError(
            f"{checkpoint.path}: does not say with how many frames it was trained, and another number gives worse "
            "results: give --clip-length"
        )
    if options.was_given("model") or facts.model_name is None:
        overrides.setdefault("num_frames", options.clip_length)
        model = create_model(options.model, **sizes(options), **overrides, **behaviour(options))
        logger.info("%s%s", checkpoint.load(model), _inflation(facts, model))
        return model
    given = {name: value for name, value in sizes(options).items() if options.was_given(name)}
    model = checkpoint.build(**given, **overrides, **behaviour(options))
    logger.info("%s%s", model.load_report, _inflation(facts, model))
    return model


def _inflation(facts: CheckpointFacts, model: nn.Module) -> str:
    """Write a remark for the load report where the length of clips changes. Not every model has a parameter that shows
    this.
    """
    before, after = facts.num_frames, model.config.num_frames
    if before in (None, after):
        return ""
    return f"; frames {'inflated' if after > before else 'reduced'} {before} -> {after}"
