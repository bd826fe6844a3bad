import math

import pytest
import torch
import torch.nn.functional as F

from avion.ops.buffers import forget_spare_buffers
from avion.ops.causal_conv import causal_conv_silu, causal_conv_silu_both
from avion.ops.causal_conv import torch_backend as blocked
from tests.ops.named import assert_close, poisoned_memory


@pytest.fixture(autouse=True)
def poison():
    forget_spare_buffers()  # memory of earlier calls holds numbers, not NaN
    with poisoned_memory():
        yield


def by_conv1d(x, weight, bias, reverse):
    """The definition: flip, pad on the left, depthwise conv1d in (R, D, T), flip back."""
    taps = weight.shape[1]
    x = (x.flip(1) if reverse else x).transpose(1, 2)
    y = F.conv1d(F.pad(x, (taps - 1, 0)), weight[:, None], bias, groups=weight.shape[0]).transpose(1, 2)
    return F.silu(y.flip(1) if reverse else y)


def random_inputs(rows, steps, channels, taps, dtype=torch.float64):
    """x is half of a wider tensor, as in the mixer."""
    wide = torch.randn(rows, steps, 2 * channels, dtype=dtype, requires_grad=True)
    weight = torch.randn(channels, taps, dtype=dtype, requires_grad=True)
    bias = torch.randn(channels, dtype=dtype, requires_grad=True)
    return wide, weight, bias


@pytest.mark.parametrize("block", [200_000, 12])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "shape", [(5, 4, 7, 4), (3, 1, 6, 4), (0, 4, 5, 4), (2, 23, 3, 3), (4, 5, 8, 2), (3, 2, 5, 4), (2, 9, 4, 1)]
)
def test_outputs_and_gradients_equal_conv1ds(shape, reverse, block, monkeypatch):
    monkeypatch.setattr(blocked, "BLOCK_ELEMENTS", block)  # 12: blocks of one row and a few steps
    wide, weight, bias = random_inputs(*shape)
    x = wide[..., : shape[2]]
    expected, actual = by_conv1d(x, weight, bias, reverse), causal_conv_silu(x, weight, bias, reverse=reverse)
    assert_close("y", actual, expected, 1e-12)
    loss_weight = torch.randn_like(actual)
    inputs = (wide, weight, bias)
    pairs = zip(
        ("dx", "dweight", "dbias"),
        torch.autograd.grad(actual, inputs, loss_weight),
        torch.autograd.grad(expected, inputs, loss_weight),
        strict=True,
    )
    for name, left, right in pairs:
        assert_close(name, left, right, 1e-12)


@pytest.mark.parametrize("block", [200_000, 12])
@pytest.mark.parametrize("shape", [(5, 4, 7, 4), (0, 4, 5, 4), (2, 23, 3, 3), (2, 9, 4, 1)])
def test_both_directions_at_once_equal_each_alone(shape, block, monkeypatch):
    monkeypatch.setattr(blocked, "BLOCK_ELEMENTS", block)
    wide, *ahead = random_inputs(*shape)
    behind = random_inputs(*shape)[1:]
    x, inputs = wide[..., : shape[2]], (wide, *ahead, *behind)
    actual = torch.cat(causal_conv_silu_both(x, ahead, behind))
    expected = torch.cat([by_conv1d(x, *ahead, False), by_conv1d(x, *behind, True)])
    assert_close("y", actual, expected, 1e-12)
    loss_weight = torch.randn_like(actual)
    found = torch.autograd.grad(actual, inputs, loss_weight)
    wanted = torch.autograd.grad(expected, inputs, loss_weight)
    for name, left, right in zip(("dx", "dw", "db", "dw behind", "db behind"), found, wanted, strict=True):
        assert_close(name, left, right, 1e-12)


def test_gradients_of_one_of_both_directions_only():
    wide, *ahead = random_inputs(2, 5, 3, 4)
    behind = random_inputs(2, 5, 3, 4)[1:]
    x = wide[..., :3]
    (actual,) = torch.autograd.grad(causal_conv_silu_both(x, ahead, behind)[1].square().sum(), wide)
    (expected,) = torch.autograd.grad(by_conv1d(x, *behind, True).square().sum(), wide)
    assert_close("dx", actual, expected, 1e-12)


@pytest.mark.parametrize("reverse", [False, True])
def test_by_hand(reverse):
    x, weight, bias = [1.0, -2.0, 3.0], [0.5, 2.0], 0.25
    # Forward: y_t = b + 2 x_t + 0.5 x_{t-1}; reverse: y_t = b + 2 x_t + 0.5 x_{t+1}.
    sums = [2.25 - 1.0, -3.75 + 1.5, 6.25] if reverse else [2.25, -3.75 + 0.5, 6.25 - 1.0]
    expected = [value / (1 + math.exp(-value)) for value in sums]
    y = causal_conv_silu(torch.tensor(x).view(1, 3, 1), torch.tensor([weight]), torch.tensor([bias]), reverse=reverse)
    assert y.flatten().tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("reverse", [False, True])
def test_gradcheck(reverse, monkeypatch):
    monkeypatch.setattr(blocked, "BLOCK_ELEMENTS", 6)
    inputs = random_inputs(2, 5, 3, 4)
    assert torch.autograd.gradcheck(
        lambda *args: causal_conv_silu(*args, reverse=reverse), (inputs[0][..., :3], *inputs[1:])
    )


