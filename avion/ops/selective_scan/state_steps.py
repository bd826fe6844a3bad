"""States in and out of kernels that know none: through steps of the scan itself.

N steps before the piece put one state each in place (Δ·B·u with Δ tiny, B a unit vector, u = state / Δ), N after it
read them (Δ = 0, C a unit vector).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# A step so small that nothing decays in it, exactly so in float64: exp(-1e-18 · A) rounds to 1. A power of two, so
# that dividing by it is exact.
_TINY_STEP = 2.0**-60


def with_state_by_steps(
    run: Callable[..., Tensor],
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y (R, T, D) and the final state (R, N, D), of a backend's `run`; initial_state (R, N, D) or None."""
    dtype = torch.float64 if torch.float64 in (u.dtype, delta.dtype) else torch.float32
    (rows, steps, channels), states = u.shape, A.shape[1]
    step = delta.to(dtype) if delta_bias is None else delta.to(dtype) + delta_bias.to(dtype)
    if delta_softplus:
        step = F.softplus(step)
    unit = torch.eye(states, dtype=dtype, device=u.device).expand(rows, -1, -1)  # (R, N, N)
    zero, nothing = torch.zeros_like(unit), torch.zeros(rows, states, channels, dtype=dtype, device=u.device)
    # (u, Δ, B, C) of the steps before, of the piece, of those after, in walking order.
    parts = [(u.to(dtype), step, B.to(dtype), C.to(dtype)), (nothing, nothing, zero, unit)]
    if initial_state is not None:
        parts.insert(0, (initial_state.to(dtype) / _TINY_STEP, torch.full_like(nothing, _TINY_STEP), unit, zero))
    first = states if reverse or initial_state is not None else 0  # of the piece
    u_all, step, B, C = (torch.cat(part[::-1] if reverse else part, dim=1) for part in zip(*parts, strict=True))
    y = run(u_all, step, A, B, C, D, None, False, reverse)
    final = y[:, :states] if reverse else y[:, -states:]
    return y[:, first : first + steps].to(u.dtype), final
