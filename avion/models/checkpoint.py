"""One way in for weights: any released or own checkpoint into a model, or a model out of a checkpoint.

What loads, and what is reported, is described in docs/checkpoints.md. Files are opened by
`avion.models.weight_files`, names and shapes mapped by `avion.models.layouts`.
"""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from avion.errors import UserError

from .checkpoint_facts import (
    CheckpointFacts,
    check_preprocess,
    checkpoint_facts,
    facts_of,
    few,
    parse_preprocess,
    saved_args,
)
from .layouts import LAYOUTS, Layout, canonical, fit, layout_of, likely_models, sizes_of
from .model_clip import VideoClassifier
from .registry import ModelConfig, create_model, model_config, resolve_name
from .weight_files import (
    checkpoint_state_dict,
    read_checkpoint,
    resolve_path,
    write_pt,
    write_safetensors,
)

__all__ = [
    "CheckpointFacts",
    "LoadReport",
    "check_preprocess",
    "checkpoint_facts",
    "checkpoint_state_dict",
    "is_classifier",
    "load_checkpoint",
    "model_fields",
    "model_from_checkpoint",
    "read_checkpoint",
    "resolve_path",
    "save_safetensors",
    "save_weights",
]

# How a model is run, not what it is: a checkpoint from a GPU run must open anywhere.
RUN_FIELDS = (
    "drop_path_rate",
    "patch_dropout",
    "grad_checkpointing",
    "use_fast_conv1",
    "use_flash_attn",
    "scan_backend",
)
# What the shapes do not show, and a model that differs in it would silently compute something else.
_UNSEEN_FIELDS = ("act_layer", "residual", "mixer", "num_heads", "text_heads")


# --- loading ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoadReport:
    """What happened to the weights of one file.

    resized: "name (found) -> (wanted)"; missing: parameters of the model that the file does not have, left
    as they were; unexpected: entries of the file that the model has no place for; notes: sentences.
    """

    path: str
    loaded: int = 0
    resized: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line for a log."""
        parts = [f"{self.path}: {self.loaded} tensors loaded"]
        for what in ("resized", "missing", "unexpected"):
            if names := getattr(self, what):
                parts.append(f"{len(names)} {what} ({few(names)})")
        return "; ".join([*parts, *self.notes])


def load_checkpoint(model: nn.Module, path: str | os.PathLike, *, strict: bool = True) -> LoadReport:
    """Load the weights of `path` (a file or `hf:owner/repo/file`) into `model`, in place.

    Takes every layout of docs/checkpoints.md but image CLIPs (see `load_pretrained`). Temporal and
    position embeddings are resized to the model's. With strict=False, entries that only one side has, and
    a checkpoint of another activation, residual, mixer or number of heads, are reported instead of refused;
    other shapes are refused either way.
    Raises UserError, one line, and then the model is untouched.
    """
    path = os.fspath(path)
    return load_contents(model, read_checkpoint(path), path, strict=strict)


def load_contents(model: nn.Module, checkpoint: Mapping[str, Any], path: str, *, strict: bool = True) -> LoadReport:
    """`load_checkpoint` for a checkpoint that was read already; `path` is for messages."""
    model = unwrap(model)
    weights = canonical(checkpoint_state_dict(checkpoint, path), path)
    facts = facts_of(checkpoint, weights, path)
    config = getattr(model, "config", None)
    contradictions = _contradictions(facts, config) if isinstance(config, ModelConfig) else []
    found = fit(weights, model.state_dict())
    wrong = [("of another shape", found.misshapen)]
    if strict:
        wrong += [
            ("unexpected", found.unexpected),
            ("missing", found.missing),
            ("contradicting", contradictions),
        ]
    problems = [f"{len(names)} {what} ({few(names)})" for what, names in wrong if names]
    if problems or not found.values:
        where = f"does not fit {config.name}" if isinstance(config, ModelConfig) else "does not fit the model"
        cure = _head_cure(weights, model) or _cure(weights, facts, config)
        raise UserError(f"{path}: {where}: {'; '.join(problems) or 'no weight in common'}: {cure}")
    # Names, shapes and types were all checked: from here on nothing can stop half-way.
    model.load_state_dict(found.values, strict=False)
    notes = [] if strict else [f"differs in {text}" for text in contradictions]
    if isinstance(config, ModelConfig) and facts.num_frames not in (None, config.num_frames):
        notes.append(f"trained with {facts.num_frames} frames, the model is built for {config.num_frames}")
    return LoadReport(
        path,
        len(found.values),
        tuple(found.resized),
        tuple(found.missing),
        tuple(found.unexpected),
        tuple(notes),
    )


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's and DistributedDataParallel's wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _contradictions(facts: CheckpointFacts, config: ModelConfig) -> list[str]:
    """What checkpoint and model differ in without any shape showing it."""
    says: dict[str, Any] = {}
    if facts.config is not None:
        says = {field: getattr(facts.config, field) for field in _UNSEEN_FIELDS}
    else:
        if _is_registered(facts.model_name):
            named = model_config(facts.model_name)
            says = {field: getattr(named, field) for field in ("residual", "mixer")}
        if facts.act_layer is not None:
            says["act_layer"] = facts.act_layer
    return [
        f"{field}: {value} in the checkpoint, {getattr(config, field)} in the model"
        for field, value in says.items()
        if value != getattr(config, field)
    ]


def _is_registered(name: str | None) -> bool:
    try:
        return name is not None and bool(resolve_name(name))
    except UserError:
        return False


def is_classifier(weights: Mapping[str, Tensor]) -> bool:
    """Whether canonical `weights` are a fine-tuned classifier's: a video tower and a head, no text tower."""
    return any(name.startswith("fc_cls.") for name in weights)