@pytest.mark.parametrize("half, tolerance", [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_half_precision_x_is_summed_in_float32(half, tolerance):
    wide, weight, bias = random_inputs(4, 6, 5, 4, torch.float32)
    x = wide[..., :5].detach().to(half).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = causal_conv_silu(x, weight, bias)
    loss_weight = torch.randn(4, 6, 5).to(half)
    actual = torch.autograd.grad(y, (x, weight, bias), loss_weight)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight, bias)]
    expected_y = by_conv1d(*exact, False)
    expected = torch.autograd.grad(expected_y, exact, loss_weight.double())
    assert (y.dtype, actual[0].dtype, actual[1].dtype) == (half, half, torch.float32)
    assert_close("y", y.double(), expected_y, tolerance)
    assert_close("dx", actual[0].double(), expected[0], tolerance)
    assert_close("dweight", actual[1].double(), expected[1], 1e-5)
    assert_close("dbias", actual[2].double(), expected[2], 1e-5)


def test_the_operator_keeps_torch_librarys_rules():
    wide, weight, bias = random_inputs(2, 5, 3, 4)
    x = wide[..., :3].detach().requires_grad_()
    torch.library.opcheck(torch.ops.avion.causal_conv_silu.default, (x, weight, bias, True))
    arguments = (x, weight, bias, weight.detach().clone().requires_grad_(), bias.detach().clone().requires_grad_())
    torch.library.opcheck(torch.ops.avion.causal_conv_silu_both.default, arguments)


def test_shapes_that_do_not_fit_are_refused():
    wide, weight, bias = random_inputs(2, 5, 3, 4)
    with pytest.raises(ValueError, match=r"expected x \(R, T, D\), weight \(D, K\), bias \(D,\), got \(2, 5, 6\)"):
        causal_conv_silu(wide, weight, bias)


# Rows and steps that fill no number of tiles; D that is not a multiple of the block; K from 2 to 4.
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", [(5, 4, 7, 4), (3, 1, 6, 4), (0, 4, 5, 4), (2, 11, 3, 3), (4, 5, 8, 2)])
def test_triton_kernels_equal_conv1d_in_float64(shape, reverse):
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = [t.detach().float().to(device).requires_grad_() for t in random_inputs(*shape)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    actual = causal_conv_silu(inputs[0][..., : shape[2]], *inputs[1:], reverse=reverse, backend="triton")
    expected = by_conv1d(exact[0][..., : shape[2]], *exact[1:], reverse)
    assert_close("y", actual.double(), expected, 1e-5)
    loss_weight = torch.randn_like(actual)
    found = torch.autograd.grad(actual, inputs, loss_weight)
    wanted = torch.autograd.grad(expected, exact, loss_weight.double())
    for name, left, right in zip(("dx", "dweight", "dbias"), found, wanted, strict=True):
        assert_close(name, left.double(), right, 1e-5)
    again = torch.autograd.grad(
        causal_conv_silu(inputs[0][..., : shape[2]], *inputs[1:], reverse=reverse, backend="triton"),
        inputs,
        loss_weight,
    )
    assert all(torch.equal(left, right) for left, right in zip(found, again, strict=True))


def test_the_triton_operator_keeps_torch_librarys_rules():
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, weight, bias = (t.detach().float().to(device).requires_grad_() for t in random_inputs(2, 5, 3, 4))
    causal_conv_silu(x[..., :3], weight, bias, backend="triton")  # registers it
    torch.library.opcheck(torch.ops.avion.causal_conv_silu_triton.default, (x[..., :3], weight, bias, True))


@pytest.mark.parametrize("shape", [(5, 4, 7, 4), (3, 1, 6, 4), (0, 4, 5, 4), (2, 11, 3, 3)])
def test_triton_kernels_of_both_directions_equal_conv1d_in_float64(shape):
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = (*random_inputs(*shape), *random_inputs(*shape)[1:])
    inputs = [t.detach().float().to(device).requires_grad_() for t in tensors]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    x, channels = inputs[0], shape[2]
    actual = torch.cat(causal_conv_silu_both(x[..., :channels], inputs[1:3], inputs[3:], backend="triton"))
    by_hand = [by_conv1d(exact[0][..., :channels], *exact[i : i + 2], i == 3) for i in (1, 3)]
    expected = torch.cat(by_hand)
    assert_close("y", actual.double(), expected, 1e-5)
    loss_weight = torch.randn_like(actual)
    found = torch.autograd.grad(actual, inputs, loss_weight)
    wanted = torch.autograd.grad(expected, exact, loss_weight.double())
    for name, left, right in zip(("dx", "dw", "db", "dw behind", "db behind"), found, wanted, strict=True):
        assert_close(name, left.double(), right, 1e-5)


def test_the_triton_operator_of_both_directions_keeps_torch_librarys_rules():
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = (*random_inputs(2, 5, 3, 4), *random_inputs(2, 5, 3, 4)[1:])
    x, *parameters = (t.detach().float().to(device).requires_grad_() for t in tensors)
    causal_conv_silu_both(x[..., :3], parameters[:2], parameters[2:], backend="triton")  # registers it
    torch.library.opcheck(torch.ops.avion.causal_conv_silu_both_triton.default, (x[..., :3], *parameters))
