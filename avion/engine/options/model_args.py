"""`--model-args FIELD=VALUE ...` sets fields of the model's configuration; the words are checked before any file is
read.

The functions import the models, and with them PyTorch, when they are called. The words of the command line have been
parsed by then, so that `--help` does not wait for the import.
"""

import dataclasses
from collections.abc import Container, Sequence
from typing import TYPE_CHECKING, Any

from avion.errors import UserError

if TYPE_CHECKING:
    from avion.engine.args import Options
    from avion.models.registry import FieldValue

    from .shared import TrainingOptions

# Flags that are fields of the model's configuration under the same name; num_frames is `--clip-length`.
_SIZES = ("project_embed_dim", "context_length", "vocab_size")
BEHAVIOUR = (
    "grad_checkpointing", "use_fast_conv1", "use_flash_attn", "patch_dropout", "drop_path_rate", "scan_backend",
    "freeze_temperature",
)  # fmt: skip
_RESERVED = {"name": "--model chooses the model", "tower": "a tower is chosen with the model, by --model"}


def parse_model_args(words: Sequence[str], model: str | None = None) -> "dict[str, FieldValue]":
    """Read ["depth=6", "act_layer=quick_gelu"] as {"depth": 6, "act_layer": "quick_gelu"}.

    Args:
        words: FIELD=VALUE each.
        model: The name of the registered model that has the fields, where it is known.

    Returns:
        The values by field.

    Raises:
        UserError: A field does not exist, a value is not of the type or in the range of its field, or a field has two
            values.
    """
    from avion.models.registry import read_field

    fields: dict[str, FieldValue] = {}
    for word in words:
        name, equals, text = word.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name or not text:
            raise UserError(f"--model-args {word}: expected FIELD=VALUE, for example depth=6")
        if name in _RESERVED:
            raise UserError(f"--model-args {word}: {name} is not a field that can be changed; {_RESERVED[name]}")
        try:
            value = read_field(name, text, model)
        except UserError as e:
            raise UserError(f"--model-args {word}: {e}") from e
        if name in fields and fields[name] != value:
            raise UserError(f"--model-args: {name} is given twice, as {fields[name]} and as {value}; keep one")
        fields[name] = value
    return fields


def flag_of(field: str, flags: Container[str]) -> str | None:
    """Find the flag that sets a field of the model's configuration too.

    Args:
        field: The name of the field.
        flags: The names of the flags.

    Returns:
        The name of the flag among `flags`; None where no flag sets the field.
    """
    name = "clip_length" if field == "num_frames" else field
    return name if name in flags else None


def settle_model_args(values: dict[str, Any], config: type) -> dict[str, Any]:
    """Add the values that `--model-args` sets in the place of flags to the values of the flags.

    Args:
        values: The values of the flags by the names of their fields.
        config: The options class.

    Returns:
        The values with these additions.

    Raises:
        UserError: A flag and `--model-args` disagree, or the registered model (`--model`) cannot have the fields.
    """
    from avion.models.registry import model_config
    from avion.ops.selective_scan import check_backend_name

    flags = {field.name: field for field in dataclasses.fields(config)}
    if "model" in values:
        model_config(values["model"])
    check_backend_name(values.get("scan_backend", "auto"))
    fields = parse_model_args(values.get("model_args", ()), values.get("model"))
    values = dict(values)
    for field, value in fields.items():
        name = flag_of(field, flags)
        if name is None:
            continue
        shown = "--" + name.replace("_", "-")
        if name in values and values[name] != value:
            raise UserError(f"{shown} {values[name]} and --model-args {field}={value}: both set it; give one of them")
        within = flags[name].metadata["flag"]["within"]
        if within is not None and value not in within:
            raise UserError(f"--model-args {field}={value}: is {shown}, which is {within}")
        values[name] = value
    return values


def sizes(options: "Options") -> dict[str, int]:
    """Return the values of the flags that are sizes of the model, by field.

    Fine-tuning has no such flags: the checkpoint sets the sizes.
    """
    values = options.values()
    return {name: values[name] for name in _SIZES if name in values}


def behaviour(options: "Options") -> "dict[str, FieldValue]":
    """Return the values of the other flags that are fields of the model, and of the fields that only `--model-args`
    sets.
    """
    values = options.values()
    fields = {name: values.get(name) for name in BEHAVIOUR}
    others = parse_model_args(values["model_args"], values["model"])
    return {name: value for name, value in fields.items() if value is not None} | {
        name: value for name, value in others.items() if flag_of(name, values) is None
    }


def check_model(options: "TrainingOptions") -> None:
    """Refuse flags that give the registered model `--model` fields that it cannot have.

    Args:
        options: The options of the run.

    Raises:
        UserError: The model cannot have these fields.
    """
    from avion.models.registry import check_config, model_config

    fields = {**sizes(options), "num_frames": options.clip_length, **behaviour(options)}
    check_config(dataclasses.replace(model_config(options.model), **fields))
