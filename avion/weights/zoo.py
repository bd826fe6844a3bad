"""Initial weights for pretraining: those of image CLIPs (OpenAI's, open_clip's) and of LaViLa's dual encoder.

The parameters of a source are first given the names of the divided tower (avion/models/timemamba.py), and then the
names of the model's own tower. A source lacks some parameters of a video model, and may have others: `load_pretrained`
allows the differences that docs/checkpoints.md lists, and no other.
"""

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from avion.constants import NORM_STYLES
from avion.elsewhere import value_elsewhere
from avion.errors import UserError
from avion.models.config import ModelConfig
from avion.models.tower import Tower, find_tower, rename

from .checkpoint import Checkpoint
from .facts import few
from .files import HF_PREFIX, hub_file, read_checkpoint, resolve_path
from .layouts import IMAGE_CLIP, fit, layout_of
from .loading import LoadReport, unwrap

ZOOS = ("openai", "open_clip", "lavila", "none")
_FLAG = "--pretrain-path"

# open_clip's name: patch size, width, blocks, text width, text blocks, image size
OPEN_CLIP_MODELS = {
    "ViT-B-32": (32, 768, 12, 512, 12, 224),
    "ViT-B-16": (16, 768, 12, 512, 12, 224),
    "ViT-L-14": (14, 1024, 24, 768, 12, 224),
    "ViT-L-14-336": (14, 1024, 24, 768, 12, 336),
}


@dataclass(frozen=True)
class _Source:
    file: Path
    title: str
    quick_gelu: bool | None = None  # None: the file does not say
    notes: tuple[str, ...] = ()


def load_pretrained(model: nn.Module, zoo: str, path: str | os.PathLike | None = None) -> LoadReport:
    """Give a newly built video model its initial weights, in place.

    The temporal parts stay as they were where the source has none; both projections and the logit scale stay as they
    were where the embedding of the source has another size. The report lists them as missing. Position and temporal
    embeddings are resized. The positions of the text are cut, or beyond the context of the source those of the model
    are kept.

    Args:
        model: A newly built CLIP.
        zoo: "openai" (OpenAI's CLIP of the model's size, from open_clip's table or from the file `path`), "open_clip"
            (`path` is a file, or one of open_clip's pretrained tags for this size), "lavila" (`path` is a LaViLa-CLIP
            dual encoder) or "none".
        path: A file of torch.save, safetensors or OpenAI's TorchScript archives, also as `hf:owner/repo/file`; or a
            tag.

    Returns:
        The report of what was loaded, resized and left out.

    Raises:
        UserError: The source cannot be read or does not fit. The model is then unchanged. The message is one line.
    """
    if zoo not in ZOOS:
        if elsewhere := value_elsewhere("--pretrain-zoo", zoo):
            raise UserError(f"--pretrain-zoo {zoo}: {elsewhere}")
        raise UserError(f"--pretrain-zoo {zoo}: must be one of {', '.join(ZOOS)}")
    path = None if path is None or os.fspath(path) == "" else os.fspath(path)
    if zoo == "none":
        if path is not None:
            raise UserError(f"{_FLAG} {path}: would not be read with --pretrain-zoo none: name the zoo it is of")
        return LoadReport("none", notes=("no initial weights",))
    model = unwrap(model)
    config = model.config
    tower = find_tower(config.tower)
    if tower is None or tower.from_common is None:
        raise UserError(f"{config.name}: no initial weights are known for tower {config.tower!r}")
    source = _source(zoo, path, config)
    weights = Checkpoint(read_checkpoint(source.file), source.title).weights
    _check_layout(weights, zoo, source.title)
    return _copy(model, tower, tower.from_common(_to_common(weights, zoo)), zoo, source)


# --- where the file is -----------------------------------------------------------------------


def _source(zoo: str, path: str | None, config: ModelConfig) -> _Source:
    if zoo == "lavila":
        if path is None:
            raise UserError(f"--pretrain-zoo lavila needs {_FLAG}, a LaViLa-CLIP checkpoint")
        legacy = NORM_STYLES["openai_legacy"].mean[0]
        note = f"LaViLa trains with --norm-style openai_legacy (red mean {legacy})"
        return _Source(resolve_path(path), path, True, (note,))
    if path is not None and _is_address(path, zoo):
        return _Source(resolve_path(path), path, True if zoo == "openai" else None)
    tag = "openai" if zoo == "openai" else path
    name = open_clip_name(config, tag)
    if name is None:
        sizes = ", ".join(f"{n} (patch {s[0]}, width {s[1]}, depth {s[2]})" for n, s in OPEN_CLIP_MODELS.items())
        raise UserError(
            f"--pretrain-zoo {zoo}: no image CLIP has the size of {config.name} (patch {config.patch_size}, width "
            f"{config.embed_dim}, depth {config.depth}, text {config.text_width} x {config.text_layers}); there "
            f"are {sizes}: use --pretrain-zoo none or give a file with {_FLAG}"
        )
    return _open_clip_source(name, tag)


