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
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from avion.ops.causal_conv import causal_conv_silu, causal_conv_silu_both
from avion.ops.gated_scan import ScanInputs, gated_bidirectional_scan
from avion.ops.mixer import MixerWeights, mixer_of_whole_rows, runs_whole
from avion.ops.selective_scan import check_backend_name, selective_scan_with_state

# Initial step sizes are log-uniform in this range and never below the floor (Mamba, section 3.6).
_DT_MIN, _DT_MAX, _DT_FLOOR = 1e-3, 0.1, 1e-4


class BiMambaMixer(nn.Module):
    """Mix T steps of each of R rows: (R, T, D) → (R, T, D). The parameters have the names of the released checkpoints.

    A_log, A_b_log, D and D_b are meant to take no weight decay. The convolution modules only hold their parameters; the
    convolution itself runs in the layout (R, T, I).

    Raises:
        UserError: `scan_backend` does not exist.
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
        # Only for the forward direction, because in the released models dt_proj_b kept the initial values of nn.Linear.
        _init_dt_proj(self.dt_proj)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        xz = self.in_proj(h)  # (R, T, 2I)
        forward, backward = self._direction(reverse=False), self._direction(reverse=True)
        if runs_whole(xz, self.scan_backend) and _is_plain(self.x_proj) and _is_plain(self.x_proj_b):
            weights = forward.weights(), backward.weights()
            return self.out_proj(mixer_of_whole_rows(xz, *weights, backend=self.scan_backend))  # (R, T, D)
        x, z = xz.chunk(2, dim=-1)  # (R, T, I) each
        u = causal_conv_silu_both(x, forward.taps(), backward.taps(), backend=self.scan_backend)  # (R, T, I) each
        ahead, behind = self._scan_inputs(u[0], forward), self._scan_inputs(u[1], backward)
        return self.out_proj(gated_bidirectional_scan(ahead, behind, z, backend=self.scan_backend))  # (R, T, D)

    def _scan_inputs(self, u: torch.Tensor, p: "_Direction") -> ScanInputs:
        delta, B, C = self._step_inputs(u, p)
        # The scan adds the bias, in float32: under autocast it would be lost in bf16's rounding.
        return ScanInputs(u, delta, _decay_rates(p.A_log), B, C, p.D, p.dt_proj.bias)

    def _direction(self, reverse: bool) -> "_Direction":
        if reverse:
            return _Direction(self.conv1d_b, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b)
        return _Direction(self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D)

    def _step_inputs(self, u: torch.Tensor, p: "_Direction") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return delta before its bias and the softplus, (R, T, I), and B and C, (R, T, N), of u (R, T, I)."""
        dt, B, C = p.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        return F.linear(dt, p.dt_proj.weight), B, C

    def scan_piece(
        self, h: torch.Tensor, carry: "ScanCarry | None", *, reverse: bool
    ) -> tuple[torch.Tensor, "ScanCarry"]:
        """Compute one direction's share of the output for a piece of the steps, for sequences that are too long for the
        memory.

        The results of both directions over all pieces add up to the result of `forward` for the whole sequence. For
        inference only.

        Args:
            h: The next S steps in walking order, (R, S, D). With `reverse` the pieces come from the end, and each has
                its steps in their usual order.
            carry: What the call for the piece before returned; None for the first piece.
            reverse: Which direction.

        Returns:
            (R, S, D), and the carry for the next piece.
        """
        p = self._direction(reverse)
        x, z = self.in_proj(h).chunk(2, dim=-1)  # (R, S, I) each
        steps, tail = x.shape[1], p.conv.weight.shape[-1] - 1
        if carry is not None:
            x = torch.cat([x, carry.x] if reverse else [carry.x, x], dim=1)
        u = causal_conv_silu(x, *p.taps(), reverse=reverse, backend=self.scan_backend)
        u = u[:, :steps] if reverse else u[:, u.shape[1] - steps :]
        delta, B, C = self._step_inputs(u, p)
        y, state = selective_scan_with_state(
            u,
            delta,
            _decay_rates(p.A_log),
            B,
            C,
            p.D,
            delta_bias=p.dt_proj.bias,
            reverse=reverse,
            initial_state=None if carry is None else carry.state,
            backend=self.scan_backend,
        )
        kept = x[:, :tail] if reverse else x[:, max(0, x.shape[1] - tail) :]
        return self.out_proj(y.to(z.dtype) * F.silu(z)), ScanCarry(kept.clone(), state)


class _Direction(NamedTuple):
    """The parameters of one direction."""

    conv: nn.Conv1d
    x_proj: nn.Linear
    dt_proj: nn.Linear
    A_log: torch.Tensor
    D: torch.Tensor

    def taps(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the convolution's weight (I, K) and bias (I,)."""
        assert self.conv.bias is not None
        return self.conv.weight.squeeze(1), self.conv.bias

    def weights(self) -> MixerWeights:
        A = _decay_rates(self.A_log)
        return MixerWeights(*self.taps(), self.x_proj.weight, self.dt_proj.weight, A, self.D, self.dt_proj.bias)


class ScanCarry(NamedTuple):
    """What one piece of a sequence hands to the next.

    Attributes:
        x: The last inputs of the convolution, (R, K-1, I), or fewer where there have been fewer steps.
        state: The scan's state, (R, N, I).
    """

    x: torch.Tensor
    state: torch.Tensor


def _is_plain(linear: nn.Module) -> bool:
    """Return whether a call of the module is only a product with its weight: there is no adapter and no hook."""
    return type(linear) is nn.Linear and not linear._forward_hooks and not linear._forward_pre_hooks


def _decay_rates(A_log: torch.Tensor) -> torch.Tensor:
    """Return A (I, N), in float32 or float64."""
    return -torch.exp(A_log.float() if A_log.dtype in (torch.float16, torch.bfloat16) else A_log)


def _initial_A_log(channels: int, states: int) -> torch.Tensor:
    """Return log(1 … N) for every channel, (channels, states) (S4D-real)."""
    return torch.log(torch.arange(1, states + 1, dtype=torch.float32)).repeat(channels, 1)


def _init_dt_proj(dt_proj: nn.Linear) -> None:
    bound = dt_proj.in_features**-0.5
    nn.init.uniform_(dt_proj.weight, -bound, bound)
    low, high = math.log(_DT_MIN), math.log(_DT_MAX)
    dt = torch.exp(torch.rand(dt_proj.out_features) * (high - low) + low).clamp(min=_DT_FLOOR)
    with torch.no_grad():
        dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus⁻¹, so that softplus(bias) = dt
