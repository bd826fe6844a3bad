"""Depthwise causal convolution over time on (R, T, D), for sequences of a few steps or of thousands.

With K taps w (D, K) and bias b (D,):  y_t = b + sum_k w[:, k] x_{t - (K - 1) + k},  x = 0 outside [0, T).
With `reverse=True` time runs the other way, y_t = b + sum_k w[:, k] x_{t + (K - 1) - k}: what flipping x in
time, convolving causally and flipping back gives, without any flip.
"""

import torch
import torch.nn.functional as F


def causal_conv_silu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, reverse: bool = False
) -> torch.Tensor:
    """SiLU of the convolution. x (R, T, D), weight (D, K), bias (D,) -> (R, T, D) in x's dtype."""
    taps, steps = weight.shape[1], x.shape[1]
    compute = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    padded = F.pad(x.to(compute), (0, 0, 0, taps - 1) if reverse else (0, 0, taps - 1, 0))
    y = bias.to(compute)
    for k in range(taps):
        start = taps - 1 - k if reverse else k
        y = y + padded[:, start : start + steps] * weight[:, k].to(compute)  # (R, T, D)
    return F.silu(y).to(x.dtype)