def _is_address(path: str, zoo: str) -> bool:
    """Return whether `path` is a file rather than one of open_clip's tags, which have no slash and no suffix."""
    return zoo == "openai" or path.startswith(HF_PREFIX) or os.path.exists(path) or "/" in path or "." in path


def open_clip_name(config: ModelConfig, tag: str | None) -> str | None:
    """Find open_clip's image CLIP of the same size as a video model.

    Image sizes may differ, since position embeddings are resized.

    Args:
        config: The configuration of the video model.
        tag: One of open_clip's pretrained tags.

    Returns:
        The name of open_clip's model; None where there is none of this size.
    """
    wanted = (config.patch_size, config.embed_dim, config.depth, config.text_width, config.text_layers)
    same = {name: sizes[-1] for name, sizes in OPEN_CLIP_MODELS.items() if sizes[:-1] == wanted}
    if tag != "openai":
        same = {name: size for name, size in same.items() if size == 224}  # the others have OpenAI's weights only
    return min(same, key=lambda name: abs(same[name] - config.img_size), default=None)


def openai_files(config: ModelConfig) -> tuple[str, list[str]] | None:
    """Find the repository of the hub that has OpenAI's CLIP of a model's size.

    `load_pretrained(model, "openai")` takes the file from there.

    Args:
        config: The configuration of the video model.

    Returns:
        The repository, and the names that its file may have; None where no repository has a CLIP of this size.
    """
    from open_clip import pretrained as zoo

    name = open_clip_name(config, "openai")
    return _hub_names(zoo.get_pretrained_cfg(name, "openai")) if name is not None else None


def _hub_names(cfg: Mapping) -> tuple[str, list[str]] | None:
    """Return the repository and the names of files of an entry of open_clip's table; None where the entry has another
    address.
    """
    from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME

    if not cfg.get("hf_hub"):
        return None
    repo, filename = os.path.split(cfg["hf_hub"])
    return repo, [filename] if filename else [HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME]


def _open_clip_source(name: str, tag: str | None) -> _Source:
    from open_clip import pretrained as zoo  # takes seconds: only where its table is needed

    tags = zoo.list_pretrained_tags_by_model(name)
    if tag is None:
        raise UserError(f"--pretrain-zoo open_clip needs {_FLAG}: a file, or a tag of {name} ({', '.join(tags)})")
    if tag not in tags:
        near = difflib.get_close_matches(tag, tags, n=3) or tags
        raise UserError(f"{_FLAG} {tag}: neither a file nor a tag that open_clip has for {name}: try {few(near)}")
    cfg = zoo.get_pretrained_cfg(name, tag)
    on_hub = _hub_names(cfg)
    file = _download(cfg["url"]) if on_hub is None else hub_file(*on_hub, _FLAG)
    notes = ()
    mean = cfg.get("mean")
    clip_mean = NORM_STYLES["openai"].mean
    if mean and any(abs(255 * a - b) > 0.01 for a, b in zip(mean, clip_mean, strict=True)):
        notes = (f"trained with mean {tuple(round(255 * m, 1) for m in mean)} on 0-255, not CLIP's",)
    return _Source(file, f"{name} {tag}", bool(cfg.get("quick_gelu", False)), notes)


def _download(url: str) -> Path:
    """Download weights that open_clip's table has outside of the hub."""
    from open_clip import pretrained as zoo

    try:
        return Path(zoo.download_pretrained_from_url(url))
    except OSError as error:
        name = url.rpartition("/")[2]
        raise UserError(
            f"{name} cannot be downloaded ({' '.join(str(error).split())}): fetch {url} elsewhere and give its "
            f"path with {_FLAG}, or put it into {Path('~/.cache/clip').expanduser()}"
        ) from error


def _check_layout(weights: Mapping[str, Tensor], zoo: str, title: str) -> None:
    layout = layout_of(weights)
    found = layout.name if layout else None
    wanted = "lavila" if zoo == "lavila" else "clip"
    if found == wanted:
        return
    what = {"lavila": "a LaViLa-CLIP dual encoder", "clip": "an image CLIP with a vision transformer"}
    if layout is None:
        cure = f"its first names are {few(weights)}"
    elif layout is IMAGE_CLIP or layout.name == "lavila":
        cure = f"give --pretrain-zoo {'lavila' if layout.name == 'lavila' else 'open_clip'}"
    else:
        cure = "a video model's own checkpoint is loaded with --resume or load_checkpoint"
    raise UserError(f"{title}: is not {what[wanted]}: {cure}")


# --- names -----------------------------------------------------------------------------------

_CLIP_TO_COMMON = (
    (r"visual\.class_embedding", "visual.cls_token"),
    (r"visual\.positional_embedding", "visual.pos_embed"),
    (r"visual\.conv1\.", "visual.patch_embed.proj."),
    (r"visual\.ln_post\.", "visual.norm."),
    (r"visual\.proj$", "visual.image_projection"),
    (r"visual\.transformer\.resblocks\.(\d+)\.ln_([12])\.", r"visual.blocks.\1.norm\2."),
    (r"visual\.transformer\.resblocks\.(\d+)\.", r"visual.blocks.\1."),
    (r"(?!visual\.|logit_)", "textual."),
)
_TIME_GATE = re.compile(r"visual\.(?:\w+\.)+alpha_timeattn")


