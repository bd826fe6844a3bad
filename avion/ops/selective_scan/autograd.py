"""What the backends that bring a backward operator of their own have in common: its gradients' wiring."""

from collections.abc import Callable

import torch
from torch import Tensor


def differentiable(scan, scan_backward) -> Callable[..., Tensor]:
    """The backend's function, y of `avion.ops.selective_scan`, from its two custom operators.

    scan(u, delta, A, B, C, D, delta_bias | None, delta_softplus, reverse, keep_states) -> y, and the states to keep
    for backward; scan_backward(dy, u, delta, A, B, C, D, delta_bias | None, states, delta_softplus, reverse) ->
    gradients of u, delta, A, B, C, D and delta_bias (of shape (0,) where there is none).
    """

    @scan_backward.register_fake
    def _(dy, u, delta, A, B, C, D, delta_bias, states, delta_softplus, reverse):
        bias = D.new_empty(0) if delta_bias is None else delta_bias.new_empty(delta_bias.shape)
        return (*(t.new_empty(t.shape) for t in (u, delta, A, B, C, D)), bias)

    def keep_for_backward(ctx, inputs, output) -> None:
        u, delta, A, B, C, D, delta_bias, ctx.delta_softplus, ctx.reverse, _ = inputs
        states = output[1]
        ctx.mark_non_differentiable(states)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(u, delta, A, B, C, D, delta_bias, states)

    def backward(ctx, dy: Tensor | None, _):
        if dy is None:
            return (None,) * 10
        u, delta, A, B, C, D, delta_bias, states = ctx.saved_tensors
        *grads, bias = scan_backward(dy, u, delta, A, B, C, D, delta_bias, states, ctx.delta_softplus, ctx.reverse)
        return (*grads, None if delta_bias is None else bias, None, None, None)

    scan.register_autograd(backward, setup_context=keep_for_backward)

    def run(
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = True,
        reverse: bool = False,
    ) -> Tensor:
        """See the package's docstring for shapes and maths; y (R, T, D) in u's dtype."""
        given = [t for t in (u, delta, A, B, C, D, delta_bias) if t is not None]
        keep_states = torch.is_grad_enabled() and any(t.requires_grad for t in given)
        return scan(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse, keep_states)[0]

    return run
