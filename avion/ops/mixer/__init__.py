"""All of a bidirectional Mamba mixer (ViM, arXiv 2401.09417) between its input and its output projection, at once.

x and z are the halves of xz (R, T, 2I), Q is the rank of the step size, and each direction has its own `MixerWeights`:

    u = SiLU(depthwise causal conv(x))      dt, B, C = x_proj u      y = scan of u with step softplus(dt_proj dt + bias)
    out = (y forward + y backward, time walked from its end) · SiLU(z)                             (R, T, I), xz's dtype

The result is that of `causal_conv`, two products and `gated_scan`. This package is for short rows on a CPU, where the
tensors between these functions cost as much as the scan itself. `runs_whole` says whether a case is such a case; in all
others the functions are called one by one.

Two ways compute it: `native.c`, compiled with the machine's C compiler when it is first needed (float32 and 16 bits),
and PyTorch's operators (all dtypes).
"""

from .dispatch import mixer_of_whole_rows, runs_whole
from .weights import MixerWeights

__all__ = ["MixerWeights", "mixer_of_whole_rows", "runs_whole"]
