"""Plain PyTorch operators, a group of rows at a time: what lies between the projections never leaves the cache.

Kept for backward are xz, the outputs of x_proj and the sum of both scans; u, the steps and the states are recomputed.
The matrix products are in xz's dtype, as they are outside under autocast, all else in float32 (float64).
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from avion.ops.buffers import Buffers, borrowed_buffers
from avion.ops.gated_scan.autograd import differentiable
from avion.ops.selective_scan import resolve_backend
from avion.ops.selective_scan.torch_blocks import MAX_STEPS, Group, compute_dtype, whole_rows
from avion.ops.selective_scan.torch_walk import BackwardScratch, ParameterGradients, Parameters, Scratch


class MixerWeights(NamedTuple):
    """One direction's: conv (I, K), x_proj (Q+2N, I), dt_proj (I, Q), A (I, N); conv_bias, D and delta_bias (I,)."""

    conv: Tensor
    conv_bias: Tensor
    x_proj: Tensor
    dt_proj: Tensor
    A: Tensor
    D: Tensor
    delta_bias: Tensor


def runs_whole(xz: Tensor, backend: str) -> bool:
    """Whether `mixer_of_whole_rows` is for this case: the torch backend on a CPU, rows of one block of time."""
    float64 = xz.dtype == torch.float64
    on_cpu = xz.device.type == "cpu" and xz.shape[1] <= MAX_STEPS
    return on_cpu and resolve_backend(backend, xz.device, float64=float64) == "torch"


# ---- one direction ---------------------------------------------------------------------------------------


class _Direction(Parameters):
    """One direction's parameters: of the products in `linear`, the others in the compute dtype."""

    def __init__(self, tensors: Sequence[Tensor], reverse: bool, dtype: torch.dtype, linear: torch.dtype):
        conv, conv_bias, x_proj, dt_proj, A, D, delta_bias = tensors
        super().__init__(A, D, delta_bias, dtype, reverse=reverse)
        self.taps = list(conv.to(dtype).t().flip(0).contiguous().unbind(0))  # of x_t, of the step before, …
        self.conv_bias = conv_bias.to(dtype)
        self.x_proj, self.dt_proj = x_proj.to(linear), dt_proj.to(linear)

    @property
    def rank(self) -> int:
        return self.dt_proj.shape[1]

    def shifts(self, steps: int) -> Iterator[tuple[int, slice, slice]]:
        """Each tap's number, the steps of y that it serves and the steps of x that it reads."""
        for s in range(min(len(self.taps), steps)):
            late, early = slice(s, steps), slice(0, steps - s)
            yield (s, early, late) if self.reverse else (s, late, early)

    def convolve(self, x: Tensor, out: Tensor) -> None:
        """x and out (blocks, steps, rows, I); before the SiLU."""
        for s, served, read in self.shifts(x.shape[1]):
            if s == 0:
                torch.addcmul(self.conv_bias, x, self.taps[0], out=out)
            else:
                out[:, served].addcmul_(x[:, read], self.taps[s])


def _directions(ahead, behind, xz: Tensor) -> tuple[_Direction, _Direction]:
    dtype = compute_dtype(xz, *ahead, *behind)
    return _Direction(ahead, False, dtype, xz.dtype), _Direction(behind, True, dtype, xz.dtype)


class _Space:
    """The buffers of a group that both directions share, (blocks, steps, rows, I) and flat (M, I) of its M tokens, and
    each direction's walk through its blocks, all in the same memory."""

    def __init__(self, kind: type[Scratch], buffers: Buffers, directions: Sequence[_Direction], group: Group):
        shape = (group.blocks, group.steps.stop, group.rows)
        self.walks = [kind(buffers, p, *shape) for p in directions]
        channels = directions[0].A.shape[1]
        self.conv, self.u = (buffers.view(name, *shape, channels) for name in ("conv", "u"))
        self.u_flat = self.u.flatten(0, 2)
        for walk in self.walks:
            walk.u = self.u

    def steps_of(self, walk: Scratch, projected: Tensor) -> None:
        """All that the walk wants, from `projected`, dt, B and C of the group's tokens."""
        p: _Direction = walk.p
        dt, B, C = projected.split([p.rank, p.states, p.states], dim=-1)
        raw = walk.raw.flatten(0, 2)
        if dt.dtype == raw.dtype:
            torch.addmm(p.bias, dt, p.dt_proj.t(), out=raw)
        else:
            torch.add(dt @ p.dt_proj.t(), p.bias, out=raw)
        walk.B.flatten(0, 2).copy_(B)
        walk.C.flatten(0, 2).copy_(C)
        walk.derive()


