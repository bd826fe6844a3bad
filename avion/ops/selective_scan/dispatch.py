"""`selective_scan` and the table of its backends. The package's docstring has the shapes and the maths."""

import difflib
import functools
import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from avion.errors import UserError
from avion.ops import choices

from . import mamba_ssm
from .reference import selective_scan_reference, selective_scan_with_state_reference
from .state_steps import with_state_by_steps
from .torch_backend import selective_scan_torch, selective_scan_with_state_torch

_log = logging.getLogger(__name__)

# Looked up once: a backend is resolved in every layer's forward pass.
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def _runs_anywhere(device: torch.device) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """`run` takes selective_scan's arguments less `backend`, positionally; `unavailable(device)` gives the
    reason why it cannot run on that device, or None where it can. `auto_on`: the types of device on which `auto`
    considers it (None: all). `float64`: whether it computes in float64 where an input is. `run_with_state` takes the
    initial state after run's arguments and returns (y, final state); None where the kernels know no such states."""

    run: Callable[..., torch.Tensor]
    unavailable: Callable[[torch.device], str | None] = _runs_anywhere
    auto_on: tuple[str, ...] | None = None
    float64: bool = True
    run_with_state: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None

    def in_auto(self, device: torch.device) -> bool:
        return (self.auto_on is None or device.type in self.auto_on) and self.unavailable(device) is None


