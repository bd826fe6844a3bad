"""The list of models: `register_model`, `register_mixer`, `create_model`, `list_models`. Nothing else lives here.

A model is a flat `ModelConfig` and a function that builds it. Every field of the config can be
overridden when the model is created; a name or a field that does not exist is an error that says
which ones come near, so a misspelling never passes silently.
"""

import dataclasses
import difflib
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

from avion.errors import UserError


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """All that is needed to build a model. Sizes of images are in pixels, of embeddings in channels."""

    name: str
    tower: str  # "divided" (timemamba.py), "joint" (AVION's ViT), "lavila"; or one of yours

    # the two choices of a divided space-time block
    mixer: str = "attention"  # "attention", "vim", "vim_spacetime"; or one of yours
    residual: str = "vanilla"  # "vanilla", "frozen"

    # video tower
    img_size: int = 224
    patch_size: int = 16
    in_chans: int = 3
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    num_frames: int = 4  # of the temporal embedding; any number runs, see docs/models.md

    # text tower, and the embedding that the two share
    project_embed_dim: int = 256
    context_length: int = 77
    vocab_size: int = 49408
    text_width: int = 512
    text_heads: int = 8
    text_layers: int = 12

    # training
    drop_path_rate: float = 0.0  # of the last block; rises linearly from 0 in the first
    patch_dropout: float = 0.0  # share of patches left out in training, the same ones in every frame
    grad_checkpointing: bool = False
    temperature_init: float = 0.07
    freeze_temperature: bool = False

    # computation
    act_layer: str = "gelu"  # "gelu", "quick_gelu"; both towers
    use_fast_conv1: bool = False  # patch embedding as reshape and matmul
    use_flash_attn: bool | None = None  # True: fused kernels only, False: plain math, None: PyTorch chooses

    # ViM mixer
    ssm_expand: int = 1
    d_state: int = 16
    d_conv: int = 4
    dt_rank: int | None = None  # None: ceil(embed_dim / 16)
    scan_backend: str = "auto"

    gated_time: bool = False  # LaViLa's tower: tanh(alpha) in front of time attention
    # alpha at the start. 0 leaves an image model as it was; training from scratch has none to spare, see docs/models.md
    time_gate_init: float = 0.0

    def __post_init__(self) -> None:
        _check_sizes(self)
        _check_choices(self)


def _check_sizes(config: ModelConfig) -> None:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.type is int and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise UserError(f"{config.name}: {field.name} must be a whole number above 0, found {value!r}")
        if field.type is bool and not isinstance(value, bool):
            raise UserError(f"{config.name}: {field.name} must be True or False, found {value!r}")
    if config.dt_rank is not None and (not isinstance(config.dt_rank, int) or config.dt_rank < 1):
        raise UserError(f"{config.name}: dt_rank must be None or a whole number above 0, found {config.dt_rank!r}")
    for part, whole in (("num_heads", "embed_dim"), ("text_heads", "text_width"), ("patch_size", "img_size")):
        if getattr(config, whole) % getattr(config, part):
            raise UserError(
                f"{config.name}: {whole}={getattr(config, whole)} must be a multiple of {part}={getattr(config, part)}"
            )
    for name in ("drop_path_rate", "patch_dropout"):
        if not 0 <= getattr(config, name) < 1:
            raise UserError(f"{config.name}: {name} must be in [0, 1), found {getattr(config, name)!r}")
    for name in ("mlp_ratio", "temperature_init"):
        if not getattr(config, name) > 0:
            raise UserError(f"{config.name}: {name} must be above 0, found {getattr(config, name)!r}")


CHOICES = {
    "mixer": ("attention", "vim", "vim_spacetime"),
    "residual": ("vanilla", "frozen"),
    "act_layer": ("gelu", "quick_gelu"),
    "use_flash_attn": (True, False, None),
}
_VIM_FIELDS = ("ssm_expand", "d_state", "d_conv", "dt_rank", "scan_backend")


