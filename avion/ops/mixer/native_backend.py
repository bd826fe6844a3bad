"""The mixer between its projections in C (`native.c`), with PyTorch's matrix products, on a CPU and in float32.

The work is cut into groups of rows whose tensors stay in the cache. Kept for the backward pass are xz, the outputs of
x_proj and the sum of both scans; u and the step sizes are recomputed.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from avion.ops.buffers import Buffers, borrowed_buffers
from avion.ops.gated_scan.autograd import differentiable
from avion.ops.selective_scan.torch_blocks import budget

from . import c_functions as c
from .products import outputs_without_values, products_backward, raw_step_sizes
from .weights import MixerWeights

_LOG2_E = 1.4426950408889634
_FLOAT = torch.float32


class _Direction:
    """The parameters of one direction as the C functions take them, and those of the products in the dtype `linear`."""

    def __init__(self, tensors: Sequence[Tensor], reverse: bool, linear: torch.dtype):
        conv, conv_bias, x_proj, dt_proj, A, D, delta_bias = tensors
        self.taps = conv.to(_FLOAT).t().flip(0).contiguous()  # (K, I): of x_t, of x_{t-1}, …
        self.conv_bias, self.D = conv_bias.to(_FLOAT).contiguous(), D.to(_FLOAT).contiguous()
        self.A_log2 = (A.to(_FLOAT).t() * _LOG2_E).contiguous()  # (N, I)
        self.delta_bias = delta_bias.to(_FLOAT)
        self.x_proj, self.dt_proj = x_proj.to(linear), dt_proj.to(linear)
        self.rank, self.states = dt_proj.shape[1], A.shape[1]
        pointers = (t.data_ptr() for t in (self.taps, self.conv_bias, self.A_log2, self.D))
        self.struct = c.Direction(*pointers, len(self.taps), self.states, reverse)


class _Group:
    """Some rows: the first one and the end, their tokens among all tokens, and the C structure."""

    def __init__(self, begin: int, end: int, steps: int, channels: int, threads: int):
        self.rows, self.tokens = slice(begin, end), slice(begin * steps, end * steps)
        self.count = (end - begin) * steps
        self.shape = c.Shape(end - begin, steps, channels, threads)


def _groups(xz: Tensor, threads: int) -> Iterator[_Group]:
    rows, steps, channels = xz.shape[0], xz.shape[1], xz.shape[2] // 2
    size = max(1, budget(xz.device).group // (steps * channels))
    for begin in range(0, rows, size):
        yield _Group(begin, min(begin + size, rows), steps, channels, threads)


def _plain(tensor: Tensor) -> Tensor:
    """The tensor in float32, with its last dimensions in one piece; the tensor itself where it is so."""
    return tensor.to(_FLOAT).contiguous()


def _recompute(
    p: _Direction, group: _Group, x: Tensor, buffers: Buffers, projected: Tensor, known: bool
) -> tuple[Tensor, Tensor]:
    """Return u and the step sizes before the softplus, in buffers; write `projected` unless it is known."""
    u, raw = (buffers.view(name, group.count, group.shape.channels) for name in ("u", "raw"))
    c.call("convolve", group.shape, p.struct, x, x.shape[-1], u)
    if not known:
        torch.mm(u.to(projected.dtype), p.x_proj.t(), out=projected)
    raw_step_sizes(p, projected, p.delta_bias, raw)
    return u, raw


# ---- forward ---------------------------------------------------------------------------------------------


@torch.library.custom_op("avion::mixer_native", mutates_args=())
def _mixer(
    ahead: Sequence[Tensor], behind: Sequence[Tensor], xz: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the output (R, T, I), and what the backward pass needs, which is empty unless `keep`.

    The latter is the sum of the scans (R·T, I) and each direction's output of x_proj (R·T, Q+2N).
    """
    threads, channels = torch.get_num_threads(), xz.shape[2] // 2
    with torch.autocast("cpu", enabled=False), borrowed_buffers(_FLOAT, xz.device) as buffers:
        directions = [_Direction(p, reverse, xz.dtype) for p, reverse in ((ahead, False), (behind, True))]
        tokens = xz.shape[0] * xz.shape[1]
        out = xz.new_empty(*xz.shape[:2], channels)
        projected = [xz.new_empty(tokens if keep else 0, len(p.x_proj)) for p in directions]
        total = xz.new_empty(tokens if keep else 0, channels, dtype=_FLOAT)
        for group in _groups(xz, threads):
            part = _plain(xz[group.rows])
            both = total[group.tokens] if keep else buffers.view("total", group.count, channels)
            for p, kept in zip(directions, projected, strict=True):
                at = kept[group.tokens] if keep else xz.new_empty(group.count, len(p.x_proj))
                u, raw = _recompute(p, group, part, buffers, at, known=False)
                bc = _plain(at)[:, p.rank :]
                c.call("scan", group.shape, p.struct, u, raw, bc, bc.stride(0), both, p is not directions[0])
            here = out[group.rows] if out.dtype == _FLOAT else buffers.view("out", group.count, channels)
            c.call("gate", group.shape, part[..., channels:], part.shape[-1], both, here)
            if out.dtype != _FLOAT:
                out[group.rows] = here.view_as(out[group.rows])
        return out, total, projected[0], projected[1]


