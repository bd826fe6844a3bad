"""The oracle: the recurrence as it is written down, gradients by autograd. Slow and hungry, made to be read."""

import torch
import torch.nn.functional as F


def selective_scan_reference(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = True,
    reverse: bool = False,
) -> torch.Tensor:
    """See the package's docstring for shapes and maths; y (R, T, D) in u's dtype."""
    return selective_scan_with_state_reference(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse, None)[0]


def selective_scan_with_state_reference(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    delta_bias: torch.Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    initial_state: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y, and the state (R, N, D) after the last step; initial_state (R, N, D), zeros where None."""
    out_dtype = u.dtype
    double = any(x is not None and x.dtype == torch.float64 for x in (u, delta, A, B, C, D, delta_bias))
    compute = torch.float64 if double else torch.float32
    u, delta, A, B, C, D = (x.to(compute) for x in (u, delta, A, B, C, D))
    if delta_bias is not None:
        delta = delta + delta_bias.to(compute)
    if delta_softplus:
        delta = F.softplus(delta)

    # Discretise all steps, then recur: exp(ΔA) and ΔBu, (R, T, D, N) each.
    decay = torch.exp(delta[..., None] * A)
    drive = (delta * u)[..., None] * B[:, :, None, :]

    rows, steps, channels = u.shape
    state = u.new_zeros(rows, channels, A.shape[1])  # (R, D, N)
    if initial_state is not None:
        state = initial_state.to(compute).transpose(1, 2)
    ys: list[torch.Tensor] = [u] * steps
    for t in reversed(range(steps)) if reverse else range(steps):
        state = decay[:, t] * state + drive[:, t]
        ys[t] = (state * C[:, t, None, :]).sum(-1)  # (R, D)
    y = torch.stack(ys, dim=1) + D * u  # (R, T, D)
    return y.to(out_dtype), state.transpose(1, 2)
