"""Every kernel against float64 on the device, at the widths that training has. Needs no pytest."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from avion.ops.causal_conv import causal_conv_silu_both
from avion.ops.gated_scan import ScanInputs, gated_bidirectional_scan
from avion.ops.selective_scan import selective_scan, selective_scan_with_state

TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
CHANNELS, STATES, TAPS = 768, 16, 4
# Rows and steps: training's, fine-tuning's, several segments, long and few rows; steps that fill no chunk.
SHAPES = ((33, 4), (17, 16), (9, 64), (2, 784), (1, 3136), (7, 1), (5, 3), (3, 33))
TOY_SHAPES = ((2, 3),)


class Check(NamedTuple):
    """`run` gives the largest error relative to a tensor's largest value, and the tensor it is in."""

    name: str
    tolerance: float
    run: Callable[[], tuple[float, str]]


def checks(device: str, backend: str, toy: bool = False) -> Iterator[Check]:
    """All of one backend; `toy` for the interpreter: few shapes, eight channels."""
    channels, states = (8, 4) if toy else (CHANNELS, STATES)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for rows, steps in TOY_SHAPES if toy else SHAPES:
            size = (rows, steps, channels, states)
            for name, run in (("gated scan", gated_scan), ("scan", scan), ("convolutions", convolutions)):
                shown = f"{name}, {rows} x {steps}, {str(dtype).removeprefix('torch.')}"
                yield Check(shown, TOLERANCE[dtype], lambda run=run, s=size, d=dtype: run(device, backend, s, d))
    yield Check("states in and out", TOLERANCE[torch.float32], lambda: states_in_pieces(device, backend, toy))
    size = (2, 5 if toy else 40, channels, states)
    yield Check("two runs, bit for bit", 1e-30, lambda: two_runs(device, backend, size))
    if torch.cuda.is_available() and not toy and device != "cpu" and torch.cuda.mem_get_info()[0] > 40e9:
        yield Check("offsets beyond 2^31", TOLERANCE[torch.bfloat16], lambda: large_offsets(device, backend))


def _random(device: str, size: tuple[int, int, int, int], dtype: torch.dtype) -> ScanInputs:
    rows, steps, channels, states = size

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, device=device) * scale).to(dtype).requires_grad_()

    A = -torch.arange(1, states + 1, device=device) * (1 + 0.1 * torch.rand(channels, states, device=device))
    D, bias = torch.randn(channels, device=device), torch.randn(channels, device=device) - 3
    return ScanInputs(
        draw(rows, steps, channels),
        draw(rows, steps, channels, scale=0.5),
        A.requires_grad_(),
        draw(rows, steps, states),
        draw(rows, steps, states),
        D.requires_grad_(),
        bias.requires_grad_(),
    )


def _worst(run: Callable, tensors: dict[str, torch.Tensor], weight: torch.Tensor, expected: Callable):
    """The largest relative error of the output and of every gradient, and whose it is."""
    exact = {name: t.detach().double().requires_grad_() for name, t in tensors.items()}
    found, wanted = run(*tensors.values()), expected(*exact.values())
    pairs = {"output": (found, wanted)}
    gradients = torch.autograd.grad(found, list(tensors.values()), weight.to(found.dtype))
    right = torch.autograd.grad(wanted, list(exact.values()), weight.to(found.dtype).double())
    pairs |= {f"gradient of {n}": pair for n, *pair in zip(tensors, gradients, right, strict=True)}
    errors = {name: _difference(*pair) for name, pair in pairs.items()}
    worst = max(errors, key=errors.__getitem__)
    return errors[worst], worst


def _difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    error = ((found.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)).item()
    return error if error == error else float("inf")


def gated_scan(device: str, backend: str, size, dtype) -> tuple[float, str]:
    ahead, behind = _random(device, size, dtype), _random(device, size, dtype)
    z = torch.randn(size[0], size[1], 2 * size[2], device=device).to(dtype)[..., size[2] :].requires_grad_()
    names = [*(f"{n} ahead" for n in ScanInputs._fields), *(f"{n} behind" for n in ScanInputs._fields), "z"]

    def run(*t: torch.Tensor, name: str = backend) -> torch.Tensor:
        return gated_bidirectional_scan(ScanInputs(*t[:7]), ScanInputs(*t[7:14]), t[14], backend=name)

    weight = torch.randn(size[:3], device=device)
    tensors = dict(zip(names, [*ahead, *behind, z], strict=True))
    return _worst(run, tensors, weight, lambda *t: run(*t, name="reference"))


def scan(device: str, backend: str, size, dtype) -> tuple[float, str]:
    """Against the recurrence written out, time walked from its end."""
    inputs = _random(device, size, dtype)

    def run(*t: torch.Tensor) -> torch.Tensor:
        return selective_scan(*t[:6], delta_bias=t[6], reverse=True, backend=backend)

    return _worst(run, inputs._asdict(), torch.randn(size[:3], device=device), _by_hand)


