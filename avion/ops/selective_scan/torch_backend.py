"""The `torch` backend: plain PyTorch operators on any device (`torch_blocks.py`), as `torch.library` operators.

The backward pass recomputes the states and walks them the other way. Kept for it are the inputs and, where T needs
several blocks, the state that enters each block.
"""

import torch
from torch import Tensor

from .autograd import differentiable
from .inputs import ScanInputs, Time
from .torch_blocks import Direction, Group, backward, entering_shape, forward


@torch.library.custom_op("avion::selective_scan", mutates_args=())
def _scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    keep_states: bool,
) -> tuple[Tensor, Tensor]:
    """Return y (R, T, D), and the states (R, blocks of time - 1, N, D) that enter the second and later blocks.

    Without `keep_states` there are no blocks.
    """
    with torch.autocast(u.device.type, enabled=False):
        x = Direction(ScanInputs(u, delta, A, B, C, D, delta_bias), Time(delta_softplus, reverse))
        y = u.new_empty(u.shape)
        entering = x.A.new_empty(entering_shape(u, x.states, keep_states))
        forward(x, lambda part, _, group: group.view(y).copy_(part), entering)
        return y, entering


@_scan.register_fake
def _(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    keep_states: bool,
) -> tuple[Tensor, Tensor]:
    dtype = ScanInputs(u, delta, A, B, C, D, delta_bias).compute_dtype
    return u.new_empty(u.shape), u.new_empty(entering_shape(u, A.shape[1], keep_states), dtype=dtype)


@torch.library.custom_op("avion::selective_scan_backward", mutates_args=())
def _scan_backward(
    dy: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor | None,
    entering: Tensor,
    delta_softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of u, delta, A, B, C, D and delta_bias, (0,) where there is no bias."""

    def load_dy(out: Tensor, _: Tensor, group: Group) -> None:
        out.copy_(group.view(dy))

    with torch.autocast(u.device.type, enabled=False):
        x = Direction(ScanInputs(u, delta, A, B, C, D, delta_bias), Time(delta_softplus, reverse))
        return backward(x, load_dy, entering)


selective_scan_torch = differentiable(_scan, _scan_backward)


@torch.library.custom_op("avion::selective_scan_with_state", mutates_args=())
def _scan_with_state(
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
    """Return y (R, T, D) and the state (R, N, D) after the last step in walking order."""
    with torch.autocast(u.device.type, enabled=False):
        x = Direction(ScanInputs(u, delta, A, B, C, D, delta_bias), Time(delta_softplus, reverse))
        y, final = u.new_empty(u.shape), x.A.new_empty(len(u), *x.A.shape)
        initial = None if initial_state is None else initial_state.to(x.dtype)
        forward(x, lambda part, _, group: group.view(y).copy_(part), initial=initial, final=final)
        return y, final


@_scan_with_state.register_fake
def _(
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
    dtype = ScanInputs(u, delta, A, B, C, D, delta_bias).compute_dtype
    return u.new_empty(u.shape), u.new_empty((len(u), A.shape[1], A.shape[0]), dtype=dtype)


def selective_scan_with_state_torch(
    inputs: ScanInputs, time: Time, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scan one piece of a sequence, without gradients.

    Args:
        inputs: the tensors of the piece.
        time: how the steps are walked.
        initial_state: the state before the first step, (R, N, D); None means zeros.

    Returns:
        y (R, T, D) in u's dtype, and the state (R, N, D) after the last step in walking order, in the compute dtype.
    """
    return _scan_with_state(*inputs, *time, initial_state)
