"""The configuration of a model: flat, frozen, and every field has a type and a range.

The file of a tower states which fields the tower ignores; `avion.models.registry.check_config` asks it.
"""

import dataclasses
import sys
from collections.abc import Callable
from typing import NamedTuple, TypeVar, get_args, get_type_hints

from torch import nn

from avion.errors import UserError
from avion.numbers import SHARE_BELOW_1, Number, shown, whole
from avion.ops.selective_scan import backend_names
from avion.plugins import HINT
from avion.reading import parse_yaml

FieldValue = int | float | bool | str | None
_T = TypeVar("_T", int, float, int | None)


def numeric(default: _T, within: Number) -> _T:
    """Declare a field of a configuration that holds a number, and the numbers that the field takes."""
    return dataclasses.field(default=default, metadata={"within": within})


_WIDTH = whole(1, 1_000_000)  # of an embedding, in channels; there are at most as many heads
_LAYERS = whole(1, 1024)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """All that is needed to build a model. Sizes of images are in pixels, sizes of embeddings in channels.

    Every field is an int, a float, a bool or a str, and some may be None; a number declares its range. In a subclass, a
    number without a declared range may be any finite float, or any whole number above 0.
    """

    name: str
    tower: str  # "divided" (timemamba.py), "joint" (AVION's ViT), "lavila"; or one of yours

    # the two choices of a divided space-time block
    mixer: str = "attention"  # "attention", "vim", "vim_spacetime"; or one of yours
    residual: str = "vanilla"  # "vanilla", "frozen"

    # video tower
    img_size: int = numeric(224, whole(1, 8192))
    patch_size: int = numeric(16, whole(1, 8192))
    in_chans: int = numeric(3, whole(1, 1024))
    embed_dim: int = numeric(768, _WIDTH)
    depth: int = numeric(12, _LAYERS)
    num_heads: int = numeric(12, _WIDTH)
    mlp_ratio: float = numeric(4.0, Number(float, 0, 64, above=True))
    num_frames: int = numeric(
        4, whole(1, 65536)
    )  # of the temporal embedding; the model accepts any number, see docs/models.md

    # text tower, and the embedding that the two share
    project_embed_dim: int = numeric(256, _WIDTH)
    context_length: int = numeric(77, whole(1, 65536))
    vocab_size: int = numeric(49408, whole(1, 10_000_000))
    text_width: int = numeric(512, _WIDTH)
    text_heads: int = numeric(8, _WIDTH)
    text_layers: int = numeric(12, _LAYERS)

    # training
    drop_path_rate: float = numeric(
        0.0, SHARE_BELOW_1
    )  # of the last block; the rate rises linearly from 0 in the first block
    patch_dropout: float = numeric(
        0.0, SHARE_BELOW_1
    )  # the share that is left out in training, the same patches in every frame
    grad_checkpointing: bool = False
    temperature_init: float = numeric(0.07, Number(float, 1e-6, 100))
    freeze_temperature: bool = False

    # computation
    act_layer: str = "gelu"  # "gelu", "quick_gelu"; both towers
    use_fast_conv1: bool = False  # patch embedding as reshape and matmul
    use_flash_attn: bool | None = None  # True: fused kernels only, False: plain math, None: PyTorch chooses

    # ViM mixer
    ssm_expand: int = numeric(1, whole(1, 64))
    d_state: int = numeric(16, whole(1, 4096))
    d_conv: int = numeric(4, whole(1, 1024))
    dt_rank: int | None = numeric(None, _WIDTH)  # None: ceil(embed_dim / 16)
    scan_backend: str = "auto"

    gated_time: bool = False  # LaViLa's tower: tanh(alpha) in front of time attention
    # The initial alpha. 0 keeps an image model as it was; training from scratch has no such model (docs/models.md).
    time_gate_init: float = numeric(0.0, Number(float, -100, 100))

    def __post_init__(self) -> None:
        _check_types(self)
        _check_sizes(self)


