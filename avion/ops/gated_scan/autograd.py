"""Makes a backend's two custom operators, forward and backward, into one differentiable function."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef


def differentiable(
    scan: CustomOpDef, scan_backward: CustomOpDef
) -> Callable[[Sequence[Tensor], Sequence[Tensor], Tensor], Tensor]:
    """Register the gradients of a backend's operator.

    Args:
        scan: the operator (ahead, behind, z, keep) → the output, and what the backward pass needs beside the inputs,
            any number of tensors. `ahead` and `behind` are the tensors of the two directions of time.
        scan_backward: the operator (d_out, ahead, behind, z, kept) → the gradients of the tensors of `ahead`, of those
            of `behind`, and of z.

    Returns:
        The backend's function (ahead, behind, z) → output. Gradients flow to every tensor.
    """

    @scan_backward.register_fake
    def _(
        d_out: Tensor, ahead: Sequence[Tensor], behind: Sequence[Tensor], z: Tensor, kept: Sequence[Tensor]
    ) -> list[Tensor]:
        return [t.new_empty(t.shape) for t in (*ahead, *behind, z)]

    def keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ahead, behind, z, _ = inputs
        _, *kept = output
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        ctx.count = len(ahead)
        ctx.save_for_backward(*ahead, *behind, z, *kept)

    def backward(ctx: Any, d_out: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
        n = ctx.count
        if d_out is None:
            return [None] * n, [None] * n, None, None
        tensors = ctx.saved_tensors
        ahead, behind, z, kept = tensors[:n], tensors[n : 2 * n], tensors[2 * n], tensors[2 * n + 1 :]
        grads = scan_backward(d_out, ahead, behind, z, kept)
        return grads[:n], grads[n : 2 * n], grads[2 * n], None

    scan.register_autograd(backward, setup_context=keep_for_backward)

    def run(ahead: Sequence[Tensor], behind: Sequence[Tensor], z: Tensor) -> Tensor:
        """Compute the output. The package's docstring has the maths."""
        keep = torch.is_grad_enabled() and any(t.requires_grad for t in (*ahead, *behind, z))
        return scan(list(ahead), list(behind), z, keep)[0]

    return run
