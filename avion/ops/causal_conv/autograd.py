"""What the backends with a backward operator of their own have in common: its gradients' wiring."""


def differentiable(conv, conv_backward) -> None:
    """conv(x, weight, bias, reverse) -> y gets the gradients of x, weight and bias that
    conv_backward(dy, x, weight, bias, reverse) returns. These three are all that is kept."""

    @conv_backward.register_fake
    def _(dy, x, weight, bias, reverse):
        return x.new_empty(x.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)

    def keep_for_backward(ctx, inputs, output) -> None:
        x, weight, bias, ctx.reverse = inputs
        ctx.save_for_backward(x, weight, bias)

    def backward(ctx, dy):
        return (*conv_backward(dy, *ctx.saved_tensors, ctx.reverse), None)

    conv.register_autograd(backward, setup_context=keep_for_backward)


def differentiable_both(conv, conv_backward) -> None:
    """As `differentiable`, of both directions at once: conv(x, weight, bias, weight_b, bias_b) -> y, y_b, and
    conv_backward(dy, dy_b, x, weight, bias, weight_b, bias_b) -> gradients of the five."""

    @conv_backward.register_fake
    def _(dy, dy_b, *inputs):
        return tuple(t.new_empty(t.shape) for t in inputs)

    conv.register_autograd(
        lambda ctx, dy, dy_b: conv_backward(dy, dy_b, *ctx.saved_tensors),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    )
