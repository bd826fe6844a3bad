"""Choosing among a kernel's few ways to cut its work: by measuring them once, on the device and shape at hand.

The choice is kept for the process and in a file, `$XDG_CACHE_HOME/avion/` (`~/.cache/avion/`), so that later runs
on this kind of GPU take the same one: results then agree bit for bit between runs, and nothing is measured twice.
Nothing is measured where there is no choice, while a CUDA graph is being captured, or with `AVION_TUNE=0`; the
first plan, the guess, is taken then.
"""

import hashlib
import json
import logging
import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from avion.errors import UserError
from avion.files import write_text
from avion.reading import parse_json, read_text

_log = logging.getLogger(__name__)
Result = TypeVar("Result")
_ROUNDS = 7
_chosen: dict[tuple, NamedTuple] = {}  # by device, op, shape class and what was on offer


def tuned(op: str, like: Tensor, states: int, plans: Sequence[NamedTuple], run: Callable[[Any], Result]) -> Result:
    """`run` with the fastest of `plans` for this op on tensors like `like` (R, T, D) with N states.

    `run(plan)` must give the same result however often it is called. Plans that the GPU has no room for are passed by.
    """
    if len(plans) == 1 or os.environ.get("AVION_TUNE") == "0" or torch.cuda.is_current_stream_capturing():
        return run(plans[0])
    rows, steps, channels = like.shape
    # Shapes in classes a factor of two wide.
    case = (op, rows.bit_length(), steps.bit_length(), channels, states, like.dtype, tuple(plans))
    if (like.device, case) not in _chosen:
        device, key = torch.cuda.get_device_name(like.device), _key(*case)
        stored = _stored(device).get(key)
        known = [plan for plan in plans if stored is not None and list(plan) == stored]
        _chosen[like.device, case] = known[0] if known else _measured(op, device, key, plans, run, _milliseconds)
    return run(_chosen[like.device, case])


def _key(op: str, row_bits: int, step_bits: int, channels: int, states: int, dtype, plans: tuple) -> str:
    """The case in the file, with the plans themselves: others would make the choice stale."""
    offered = hashlib.sha256(repr([tuple(plan) for plan in plans]).encode()).hexdigest()[:8]
    return f"{op}, R<2^{row_bits}, T<2^{step_bits}, D={channels}, N={states}, {dtype}, {offered}"


def _measured(op: str, device: str, key: str, plans: Sequence, run: Callable, milliseconds: Callable) -> NamedTuple:
    from triton import OutOfResources

    times: dict[int, float] = {}
    for index, plan in enumerate(plans):
        try:
            times[index] = milliseconds(lambda plan=plan: run(plan))
        except OutOfResources as e:
            _log.debug("%s: %s does not fit this GPU (%s)", op, plan, e)
    if not times:
        raise RuntimeError(f"{op}: none of {len(plans)} ways to cut the work fits {device}")
    best = plans[min(times, key=times.__getitem__)]
    _log.info("%s on %s: %s, %.3f ms (the guess: %.3f)", key, device, best, min(times.values()), times.get(0, 0.0))
    _store(device, key, list(best))
    return best


def _milliseconds(run: Callable[[], object]) -> float:
    """Median over a few rounds, by CUDA events, after the compilation and a warm-up."""
    run()
    times = []
    for _ in range(_ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[1:])


def cache_file(kind: str, device: str) -> Path:
    """The file of what was measured on GPUs of this name, under this version of PyTorch."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "avion"
    return root / f"{kind}, {device}, torch {torch.__version__}.json".replace("/", "_")


def _stored(device: str) -> dict[str, list]:
    """What earlier runs chose; nothing where the file is missing or is not what `_store` writes."""
    try:
        content = parse_json(read_text(cache_file("plans", device)))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _store(device: str, key: str, plan: list) -> None:
    """Adds a choice to the file. Where several processes do, the last one wins: what is lost is measured again."""
    path = cache_file("plans", device)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({**_stored(device), key: plan}, indent=0), cure="set XDG_CACHE_HOME")
    except OSError as e:
        _log.warning("%s cannot be written (%s): kernels will be measured again in the next run", path, e.strerror)
    except UserError as e:
        _log.warning("%s: kernels will be measured again in the next run", e)
