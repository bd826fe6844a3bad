"""Makes a backend's two custom operators, forward and backward, into one differentiable operator."""

from typing import Any

from torch import Tensor
from torch.library import CustomOpDef

# The weight (D, K) and the bias (D,) of one direction.
Taps = tuple[Tensor, Tensor]


def differentiable(conv: CustomOpDef, conv_backward: CustomOpDef) -> None:
    """Register the gradients of the convolution in one direction. Only the inputs are kept for the backward pass.

    Args:
        conv: the operator (x, weight, bias, reverse) → y.
        conv_backward: the operator (dy, x, weight, bias, reverse) → the gradients of x, weight and bias.
    """

    @conv_backward.register_fake
    def _(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
        return x.new_empty(x.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)

    def keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, ctx.reverse = inputs
        ctx.save_for_backward(x, weight, bias)

    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return (*conv_backward(dy, *ctx.saved_tensors, ctx.reverse), None)

    conv.register_autograd(backward, setup_context=keep_for_backward)


def differentiable_both(conv: CustomOpDef, conv_backward: CustomOpDef) -> None:
    """Register the gradients of the convolution in both directions at once.

    Args:
        conv: the operator (x, weight, bias, weight_b, bias_b) → y and y_b.
        conv_backward: the operator (dy, dy_b, x, weight, bias, weight_b, bias_b) → the gradients of x, weight, bias,
            weight_b and bias_b.
    """

    @conv_backward.register_fake
    def _(dy: Tensor, dy_b: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.new_empty(t.shape) for t in inputs)

    def keep_for_backward(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs)

    def backward(ctx: Any, dy: Tensor, dy_b: Tensor) -> tuple[Tensor, ...]:
        return conv_backward(dy, dy_b, *ctx.saved_tensors)

    conv.register_autograd(backward, setup_context=keep_for_backward)
