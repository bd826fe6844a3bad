"""Plain PyTorch operators, a group of rows at a time, so that what lies between the projections stays in the cache.

Kept for the backward pass are xz, the outputs of x_proj and the sum of both scans; u, the step sizes and the states are
recomputed. The matrix products are computed in xz's dtype, as autocast would do, and all else in float32, or in float64
where an input is float64.
"""

from collections.abc import Iterator, Sequence
from typing import Generic

import torch
from torch import Tensor

from avion.ops.buffers import Buffers, borrowed_buffers
from avion.ops.gated_scan.autograd import differentiable
from avion.ops.selective_scan.inputs import Time, compute_dtype
from avion.ops.selective_scan.torch_blocks import Group, Kind, whole_rows
from avion.ops.selective_scan.torch_walk import BackwardScratch, ParameterGradients, Parameters, Scratch

from .products import outputs_without_values, products_backward, raw_step_sizes
from .weights import MixerWeights

# ---- one direction ---------------------------------------------------------------------------------------


class _Direction(Parameters):
    """The parameters of one direction: those of the matrix products in the dtype `linear`, the others in `dtype`."""

    def __init__(self, tensors: Sequence[Tensor], reverse: bool, dtype: torch.dtype, linear: torch.dtype):
        conv, conv_bias, x_proj, dt_proj, A, D, delta_bias = tensors
        super().__init__(A, D, delta_bias, dtype, Time(reverse=reverse))
        self.delta_bias = delta_bias.to(dtype)
        self.taps = list(conv.to(dtype).t().flip(0).contiguous().unbind(0))  # the taps of x_t, of x_{t-1}, …
        self.conv_bias = conv_bias.to(dtype)
        self.x_proj, self.dt_proj = x_proj.to(linear), dt_proj.to(linear)

    @property
    def rank(self) -> int:
        return self.dt_proj.shape[1]

    def shifts(self, steps: int) -> Iterator[tuple[int, slice, slice]]:
        """Yield the number of each tap, the steps of y to which the tap adds and the steps of x that it reads."""
        for s in range(min(len(self.taps), steps)):
            late, early = slice(s, steps), slice(0, steps - s)
            yield (s, early, late) if self.time.reverse else (s, late, early)

    def convolve(self, x: Tensor, out: Tensor) -> None:
        """Write x, convolved, without the SiLU, to `out`; both are (blocks, steps, rows, I)."""
        for s, served, read in self.shifts(x.shape[1]):
            if s == 0:
                torch.addcmul(self.conv_bias, x, self.taps[0], out=out)
            else:
                out[:, served].addcmul_(x[:, read], self.taps[s])


def _directions(ahead: Sequence[Tensor], behind: Sequence[Tensor], xz: Tensor) -> tuple[_Direction, _Direction]:
    dtype = compute_dtype(xz, *ahead, *behind)
    return _Direction(ahead, False, dtype, xz.dtype), _Direction(behind, True, dtype, xz.dtype)


class _Space(Generic[Kind]):
    """The buffers of a group, all in the same memory.

    Both directions share conv and u, (blocks, steps, rows, I), and u_flat, (M, I) with the group's M tokens. Each
    direction has a walk through the group's blocks.
    """

    def __init__(self, kind: type[Kind], buffers: Buffers, directions: Sequence[_Direction], group: Group):
        shape = (group.blocks, group.steps.stop, group.rows)
        self.directions = directions
        self.walks = [kind(buffers, p, *shape) for p in directions]
        channels = directions[0].A.shape[1]
        self.conv, self.u = (buffers.view(name, *shape, channels) for name in ("conv", "u"))
        self.u_flat = self.u.flatten(0, 2)
        for walk in self.walks:
            walk.u = self.u

    def steps_of(self, p: _Direction, walk: Scratch, projected: Tensor) -> None:
        """Fill the buffers of a direction's walk from `projected`: dt, B and C of the group's tokens."""
        raw_step_sizes(p, projected, p.delta_bias, walk.raw.flatten(0, 2))
        _, B, C = projected.split([p.rank, p.states, p.states], dim=-1)
        walk.B.flatten(0, 2).copy_(B)
        walk.C.flatten(0, 2).copy_(C)
        walk.derive()


