"""The `torch` backend: plain PyTorch operators on any device (`torch_blocks.py`), as `torch.library` operators.

Backward recomputes the states and walks them the other way; what is kept for it are the inputs and, where T needs
several blocks, the state that enters each block.
"""

import torch
from torch import Tensor

from .autograd import differentiable
from .torch_blocks import Group, Inputs, backward, compute_dtype, entering_shape, forward


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
    """y (R, T, D), and the states (R, blocks of time - 1, N, D) that enter the second and later blocks
    (no blocks unless `keep_states`)."""
    with torch.autocast(u.device.type, enabled=False):
        x = Inputs(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse)
        y = u.new_empty(u.shape)
        entering = x.A.new_empty(entering_shape(u, x.states, keep_states))
        forward(x, lambda part, _, group: group.view(y).copy_(part), entering)
        return y, entering


@_scan.register_fake
def _(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse, keep_states):
    dtype = compute_dtype(u, delta, A, B, C, D, delta_bias)
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
    """Gradients of u, delta, A, B, C, D and delta_bias (of shape (0,) where there is none)."""

    def load_dy(out: Tensor, _, group: Group) -> None:
        out.copy_(group.view(dy))

    with torch.autocast(u.device.type, enabled=False):
        x = Inputs(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse)
        return backward(x, load_dy, entering).as_inputs(A, D, delta_bias)


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
    """y (R, T, D) and the state (R, N, D) after the last step in walking order."""
    with torch.autocast(u.device.type, enabled=False):
        x = Inputs(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse)
        y, final = u.new_empty(u.shape), x.A.new_empty(len(u), *x.A.shape)
        initial = None if initial_state is None else initial_state.to(x.dtype)
        forward(x, lambda part, _, group: group.view(y).copy_(part), initial=initial, final=final)
        return y, final


@_scan_with_state.register_fake
def _(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse, initial_state):
    dtype = compute_dtype(u, delta, A, B, C, D, delta_bias)
    return u.new_empty(u.shape), u.new_empty((len(u), A.shape[1], A.shape[0]), dtype=dtype)


def selective_scan_with_state_torch(*arguments) -> tuple[Tensor, Tensor]:
    """selective_scan's arguments, positionally, and initial_state (R, N, D) or None. No gradients."""
    return _scan_with_state(*arguments)
