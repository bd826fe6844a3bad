"""The parameters of one direction of the mixer."""

from typing import NamedTuple

from torch import Tensor


class MixerWeights(NamedTuple):
    """The parameters of one direction.

    Attributes:
        conv: the taps of the convolution, (I, K).
        conv_bias: (I,).
        x_proj: the projection of u to dt, B and C, (Q + 2N, I).
        dt_proj: the projection of dt to the step sizes, (I, Q).
        A: negative decay rates, (I, N).
        D: skip weights, (I,).
        delta_bias: what is added to the step size before the softplus, (I,).
    """

    conv: Tensor
    conv_bias: Tensor
    x_proj: Tensor
    dt_proj: Tensor
    A: Tensor
    D: Tensor
    delta_bias: Tensor
