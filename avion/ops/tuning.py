"""Chooses among the few ways to cut a kernel's work: each is measured once, on the device and shape at hand.

The choice is kept for the process and in a file in `$XDG_CACHE_HOME/avion/` (`~/.cache/avion/`). Later runs on this
kind of GPU take the same plan, so that the results of runs agree bit for bit and nothing is measured twice. Nothing is
measured where there is no choice, while a CUDA graph is being captured, or with `AVION_TUNE=0`; then the first plan is
taken, which is the guess.
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
from avion.files import cache_folder, write_text
from avion.reading import parse_json, read_text

_log = logging.getLogger(__name__)
Result = TypeVar("Result")
_ROUNDS = 7
Plan = TypeVar("Plan", bound=tuple[Any, ...])


class _Case(NamedTuple):
    """What a choice is made for: an op on a class of shapes, and the plans to choose from."""

    op: str
    row_bits: int  # R and T in classes a factor of two wide
    step_bits: int
    channels: int
    states: int
    dtype: torch.dtype
    plans: tuple[tuple[Any, ...], ...]

    def key(self) -> str:
        """Name the case in the file. The plans are part of the name, so that a choice among others is not used."""
        offered = hashlib.sha256(repr([tuple(plan) for plan in self.plans]).encode()).hexdigest()[:8]
        shape = f"R<2^{self.row_bits}, T<2^{self.step_bits}, D={self.channels}, N={self.states}"
        return f"{self.op}, {shape}, {self.dtype}, {offered}"


_chosen: dict[tuple[torch.device, _Case], Any] = {}


def tuned(op: str, like: Tensor, states: int, plans: Sequence[Plan], run: Callable[[Plan], Result]) -> Result:
    """Run an op with the plan that is the fastest for such tensors.

    Args:
        op: the name of the op.
        like: a tensor (R, T, D) of the op.
        states: N, the number of states per channel.
        plans: the plans to choose from, the best guess first. A plan for which the GPU has no room is left out.
        run: runs the op with a plan; it must give the same result however often it is called.

    Returns:
        The result of `run`.
    """
    if len(plans) == 1 or os.environ.get("AVION_TUNE") == "0" or torch.cuda.is_current_stream_capturing():
        return run(plans[0])
    rows, steps, channels = like.shape
    case = _Case(op, rows.bit_length(), steps.bit_length(), channels, states, like.dtype, tuple(plans))
    if (like.device, case) not in _chosen:
        device, key = torch.cuda.get_device_name(like.device), case.key()
        stored = _stored(device).get(key)
        known = [plan for plan in plans if stored is not None and list(plan) == stored]
        _chosen[like.device, case] = known[0] if known else _measured(op, device, key, plans, run)
    return run(_chosen[like.device, case])


def _measured(
    op: str,
    device: str,
    key: str,
    plans: Sequence[Plan],
    run: Callable[[Plan], object],
) -> Plan:
    """Return the fastest plan, and stores it."""
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


def milliseconds(run: Callable[[], object]) -> float:
    """Time `run` with CUDA events, after the compilation and a warm-up; return the median over a few rounds."""
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
    """Return the path of a file of measurements on GPUs of this name, under this version of PyTorch.

    Args:
        kind: what was measured: "plans" or "backends".
        device: the GPU's name.
    """
    return cache_folder() / f"{kind}, {device}, torch {torch.__version__}.json".replace("/", "_")


def forget_choices() -> None:
    """Forget the choices of this process, so that the next call reads the file again."""
    _chosen.clear()


def _stored(device: str) -> dict[str, list[Any]]:
    """Return what earlier runs chose; nothing where the file is missing or is not what `_store` writes."""
    try:
        content = parse_json(read_text(cache_file("plans", device)))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _store(device: str, key: str, plan: list[Any]) -> None:
    """Add a choice to the file. Where several processes do so, the last one wins; what is lost is measured again."""
    try:
        path = cache_file("plans", device)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({**_stored(device), key: plan}, indent=0), cure="set XDG_CACHE_HOME")
    except OSError as e:
        _log.warning("the choice cannot be written (%s): kernels will be measured again in the next run", e)
    except UserError as e:
        _log.warning("%s: kernels will be measured again in the next run", e)