_mixer.register_fake(outputs_without_values)


# ---- backward --------------------------------------------------------------------------------------------


class _Sums:
    """The gradients of a direction's parameters: those that C sums up, by thread; those of the products, in all."""

    def __init__(self, p: _Direction, threads: int):
        self.taps, self.A = (w.new_zeros(threads, *w.shape) for w in (p.taps, p.A_log2))
        self.conv_bias, self.D, self.delta_bias = (p.D.new_zeros(threads, *p.D.shape) for _ in range(3))
        self.x_proj, self.dt_proj = (torch.zeros_like(w, dtype=_FLOAT) for w in (p.x_proj, p.dt_proj))

    def as_inputs(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        taps, A, conv_bias, D, delta_bias = (
            t.sum(0) for t in (self.taps, self.A, self.conv_bias, self.D, self.delta_bias)
        )
        found = MixerWeights(taps.flip(0).t(), conv_bias, self.x_proj, self.dt_proj, A.t(), D, delta_bias)
        return [gradient.contiguous().to(t.dtype) for gradient, t in zip(found, tensors, strict=True)]


@torch.library.custom_op("avion::mixer_native_backward", mutates_args=())
def _mixer_backward(
    d_out: Tensor, ahead: Sequence[Tensor], behind: Sequence[Tensor], xz: Tensor, kept: Sequence[Tensor]
) -> list[Tensor]:
    """Return the gradients of the tensors of `ahead`, of those of `behind`, and of xz."""
    total, *projected = kept
    threads, channels = torch.get_num_threads(), xz.shape[2] // 2
    with torch.autocast("cpu", enabled=False), borrowed_buffers(_FLOAT, xz.device) as buffers:
        directions = [_Direction(p, reverse, xz.dtype) for p, reverse in ((ahead, False), (behind, True))]
        sums = [_Sums(p, threads) for p in directions]
        d_xz = torch.empty_like(xz, memory_format=torch.contiguous_format)
        for group in _groups(xz, threads):
            part = _plain(xz[group.rows])
            d_part = d_xz[group.rows] if xz.dtype == _FLOAT else buffers.view("d_part", *part.shape)
            dy = buffers.view("dy", group.count, channels)
            z, dz = part[..., channels:], d_part[..., channels:]
            both, wide = total[group.tokens], part.shape[-1]
            c.call("gate_backward", group.shape, z, wide, both, _plain(d_out[group.rows]), dy, dz, wide)
            for p, of_x, own in zip(directions, projected, sums, strict=True):
                at = of_x[group.tokens]
                u, raw = _recompute(p, group, part, buffers, at, known=True)
                du = _scan_backward(p, group, at, u, raw, dy, own, buffers)
                later = p is not directions[0]
                ends = (own.taps, own.conv_bias)
                c.call("convolve_backward", group.shape, p.struct, part, wide, du, d_part, wide, later, *ends)
            if xz.dtype != _FLOAT:
                d_xz[group.rows] = d_part
        by_direction = (own.as_inputs(p) for own, p in zip(sums, (ahead, behind), strict=True))
        return [*(tensor for tensors in by_direction for tensor in tensors), d_xz]


def _scan_backward(
    p: _Direction,
    group: _Group,
    projected: Tensor,
    u: Tensor,
    raw: Tensor,
    dy: Tensor,
    sums: _Sums,
    buffers: Buffers,
) -> Tensor:
    """Return the gradient of u, and add to the parameters' gradients except the convolution's."""
    d_raw, du = (buffers.view(name, *u.shape) for name in ("d_raw", "du"))
    d_projected = buffers.view("d_projected", *projected.shape)
    bc, d_bc = _plain(projected)[:, p.rank :], d_projected[:, p.rank :]
    places = (d_raw, du, d_bc, sums.A, sums.D, sums.delta_bias)
    to = c.Gradients(*(t.data_ptr() for t in places), d_bc.stride(0))
    if c.call("scan_backward", group.shape, p.struct, u, raw, bc, bc.stride(0), dy, to):
        raise MemoryError("the mixer's backward pass: no memory is left")
    products_backward(p, sums, projected, u, d_raw, d_projected, du)
    return du


_run = differentiable(_mixer, _mixer_backward)


def mixer_in_c(xz: Tensor, forward: MixerWeights, backward: MixerWeights) -> Tensor:
    """Compute `mixer_of_whole_rows` with the C code, which is compiled. No tensor is float64."""
    return _run(forward, backward, xz)
