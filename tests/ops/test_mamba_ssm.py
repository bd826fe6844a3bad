"""The mamba_ssm backend without its packages: functions of the same contract stand in for the CUDA ones."""

import importlib.metadata
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from avion.ops.causal_conv.torch_backend import causal_conv_silu_torch
from avion.ops.selective_scan import mamba_ssm
from avion.ops.selective_scan.inputs import ScanInputs, Time
from tests.ops.named import assert_close
from tests.ops.test_selective_scan import NAMES, random_inputs, scan

calls: list[int] = []


def scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
    """What the CUDA function computes, on (R, D, T) and (R, N, T), with its demands on dtypes and layout."""
    assert u.dtype == delta.dtype == B.dtype == C.dtype and {A.dtype, D.dtype} == {torch.float32}
    assert delta_bias is None or delta_bias.dtype == torch.float32
    assert z is None and not return_last_state
    assert all(x.stride(-1) == 1 or x.shape[-1] == 1 for x in (u, delta, B, C))
    calls.append(len(u))
    step = delta.float() if delta_bias is None else delta.float() + delta_bias[:, None]
    step = F.softplus(step) if delta_softplus else step
    state, ys = u.new_zeros(*u.shape[:2], A.shape[1], dtype=torch.float32), []
    for t in range(u.shape[2]):
        state = (step[..., t, None] * A).exp() * state + (step * u.float())[..., t, None] * B[:, None, :, t].float()
        ys.append((state * C[:, None, :, t].float()).sum(-1))
    return (torch.stack(ys, dim=2) + D[:, None] * u.float()).to(u.dtype)


def conv_fn(x, weight, bias=None, activation=None):
    assert activation == "silu" and 2 <= weight.shape[1] <= 4 and x.is_contiguous()
    calls.append(len(x))
    padded = F.pad(x.float(), (weight.shape[1] - 1, 0))
    return F.silu(F.conv1d(padded, weight.float()[:, None], bias.float(), groups=len(weight))).to(x.dtype)


@pytest.fixture(autouse=True)
def packages(monkeypatch):
    calls.clear()
    interface, conv = ModuleType("mamba_ssm.ops.selective_scan_interface"), ModuleType("causal_conv1d")
    interface.selective_scan_fn, conv.causal_conv1d_fn = scan_fn, conv_fn
    for module in (ModuleType("mamba_ssm"), ModuleType("mamba_ssm.ops"), interface, conv):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def run(inputs, reverse=False, softplus=True):
    return mamba_ssm.selective_scan_mamba_ssm(ScanInputs(**inputs), Time(softplus, reverse))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("rows_a_call", [100, 2])
def test_output_and_gradients_equal_the_references(reverse, rows_a_call, monkeypatch):
    monkeypatch.setattr(mamba_ssm, "rows_per_call", lambda *sizes: rows_a_call)
    inputs = {name: t.detach().float().requires_grad_() for name, t in random_inputs(5, 6, 4, 3).items()}
    exact = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    weight = torch.randn(5, 6, 4)
    actual, expected = run(inputs, reverse), scan(exact, "reference", reverse=reverse)
    assert calls == ([5] if rows_a_call == 100 else [2, 2, 1])
    assert_close("y", actual.double(), expected, 1e-5)
    found = torch.autograd.grad(actual, list(inputs.values()), weight)
    wanted = torch.autograd.grad(expected, list(exact.values()), weight.double())
    for name, left, right in zip(NAMES, found, wanted, strict=True):
        assert_close(f"d{name}", left.double(), right, 1e-5)


def test_mixed_dtypes_as_autocast_leaves_them():
    inputs = {name: t.detach().float() for name, t in random_inputs(2, 3, 4, 5).items()}
    inputs |= {name: inputs[name].bfloat16() for name in ("u", "delta", "B")}  # C stays float32
    y = run(inputs)
    exact = {name: t.double() for name, t in inputs.items()}
    assert y.dtype == torch.bfloat16
    assert_close("y", y.double(), scan(exact, "reference"), 2e-2)


def test_no_rows_and_too_many_states():
    assert run(random_inputs(0, 3, 4, 5)).shape == (0, 3, 4) and calls == []
    with pytest.raises(ValueError, match="up to 256 states, got 300"):
        run(random_inputs(1, 2, 3, 300))


@pytest.mark.parametrize("reverse", [False, True])
def test_convolution(reverse):
    x = torch.randn(3, 5, 2 * 6)[..., :6]
    weight, bias = torch.randn(6, 4), torch.randn(6)
    actual = mamba_ssm.causal_conv_silu_mamba_ssm(x, weight, bias, reverse)
    assert_close("y", actual, causal_conv_silu_torch(x, weight, bias, reverse), 1e-5)


@pytest.mark.parametrize(
    "channels, steps, states", [(768, 4, 16), (768, 8192, 16), (1536, 2049, 64), (2**20, 2**12, 16)]
)
def test_rows_per_call_keep_offsets_within_31_bits(channels, steps, states):
    rows = mamba_ssm.rows_per_call(channels, steps, states)
    chunks = _ceil_divide(steps, 2048)
    largest = channels * max(steps, 2 * states * chunks)
    assert rows >= 1 and (rows * largest < 2**31 or rows == 1) and (rows + 1) * largest >= 2**31


def _ceil_divide(a: int, b: int) -> int:
    return a // b + (a % b > 0)


def test_rows_of_the_training_batch_fit_one_call():
    """64 clips of 196 patches at T = 4, and no more than the 87,381 at which 32-bit offsets end."""
    assert 64 * 196 <= mamba_ssm.rows_per_call(768, 4, 16) <= 87_381


GPU = torch.device("cuda")


@pytest.fixture
def installed(monkeypatch):
    """Sets the versions and whether the extensions load."""

    def install(versions: dict[str, str], loads: bool = True):
        def version(package):
            if package not in versions:
                raise importlib.metadata.PackageNotFoundError(package)
            return versions[package]

        real = importlib.import_module

        def load(name, *arguments):
            if name not in ("selective_scan_cuda", "causal_conv1d_cuda"):
                return real(name, *arguments)
            if not loads:
                raise ImportError("selective_scan_cuda.so: undefined symbol: _ZN3c10\nmore")
            return ModuleType(name)

        monkeypatch.setattr(mamba_ssm.importlib.metadata, "version", version)
        monkeypatch.setattr(mamba_ssm.importlib, "import_module", load)

    return install


def test_why_it_cannot_run(installed):
    good = {"mamba-ssm": "2.3.2.post1", "causal-conv1d": "1.7.0"}
    assert mamba_ssm.unavailable(torch.device("cpu")) == "its kernels are for NVIDIA GPUs"
    installed({})
    assert "mamba-ssm is not installed" in mamba_ssm.unavailable(GPU)
    installed({"mamba-ssm": "2.3.0"})
    assert "causal-conv1d is not installed" in mamba_ssm.unavailable(GPU)
    installed(good | {"mamba-ssm": "1.1.1"})
    assert "mamba-ssm 1.1.1 is known not to work, 2.2 or newer does" in mamba_ssm.unavailable(GPU)
    installed(good | {"causal-conv1d": "1.1.0"})
    assert "causal-conv1d 1.1.0 is known not to work" in mamba_ssm.unavailable(GPU)
    installed(good, loads=False)
    reason = mamba_ssm.unavailable(GPU)
    assert (
        "extension of mamba-ssm 2.3.2.post1 does not load (selective_scan_cuda.so: undefined" in reason
        and "\n" not in reason
    )
    installed(good)
    assert mamba_ssm.unavailable(GPU) is None