def _head_cure(weights: Mapping[str, Tensor], model: nn.Module) -> str:
    if is_classifier(weights) and not isinstance(model, VideoClassifier):
        return "it is a fine-tuned classifier, which has no text tower: give a pretrained dual encoder"
    if isinstance(model, VideoClassifier) and not is_classifier(weights):
        return "it has no classification head, is it a dual encoder? give a fine-tuned classifier"
    return ""


def _cure(weights: Mapping[str, Tensor], facts: CheckpointFacts, config: Any) -> str:
    """The likely reason why a checkpoint does not fit, and what to do."""
    layout = layout_of(weights)
    if layout is None:
        return "its names are of no layout this project knows, is it a checkpoint of another program?"
    if layout.name == "clip":
        return "it is an image CLIP, use it as initial weights: --pretrain-zoo open_clip --pretrain-path FILE"
    names = [facts.model_name] if facts.model_name else likely_models(weights, layout)
    if not isinstance(config, ModelConfig):
        return f"this looks like a {' or '.join(names)} checkpoint"
    if config.name not in names:
        return (
            f"this looks like a {' or '.join(names)} checkpoint, the model is {config.name}: "
            f"build the model as {names[0]} (--model {names[0]})"
        )
    if facts.act_layer not in (None, config.act_layer):
        act = f"act_layer={facts.act_layer}"
        return f"build the model with {act} (--model-args {act}), which the weights were trained with"
    saved = dataclasses.asdict(facts.config) if facts.config else sizes_of(weights, layout, facts.path)
    other = [f"{k}={v}" for k, v in saved.items() if k not in RUN_FIELDS and getattr(config, k) != v]
    if other:
        return f"same model, other sizes: build it with {few(other, 6)}, or with model_from_checkpoint"
    return "the file is incomplete or was changed, fetch or write it again"


# --- building --------------------------------------------------------------------------------


def model_from_checkpoint(path: str | os.PathLike, *, name: str | None = None, **overrides: Any) -> nn.Module:
    """Build the model that a checkpoint says it is and load it; the report is `model.load_report`.

    Our own checkpoints carry their config; how the model was run (kernels, dropout, gradient checkpointing)
    is not taken over. For upstream's, the model's name comes from `name`, else from `args.model`, else from
    the layout where that is unambiguous; the sizes from the shapes; heads are width / 64, since no shape
    shows them. `overrides` are fields of `ModelConfig` and win over both: other numbers of frames and other
    image sizes resize the embeddings.
    Raises UserError for a file that does not say enough, naming the override that is needed.
    """
    path = os.fspath(path)
    checkpoint = read_checkpoint(path)
    weights = canonical(checkpoint_state_dict(checkpoint, path), path)
    if is_classifier(weights):
        raise UserError(f"{path}: is a fine-tuned classifier without a text tower, a dual encoder is needed")
    chosen, fields = described_model(checkpoint, weights, path, name, overrides)
    model = create_model(chosen, **fields)
    model.load_report = load_contents(model, checkpoint, path)
    return model


