"""Which backend of the scan was measured to be the fastest on a GPU: a file beside the tuned plans.

A benchmark on the GPU writes the file, and `avion.ops.selective_scan.dispatch` reads it. Without the file, for shapes
that were not measured, on a CPU, and with `AVION_TUNE=0`, the backend `auto` is the first one that can run.
"""

import functools
import json
import os
from collections.abc import Mapping
from typing import NamedTuple

import torch

from avion.files import write_text
from avion.reading import parse_json, read_text

from .tuning import cache_file


class Choice(NamedTuple):
    """What was measured for one class of shapes.

    Attributes:
        backend: the fastest backend.
        milliseconds: the time of each backend that was measured.
        date: the day of the measurement.
    """

    backend: str
    milliseconds: dict[str, float]
    date: str

    def __str__(self) -> str:
        times = ", ".join(f"{name} {ms:.3f} ms" for name, ms in sorted(self.milliseconds.items(), key=lambda x: x[1]))
        return f"{self.backend}, the fastest when measured on {self.date} ({times})"


def shape_class(steps: int, channels: int, states: int, dtype: torch.dtype) -> str:
    """Name the class of shapes: T within a factor of two, D, N and the dtype. The number of rows does not matter."""
    return f"T<{1 << steps.bit_length()}, D={channels}, N={states}, {str(dtype).removeprefix('torch.')}"


def fastest(device: torch.device, steps: int, channels: int, states: int, dtype: torch.dtype) -> Choice | None:
    """Return what was measured for such tensors on this kind of GPU; None where nothing was measured."""
    if device.type != "cuda" or os.environ.get("AVION_TUNE") == "0":
        return None
    return _stored(torch.cuda.get_device_name(device)).get(shape_class(steps, channels, states, dtype))


def store(device: str, choices: Mapping[str, Choice]) -> str:
    """Add choices to the file of a kind of GPU.

    Args:
        device: the GPU's name.
        choices: the choices by class of shapes, as `shape_class` names it.

    Returns:
        The path of the file.

    Raises:
        OSError, UserError: the file cannot be written.
    """
    path = cache_file("backends", device)
    _stored.cache_clear()
    merged = {**_stored(device), **choices}
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({key: choice._asdict() for key, choice in merged.items()}, indent=1)
    write_text(path, text, cure="set XDG_CACHE_HOME")
    _stored.cache_clear()
    return str(path)


def forget() -> None:
    """Forget what was read from the files, so that the next call reads them again."""
    _stored.cache_clear()


@functools.cache
def _stored(device: str) -> dict[str, Choice]:
    """Return the choices in the file, without those that `store` cannot have written."""
    try:
        content = parse_json(read_text(cache_file("backends", device)))
    except (OSError, ValueError):
        return {}
    entries = content.items() if isinstance(content, dict) else ()
    return {key: choice for key, entry in entries if (choice := _read(entry)) is not None}


def _read(entry: object) -> Choice | None:
    if not isinstance(entry, dict) or entry.keys() != set(Choice._fields):
        return None
    backend, times, date = (entry[name] for name in Choice._fields)
    if not isinstance(backend, str) or not isinstance(date, str) or not isinstance(times, dict):
        return None
    if not all(isinstance(ms, int | float) for ms in times.values()):
        return None
    return Choice(backend, {str(name): float(ms) for name, ms in times.items()}, date)
