"""The selective scan (Mamba's recurrence, arXiv 2312.00752, section 3.3): one function, several backends.

Shapes, with R independent rows, T steps in time, D channels, N states per channel:

| name       | shape     | what                                                         |
|------------|-----------|--------------------------------------------------------------|
| u          | (R, T, D) | input                                                        |
| delta      | (R, T, D) | step size before bias and softplus                           |
| A          | (D, N)    | negative decay rates                                         |
| B, C       | (R, T, N) | input and output vectors, shared by the channels of a step   |
| D          | (D,)      | skip weight                                                  |
| delta_bias | (D,)      | added to delta before the softplus, or None                  |
| y          | (R, T, D) | output, in u's dtype                                         |

    Δ   = softplus(delta + delta_bias)
    s_t = exp(Δ_t A) s_{t-1} + Δ_t B_t u_t        s before the first step is 0
    y_t = C_t · s_t + D u_t

With `reverse=True` time is walked from the last step to the first (s_t follows from s_{t+1}): the result
is that of flipping the inputs in time, scanning and flipping y back, without any flip.
`selective_scan_with_state` starts from a given state and returns the last one, for long sequences in pieces; inference
only, natively in `torch` and `reference`, through extra steps of the scan in the others.
Any R ≥ 0 and T ≥ 1, any strides. Δ and the state are float32 whatever the inputs' dtypes or autocast say
(float64 where an input is float64). Each backend stands in a file of its own and is held to `reference`.
"""

from .dispatch import (
    available_backends,
    backend_names,
    check_backend_name,
    resolve_backend,
    selective_scan,
    selective_scan_with_state,
)

__all__ = [
    "available_backends",
    "backend_names",
    "check_backend_name",
    "resolve_backend",
    "selective_scan",
    "selective_scan_with_state",
]
