"""What the backends that bring a backward operator of their own have in common: its gradients' wiring."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def differentiable(scan, scan_backward) -> Callable[[Sequence[Tensor], Sequence[Tensor], Tensor], Tensor]:
    """The backend's function (ahead, behind, z) -> output, from its two custom operators.

    scan(ahead, behind, z, keep) -> the output and what backward keeps beside the inputs, any number of tensors;
    scan_backward(d_out, ahead, behind, z, kept) -> gradients of the tensors of `ahead`, of those of `behind`, of z.
    """

    @scan_backward.register_fake
    def _(d_out, ahead, behind, z, kept):
        return [t.new_empty(t.shape) for t in (*ahead, *behind, z)]

    def keep_for_backward(ctx, inputs, output) -> None:
        ahead, behind, z, _ = inputs
        _, *kept = output
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        ctx.count = len(ahead)
        ctx.save_for_backward(*ahead, *behind, z, *kept)

    def backward(ctx, d_out: Tensor | None, *_):
        n = ctx.count
        if d_out is None:
            return [None] * n, [None] * n, None, None
        tensors = ctx.saved_tensors
        ahead, behind, z, kept = tensors[:n], tensors[n : 2 * n], tensors[2 * n], tensors[2 * n + 1 :]
        grads = scan_backward(d_out, ahead, behind, z, kept)
        return grads[:n], grads[n : 2 * n], grads[2 * n], None

    scan.register_autograd(backward, setup_context=keep_for_backward)

    def run(ahead: Sequence[Tensor], behind: Sequence[Tensor], z: Tensor) -> Tensor:
        """See the package's docstring. Each direction's tensors in the order of `ScanInputs`."""
        keep = torch.is_grad_enabled() and any(t.requires_grad for t in (*ahead, *behind, z))
        return scan(list(ahead), list(behind), z, keep)[0]

    return run
