"""Makes a backend's two custom operators, forward and backward, into one differentiable function."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef

from .inputs import ScanGradients, ScanInputs, Time


def differentiable(scan: CustomOpDef, scan_backward: CustomOpDef) -> Callable[[ScanInputs, Time], Tensor]:
    """Register the gradients of a backend's operator.

    Args:
        scan: the operator (u, delta, A, B, C, D, delta_bias | None, delta_softplus, reverse, keep_states) → y and the
            states that the backward pass needs.
        scan_backward: the operator (dy, u, delta, A, B, C, D, delta_bias | None, states, delta_softplus, reverse) →
            the gradients of u, delta, A, B, C, D and delta_bias; the last one has the shape (0,) where there is no
            bias.

    Returns:
        The backend's function (inputs, time) → y, (R, T, D) in u's dtype. Gradients flow to every tensor.
    """

    @scan_backward.register_fake
    def _(
        dy: Tensor,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        delta_bias: Tensor | None,
        states: Tensor,
        delta_softplus: bool,
        reverse: bool,
    ) -> ScanGradients:
        bias = D.new_empty(0) if delta_bias is None else delta_bias
        du, d_delta, dA, dB, dC, dD, d_bias = (t.new_empty(t.shape) for t in (u, delta, A, B, C, D, bias))
        return du, d_delta, dA, dB, dC, dD, d_bias

    def keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.delta_softplus, ctx.reverse, _ = inputs
        states = output[1]
        ctx.mark_non_differentiable(states)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, states)

    def backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 10
        *tensors, states = ctx.saved_tensors
        *grads, bias = scan_backward(dy, *tensors, states, ctx.delta_softplus, ctx.reverse)
        return (*grads, None if ScanInputs(*tensors).delta_bias is None else bias, None, None, None)

    scan.register_autograd(backward, setup_context=keep_for_backward)

    def run(inputs: ScanInputs, time: Time) -> Tensor:
        """Compute y, (R, T, D) in u's dtype. The package's docstring has the maths."""
        keep_states = torch.is_grad_enabled() and any(t.requires_grad for t in inputs.given())
        y, _ = scan(*inputs, *time, keep_states)
        return y

    return run