def described_model(
    checkpoint: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    path: str,
    name: str | None,
    overrides: Mapping[str, Any],
) -> tuple[str, dict[str, Any]]:
    """The name and the fields of the model that a checkpoint with these canonical weights says it is, as
    `model_from_checkpoint` describes; `overrides` are among the fields."""
    facts = facts_of(checkpoint, weights, path)
    if facts.config is not None:
        chosen, fields = facts.config.name, _own_fields(facts.config)
        if name is not None and resolve_name(name) != chosen:
            raise UserError(f"{path}: says that it is a {chosen}, which name={name} contradicts: leave name out")
    else:
        layout = _video_layout(weights, path)
        chosen = name or _name_of(facts, weights, layout)
        fields = _upstream_fields(checkpoint, weights, facts, layout, overrides)
    if not _is_registered(chosen):
        raise UserError(f"{path}: its model {chosen!r} is not registered here: give name=, one of list_models()")
    return chosen, fields | overrides


def _own_fields(config: ModelConfig) -> dict[str, Any]:
    fields = dataclasses.asdict(config)
    return {k: v for k, v in fields.items() if k not in ("name", "tower", *RUN_FIELDS)}


def _video_layout(weights: Mapping[str, Tensor], path: str) -> Layout:
    layout = layout_of(weights)
    if layout is None or layout.name == "clip":
        known = f"expected one of {', '.join(k for k in LAYOUTS if k != 'clip')}"
        kind = "an image CLIP" if layout else f"of no known layout (first names {few(weights)})"
        raise UserError(f"{path}: is {kind}, no video model can be built from it alone: {known}")
    return layout


def _name_of(facts: CheckpointFacts, weights: Mapping[str, Tensor], layout: Layout) -> str:
    if facts.model_name is not None:
        return facts.model_name
    names = likely_models(weights, layout)
    if len(names) != 1:
        raise UserError(
            f"{facts.path}: does not say which model it is, and these have the same parameters: "
            f"{', '.join(names)}: give name= (--model)"
        )
    return names[0]


def _upstream_fields(
    checkpoint: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    facts: CheckpointFacts,
    layout: Layout,
    overrides: Mapping[str, Any],
) -> dict[str, Any]:
    fields = sizes_of(weights, layout, facts.path)
    for heads, width in (("num_heads", "embed_dim"), ("text_heads", "text_width")):
        if heads in overrides or width not in fields:
            continue
        if fields[width] % 64:
            raise UserError(
                f"{facts.path}: {width}={fields[width]} is no multiple of 64, and the shapes do not show the "
                f"number of heads: give {heads}= (--model-args {heads}=...)"
            )
        fields[heads] = fields[width] // 64
    if facts.num_frames is not None:
        fields["num_frames"] = facts.num_frames
    args = saved_args(checkpoint)
    if isinstance(args.get("freeze_temperature"), bool):
        fields["freeze_temperature"] = args["freeze_temperature"]
    return fields


# --- writing ---------------------------------------------------------------------------------


def model_fields(model: nn.Module) -> dict[str, Any]:
    """What a checkpoint says about the model beside its weights: `model_config`, and `classifier` if it is one."""
    fields: dict[str, Any] = {"model_config": dataclasses.asdict(model.config)}
    if isinstance(model, VideoClassifier):
        fields["classifier"] = {
            "num_classes": model.fc_cls.out_features,
            "dropout": model.dropout.p,
            "actions": None if model.actions is None else list(model.actions),
        }
    return fields


def save_safetensors(model: nn.Module, path: str | os.PathLike, preprocess: Mapping[str, Any]) -> None:
    """Write the weights, the config and `preprocess` ({"norm_style", "mean", "std"}) as one safetensors file.

    Written beside and renamed; `read_checkpoint`, `load_checkpoint` and `model_from_checkpoint` read it.
    """
    model = unwrap(model)
    fields = {**model_fields(model), "preprocess": _plain(preprocess, path)}
    write_safetensors(model.state_dict(), path, **fields)


def save_weights(model: nn.Module, path: str | os.PathLike, preprocess: Mapping[str, Any]) -> None:
    """`save_safetensors`, or a `.pt` of the same contents, by the path's suffix."""
    suffix = os.path.splitext(os.fspath(path))[1]
    if suffix == ".safetensors":
        save_safetensors(model, path, preprocess)
    elif suffix in (".pt", ".pth"):
        model = unwrap(model)
        weights = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
        contents = {
            "state_dict": weights,
            **model_fields(model),
            "preprocess": _plain(preprocess, path),
        }
        write_pt(contents, path)
    else:
        raise UserError(f"{path}: suffix {suffix!r}, expected .pt, .pth or .safetensors")


def _plain(preprocess: Mapping[str, Any], path: str | os.PathLike) -> dict[str, Any]:
    style, mean, std = parse_preprocess(preprocess, os.fspath(path))
    return {"norm_style": style, "mean": mean and list(mean), "std": std and list(std)}