def _spaces(
    kind: type[Scratch], buffers: Buffers, directions: Sequence[_Direction], xz: Tensor
) -> Iterator[tuple[Group, slice, _Space]]:
    """Every group of rows, its tokens among all, and buffers for it."""
    made: dict[tuple[int, int], _Space] = {}
    shape = torch.Size((*xz.shape[:2], xz.shape[2] // 2))
    for group in whole_rows(shape, directions[0].states, xz.device):
        key = (group.blocks, group.rows)
        if key not in made:
            made[key] = _Space(kind, buffers, directions, group)
        first = group.start * shape[1]
        yield group, slice(first, first + group.blocks * group.rows * shape[1]), made[key]


def _halves(xz: Tensor, group: Group, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x and z of the group, (blocks, steps, rows, I), in the compute dtype."""
    x, z = group.view(xz).chunk(2, dim=-1)
    return x.to(dtype), z.to(dtype)


# ---- forward ---------------------------------------------------------------------------------------------


@torch.library.custom_op("avion::mixer_whole_rows", mutates_args=())
def _mixer(
    ahead: Sequence[Tensor], behind: Sequence[Tensor], xz: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output (R, T, I); and if `keep` the sum of the scans (R·T, I) and each direction's output of x_proj
    (R·T, Q+2N), tokens in the order of the groups' buffers."""
    with torch.autocast(xz.device.type, enabled=False):
        directions = _directions(ahead, behind, xz)
        dtype, tokens, channels = directions[0].dtype, xz.shape[0] * xz.shape[1], xz.shape[2] // 2
        out = xz.new_empty(*xz.shape[:2], channels)
        projected = [xz.new_empty(tokens, len(p.x_proj)) for p in directions]
        total = xz.new_empty(tokens if keep else 0, channels, dtype=dtype)
        with borrowed_buffers(dtype, xz.device) as buffers:
            for group, at, space in _spaces(Scratch, buffers, directions, xz):
                x, z = _halves(xz, group, dtype)
                both = total[at].view_as(space.u) if keep else buffers.view("total", *space.u.shape)
                for walk, of_x in zip(space.walks, projected, strict=True):
                    y = _forward_group(space, walk, x, of_x[at])
                    if walk is space.walks[0]:
                        both.copy_(y)
                    else:
                        both.add_(y)
                gate = torch.ops.aten.silu.out(z, out=space.conv)
                group.view(out).copy_(gate.mul_(both))
        if not keep:
            projected = [p.new_empty(0, p.shape[1]) for p in projected]
        return out, total, *projected


def _forward_group(space: _Space, walk: Scratch, x: Tensor, projected: Tensor) -> Tensor:
    """y of the group; writes `projected`."""
    p: _Direction = walk.p
    p.convolve(x, out=space.conv)
    torch.ops.aten.silu.out(space.conv, out=space.u)
    torch.mm(space.u_flat.to(projected.dtype), p.x_proj.t(), out=projected)
    space.steps_of(walk, projected)
    return walk.forward()


@_mixer.register_fake
def _(ahead, behind, xz, keep):
    rows, steps, channels = xz.shape[0], xz.shape[1], xz.shape[2] // 2
    tokens = rows * steps if keep else 0
    return (
        xz.new_empty(rows, steps, channels),
        xz.new_empty(tokens, channels, dtype=compute_dtype(xz, *ahead, *behind)),
        *(xz.new_empty(tokens, len(p[2])) for p in (ahead, behind)),
    )


# ---- backward --------------------------------------------------------------------------------------------


class _Gradients(ParameterGradients):
    """Those of all of a direction's parameters."""

    def __init__(self, p: _Direction):
        super().__init__(p)
        self.taps, self.conv_bias = torch.stack(p.taps).zero_(), torch.zeros_like(p.conv_bias)
        self.x_proj, self.dt_proj = (torch.zeros_like(w, dtype=p.dtype) for w in (p.x_proj, p.dt_proj))

    def as_inputs(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        found = (
            self.taps.flip(0).t(), self.conv_bias, self.x_proj, self.dt_proj, self.A.t(), self.D, self.bias
        )  # fmt: skip
        return [gradient.contiguous().to(t.dtype) for gradient, t in zip(found, tensors, strict=True)]


@torch.library.custom_op("avion::mixer_whole_rows_backward", mutates_args=())
def _mixer_backward(
    d_out: Tensor, ahead: Sequence[Tensor], behind: Sequence[Tensor], xz: Tensor, kept: Sequence[Tensor]
) -> list[Tensor]:
    """Gradients of the tensors of `ahead`, of those of `behind`, and of xz."""
    total, *projected = kept
    with torch.autocast(xz.device.type, enabled=False):
        directions = _directions(ahead, behind, xz)
        dtype, grads, d_xz = directions[0].dtype, [_Gradients(p) for p in directions], torch.empty_like(xz)
        with borrowed_buffers(dtype, xz.device) as buffers:
            for group, at, space in _spaces(BackwardScratch, buffers, directions, xz):
                x, z = _halves(xz, group, dtype)
                dx = buffers.view("dx", *space.u.shape)
                _through_gate(space, group.view(d_out), total[at].view_as(space.u), z, out=dx)
                to_x, to_z = group.view(d_xz).chunk(2, dim=-1)
                to_z.copy_(dx)
                for walk, of_x, grad in zip(space.walks, projected, grads, strict=True):
                    _recompute(space, walk, x, of_x[at])
                    _backward_group(space, walk, of_x[at], grad, buffers)
                    _convolve_backward(walk, space, x, dx, grad)
                to_x.copy_(dx)
        by_direction = (g.as_inputs(p) for g, p in zip(grads, (ahead, behind), strict=True))
        return [*(tensor for tensors in by_direction for tensor in tensors), d_xz]


def _through_gate(space: _Space, d_out: Tensor, total: Tensor, z: Tensor, out: Tensor) -> None:
    """The gradient of z in `out`, that of both scans in their dy."""
    dy = space.walks[0].dy
    torch.mul(d_out, total, out=dy)
    torch.ops.aten.silu_backward.grad_input(dy, z, grad_input=out)
    torch.ops.aten.silu.out(z, out=dy).mul_(d_out)


def _recompute(space: _Space, walk: BackwardScratch, x: Tensor, projected: Tensor) -> None:
    """Everything that forward had but the states."""
    walk.p.convolve(x, out=space.conv)
    torch.ops.aten.silu.out(space.conv, out=space.u)
    space.steps_of(walk, projected)


def _backward_group(
    space: _Space, walk: BackwardScratch, projected: Tensor, grads: _Gradients, buffers: Buffers
) -> None:
    """The gradient of u, in walk.d_step_u; adds to the parameters' but for the convolution's."""
    p: _Direction = walk.p
    walk.backward(None, None, grads)
    d_raw, du = (t.flatten(0, 2) for t in (walk.d_step, walk.d_step_u))
    linear = projected.dtype
    d_projected = buffers.view("d_projected", *projected.shape)
    d_raw, d_dt, dt = d_raw.to(linear), d_projected[:, : p.rank], projected[:, : p.rank]
    d_projected[:, p.rank : p.rank + p.states].copy_(walk.dB.flatten(0, 2))
    d_projected[:, p.rank + p.states :].copy_(walk.dC.flatten(0, 2))
    if linear == p.dtype:
        torch.mm(d_raw, p.dt_proj, out=d_dt)
        grads.dt_proj.addmm_(d_raw.t(), dt)
        grads.x_proj.addmm_(d_projected.t(), space.u_flat)
        du.addmm_(d_projected, p.x_proj)
        return
    d_dt.copy_(d_raw @ p.dt_proj)
    grads.dt_proj += d_raw.t() @ dt
    d_projected = d_projected.to(linear)
    grads.x_proj += d_projected.t() @ space.u_flat.to(linear)
    du.add_(d_projected @ p.x_proj)


def _convolve_backward(walk: BackwardScratch, space: _Space, x: Tensor, dx: Tensor, grads: _Gradients) -> None:
    """Adds the gradients of the convolution's parameters; that of x is written to `dx` by the direction ahead, added by
    the other."""
    p: _Direction = walk.p
    d_conv = walk.d_step
    torch.ops.aten.silu_backward.grad_input(walk.d_step_u, space.conv, grad_input=d_conv)
    grads.conv_bias += d_conv.sum((0, 1, 2))
    for s, served, read in p.shifts(x.shape[1]):
        of_y = d_conv[:, served]
        # In one piece, whatever the steps: sums over slices take ten times as long.
        product = space.u.view(-1)[: of_y.numel()].view(of_y.shape)
        grads.taps[s] += torch.mul(of_y, x[:, read], out=product).sum((0, 1, 2))
        if s == 0 and not p.reverse:
            torch.mul(of_y, p.taps[0], out=dx)
        else:
            dx[:, read].addcmul_(of_y, p.taps[s])


_run = differentiable(_mixer, _mixer_backward)


def mixer_of_whole_rows(xz: Tensor, forward: MixerWeights, backward: MixerWeights) -> Tensor:
    """The package's docstring has the maths; T at most 32.

    Args:
        xz: (R, T, 2I), any strides.
        forward: the parameters of the direction along time.
        backward: those of the direction from its end.

    Returns:
        (R, T, I) in xz's dtype; gradients flow to xz and every parameter.

    Raises:
        ValueError: T is 0, or more than 32.
    """
    if not 1 <= xz.shape[1] <= MAX_STEPS:
        raise ValueError(f"mixer_of_whole_rows: T must be 1 to {MAX_STEPS}, got {xz.shape[1]}")
    return _run(forward, backward, xz)
