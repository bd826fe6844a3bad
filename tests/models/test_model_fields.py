"""Fields of a model's configuration: typed, in a range, read from words."""

import dataclasses
import math
import typing

import pytest
import torch

from avion.errors import UserError
from avion.models import create_model
from avion.models.config import ModelConfig, numeric
from avion.models.registry import model_config, read_field, register_model
from avion.numbers import Number

FIELDS = {field.name: field for field in dataclasses.fields(ModelConfig)}
HINTS = typing.get_type_hints(ModelConfig)
NUMERIC = [name for name, hint in HINTS.items() if {int, float} & {hint, *typing.get_args(hint)}]
BASE = model_config("TIMEMAMBA_VITB16")
VALUES = [
    math.nan, math.inf, -math.inf, -1, -1.5, 0, 0.0, 1, 1.0, 1.5, "abc", "", "1", "1e-3", 10**30, 1e30, True, None,
    b"1", [1], {}, 1j, torch.tensor(1),
]  # fmt: skip


def test_every_number_declares_its_range_and_every_field_a_plain_type():
    assert len(NUMERIC) > 20
    for name, hint in HINTS.items():
        types = {hint, *typing.get_args(hint)} - {type(None), hint if typing.get_args(hint) else None}
        assert len(types) == 1 and types <= {int, float, bool, str}, name
        if name in NUMERIC:
            within = FIELDS[name].metadata["within"]
            assert {within.kind} == types, name
            assert FIELDS[name].default is None or FIELDS[name].default in within, name


@pytest.mark.parametrize("name", [n for n in FIELDS if n not in ("name", "tower")])
def test_a_value_is_of_the_type_and_range_or_one_line(name):
    hint, within = HINTS[name], FIELDS[name].metadata.get("within")
    optional = type(None) in typing.get_args(hint)
    for value in VALUES:
        if value is None:
            fits = optional
        elif within is not None:
            types = (int,) if within.kind is int else (int, float)
            fits = type(value) in types and math.isfinite(value) and within.low <= value <= within.high
            fits = fits and not (within.above and value == within.low) and not (within.below and value == within.high)
        elif hint is str:
            fits = False  # all of them are choices
        else:
            fits = type(value) is bool
        try:
            config = dataclasses.replace(BASE, **{name: value})
        except UserError as error:
            assert "\n" not in str(error) and name in str(error) and len(str(error)) < 250
            combination = any(s in str(error) for s in ("must be a multiple of", "would have no effect"))
            assert combination or not fits, (value, error)
        else:
            assert fits, value
            found = getattr(config, name)
            assert found == value and (value is None or type(found) is (within.kind if within else bool))


@pytest.mark.parametrize("name", NUMERIC)
@pytest.mark.parametrize(
    "text", ["nan", ".nan", "inf", ".inf", "-.inf", "abc", "", "1" + "0" * 30, "-1e30", "true", "5 6", "1_0", "٣"]
)
def test_a_word_that_no_number_is(name, text):
    with pytest.raises(UserError, match="found") as error:
        read_field(name, text)
    assert "\n" not in str(error.value) and FIELDS[name].metadata["within"].range in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("temperature_init", "1e-3", 0.001), ("temperature_init", ".5", 0.5), ("temperature_init", "1.e-3", 0.001),
        ("mlp_ratio", "4", 4.0), ("mlp_ratio", "1e0", 1.0), ("depth", "1e1", 10), ("depth", "010", 10),
        ("time_gate_init", "-1e-3", -0.001), ("dt_rank", "null", None), ("dt_rank", "None", None), ("dt_rank", "3", 3),
        ("use_flash_attn", "none", None), ("use_flash_attn", "False", False), ("gated_time", "yes", True),
        ("act_layer", "quick_gelu", "quick_gelu"), ("scan_backend", "torch", "torch"),
    ],
)  # fmt: skip
def test_words(name, text, value):
    found = read_field(name, text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("scan_backend", "5", "found '5', expected one of auto, "),
        ("act_layer", "relu", "found 'relu', expected one of gelu, quick_gelu"),
        ("mixer", "null", "found 'null', expected one of attention"),
        ("depth", "null", "found 'null', expected a whole number"),
        ("gated_time", "1", "found '1', expected True or False"),
        ("use_flash_attn", "maybe", "found 'maybe', expected True or False, or None"),
        ("drop_path_rate", "abc", "found 'abc', expected a number from 0 to below 1"),
        ("name", "x", "unknown field 'name'"),
        ("dept", "2", "unknown field 'dept'; did you mean depth"),
    ],
)
def test_words_that_the_field_does_not_take(name, text, message):
    with pytest.raises(UserError) as error:
        read_field(name, text)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_mlp_has_channels():
    with pytest.raises(UserError, match="mlp_ratio=0.001 leaves no channel of embed_dim=768"):
        create_model("TIMEMAMBA_VITB16", mlp_ratio=1e-3)


def test_name_is_not_overridden():
    with pytest.raises(UserError, match="unknown field 'name'"):
        create_model("TIMEMAMBA_VITB16", **{"name": "x"})


def test_fields_of_a_subclass(clean_registry):
    @dataclasses.dataclass(frozen=True)
    class Config(ModelConfig):
        kernel: int = 3
        gain: float = 1.0
        shrink: float = numeric(0.5, Number(float, 0, 1))
        shape: tuple[int, ...] = (1, 2)
        style: str = "plain"

    register_model(Config("OWN", "own"), lambda config: config)
    assert read_field("kernel", "1e1", "OWN") == 10 and read_field("gain", "-.5") == -0.5
    assert read_field("shape", "[3, 4]") == [3, 4] and read_field("style", "5", "OWN") == "5"
    config = create_model("OWN", kernel=5, shape=(3,), gain=2)
    assert (config.kernel, config.shape, config.gain) == (5, (3,), 2.0)
    for wrong in ({"kernel": 0}, {"kernel": 1.5}, {"gain": math.inf}, {"shrink": 2}, {"style": 5}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            create_model("OWN", **wrong)
    with pytest.raises(UserError, match="unknown field 'kernel'"):
        read_field("kernel", "3", "CLIP_VITB16")
