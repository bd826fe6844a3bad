"""The `torch` backend of both directions and the gate against two reference scans and plain operators."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from avion.ops.buffers import forget_spare_buffers
from avion.ops.gated_scan import ScanInputs, gated_bidirectional_scan
from avion.ops.selective_scan import torch_blocks
from tests.ops.named import assert_close, poisoned_memory
from tests.ops.test_selective_scan import NAMES, random_inputs, scan


@pytest.fixture(autouse=True)
def poison():
    forget_spare_buffers()  # memory of earlier calls holds numbers, not NaN
    with poisoned_memory():
        yield


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks in a group, several groups, several blocks of time."""
    monkeypatch.setattr(torch_blocks, "MAX_STEPS", 4)
    monkeypatch.setattr(torch_blocks, "budget", lambda device: torch_blocks.Budget(block=160, group=80))


def both(ahead: dict, behind: dict, z: torch.Tensor, backend: str = "torch") -> torch.Tensor:
    inputs = (ScanInputs(*(p[name] for name in NAMES)) for p in (ahead, behind))
    return gated_bidirectional_scan(*inputs, z, backend=backend)


def definition(ahead: dict, behind: dict, z: torch.Tensor) -> torch.Tensor:
    return (scan(ahead, "reference") + scan(behind, "reference", reverse=True)) * F.silu(z)


def random_case(rows, steps, channels, states, dtype=torch.float64) -> tuple[dict, dict, torch.Tensor]:
    """z is half of a wider tensor, as in the mixer."""
    ahead, behind = (random_inputs(rows, steps, channels, states, dtype) for _ in range(2))
    wide = torch.randn(rows, steps, 2 * channels, dtype=dtype, requires_grad=True)
    return ahead, behind, wide[..., channels:]


def gradients(output: torch.Tensor, case, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    ahead, behind, z = case
    found = torch.autograd.grad(output, [*ahead.values(), *behind.values(), z], weight)
    names = [f"d{name}" for name in NAMES] + [f"d{name} behind" for name in NAMES] + ["dz"]
    return dict(zip(names, found, strict=True))


def assert_equals_the_definition(case, tolerance: float = 1e-11) -> None:
    exact = [{name: t.detach().double().requires_grad_() for name, t in p.items()} for p in case[:2]]
    exact.append(case[2].detach().double().requires_grad_())
    actual, expected = both(*case), definition(*exact)
    assert actual.dtype == case[0]["u"].dtype
    assert_close("out", actual.double(), expected, tolerance)
    weight = torch.randn_like(actual)
    found, wanted = gradients(actual, case, weight), gradients(expected, exact, weight.double())
    inputs = [*case[0].values(), *case[1].values(), case[2]]
    for (name, gradient), like in zip(found.items(), inputs, strict=True):
        assert gradient.dtype == like.dtype, name
        assert_close(name, gradient.double(), wanted[name], tolerance)
    with torch.no_grad():
        assert_close("out, nothing kept", both(*case), actual.detach(), 1e-12 if actual.dtype.itemsize == 8 else 1e-6)


@pytest.mark.parametrize("shape", [(5, 4, 7, 16), (3, 1, 8, 4), (0, 4, 8, 16), (2, 33, 3, 4)])
def test_output_and_every_gradient_equal_the_definition(shape):
    assert_equals_the_definition(random_case(*shape))


@pytest.mark.parametrize("rows, steps", [(1, 4), (13, 3), (5, 5), (9, 14)])
def test_blocks_of_rows_and_time_join_seamlessly(small_blocks, rows, steps):
    assert_equals_the_definition(random_case(rows, steps, 5, 4))


def test_float32_where_one_direction_is_float64():
    ahead, behind, z = random_case(3, 4, 5, 6)
    ahead = {name: t.detach().float().requires_grad_() for name, t in ahead.items()}
    assert_equals_the_definition((ahead, behind, z), 1e-5)


@pytest.mark.parametrize("half, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_half_precision_inputs_are_computed_in_float32(half, tolerance):
    """As under autocast: u, delta, B, C and z in 16 bits, A, D and the bias in float32."""
    ahead, behind, z = random_case(4, 6, 5, 8, torch.float32)
    halved = [
        {n: (t.detach().to(half) if t.ndim == 3 else t.detach()).requires_grad_() for n, t in p.items()}
        for p in (ahead, behind)
    ]
    with torch.autocast("cpu", torch.bfloat16):
        assert_equals_the_definition((*halved, z.detach().to(half).requires_grad_()), tolerance)


def test_two_runs_agree_bit_for_bit():
    case = random_case(7, 6, 5, 4, torch.float32)
    weight = torch.randn(7, 6, 5)
    first, second = (gradients(both(*case), case, weight) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_what_is_kept_is_the_inputs_the_sum_and_few_states():
    case = random_case(3, 70, 8, 16)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        both(*case)
    given = {t.data_ptr() for t in (*case[0].values(), *case[1].values(), case[2])}
    extra = [tuple(t.shape) for t in saved if t.data_ptr() not in given]
    assert extra == [(3, 70, 8), (3, 2, 16, 8), (3, 2, 16, 8)]


def test_activation_checkpointing_and_compilation():
    ahead, behind, z = random_case(3, 40, 4, 5)
    inputs = [*ahead.values(), *behind.values(), z.detach().requires_grad_()]

    def run(*args):
        return both(dict(zip(NAMES, args[:7], strict=True)), dict(zip(NAMES, args[7:14], strict=True)), args[14])

    expected = torch.autograd.grad(run(*inputs).square().sum(), inputs)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for output in (checkpoint(run, *inputs, use_reentrant=False), compiled(*inputs)):
        for left, right in zip(torch.autograd.grad(output.square().sum(), inputs), expected, strict=True):
            assert_close("gradient", left, right, 1e-12)


def test_the_operator_keeps_torch_librarys_rules():
    ahead, behind, z = random_case(2, 40, 3, 4)
    arguments = (list(ahead.values()), list(behind.values()), z.detach().requires_grad_(), True)
    torch.library.opcheck(torch.ops.avion.gated_scan.default, arguments)


def test_a_gate_of_another_shape_is_refused():
    ahead, behind, z = random_case(2, 3, 4, 5)
    with pytest.raises(ValueError, match=r"z must be \(2, 3, 4\) as u is, got \(2, 2, 4\)"):
        both(ahead, behind, z[:, :2])