def _triton_unavailable(device: torch.device) -> str | None:
    if not _TRITON_INSTALLED:
        return "the package triton is not installed (it comes with PyTorch's CUDA builds)"
    if device.type == "cuda" or (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return None
    return "its kernels are for GPUs (on a CPU for tests only, slowly, with TRITON_INTERPRET=1)"


def _run_triton(*arguments) -> torch.Tensor:
    from .triton_backend import (
        selective_scan_triton,
    )  # only where there is a GPU for it: triton takes a while to import

    return selective_scan_triton(*arguments)


# `auto` takes the first one that can run, the fastest come first, unless measurements on this GPU say otherwise.
_BACKENDS: dict[str, Backend] = {
    "triton": Backend(_run_triton, _triton_unavailable, auto_on=("cuda",), float64=False),
    "mamba_ssm": Backend(
        mamba_ssm.selective_scan_mamba_ssm,
        functools.cache(mamba_ssm.unavailable),  # it reads package versions
        auto_on=(),
        float64=False,
    ),
    "torch": Backend(selective_scan_torch, run_with_state=selective_scan_with_state_torch),
    "reference": Backend(selective_scan_reference, run_with_state=selective_scan_with_state_reference),
}
_logged_picks: set[tuple[str, str]] = set()


def available_backends(device: torch.device | str = "cpu") -> tuple[str, ...]:
    """Names of the backends that can run on `device`, in the order in which `auto` prefers them."""
    device = torch.device(device)
    return tuple(name for name, backend in _BACKENDS.items() if backend.unavailable(device) is None)


def backend_names() -> tuple[str, ...]:
    """Names of all backends, whether they can run here or not."""
    return tuple(_BACKENDS)


def check_backend_name(name: str) -> None:
    """Raises UserError with the near names where `name` is neither `auto` nor a backend's."""
    if name == "auto" or name in _BACKENDS:
        return
    names = ["auto", *_BACKENDS]
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or names
    raise UserError(f"scan backend {name!r} does not exist: did you mean {' or '.join(near)}?")


def resolve_backend(
    name: str = "auto",
    device: torch.device | str = "cpu",
    *,
    float64: bool = False,
    like: torch.Tensor | None = None,
    states: int = 0,
) -> str:
    """The name of the backend that `name` means on `device`, where `float64` says whether an input is of that dtype.

    For tensors like `like` (R, T, D) with N states, `auto` takes what was measured to be the fastest on this GPU, if
    anything was (`avion.ops.choices`).

    Raises UserError for an unknown name (with the near ones) and for one that cannot run there (with the reason).
    """
    device = torch.device(device)
    check_backend_name(name)
    if name != "auto":
        reason = _BACKENDS[name].unavailable(device)
        if reason is None and float64 and not _BACKENDS[name].float64:
            reason = "it computes in float32 and an input is float64"
        if reason is not None:
            runnable = " or ".join(n for n in available_backends(device) if n != name)
            raise UserError(f"scan backend {name!r} cannot run on {device.type}: {reason}; use {runnable}")
        return name
    measured = None if like is None or float64 else _measured_choice(device, like, states)
    if measured is not None:
        return measured
    for candidate, backend in _BACKENDS.items():
        if backend.in_auto(device) and (backend.float64 or not float64):
            _log_pick(device.type, candidate)
            return candidate
    raise AssertionError("the reference runs everywhere")


# A compiled graph takes what is found when it is compiled: the file is not read within it.
@torch.compiler.assume_constant_result
def _fastest_of_class(device: torch.device, steps: int, channels: int, states: int, dtype: torch.dtype) -> str | None:
    choice = choices.fastest(device, steps, channels, states, dtype)
    if choice is None or choice.backend not in available_backends(device):
        return None
    _log_pick(f"{device.type}, {choices.shape_class(steps, channels, states, dtype)}", str(choice))
    return choice.backend


def _measured_choice(device: torch.device, like: torch.Tensor, states: int) -> str | None:
    if device.type != "cuda" or not isinstance(like.shape[1], int):  # in graphs for any T nothing is known of it
        return None
    return _fastest_of_class(device, like.shape[1], like.shape[2], states, like.dtype)


def _log_pick(where: str, pick: str) -> None:
    # Logging would break the graph of torch.compile.
    if not torch.compiler.is_compiling() and (pick, where) not in _logged_picks:
        _logged_picks.add((pick, where))
        _log.info("selective scan on %s: backend %s", where, pick)


def selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    *,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = True,
    reverse: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """y (R, T, D) of the recurrence; gradients flow to every tensor argument.

    Raises UserError for a backend that does not exist or cannot run, ValueError for shapes that do not fit.
    """
    check_shapes(u, delta, A, B, C, D, delta_bias)
    float64 = any(x is not None and x.dtype == torch.float64 for x in (u, delta, A, B, C, D, delta_bias))
    run = _BACKENDS[resolve_backend(backend, u.device, float64=float64, like=u, states=A.shape[1])].run
    return run(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse)


def selective_scan_with_state(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    *,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = True,
    reverse: bool = False,
    initial_state: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """One piece of a sequence: y (R, T, D), and the state (R, N, D) after the last step in walking order, in float32
    (float64 where an input is). `initial_state`: what the piece before returned, None for zeros.

    Inference only: raises ValueError where a gradient would be expected, else as `selective_scan`.
    """
    check_shapes(u, delta, A, B, C, D, delta_bias)
    state_shape = (u.shape[0], A.shape[1], A.shape[0])
    if initial_state is not None and initial_state.shape != state_shape:
        raise ValueError(f"selective_scan: initial_state must be {state_shape}, got {_shape(initial_state)}")
    given = [x for x in (u, delta, A, B, C, D, delta_bias, initial_state) if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        raise ValueError("selective_scan_with_state: no gradient flows through states; call it under torch.no_grad()")
    name = resolve_backend(backend, u.device, float64=any(x.dtype == torch.float64 for x in given))
    arguments = (u, delta, A, B, C, D, delta_bias, delta_softplus, reverse, initial_state)
    run = _BACKENDS[name].run_with_state
    return with_state_by_steps(_BACKENDS[name].run, *arguments) if run is None else run(*arguments)


def check_shapes(u, delta, A, B, C, D, delta_bias) -> None:
    """Raises ValueError, naming the tensor, where shapes are not those of the package's docstring."""
    if u.ndim != 3 or A.ndim != 2:
        raise ValueError(f"selective_scan: u must be (R, T, D) and A (D, N), got {_shape(u)} and {_shape(A)}")
    rows, steps, channels = u.shape
    states = A.shape[1]
    expected = {
        "delta": (delta, (rows, steps, channels)),
        "A": (A, (channels, states)),
        "B": (B, (rows, steps, states)),
        "C": (C, (rows, steps, states)),
        "D": (D, (channels,)),
        "delta_bias": (delta_bias, (channels,)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"selective_scan: {name} must be {tuple(shape)} for u {_shape(u)}, got {_shape(tensor)}")
    if steps < 1:
        raise ValueError("selective_scan: T must be at least 1")


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
