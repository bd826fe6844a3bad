"""The oracle: the recurrence as it is written down, with gradients by autograd. It is slow, and made to be read."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .inputs import ScanInputs, Time


def selective_scan_reference(inputs: ScanInputs, time: Time) -> Tensor:
    """Compute y, (R, T, D) in u's dtype. The package's docstring has the maths."""
    return selective_scan_with_state_reference(inputs, time, None)[0]


def selective_scan_with_state_reference(
    inputs: ScanInputs, time: Time, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scan one piece of a sequence.

    Args:
        inputs: the tensors of the piece.
        time: how the steps are walked.
        initial_state: the state before the first step, (R, N, D); None means zeros.

    Returns:
        y (R, T, D) in u's dtype, and the state (R, N, D) after the last step in walking order, in the compute dtype.
    """
    out_dtype, compute = inputs.u.dtype, inputs.compute_dtype
    u, delta, A, B, C, D = (x.to(compute) for x in inputs[:6])
    if inputs.delta_bias is not None:
        delta = delta + inputs.delta_bias.to(compute)
    if time.softplus:
        delta = F.softplus(delta)

    # Discretise all steps, then recur: exp(ΔA) and ΔBu, (R, T, D, N) each.
    decay = torch.exp(delta[..., None] * A)
    drive = (delta * u)[..., None] * B[:, :, None, :]

    rows, steps, channels = u.shape
    state = u.new_zeros(rows, channels, inputs.states)  # (R, D, N)
    if initial_state is not None:
        state = initial_state.to(compute).transpose(1, 2)
    ys: list[Tensor] = [u] * steps
    for t in reversed(range(steps)) if time.reverse else range(steps):
        state = decay[:, t] * state + drive[:, t]
        ys[t] = (state * C[:, t, None, :]).sum(-1)  # (R, D)
    y = torch.stack(ys, dim=1) + D * u  # (R, T, D)
    return y.to(out_dtype), state.transpose(1, 2)