def _to_common(weights: Mapping[str, Tensor], zoo: str) -> dict[str, Tensor]:
    """The common names (see `avion.models.tower.Tower`) of an image CLIP's or of LaViLa's weights."""
    if zoo == "lavila":
        lavila = find_tower("lavila")
        assert lavila is not None and lavila.to_common is not None
        return lavila.to_common(weights)
    # The causal mask is a constant, which TorchScript archives hold among the weights.
    weights = {name: value for name, value in weights.items() if not name.endswith("attn_mask")}
    renamed = rename(weights, _CLIP_TO_COMMON)
    for name, lead in (("visual.cls_token", 2), ("visual.pos_embed", 1)):  # (D,), (1 + N, D)
        if name in renamed:
            renamed[name] = renamed[name][(None,) * lead]  # (1, 1, D), (1, 1 + N, D)
    return renamed


# --- what fits -------------------------------------------------------------------------------


def _copy(model: nn.Module, tower: Tower, weights: dict[str, Tensor], zoo: str, source: _Source) -> LoadReport:
    """Load `weights`, under the names of the tower, into the model, unless something differs that must not differ."""
    config, target = model.config, model.state_dict()
    notes = [*source.notes, *_activation_note(source, config)]
    taken = tower.time_from_lavila(config)
    temporal = [name for name in weights if tower.temporal.match(name)]
    dropped = [name for name in temporal if not taken.match(name)] if zoo == "lavila" else []
    left_out = _other_embedding(weights, target)
    _fit_context(weights, target, notes)
    found = fit({n: v for n, v in weights.items() if n not in left_out + dropped}, target)
    may_be_missing = (n for n in found.missing if tower.temporal.match(n))
    absent = {n for n in may_be_missing if zoo != "lavila" or _TIME_GATE.match(n) or not taken.match(n)}
    missing = [n for n in found.missing if n not in left_out and n not in absent]
    wrong = {"of another shape": found.misshapen, "unexpected": found.unexpected, "missing": missing}
    if any(wrong.values()):
        listed = "; ".join(f"{len(names)} {what} ({few(names)})" for what, names in wrong.items() if names)
        raise UserError(f"{source.title}: cannot start {config.name}: {listed}: give weights of the model's size")
    if left_out:
        notes.append("embedding of another size: projections and temperature start anew")
    elif config.freeze_temperature and "logit_scale" in found.values:
        notes.append(f"the frozen temperature is the source's, 1 / {weights['logit_scale'].exp().item():.2f}")
    gates = [n for n in found.missing if _TIME_GATE.match(n) and taken.match(n)]
    if zoo == "lavila" and gates:
        notes.append("the source is not gated: time attention is loaded behind closed gates (alpha 0)")
    # Names, shapes and types were all checked, so that the next line loads everything and cannot fail half-way.
    model.load_state_dict(found.values, strict=False)
    return LoadReport(
        source.title,
        len(found.values),
        tuple(found.resized),
        tuple(found.missing),
        tuple(left_out + dropped),
        tuple(notes),
    )


def _other_embedding(weights: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> list[str]:
    """Name the projections and the logit scale, where the source embeds into another number of dimensions."""
    names = [n for n in target if n.endswith(("image_projection", "text_projection"))]
    pairs = [(weights[n].shape, target[n].shape) for n in names if n in weights]
    if pairs and all(len(a) == 2 and a[0] == b[0] and a[1] != b[1] for a, b in pairs):
        return [n for n in (*names, "logit_scale") if n in weights]
    return []


def _fit_context(weights: dict[str, Tensor], target: Mapping[str, Tensor], notes: list[str]) -> None:
    """Cut the positions of the text, or continue them with those of the model.

    Attention is causal, so both are exact for texts that both contexts can hold.
    """
    for name in ("textual.positional_embedding", "positional_embedding"):
        if name not in weights or name not in target:
            continue
        value, wanted = weights[name], target[name]
        if value.ndim == 2 and value.shape[1] == wanted.shape[1] and len(value) != len(wanted):
            weights[name] = torch.cat([value.to(wanted), wanted[len(value) :]])[: len(wanted)]
            notes.append(f"text context {len(value)} -> {len(wanted)}")


def _activation_note(source: _Source, config: ModelConfig) -> list[str]:
    if source.quick_gelu is None or source.quick_gelu == (config.act_layer == "quick_gelu"):
        return []
    trained, built = ("QuickGELU", "exact GELU") if source.quick_gelu else ("exact GELU", "QuickGELU")
    usual = ", as Video Mamba Suite and AVION do" if source.quick_gelu else ""
    return [f"trained with {trained}, the model computes {built}{usual}"]
