"""The number format that a model computes in: the settings of autocast."""

from dataclasses import dataclass

import torch

from avion.errors import UserError

from .options import DeviceOptions


@dataclass(frozen=True)
class Precision:
    """The settings of autocast."""

    device_type: str
    dtype: torch.dtype

    def autocast(self) -> torch.autocast:
        """Return a context in which the model is to be run."""
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.dtype is not torch.float32)


def precision_named(name: str | None, device: torch.device) -> Precision:
    """Return the autocast settings of a number format.

    Args:
        name: "fp32", "bf16" or "fp16"; None is bf16 on a GPU and fp32 on a CPU.
        device: The device that the model computes on.

    Returns:
        The settings.
    """
    default = "bf16" if device.type == "cuda" else "fp32"
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return Precision(device.type, dtypes[name or default])


def choose_precision(options: DeviceOptions, device: torch.device) -> Precision:
    """Choose the autocast settings that `--precision`, `--use-bf16` and `--disable-amp` mean.

    Args:
        options: The flags about the device.
        device: The device that the model computes on.

    Returns:
        The settings.

    Raises:
        UserError: The flags contradict each other.
    """
    named = {
        f"--precision {options.precision}": options.precision,
        "--use-bf16": "bf16" if options.use_bf16 else None,
        "--disable-amp": "fp32" if options.disable_amp else None,
    }
    wanted = {flag: value for flag, value in named.items() if value is not None}
    if len(set(wanted.values())) > 1:
        raise UserError(f"{' and '.join(wanted)} contradict each other; give one of them")
    return precision_named(next(iter(wanted.values()), None), device)
