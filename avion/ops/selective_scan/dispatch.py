"""`selective_scan` and the table of its backends. The docstring of the package has the shapes and the maths."""

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
from avion.ops.exporting import exported_scan, exporting
from avion.ops.graphs import constant_in_graphs

from . import mamba_ssm
from .inputs import ScanInputs, Time
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
    """One way to compute the scan.

    Attributes:
        run: computes y from the inputs.
        unavailable: returns the reason why the backend cannot run on a device, None where it can.
        auto_on: the types of device on which `auto` considers the backend; None means all.
        float64: whether the backend computes in float64 where an input is float64.
        run_with_state: takes an initial state as well, and returns y and the final state; None where the kernels take
            and return no states.
    """

    run: Callable[[ScanInputs, Time], torch.Tensor]
    unavailable: Callable[[torch.device], str | None] = _runs_anywhere
    auto_on: tuple[str, ...] | None = None
    float64: bool = True
    run_with_state: Callable[[ScanInputs, Time, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]] | None = None

    def in_auto(self, device: torch.device) -> bool:
        """Return whether `auto` may take this backend on the device."""
        return (self.auto_on is None or device.type in self.auto_on) and self.unavailable(device) is None


def _triton_unavailable(device: torch.device) -> str | None:
    if not _TRITON_INSTALLED:
        return "the package triton is not installed (it comes with PyTorch's CUDA builds)"
    if device.type == "cuda" or (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return None
    return "its kernels are for GPUs (on a CPU for tests only, slowly, with TRITON_INTERPRET=1)"


def _run_triton(inputs: ScanInputs, time: Time) -> torch.Tensor:
    # Imported only where there is a GPU for it, because the import of triton takes a while.
    from .triton_backend import selective_scan_triton

    return selective_scan_triton(inputs, time)


# The fastest come first: `auto` takes the first one that can run, unless measurements on this GPU say otherwise.
BACKENDS: dict[str, Backend] = {
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
logged_picks: set[tuple[str, str]] = set()


def available_backends(device: torch.device | str = "cpu") -> tuple[str, ...]:
    """Return the names of the backends that can run on `device`, in the order in which `auto` prefers them."""
    device = torch.device(device)
    return tuple(name for name, backend in BACKENDS.items() if backend.unavailable(device) is None)


def backend_names() -> tuple[str, ...]:
    """Return the names of all backends, whether they can run here or not."""
    return tuple(BACKENDS)


def check_backend_name(name: str) -> None:
    """Check that a backend has this name, or that the name is `auto`.

    Raises:
        UserError: no backend has this name; the message lists similar names.
    """
    if name == "auto" or name in BACKENDS:
        return
    names = ["auto", *BACKENDS]
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
    """Return the name of the backend that runs on `device` when the user asks for `name`.

    Args:
        name: a backend's name, or `auto`.
        device: where the tensors are.
        float64: whether an input is float64.
        like: a tensor (R, T, D) of the scan. With it `auto` takes the backend that was measured to be the fastest for
            such tensors on this GPU, if any was (`avion.ops.choices`).
        states: N, the number of states per channel.

    Raises:
        UserError: no backend has this name, or the backend cannot run there; the message gives the reason.
    """
    device = torch.device(device)
    check_backend_name(name)
    if name != "auto":
        reason = BACKENDS[name].unavailable(device)
        if reason is None and float64 and not BACKENDS[name].float64:
            reason = "it computes in float32 and an input is float64"
        if reason is not None:
            runnable = " or ".join(n for n in available_backends(device) if n != name)
            raise UserError(f"scan backend {name!r} cannot run on {device.type}: {reason}; use {runnable}")
        return name
    measured = None if like is None or float64 else _measured_choice(device, like, states)
    if measured is not None:
        return measured
    for candidate, backend in BACKENDS.items():
        if backend.in_auto(device) and (backend.float64 or not float64):
            _log_pick(device.type, candidate)
            return candidate
    raise AssertionError("the reference runs everywhere")


# The file is read when a graph is compiled, not when the graph runs.
@constant_in_graphs
def _fastest_of_class(device: torch.device, steps: int, channels: int, states: int, dtype: torch.dtype) -> str | None:
    choice = choices.fastest(device, steps, channels, states, dtype)
    if choice is None or choice.backend not in available_backends(device):
        return None
    _log_pick(f"{device.type}, {choices.shape_class(steps, channels, states, dtype)}", str(choice))
    return choice.backend


def _measured_choice(device: torch.device, like: torch.Tensor, states: int) -> str | None:
    if device.type != "cuda" or not isinstance(like.shape[1], int):  # a graph for any T knows no T
        return None
    return _fastest_of_class(device, like.shape[1], like.shape[2], states, like.dtype)


def _log_pick(where: str, pick: str) -> None:
    # Logging would break the graph of torch.compile.
    if not torch.compiler.is_compiling() and (pick, where) not in logged_picks:
        logged_picks.add((pick, where))
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
    """Compute the selective scan (Mamba, arXiv 2312.00752, section 3.3). Gradients flow to every tensor.

    Args:
        u: the input, (R, T, D).
        delta: the step size before bias and softplus, (R, T, D).
        A: negative decay rates, (D, N).
        B: input vectors, (R, T, N).
        C: output vectors, (R, T, N).
        D: skip weights, (D,).
        delta_bias: what is added to delta before the softplus, (D,), or None.
        delta_softplus: whether the step size is the softplus of delta and its bias, or their plain sum.
        reverse: whether time is walked from the last step to the first.
        backend: a backend's name, or `auto`.

    Returns:
        y, (R, T, D) in u's dtype.

    Raises:
        UserError: the backend does not exist or cannot run.
        ValueError: the shapes do not fit.
    """
    inputs = ScanInputs(u, delta, A, B, C, D, delta_bias)
    check_shapes(inputs)
    if exporting():
        return exported_scan(inputs, Time(delta_softplus, reverse))
    name = resolve_backend(backend, u.device, float64=_is_float64(inputs), like=u, states=inputs.states)
    return BACKENDS[name].run(inputs, Time(delta_softplus, reverse))


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
    """Scan one piece of a long sequence, for inference.

    Args:
        u: the input, (R, T, D).
        delta: the step size before bias and softplus, (R, T, D).
        A: negative decay rates, (D, N).
        B: input vectors, (R, T, N).
        C: output vectors, (R, T, N).
        D: skip weights, (D,).
        delta_bias: what is added to delta before the softplus, (D,), or None.
        delta_softplus: whether the step size is the softplus of delta and its bias, or their plain sum.
        reverse: whether time is walked from the last step to the first.
        initial_state: the state that the call for the piece before returned, (R, N, D); None means zeros.
        backend: a backend's name, or `auto`.

    Returns:
        y, (R, T, D) in u's dtype, and the state (R, N, D) after the last step in walking order, in float32 (float64
        where an input is float64).

    Raises:
        UserError: the backend does not exist or cannot run.
        ValueError: the shapes do not fit, or a gradient would be expected.
    """
    inputs = ScanInputs(u, delta, A, B, C, D, delta_bias)
    check_shapes(inputs)
    state_shape = (u.shape[0], A.shape[1], A.shape[0])
    if initial_state is not None and initial_state.shape != state_shape:
        raise ValueError(f"selective_scan: initial_state must be {state_shape}, got {_shape(initial_state)}")
    given = inputs.given() + ([] if initial_state is None else [initial_state])
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        raise ValueError("selective_scan_with_state: no gradient flows through states; call it under torch.no_grad()")
    name = resolve_backend(backend, u.device, float64=any(x.dtype == torch.float64 for x in given))
    run, time = BACKENDS[name].run_with_state, Time(delta_softplus, reverse)
    if run is None:
        return with_state_by_steps(BACKENDS[name].run, inputs, time, initial_state)
    return run(inputs, time, initial_state)


def _is_float64(inputs: ScanInputs) -> bool:
    return inputs.compute_dtype == torch.float64


def check_shapes(inputs: ScanInputs) -> None:
    """Check that the shapes are those of the package's docstring.

    Raises:
        ValueError: a shape does not fit; the message names the tensor.
    """
    u, delta, A, B, C, D, delta_bias = inputs
    if u.ndim != 3 or A.ndim != 2:
        raise ValueError(f"selective_scan: u must be (R, T, D) and A (D, N), got {_shape(u)} and {_shape(A)}")
    rows, steps, channels = u.shape
    states = A.shape[1]
    expected: dict[str, tuple[torch.Tensor | None, tuple[int, ...]]] = {
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
