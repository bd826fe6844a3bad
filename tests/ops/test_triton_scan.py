"""The Triton kernels against the float64 reference: on a GPU where there is one, else in Triton's interpreter."""

import pytest
import torch

from avion.errors import UserError
from avion.ops.selective_scan import available_backends, resolve_backend
from tests.ops.named import assert_close, poisoned_memory
from tests.ops.test_selective_scan import NAMES, outputs_and_gradients, random_inputs, scan

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def poison():
    with poisoned_memory():
        yield


def single_precision(inputs: dict, **changes) -> dict:
    cast = {name: None if t is None else t.detach().float() for name, t in (inputs | changes).items()}
    return {name: None if t is None else t.to(DEVICE).requires_grad_() for name, t in cast.items()}


def assert_equals_the_reference(inputs: dict, tolerance: float = 2e-5, **options) -> None:
    """Output and every gradient; the reference computes in float64 from the same numbers."""
    weight = torch.randn_like(inputs["u"])
    exact = {name: None if t is None else t.detach().double().requires_grad_() for name, t in inputs.items()}
    expected = outputs_and_gradients(exact, "reference", weight.double(), **options)
    actual = outputs_and_gradients(inputs, "triton", weight, **options)
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        like = inputs["u" if name == "y" else name.removeprefix("d") if name != "delta" else name]
        assert value.dtype == like.dtype, name
        assert_close(name, value.double(), expected[name], tolerance)


# Rows that divide by no number of programs; D that is not a multiple of the block; N of a power of two and not; one
# step, one chunk, several chunks, a ragged chunk, several segments of time.
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "shape", [(5, 4, 7, 16), (3, 1, 8, 4), (0, 4, 8, 16), (1, 2, 1, 5), (3, 3, 5, 64), (2, 32, 3, 2), (3, 34, 3, 2)]
)
def test_outputs_and_every_gradient_equal_the_references(shape, reverse):
    assert_equals_the_reference(single_precision(random_inputs(*shape)), reverse=reverse)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softplus", [False, True])
def test_without_bias_or_softplus(softplus, bias):
    inputs = random_inputs(3, 5, 6, 3)
    if not softplus:  # Δ itself, then: positive
        inputs |= {name: inputs[name].detach().abs() for name in ("delta", "delta_bias")}
    assert_equals_the_reference(
        single_precision(inputs, **({} if bias else {"delta_bias": None})), delta_softplus=softplus
    )


def test_strided_and_expanded_inputs():
    plain = single_precision(random_inputs(3, 4, 6, 5))
    wide = torch.randn(3, 4, 2 * 6 + 2 * 5, device=DEVICE, requires_grad=True)  # as x_proj hands them out
    u, delta, B, C = wide.split([6, 6, 5, 5], dim=-1)
    transposed = torch.randn(5, 6, device=DEVICE).abs().neg().t()  # A (6, 5)
    strided = plain | {"u": u, "delta": delta, "B": B, "C": C, "A": transposed.requires_grad_()}
    swapped = torch.randn(4, 3, 6, device=DEVICE).transpose(0, 1).requires_grad_()
    one_for_all = torch.randn(1, 4, 5, device=DEVICE, requires_grad=True).expand(3, 4, 5)
    for inputs in (strided, plain | {"u": swapped, "B": one_for_all}):
        weight = torch.randn(3, 4, 6, device=DEVICE)
        expected = outputs_and_gradients(inputs, "reference", weight)
        actual = outputs_and_gradients(inputs, "triton", weight)
        for name in expected:
            assert_close(name, actual[name], expected[name], 2e-5)


@pytest.mark.parametrize("half, tolerance", [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_half_precision_inputs_are_computed_in_float32(half, tolerance):
    """As under autocast: u, delta, B, C in 16 bits, A, D and the bias in float32, as are the latter's gradients."""
    inputs = single_precision(random_inputs(4, 6, 5, 8))
    inputs |= {name: inputs[name].detach().to(half).requires_grad_() for name in ("u", "delta", "B", "C")}
    assert_equals_the_reference(inputs, tolerance)


def test_step_sizes_from_underflow_to_hundreds():
    inputs = single_precision(random_inputs(1, 10, 2, 4))
    sizes = torch.tensor([-200.0, -80.0, -15.0, -6.0, 0.0, 1.0, 19.0, 21.0, 90.0, 500.0], device=DEVICE)
    inputs["delta"] = sizes[None, :, None].expand(1, 10, 2).clone().requires_grad_()
    inputs["delta_bias"] = torch.zeros(2, device=DEVICE, requires_grad=True)
    assert_equals_the_reference(inputs)


def test_small_step_sizes_keep_their_relative_precision():
    """y = Δ·B·u at a single step: softplus of -16 … -4 must not be rounded as a number near 1."""
    raw = torch.linspace(-16, -4, 8, device=DEVICE)
    ones = torch.ones(1, 1, 8, device=DEVICE)
    A, zeros = -torch.ones(8, 1, device=DEVICE), torch.zeros(8, device=DEVICE)
    inputs = dict(zip(NAMES, (ones, raw[None, None], A, ones[..., :1], ones[..., :1], zeros, zeros), strict=True))
    expected = torch.nn.functional.softplus(raw.double())
    assert ((scan(inputs, "triton")[0, 0].double() - expected).abs() / expected).max() < 2e-6


def test_two_runs_agree_bit_for_bit():
    inputs = single_precision(random_inputs(5, 6, 5, 2))
    weight = torch.randn(5, 6, 5, device=DEVICE)
    first, second = (outputs_and_gradients(inputs, "triton", weight) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_only_inputs_and_few_states_are_kept():
    inputs = single_precision(random_inputs(2, 70, 3, 4))
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        scan(inputs, "triton")
    pointers = {tensor.data_ptr() for tensor in inputs.values()}
    extra = [tensor for tensor in saved if tensor.data_ptr() not in pointers]
    assert [tuple(tensor.shape) for tensor in extra] == [(2, 2, 4, 3)]  # before steps 32 and 64


@pytest.mark.parametrize("bias", [False, True])
def test_the_operator_keeps_torch_librarys_rules(bias, monkeypatch):
    from avion.ops.selective_scan import triton_launch

    monkeypatch.setattr(triton_launch, "SEGMENT", 4)  # so that states are kept of few steps
    inputs = single_precision(random_inputs(2, 6, 3, 4))
    assert triton_launch.kept_shape(inputs["u"], 4, True) == (2, 1, 4, 3)
    scan(inputs, "triton")  # registers it
    arguments = (*inputs.values(),) if bias else (*list(inputs.values())[:-1], None)
    torch.library.opcheck(torch.ops.avion.selective_scan_triton.default, (*arguments, True, False, True))


def test_float64_is_refused_and_passed_by():
    with pytest.raises(UserError, match="'triton' cannot run on .*: it computes in float32 and an input is float64"):
        scan(random_inputs(1, 2, 3, 4, device=DEVICE), "triton")
    assert resolve_backend("auto", DEVICE, float64=True) == "torch"
    assert resolve_backend("auto", DEVICE) == ("triton" if DEVICE == "cuda" else "torch")


def test_without_gpu_and_interpreter_it_says_so(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match="'triton' cannot run on cpu: its kernels are for GPUs"):
        resolve_backend("triton", "cpu")
    assert "triton" not in available_backends("cpu")