def _spaces(
    kind: type[Kind], buffers: Buffers, directions: Sequence[_Direction], xz: Tensor
) -> Iterator[tuple[Group, slice, _Space[Kind]]]:
    """Yield every group of rows, the places of the group's tokens among all tokens, and buffers for the group."""
    made: dict[tuple[int, int], _Space[Kind]] = {}
    shape = torch.Size((*xz.shape[:2], xz.shape[2] // 2))
    for group in whole_rows(shape, directions[0].states, xz.device):
        key = (group.blocks, group.rows)
        if key not in made:
            made[key] = _Space(kind, buffers, directions, group)
        first = group.start * shape[1]
        yield group, slice(first, first + group.blocks * group.rows * shape[1]), made[key]


def _halves(xz: Tensor, group: Group, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return x and z of the group, (blocks, steps, rows, I), in the compute dtype."""
    x, z = group.view(xz).chunk(2, dim=-1)
    return x.to(dtype), z.to(dtype)


# ---- forward ---------------------------------------------------------------------------------------------


@torch.library.custom_op("avion::mixer_whole_rows", mutates_args=())
def _mixer(
    ahead: Sequence[Tensor], behind: Sequence[Tensor], xz: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the output (R, T, I), and what the backward pass needs, which is empty unless `keep`.

    The latter is the sum of the scans (R·T, I) and each direction's output of x_proj (R·T, Q+2N), with the tokens in
    the order of the groups' buffers.
    """
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
                for p, walk, of_x in zip(directions, space.walks, projected, strict=True):
                    y = _forward_group(space, p, walk, x, of_x[at])
                    if walk is space.walks[0]:
                        both.copy_(y)
                    else:
                        both.add_(y)
                gate = torch.ops.aten.silu.out(z, out=space.conv)
                group.view(out).copy_(gate.mul_(both))
        if not keep:
            projected = [p.new_empty(0, p.shape[1]) for p in projected]
        return out, total, projected[0], projected[1]


def _forward_group(space: _Space[Scratch], p: _Direction, walk: Scratch, x: Tensor, projected: Tensor) -> Tensor:
    """Return y of the group; write `projected`."""
    p.convolve(x, out=space.conv)
    torch.ops.aten.silu.out(space.conv, out=space.u)
    torch.mm(space.u_flat.to(projected.dtype), p.x_proj.t(), out=projected)
    space.steps_of(p, walk, projected)
    return walk.forward()


_mixer.register_fake(outputs_without_values)


# ---- backward --------------------------------------------------------------------------------------------


class _Gradients(ParameterGradients):
    """The running sums of the gradients of all parameters of a direction."""

    def __init__(self, p: _Direction):
        super().__init__(p)
        self.taps, self.conv_bias = torch.stack(p.taps).zero_(), torch.zeros_like(p.conv_bias)
        self.x_proj, self.dt_proj = (torch.zeros_like(w, dtype=p.dtype) for w in (p.x_proj, p.dt_proj))

    def as_inputs(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        taps = self.taps.flip(0).t()
        found = MixerWeights(taps, self.conv_bias, self.x_proj, self.dt_proj, self.A.t(), self.D, self.bias)
        return [gradient.contiguous().to(t.dtype) for gradient, t in zip(found, tensors, strict=True)]


@torch.library.custom_op("avion::mixer_whole_rows_backward", mutates_args=())
def _mixer_backward(
    d_out: Tensor, ahead: Sequence[Tensor], behind: Sequence[Tensor], xz: Tensor, kept: Sequence[Tensor]
) -> list[Tensor]:
    """Return the gradients of the tensors of `ahead`, of those of `behind`, and of xz."""
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
                for p, walk, of_x, grad in zip(directions, space.walks, projected, grads, strict=True):
                    _recompute(space, p, walk, x, of_x[at])
                    _backward_group(space, p, walk, of_x[at], grad, buffers)
                    _convolve_backward(space, p, walk, x, dx, grad)
                to_x.copy_(dx)
        by_direction = (g.as_inputs(p) for g, p in zip(grads, (ahead, behind), strict=True))
        return [*(tensor for tensors in by_direction for tensor in tensors), d_xz]


def _through_gate(space: _Space[BackwardScratch], d_out: Tensor, total: Tensor, z: Tensor, out: Tensor) -> None:
    """Write the gradient of z to `out`, and the gradient of the sum of both scans to their common buffer dy."""
    dy = space.walks[0].dy
    torch.mul(d_out, total, out=dy)
    torch.ops.aten.silu_backward.grad_input(dy, z, grad_input=out)
    torch.ops.aten.silu.out(z, out=dy).mul_(d_out)


def _recompute(
    space: _Space[BackwardScratch], p: _Direction, walk: BackwardScratch, x: Tensor, projected: Tensor
) -> None:
    """Recompute everything that the forward pass had, except for the states."""
    p.convolve(x, out=space.conv)
    torch.ops.aten.silu.out(space.conv, out=space.u)
    space.steps_of(p, walk, projected)


def _backward_group(
    space: _Space[BackwardScratch],
    p: _Direction,
    walk: BackwardScratch,
    projected: Tensor,
    grads: _Gradients,
    buffers: Buffers,
) -> None:
    """Write the gradient of u to walk.d_step_u, and add to the parameters' gradients except the convolution's."""
    walk.backward(None, None, grads)
    d_raw, du = (t.flatten(0, 2) for t in (walk.d_step, walk.d_step_u))
    d_projected = buffers.view("d_projected", *projected.shape)
    d_projected[:, p.rank : p.rank + p.states].copy_(walk.dB.flatten(0, 2))
    d_projected[:, p.rank + p.states :].copy_(walk.dC.flatten(0, 2))
    products_backward(p, grads, projected, space.u_flat, d_raw, d_projected, du)


def _convolve_backward(
    space: _Space[BackwardScratch], p: _Direction, walk: BackwardScratch, x: Tensor, dx: Tensor, grads: _Gradients
) -> None:
    """Add the gradients of the convolution's parameters.

    The direction ahead writes its gradient of x to `dx`; the direction behind adds its own.
    """
    d_conv = walk.d_step
    torch.ops.aten.silu_backward.grad_input(walk.d_step_u, space.conv, grad_input=d_conv)
    grads.conv_bias += d_conv.sum((0, 1, 2))
    for s, served, read in p.shifts(x.shape[1]):
        of_y = d_conv[:, served]
        # In one piece for any number of steps, because sums over slices take ten times as long.
        product = space.u.view(-1)[: of_y.numel()].view(of_y.shape)
        grads.taps[s] += torch.mul(of_y, x[:, read], out=product).sum((0, 1, 2))
        if s == 0 and not p.time.reverse:
            torch.mul(of_y, p.taps[0], out=dx)
        else:
            dx[:, read].addcmul_(of_y, p.taps[s])


_run = differentiable(_mixer, _mixer_backward)


def mixer_of_operators(xz: Tensor, forward: MixerWeights, backward: MixerWeights) -> Tensor:
    """Compute `mixer_of_whole_rows` with PyTorch's operators."""
    return _run(forward, backward, xz)