def _by_hand(u, delta, A, B, C, D, bias) -> torch.Tensor:
    step = F.softplus(delta + bias)
    state, ys = torch.zeros(len(u), *A.shape, dtype=u.dtype, device=u.device), [None] * u.shape[1]
    for t in reversed(range(u.shape[1])):
        drive = (step[:, t] * u[:, t])[..., None] * B[:, t, None]
        state = torch.exp(step[:, t, :, None] * A) * state + drive
        ys[t] = (state * C[:, t, None]).sum(-1) + D * u[:, t]
    return torch.stack(ys, dim=1)


def convolutions(device: str, backend: str, size, dtype) -> tuple[float, str]:
    """Both directions, against PyTorch's own on padded and on flipped time."""
    rows, steps, channels, _ = size
    x = torch.randn(rows, steps, 2 * channels, device=device).to(dtype)[..., :channels].requires_grad_()
    tensors = {"x": x}
    for which in ("ahead", "behind"):
        tensors[f"weight {which}"] = torch.randn(channels, TAPS, device=device, requires_grad=True)
        tensors[f"bias {which}"] = torch.randn(channels, device=device, requires_grad=True)

    def run(x, weight, bias, weight_b, bias_b) -> torch.Tensor:
        return torch.stack(causal_conv_silu_both(x, (weight, bias), (weight_b, bias_b), backend=backend))

    def one(x, weight, bias) -> torch.Tensor:
        padded = F.pad(x.transpose(1, 2), (TAPS - 1, 0))
        return F.silu(F.conv1d(padded, weight[:, None], bias, groups=channels)).transpose(1, 2)

    def expected(x, weight, bias, weight_b, bias_b) -> torch.Tensor:
        return torch.stack([one(x, weight, bias), one(x.flip(1), weight_b, bias_b).flip(1)])

    return _worst(run, tensors, torch.randn(2, rows, steps, channels, device=device), expected)


def states_in_pieces(device: str, backend: str, toy: bool) -> tuple[float, str]:
    """A row in two pieces, the state handed on, against the row as a whole."""
    size = (1, 4, 8, 4) if toy else (3, 96, CHANNELS, STATES)
    inputs, half = _random(device, size, torch.float32), size[1] // 2
    with torch.no_grad():
        u, delta, A, B, C, D, bias = (t.detach() for t in inputs)
        whole = selective_scan(
            *(t.double() for t in (u, delta, A, B, C, D)), delta_bias=bias.double(), backend="reference"
        )
        state, pieces = None, []
        for part in (slice(0, half), slice(half, None)):
            y, state = selective_scan_with_state(
                u[:, part],
                delta[:, part],
                A,
                B[:, part],
                C[:, part],
                D,
                delta_bias=bias,
                initial_state=state,
                backend=backend,
            )
            pieces.append(y)
    return _difference(torch.cat(pieces, dim=1), whole), "output"


def two_runs(device: str, backend: str, size) -> tuple[float, str]:
    ahead, behind = (_random(device, size, torch.float32) for _ in range(2))
    z = torch.randn(size[:3], device=device, requires_grad=True)
    tensors = {**{f"{n} ahead": t for n, t in ahead._asdict().items()}, "z": z}

    def gradients() -> list[torch.Tensor]:
        out = gated_bidirectional_scan(ahead, behind, z, backend=backend)
        return [out, *torch.autograd.grad(out.square().sum(), list(tensors.values()))]

    for name, first, second in zip(["output", *tensors], gradients(), gradients(), strict=True):
        if not torch.equal(first, second):
            return float((first - second).detach().abs().max()), name
    return 0.0, "output"


def large_offsets(device: str, backend: str) -> tuple[float, str]:
    """More elements than 32 bits count; the last rows against themselves alone."""
    rows = 2**31 // (4 * CHANNELS) + 64
    u, delta = (torch.randn(rows, 4, CHANNELS, device=device, dtype=torch.bfloat16) for _ in range(2))
    B, C = (torch.randn(rows, 4, STATES, device=device, dtype=torch.bfloat16) for _ in range(2))
    A = -torch.rand(CHANNELS, STATES, device=device)
    D, bias = torch.randn(CHANNELS, device=device), torch.randn(CHANNELS, device=device) - 3
    with torch.no_grad():
        y = selective_scan(u, delta, A, B, C, D, delta_bias=bias, backend=backend)[-3:].clone()
        few = (t[-3:].double() for t in (u, delta))
        wanted = selective_scan(
            *few,
            A.double(),
            B[-3:].double(),
            C[-3:].double(),
            D.double(),
            delta_bias=bias.double(),
            backend="reference",
        )
    return _difference(y, wanted), "output"
