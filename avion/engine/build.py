"""From flags to a model with weights: registered sizes, `--model-args`, a checkpoint or a zoo."""

import logging
from typing import Any

import yaml
from torch import nn

from avion.errors import UserError
from avion.models import create_model, load_checkpoint, model_from_checkpoint
from avion.models.checkpoint import check_preprocess, checkpoint_facts, read_checkpoint
from avion.models.pretrained import load_pretrained

logger = logging.getLogger(__name__)

# Flags that are fields of the model's configuration under the same name; num_frames is `--clip-length`.
_SIZES = ("project_embed_dim", "context_length", "vocab_size")
_BEHAVIOUR = (
    "grad_checkpointing", "use_fast_conv1", "use_flash_attn", "patch_dropout", "drop_path_rate", "scan_backend",
    "freeze_temperature",
)  # fmt: skip


def parse_model_args(words: list[str]) -> dict[str, Any]:
    """["depth=6", "act_layer=quick_gelu"] to {"depth": 6, "act_layer": "quick_gelu"}."""
    fields: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name or not value:
            raise UserError(f"--model-args {word}: expected FIELD=VALUE, for example depth=6")
        try:
            fields[name.replace("-", "_")] = yaml.safe_load(value)
        except yaml.YAMLError as e:
            raise UserError(f"--model-args {word}: cannot read the value {value!r}") from e
    return fields


def build_model(args: Any, source: str | None) -> nn.Module:
    """The model of a run on the CPU, with the weights it starts from.

    `source` is the checkpoint to go on from or to evaluate. Without `--model` on the command line, the
    model is what that checkpoint says it is; with it, the checkpoint must fit. Without a `source` the
    weights come from `--pretrain-zoo`.
    """
    behaviour = {name: getattr(args, name) for name in _BEHAVIOUR if getattr(args, name) is not None}
    overrides = {**behaviour, **parse_model_args(args.model_args)}
    if source is not None:
        checkpoint = read_checkpoint(source)
        facts = checkpoint_facts(checkpoint, source)
        check_preprocess(facts, args.norm_style)
        if "model" not in args.given and facts.model_name is not None:
            sizes = {name: getattr(args, name) for name in _SIZES if name in args.given}
            if "clip_length" in args.given:
                sizes["num_frames"] = args.clip_length
            model = model_from_checkpoint(source, **sizes, **overrides)
            logger.info("%s", model.load_report)
            return model
    sizes = {name: getattr(args, name) for name in _SIZES} | {"num_frames": args.clip_length}
    model = create_model(args.model, **{**sizes, **overrides})
    if source is not None:
        report = load_checkpoint(model, source)
    elif args.pretrain_zoo == "none":
        if args.pretrain_path is not None:
            raise UserError(
                f"--pretrain-path {args.pretrain_path}: --pretrain-zoo none does not use it; name the zoo, or "
                "give a checkpoint of this model as --resume"
            )
        logger.info("%s: new weights", model.config.name)
        return model
    else:
        report = load_pretrained(model, args.pretrain_zoo, args.pretrain_path)
    logger.info("%s", report)
    return model
