"""States in and out of kernels that know no states: through additional steps of the scan itself.

N steps before the piece put one state each in place (Δ·B·u with Δ tiny, B a unit vector, u = state / Δ). N steps after
the piece read the states (Δ = 0, C a unit vector).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .inputs import ScanInputs, Time

# A step so small that nothing decays in it, exactly so in float64: exp(-1e-18 · A) rounds to 1. It is a power of two,
# so that a division by it is exact.
_TINY_STEP = 2.0**-60


def with_state_by_steps(
    run: Callable[[ScanInputs, Time], Tensor], inputs: ScanInputs, time: Time, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scan one piece of a sequence with a backend that takes and returns no states.

    Args:
        run: the backend's function, y of the inputs.
        inputs: the tensors of the piece.
        time: how the steps are walked.
        initial_state: the state before the first step, (R, N, D); None means zeros.

    Returns:
        y (R, T, D) in u's dtype, and the state (R, N, D) after the last step in walking order.
    """
    u, delta, bias, states = inputs.u, inputs.delta, inputs.delta_bias, inputs.states
    dtype = torch.float64 if torch.float64 in (u.dtype, delta.dtype) else torch.float32
    rows, steps, channels = u.shape
    step = delta.to(dtype) if bias is None else delta.to(dtype) + bias.to(dtype)
    if time.softplus:
        step = F.softplus(step)
    unit = torch.eye(states, dtype=dtype, device=u.device).expand(rows, -1, -1)  # (R, N, N)
    zero, nothing = torch.zeros_like(unit), torch.zeros(rows, states, channels, dtype=dtype, device=u.device)
    # (u, Δ, B, C) of the steps before the piece, of the piece and of the steps after it, in walking order.
    parts = [(u.to(dtype), step, inputs.B.to(dtype), inputs.C.to(dtype)), (nothing, nothing, zero, unit)]
    if initial_state is not None:
        parts.insert(0, (initial_state.to(dtype) / _TINY_STEP, torch.full_like(nothing, _TINY_STEP), unit, zero))
    first = states if time.reverse or initial_state is not None else 0  # of the piece
    u_all, step, B, C = (torch.cat(part[::-1] if time.reverse else part, dim=1) for part in zip(*parts, strict=True))
    y = run(ScanInputs(u_all, step, inputs.A, B, C, inputs.D, None), Time(softplus=False, reverse=time.reverse))
    final = y[:, :states] if time.reverse else y[:, -states:]
    return y[:, first : first + steps].to(u.dtype), final
