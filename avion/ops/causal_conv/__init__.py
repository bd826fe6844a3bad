"""Depthwise causal convolution over time followed by SiLU, on (R, T, D), for a few steps or for thousands.

With K taps w (D, K) and bias b (D,):  y_t = SiLU(b + sum_s w[:, K-1-s] x_{t-s}),  s = 0 … K-1, x = 0 before 0.
With `reverse=True` time runs the other way, with x_{t+s} in place of x_{t-s}. The result is that of flipping x in time,
convolving causally and flipping y back, but nothing is flipped.
"""

from .dispatch import causal_conv_silu, causal_conv_silu_both

__all__ = ["causal_conv_silu", "causal_conv_silu_both"]
