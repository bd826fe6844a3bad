import dataclasses
import logging
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from avion.errors import UserError
from avion.ops.buffers import forget_spare_buffers
from avion.ops.selective_scan import (
    available_backends,
    dispatch,
    resolve_backend,
    selective_scan,
    selective_scan_with_state,
    torch_blocks,
    torch_walk,
)
from avion.ops.selective_scan.inputs import ScanInputs, Time
from tests.ops.named import assert_close, poisoned_memory

NAMES = ("u", "delta", "A", "B", "C", "D", "delta_bias")

# (R, T, D, N): one step, no rows, odd widths, one state block of time and several.
SHAPES = [(5, 4, 7, 16), (3, 1, 8, 4), (0, 4, 8, 16), (1, 2, 1, 5), (7, 3, 5, 64), (2, 32, 5, 4), (2, 33, 3, 4)]


@pytest.fixture(autouse=True)
def poison():
    forget_spare_buffers()  # memory of earlier calls holds numbers, not NaN
    with poisoned_memory():
        yield


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks, ragged ones among them, in a group; several groups; several blocks of time."""
    monkeypatch.setattr(torch_blocks, "MAX_STEPS", 4)
    monkeypatch.setattr(
        torch_blocks, "budget", lambda device: torch_blocks.Budget(block=2 * 4 * 5 * 4, group=2 * 2 * 4 * 5)
    )


def random_inputs(rows, steps, channels, states, dtype=torch.float64, device="cpu") -> dict[str, torch.Tensor]:
    shapes = {
        "u": (rows, steps, channels),
        "delta": (rows, steps, channels),
        "B": (rows, steps, states),
        "C": (rows, steps, states),
        "D": (channels,),
        "delta_bias": (channels,),
    }
    inputs = {name: torch.randn(shape, dtype=dtype, device=device) for name, shape in shapes.items()}
    inputs["A"] = -torch.rand(channels, states, dtype=dtype, device=device) * 3 - 0.1
    return {name: inputs[name].requires_grad_() for name in NAMES}


def scan(inputs: dict[str, torch.Tensor | None], backend: str, **options) -> torch.Tensor:
    main = [inputs[name] for name in NAMES[:-1]]
    return selective_scan(*main, delta_bias=inputs["delta_bias"], backend=backend, **options)


def outputs_and_gradients(inputs, backend, weight, **options) -> dict[str, torch.Tensor]:
    given = {name: tensor for name, tensor in inputs.items() if tensor is not None}
    y = scan(inputs, backend, **options)
    gradients = torch.autograd.grad(y, list(given.values()), weight)
    return {"y": y.detach()} | {f"d{name}": gradient for name, gradient in zip(given, gradients, strict=True)}


def assert_backends_agree(inputs, tolerance=1e-11, **options) -> None:
    weight = torch.randn_like(inputs["u"])
    expected = outputs_and_gradients(inputs, "reference", weight, **options)
    actual = outputs_and_gradients(inputs, "torch", weight, **options)
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_close(name, actual[name], expected[name], tolerance)


# ---- the reference, and the torch backend against it -------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True])
def test_reference_is_the_recurrence_written_out_per_element(reverse):
    rows, steps, channels, states = 2, 3, 2, 2
    inputs = {name: tensor.detach() for name, tensor in random_inputs(rows, steps, channels, states).items()}
    u, delta, A, B, C, D, bias = (inputs[name].tolist() for name in NAMES)
    y = scan(inputs, "reference", reverse=reverse)
    for r in range(rows):
        for d in range(channels):
            state = [0.0] * states
            for t in reversed(range(steps)) if reverse else range(steps):
                step = math.log(1 + math.exp(delta[r][t][d] + bias[d]))
                for n in range(states):
                    state[n] = math.exp(step * A[d][n]) * state[n] + step * B[r][t][n] * u[r][t][d]
                expected = sum(C[r][t][n] * state[n] for n in range(states)) + D[d] * u[r][t][d]
                assert y[r, t, d].item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_every_gradient_equal_the_references(shape, reverse):
    assert_backends_agree(random_inputs(*shape), reverse=reverse)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("rows, steps", [(1, 4), (3, 4), (8, 4), (13, 3), (5, 5), (9, 14), (2, 8)])
def test_blocks_of_rows_and_time_join_seamlessly(small_blocks, rows, steps, reverse):
    assert_backends_agree(random_inputs(rows, steps, 5, 4), reverse=reverse)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softplus", [False, True])
def test_without_bias_or_softplus(softplus, bias):
    inputs = random_inputs(4, 5, 6, 3)
    if not softplus:  # Δ itself, then: positive
        inputs["delta"] = inputs["delta"].detach().abs().requires_grad_()
        inputs["delta_bias"] = inputs["delta_bias"].detach().abs().requires_grad_()
    if not bias:
        inputs["delta_bias"] = None
    assert_backends_agree(inputs, delta_softplus=softplus)


def test_strided_and_expanded_inputs():
    plain = random_inputs(3, 4, 6, 5)
    wide = torch.randn(3, 4, 2 * 6 + 2 * 5, dtype=torch.float64, requires_grad=True)  # as x_proj hands them out
    u, delta, B, C = wide.split([6, 6, 5, 5], dim=-1)
    transposed = torch.randn(5, 6, dtype=torch.float64).abs().neg().t()  # A (6, 5)
    inputs = plain | {"u": u, "delta": delta, "B": B, "C": C, "A": transposed.requires_grad_()}
    assert_backends_agree(inputs)

    swapped = torch.randn(4, 3, 6, dtype=torch.float64).transpose(0, 1).requires_grad_()
    one_for_all = torch.randn(1, 4, 5, dtype=torch.float64, requires_grad=True).expand(3, 4, 5)
    assert_backends_agree(plain | {"u": swapped, "B": one_for_all})


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_reverse_is_the_flip_of_the_scan_of_the_flip(backend):
    inputs = random_inputs(3, 9, 4, 5)
    flipped = {name: t.flip(1) if t.ndim == 3 else t for name, t in inputs.items()}
    expected = scan(flipped, backend).flip(1)
    assert_close("y", scan(inputs, backend, reverse=True), expected, 1e-13)


def test_inputs_stay_as_they_were():
    inputs = random_inputs(3, 4, 5, 6)
    before = {name: tensor.detach().clone() for name, tensor in inputs.items()}
    scan(inputs, "torch").sum().backward()
    for name in NAMES:
        assert torch.equal(inputs[name].detach(), before[name]), name


def test_gradient_of_a_few_inputs_only():
    inputs = {name: tensor.detach() for name, tensor in random_inputs(3, 4, 5, 6).items()}
    inputs["B"].requires_grad_()
    (expected,) = torch.autograd.grad(scan(inputs, "reference").square().sum(), inputs["B"])
    (actual,) = torch.autograd.grad(scan(inputs, "torch").square().sum(), inputs["B"])
    assert_close("dB", actual, expected, 1e-11)


@pytest.mark.parametrize("reverse", [False, True])
def test_gradcheck(small_blocks, reverse):
    inputs = random_inputs(2, 6, 3, 4)

    def run(*args):
        return scan(dict(zip(NAMES, args, strict=True)), "torch", reverse=reverse)

    assert torch.autograd.gradcheck(run, list(inputs.values()))


def test_extreme_step_sizes():
    """Δ from underflow to hundreds: softplus must neither overflow nor lose its small values."""
    inputs = {name: t.detach().float() for name, t in random_inputs(2, 4, 3, 4).items()}
    inputs["delta_bias"].zero_()
    inputs["delta"] = torch.tensor([-200.0, -80.0, -15.0, -6.0, 0.0, 1.0, 19.0, 21.0, 90.0, 500.0] * 3)[:24].view(
        2, 4, 3
    )
    assert_close("y", scan(inputs, "torch"), scan(inputs, "reference"), 1e-6)

    small = torch.linspace(-16, -4, 1000)  # softplus ≈ e^x: compare it relatively, not absolutely
    out = torch.empty_like(small)
    torch_walk.softplus(small, out)
    expected = F.softplus(small.double())
    assert ((out.double() - expected).abs() / expected).max() < 2e-6


# ---- dtypes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("half, tolerance", [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_half_precision_inputs_are_computed_in_float32(backend, half, tolerance):
    """As under autocast: u, delta, B, C in 16 bits, A, D and the bias in float32. Only y's and the gradients'
    own rounding separates them from the float64 reference on the same (rounded) numbers."""
    inputs = {name: tensor.detach().float() for name, tensor in random_inputs(6, 40, 5, 8).items()}
    for name in ("u", "delta", "B", "C"):
        inputs[name] = inputs[name].to(half)
    given = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    weight = torch.randn(6, 40, 5).to(half)
    with torch.autocast("cpu", torch.bfloat16):
        actual = outputs_and_gradients(given, backend, weight)
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in inputs.items()}
    expected = outputs_and_gradients(exact, "reference", weight.double())
    for name, value in actual.items():
        like = "u" if name == "y" else name[1:]
        assert value.dtype == inputs[like].dtype, name
        in_float32 = inputs[like].dtype == torch.float32
        assert_close(name, value.double(), expected[name], 1e-5 if in_float32 else tolerance)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_autocast_changes_nothing(backend):
    inputs = {name: tensor.detach().float().requires_grad_() for name, tensor in random_inputs(4, 5, 6, 8).items()}
    weight = torch.randn(4, 5, 6)
    expected = outputs_and_gradients(inputs, backend, weight)
    with torch.autocast("cpu", torch.bfloat16):
        actual = outputs_and_gradients(inputs, backend, weight)
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


def test_two_runs_agree_bit_for_bit(small_blocks):
    inputs = {name: t.detach().float().requires_grad_() for name, t in random_inputs(9, 6, 5, 4).items()}
    weight = torch.randn(9, 6, 5)
    first = outputs_and_gradients(inputs, "torch", weight)
    second = outputs_and_gradients(inputs, "torch", weight)
    for name in first:
        assert torch.equal(first[name], second[name]), name


# ---- states in and out ---------------------------------------------------------------------------------


def with_state(inputs: dict[str, torch.Tensor | None], backend: str, **options) -> tuple[torch.Tensor, torch.Tensor]:
    main = [inputs[name] for name in NAMES[:-1]]
    with torch.no_grad():
        return selective_scan_with_state(*main, delta_bias=inputs["delta_bias"], backend=backend, **options)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("backend", ["reference", "torch", "by steps"])
def test_pieces_handed_on_by_their_state_are_the_whole(backend, reverse, small_blocks, monkeypatch):
    if backend == "by steps":  # as for kernels that know no states
        backend, entry = "torch", dispatch.BACKENDS["torch"]
        monkeypatch.setitem(dispatch.BACKENDS, "torch", dataclasses.replace(entry, run_with_state=None))
    inputs = random_inputs(5, 14, 4, 3)
    expected = scan(inputs, "reference", reverse=reverse)
    state, pieces, cuts = None, [], [slice(0, 1), slice(1, 10), slice(10, 14)]
    for cut in cuts[::-1] if reverse else cuts:
        piece = {name: t[:, cut] if t.ndim == 3 else t for name, t in inputs.items()}
        y, state = with_state(piece, backend, reverse=reverse, initial_state=state)
        pieces.append(y)
    assert_close("y", torch.cat(pieces[::-1] if reverse else pieces, dim=1), expected.detach(), 1e-12)
    _, whole = with_state(inputs, "reference", reverse=reverse)
    assert_close("state", state, whole, 1e-12)


def test_the_state_by_hand():
    """One channel, two states: s = exp(Δ A) s0 + Δ B u, Δ given as it is."""
    u, delta, D = torch.full((1, 1, 1), 3.0), torch.full((1, 1, 1), 0.5), torch.ones(1)
    A, B, C = torch.tensor([[-1.0, -2.0]]), torch.tensor([[[2.0, -1.0]]]), torch.tensor([[[1.0, 10.0]]])
    initial = torch.tensor([[[4.0], [5.0]]])  # (R, N, D)
    inputs = dict(zip(NAMES, (u, delta, A, B, C, D, None), strict=True))
    expected = [4 * math.exp(-0.5) + 3.0, 5 * math.exp(-1.0) - 1.5]
    for backend in ("torch", "reference"):
        y, state = with_state(inputs, backend, delta_softplus=False, initial_state=initial)
        assert state.flatten().tolist() == pytest.approx(expected, rel=1e-6)
        assert y.item() == pytest.approx(expected[0] + 10 * expected[1] + 3.0, rel=1e-6)


def test_states_take_no_gradient_and_have_one_shape():
    inputs = random_inputs(2, 3, 4, 5)
    with pytest.raises(ValueError, match="no gradient flows through states; call it under torch.no_grad"):
        selective_scan_with_state(*(inputs[name] for name in NAMES[:-1]))
    with pytest.raises(ValueError, match=r"initial_state must be \(2, 5, 4\), got \(2, 4, 5\)"):
        with_state(inputs, "torch", initial_state=torch.zeros(2, 4, 5))


# ---- what is kept, and living with torch's machinery ----------------------------------------------


def test_only_inputs_and_few_states_are_kept():
    rows, steps, channels, states = 3, 70, 8, 16
    inputs = random_inputs(rows, steps, channels, states)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        scan(inputs, "torch")
    pointers = {tensor.data_ptr() for tensor in inputs.values()}
    extra = [tensor for tensor in saved if tensor.data_ptr() not in pointers]
    assert [tuple(tensor.shape) for tensor in extra] == [(rows, 2, states, channels)]  # after 32 and 64 steps


class _Allocations(TorchDispatchMode):
    """Elements of the memory that operators ask for: the largest piece, and all together, what is freed meanwhile
    included."""

    def __init__(self):
        super().__init__()
        self.largest = self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for made in tree_leaves(result):
            if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in given:
                elements = made.untyped_storage().nbytes() // made.itemsize
                self.largest, self.total = max(self.largest, elements), self.total + elements
        return result


def allocations_of_forward_and_backward(rows, steps, channels, states) -> tuple[_Allocations, _Allocations]:
    inputs = [tensor.detach() for tensor in random_inputs(rows, steps, channels, states).values()]
    with _Allocations() as forward:
        x, y = torch_blocks.Direction(ScanInputs(*inputs), Time()), torch.empty_like(inputs[0])
        entering = x.A.new_empty(torch_blocks.entering_shape(y, states, keep=True))
        torch_blocks.forward(x, lambda part, _, group: group.view(y).copy_(part), entering)
    dy = torch.randn_like(y)
    with _Allocations() as backward:
        x = torch_blocks.Direction(ScanInputs(*inputs), Time())
        torch_blocks.backward(x, lambda out, _, group: out.copy_(group.view(dy)), entering)
    return forward, backward


def test_nothing_of_size_rows_times_steps_times_channels_times_states_is_made(monkeypatch):
    rows, steps, channels, states = 40, 4, 24, 8
    budget = torch_blocks.Budget(block=4 * channels * states, group=rows * steps * channels)
    monkeypatch.setattr(torch_blocks, "budget", lambda device: budget)
    for made in allocations_of_forward_and_backward(rows, steps, channels, states):
        assert 0 < made.largest <= rows * steps * channels


def test_memory_is_linear_in_long_time_and_far_from_a_state_per_step(monkeypatch):
    rows, channels, states = 1, 48, 16
    budget = torch_blocks.Budget(block=32 * channels * states, group=32 * channels)
    monkeypatch.setattr(torch_blocks, "budget", lambda device: budget)
    half = allocations_of_forward_and_backward(rows, 4096, channels, states)
    whole = allocations_of_forward_and_backward(rows, 8192, channels, states)
    for made, before in zip(whole, half, strict=True):
        assert 0 < made.largest <= rows * 8192 * channels
        # y and N/32 of it in states, or the gradients of u, delta, B and C: of (R, T, D, N) it would be 16 and more.
        assert made.total < 4 * rows * 8192 * channels
        assert made.total < 2.05 * before.total


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    inputs = random_inputs(3, 40, 4, 5)

    def run(*args):
        return scan(dict(zip(NAMES, args, strict=True)), "torch")

    expected = torch.autograd.grad(run(*inputs.values()).square().sum(), list(inputs.values()))
    checkpoint(run, *inputs.values(), use_reentrant=reentrant).square().sum().backward()
    for name, gradient in zip(NAMES, expected, strict=True):
        assert_close(f"d{name}", inputs[name].grad, gradient, 0)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic):
    inputs = random_inputs(3, 40, 4, 5)

    def run(*args):
        return scan(dict(zip(NAMES, args, strict=True)), "auto", reverse=True)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    expected = torch.autograd.grad(run(*inputs.values()).square().sum(), list(inputs.values()))
    actual = torch.autograd.grad(compiled(*inputs.values()).square().sum(), list(inputs.values()))
    for name, left, right in zip(NAMES, actual, expected, strict=True):
        assert_close(f"d{name}", left, right, 1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_the_operator_keeps_torch_librarys_rules(bias):
    inputs = random_inputs(2, 40, 3, 4)
    arguments = (*inputs.values(),) if bias else (*list(inputs.values())[:-1], None)
    torch.library.opcheck(torch.ops.avion.selective_scan.default, (*arguments, True, False, True))


# ---- choosing a backend, and mistakes ------------------------------------------------------------------


def test_available_backends_run_in_order_of_preference():
    assert resolve_backend("auto", "cpu") == "torch"
    assert available_backends("cpu")[-2:] == ("torch", "reference")


def test_auto_logs_its_pick_once(caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "logged_picks", set())
    caplog.set_level(logging.INFO, logger=dispatch.__name__)
    inputs = random_inputs(1, 2, 3, 4)
    for _ in range(3):
        scan(inputs, "auto")
        scan(inputs, "reference")
    assert [record.getMessage() for record in caplog.records] == ["selective scan on cpu: backend torch"]


def test_unknown_backend_names_the_near_ones():
    with pytest.raises(UserError, match=r"'torhc' does not exist: did you mean torch\?"):
        scan(random_inputs(1, 2, 3, 4), "torhc")
    with pytest.raises(UserError, match="auto or triton or mamba_ssm or torch or reference"):
        resolve_backend("zzz")


def test_a_backend_that_cannot_run_says_why_and_auto_passes_it_by(monkeypatch):
    broken = dispatch.Backend(pytest.fail, lambda device: f"no {device.type} kernels were built")
    monkeypatch.setattr(dispatch, "BACKENDS", {"broken": broken} | dispatch.BACKENDS)
    with pytest.raises(
        UserError, match="'broken' cannot run on cpu: no cpu kernels were built; use (triton or )?torch or reference"
    ):
        scan(random_inputs(1, 2, 3, 4), "broken")
    assert resolve_backend("auto") == "torch"
    assert "broken" not in available_backends()


@pytest.mark.parametrize(
    "name, shape",
    [("delta", (3, 4, 5)), ("A", (5, 6)), ("B", (3, 4, 7)), ("C", (3, 5, 6)), ("D", (5,)), ("delta_bias", (1,))],
)
def test_shapes_that_do_not_fit_are_refused_by_name(name, shape):
    inputs = random_inputs(3, 4, 6, 6) | {name: torch.zeros(shape)}
    with pytest.raises(ValueError, match=f"selective_scan: {name} must be"):
        scan(inputs, "torch")


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="T must be at least 1"):
        scan(random_inputs(3, 0, 6, 6), "torch")
