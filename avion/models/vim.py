"""ViM's bidirectional Mamba mixer (Vision Mamba, arXiv 2401.09417), over time or over space-time.

Shape legend: R rows (independent sequences), T steps, D width of the model, I = expand·D inner width,
N states per channel, K convolution taps, Q rank of the step size.

    x, z = in_proj(h)                                     (R, T, I) each
    each direction, with its own parameters (backward: suffix _b, time walked from the end):
        u = SiLU(depthwise causal conv(x))                (R, T, I)
        dt, B, C = x_proj(u)                              (R, T, Q), (R, T, N), (R, T, N)
        y = selective scan of u with step softplus(dt_proj(dt)), A = -exp(A_log), skip D
    out = out_proj((y forward + y backward) · SiLU(z))    (R, T, D)
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from avion.ops.causal_conv import causal_conv_silu
from avion.ops.selective_scan import check_backend_name, selective_scan

# Step sizes at initialisation: log-uniform in this range, never below the floor (Mamba, section 3.6).
_DT_MIN, _DT_MAX, _DT_FLOOR = 1e-3, 0.1, 1e-4


class BiMambaMixer(nn.Module):
    """Mixes T steps of each of R rows: (R, T, D) -> (R, T, D). Parameter names are the released checkpoints'.

    A_log, A_b_log, D and D_b are meant to take no weight decay. The convolution modules only hold their
    parameters; the convolution itself stays in the (R, T, I) layout.
    Raises UserError for a `scan_backend` that does not exist.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 1,
        dt_rank: int | None = None,
        scan_backend: str = "auto",
    ):
        super().__init__()
        check_backend_name(scan_backend)
        inner = expand * dim
        self.d_state = d_state
        self.dt_rank = math.ceil(dim / 16) if dt_rank is None else dt_rank
        self.scan_backend = scan_backend

        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, d_conv, groups=inner)
        self.x_proj = nn.Linear(inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, inner)
        self.A_log = nn.Parameter(_initial_A_log(inner, d_state))
        self.D = nn.Parameter(torch.ones(inner))

        self.conv1d_b = nn.Conv1d(inner, inner, d_conv, groups=inner)
        self.x_proj_b = nn.Linear(inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj_b = nn.Linear(self.dt_rank, inner)
        self.A_b_log = nn.Parameter(_initial_A_log(inner, d_state))
        self.D_b = nn.Parameter(torch.ones(inner))

        self.out_proj = nn.Linear(inner, dim, bias=False)
        # Only the forward direction's step sizes: the released models left dt_proj_b at nn.Linear's own.
        _init_dt_proj(self.dt_proj)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        x, z = self.in_proj(h).chunk(2, dim=-1)  # (R, T, I) each
        y_forward = self._scan(x, self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D, reverse=False)
        y_backward = self._scan(x, self.conv1d_b, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b, reverse=True)
        return self.out_proj((y_forward + y_backward) * F.silu(z))  # (R, T, D)

    def _scan(
        self,
        x: torch.Tensor,
        conv: nn.Conv1d,
        x_proj: nn.Linear,
        dt_proj: nn.Linear,
        A_log: torch.Tensor,
        D: torch.Tensor,
        *,
        reverse: bool,
    ) -> torch.Tensor:
        u = causal_conv_silu(
            x, conv.weight.squeeze(1), conv.bias, reverse=reverse, backend=self.scan_backend
        )  # (R, T, I)
        dt, B, C = x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        # The bias is added within the scan, in float32: under autocast it would drown in bf16's rounding.
        delta = F.linear(dt, dt_proj.weight)  # (R, T, I)
        A = -torch.exp(A_log.float() if A_log.dtype in (torch.float16, torch.bfloat16) else A_log)  # (I, N)
        return selective_scan(u, delta, A, B, C, D, delta_bias=dt_proj.bias, reverse=reverse, backend=self.scan_backend)


def _initial_A_log(channels: int, states: int) -> torch.Tensor:
    """(channels, states): log of 1 … N in every channel (S4D-real)."""
    return torch.log(torch.arange(1, states + 1, dtype=torch.float32)).repeat(channels, 1)


def _init_dt_proj(dt_proj: nn.Linear) -> None:
    bound = dt_proj.in_features**-0.5
    nn.init.uniform_(dt_proj.weight, -bound, bound)
    low, high = math.log(_DT_MIN), math.log(_DT_MAX)
    dt = torch.exp(torch.rand(dt_proj.out_features) * (high - low) + low).clamp(min=_DT_FLOOR)
    with torch.no_grad():
        dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus⁻¹, so that softplus(bias) = dt