def _check_choices(config: ModelConfig) -> None:
    """A choice that the model would ignore is refused: an accepted field always does what it says."""
    for name, choices in {**CHOICES, "mixer": (*CHOICES["mixer"], *_MIXERS)}.items():
        if getattr(config, name) not in choices:
            listed = ", ".join(map(str, choices))
            raise UserError(f"{config.name}: {name} must be one of {listed}, found {getattr(config, name)!r}")
    ignored: dict[str, str] = {}
    if config.tower in ("joint", "lavila"):
        ignored |= dict.fromkeys(("mixer", "residual"), "only a divided tower has this choice")
    if config.mixer == "attention" and config.tower in ("divided", "joint", "lavila"):
        ignored |= dict.fromkeys(_VIM_FIELDS, "this model has no ViM mixer")
    if config.tower == "divided":
        ignored["gated_time"] = "the divided towers are always gated; this is LaViLa's choice"
    if config.tower == "joint":
        ignored |= dict.fromkeys(("gated_time", "time_gate_init"), "this model has no time attention of its own")
    if config.tower == "lavila" and not config.gated_time:
        ignored["time_gate_init"] = "time attention has a gate only with gated_time=True"
    for field in dataclasses.fields(config):
        if field.name in ignored and getattr(config, field.name) != field.default:
            raise UserError(
                f"{config.name}: {field.name}={getattr(config, field.name)!r} would have no effect: "
                f"{ignored[field.name]}; leave it at {field.default!r}"
            )


# ----------------------------------------------------------------------------------------------


class _Entry(NamedTuple):
    config: ModelConfig
    build: Callable[[ModelConfig], nn.Module]


_MODELS: dict[str, _Entry] = {}
_ALIASES: dict[str, str] = {}
_MIXERS: dict[str, Callable[[ModelConfig], nn.Module]] = {}


def register_model(
    config: ModelConfig, build: Callable[[ModelConfig], nn.Module], aliases: tuple[str, ...] = ()
) -> None:
    """Add a model to the list under `config.name`, and under `aliases` too.

    `build(config)` returns the module, with the methods of `avion.models.model_clip.CLIP`.
    Raises UserError where a name is taken.
    """
    for name in (config.name, *aliases):
        if name in _MODELS or name in _ALIASES:
            raise UserError(f"model name {name!r} is already taken; choose another one")
    _MODELS[config.name] = _Entry(config, build)
    _ALIASES.update(dict.fromkeys(aliases, config.name))


def register_mixer(name: str, build: Callable[[ModelConfig], nn.Module]) -> None:
    """Make `mixer=name` a choice of the divided towers: time is mixed by the module `build(config)`.

    It takes the T frames of each patch as a row, (R, T, D), for any T, and returns the same shape.
    Raises UserError where the name is taken.
    """
    if name in CHOICES["mixer"] or name in _MIXERS:
        raise UserError(f"mixer {name!r} is already taken; choose another name")
    _MIXERS[name] = build


def build_mixer(config: ModelConfig) -> nn.Module:
    """The module of a mixer that `register_mixer` added."""
    return _MIXERS[config.mixer](config)


def list_models(pattern: str = "*") -> list[str]:
    """The canonical names that match a shell pattern, sorted."""
    return sorted(name for name in _MODELS if fnmatchcase(name, pattern))


def resolve_name(name: str) -> str:
    """The canonical name of a model, given that or an upstream name. UserError lists near names."""
    if name in _MODELS:
        return name
    if name in _ALIASES:
        return _ALIASES[name]
    hint = _near(name, [*_MODELS, *_ALIASES]) or "`python -m avion.models` lists all"
    raise UserError(f"unknown model {name!r}; {hint}")


def model_aliases(name: str) -> list[str]:
    """The upstream names of a model."""
    name = resolve_name(name)
    return sorted(alias for alias, target in _ALIASES.items() if target == name)


def model_config(name: str) -> ModelConfig:
    """The registered config of a model, before any override."""
    return _MODELS[resolve_name(name)].config


def create_model(name: str, **overrides) -> nn.Module:
    """Build a registered model with newly initialised weights, any field of its config overridden.

    Build it under `torch.device("meta")` to look at shapes without spending memory.
    Raises UserError for an unknown name or field, and for a value the model cannot honour.
    """
    entry = _MODELS[resolve_name(name)]
    known = [field.name for field in dataclasses.fields(entry.config) if field.name not in ("name", "tower")]
    for field in overrides:
        if field == "tower":
            raise UserError(f"{entry.config.name}: tower cannot be overridden; register a model of your own")
        if field not in known:
            hint = _near(field, known) or f"fields are {', '.join(known)}"
            raise UserError(f"{entry.config.name}: unknown field {field!r}; {hint}")
    return entry.build(dataclasses.replace(entry.config, **overrides))


def _near(word: str, candidates: list[str]) -> str:
    """ "did you mean …" or nothing. Upper and lower case count as the same."""
    by_fold = {candidate.lower(): candidate for candidate in candidates}
    matches = difflib.get_close_matches(word.lower(), by_fold, n=4, cutoff=0.6)
    return f"did you mean {', '.join(by_fold[match] for match in matches)}?" if matches else ""