class Kind(NamedTuple):
    """What a field holds: values of `type`, and None where the field is `optional`. A `type` of None is not checked."""

    type: type | None
    optional: bool
    within: Number | None
    choices: tuple[str, ...] | None

    def __contains__(self, value: object) -> bool:
        if self.type is None or value is None:
            return self.type is None or self.optional
        if self.within is not None:
            return value in self.within
        return isinstance(value, self.type) and (self.choices is None or value in self.choices)

    def __str__(self) -> str:
        if self.within is not None:
            one = str(self.within)
        elif self.type is bool:
            one = "True or False"
        else:
            one = "a text" if self.choices is None else f"one of {', '.join(self.choices)}"
        return f"{one}, or None" if self.optional else one

    def read(self, text: str) -> FieldValue:
        """Return the value that a text stands for.

        Raises:
            ValueError: The field does not take the value. The message says what was found and what is allowed.
        """
        if self.type is None:
            return parse_yaml(text)
        word = text.strip().lower()
        if word in ("none", "null", "~"):
            value: FieldValue = None
        elif self.within is not None:
            try:
                return self.within.read(text)
            except ValueError:
                value = text
        else:
            value = _BOOLS.get(word, text) if self.type is bool else text
        if value not in self:
            raise ValueError(f"found {shown(text)}, expected {self}")
        return value


_BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_WHOLE, _FINITE = whole(1, 2**63 - 1), Number(float, -sys.float_info.max, sys.float_info.max)


_RANGES: dict[type | None, Number] = {int: _WHOLE, float: _FINITE}


def field_kinds(config: type[ModelConfig]) -> dict[str, Kind]:
    """Return what each field of a configuration holds, by its annotation and its declared range."""
    hints = get_type_hints(config)
    kinds: dict[str, Kind] = {}
    choices = {**CHOICES, "mixer": (*CHOICES["mixer"], *MIXERS), "scan_backend": ("auto", *backend_names())}
    for field in dataclasses.fields(config):
        types = [t for t in (get_args(hints[field.name]) or (hints[field.name],)) if t is not type(None)]
        kind = types[0] if len(types) == 1 and types[0] in (int, float, bool, str) else None
        within = field.metadata.get("within", _RANGES.get(kind))
        optional = type(None) in get_args(hints[field.name])
        kinds[field.name] = Kind(kind, optional, within, choices.get(field.name))
    return kinds


def _check_types(config: ModelConfig) -> None:
    for name, kind in field_kinds(type(config)).items():
        value = getattr(config, name)
        if value not in kind:
            hint = f"; {HINT}" if name == "mixer" else ""
            raise UserError(f"{config.name}: {name} must be {kind}, found {shown(value)}{hint}")
        if kind.type is float and value is not None:
            object.__setattr__(config, name, float(value))


def _check_sizes(config: ModelConfig) -> None:
    for part, size in (("num_heads", "embed_dim"), ("text_heads", "text_width"), ("patch_size", "img_size")):
        if getattr(config, size) % getattr(config, part):
            raise UserError(
                f"{config.name}: {size}={getattr(config, size)} must be a multiple of {part}={getattr(config, part)}"
            )
    if int(config.embed_dim * config.mlp_ratio) < 1:
        raise UserError(
            f"{config.name}: mlp_ratio={config.mlp_ratio} leaves no channel of embed_dim={config.embed_dim} in the MLPs"
        )


CHOICES = {
    "mixer": ("attention", "vim", "vim_spacetime"),
    "residual": ("vanilla", "frozen"),
    "act_layer": ("gelu", "quick_gelu"),
}
VIM_FIELDS = ("ssm_expand", "d_state", "d_conv", "dt_rank", "scan_backend")

# The mixers over time that `register_mixer` added, and what builds them.
MIXERS: dict[str, Callable[[ModelConfig], nn.Module]] = {}
