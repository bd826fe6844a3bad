"""Both directions and the gate in one function, against the float64 reference."""

import pytest
import torch
import torch.nn.functional as F

from avion.errors import UserError
from avion.ops.gated_scan import ScanInputs, gated_bidirectional_scan
from tests.ops.named import assert_close, poisoned_memory
from tests.ops.test_selective_scan import NAMES, random_inputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def poison():
    with poisoned_memory():
        yield


@pytest.fixture(params=["torch", "triton"])
def backend(request) -> str:
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


class Case:
    """Inputs of both directions, z and the output's weight; in float32 unless told otherwise."""

    def __init__(self, *shape: int, dtype: torch.dtype = torch.float32, z: torch.Tensor | None = None):
        rows, steps, channels, _ = shape

        def own(tensor: torch.Tensor, name: str) -> torch.Tensor:
            wanted = dtype if name in ("u", "delta", "B", "C", "z") else torch.float32
            return tensor.detach().to(DEVICE, wanted).requires_grad_()

        self.ahead, self.behind = (
            ScanInputs(*(own(t, name) for name, t in random_inputs(*shape).items())) for _ in range(2)
        )
        self.z = own(torch.randn(rows, steps, channels), "z") if z is None else z
        self.weight = torch.randn(rows, steps, channels, device=DEVICE)

    def tensors(self) -> dict[str, torch.Tensor]:
        named = {f"{name} ahead": t for name, t in zip(NAMES, self.ahead, strict=True)}
        named |= {f"{name} behind": t for name, t in zip(NAMES, self.behind, strict=True)}
        return named | {"z": self.z}

    def run(self, backend: str) -> dict[str, torch.Tensor]:
        """The output and every gradient."""
        out = gated_bidirectional_scan(self.ahead, self.behind, self.z, backend=backend)
        return self._with_gradients(out, self.tensors(), self.weight.to(out.dtype))

    def expected(self) -> dict[str, torch.Tensor]:
        """In float64, written out: each direction step by step, the second one on flipped inputs."""
        tensors = {name: t.detach().double().requires_grad_() for name, t in self.tensors().items()}
        values = list(tensors.values())
        y = [_by_hand(*values[:7]), _by_hand(*(t.flip(1) if t.ndim == 3 else t for t in values[7:14])).flip(1)]
        return self._with_gradients((y[0] + y[1]) * F.silu(values[14]), tensors, self.weight.double())

    @staticmethod
    def _with_gradients(out, tensors, weight) -> dict[str, torch.Tensor]:
        grads = torch.autograd.grad(out, list(tensors.values()), weight)
        return {"out": out.detach(), **{f"d {name}": g for name, g in zip(tensors, grads, strict=True)}}


def _by_hand(u, delta, A, B, C, D, bias) -> torch.Tensor:
    size = F.softplus(delta + bias)
    state, ys = torch.zeros(len(u), *A.shape, dtype=u.dtype, device=u.device), []
    for t in range(u.shape[1]):
        drive = (size[:, t] * u[:, t])[..., None] * B[:, t, None]
        state = torch.exp(size[:, t, :, None] * A) * state + drive
        ys.append((state * C[:, t, None]).sum(-1) + D * u[:, t])
    return torch.stack(ys, dim=1)


def assert_equal(case: Case, backend: str, tolerance: float = 2e-5) -> None:
    actual, expected = case.run(backend), case.expected()
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert_close(name, value.double(), expected[name], tolerance)


# One step, one chunk, several with and without a remainder, several segments, few and long rows in several parts;
# channels and states that do and do not fill their blocks. Where there are many steps, the interpreter takes one state
# to a tensor, as a GPU does, since there are two states.
@pytest.mark.parametrize(
    "shape",
    [
        (2, 4, 8, 16),
        (3, 1, 7, 4),
        (4, 2, 4, 5),
        (2, 11, 5, 3),
        (3, 34, 3, 2),
        (1, 66, 3, 2),
        (1, 33, 1, 2),
    ],
)
def test_output_and_every_gradient_equal_those_by_hand(shape, backend):
    assert_equal(Case(*shape), backend)


def test_no_rows(backend):
    case = Case(0, 4, 6, 3)
    for name, value in case.run(backend).items():
        expected = case.tensors().get(name.removeprefix("d "), case.z)
        assert value.shape == expected.shape and not value.any(), name


def test_z_and_inputs_of_any_strides(backend):
    wide = torch.randn(2, 5, 12, device=DEVICE).requires_grad_()
    case = Case(2, 5, 6, 3, z=wide.chunk(2, dim=-1)[1])
    turned = case.ahead.u.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    case.ahead = case.ahead._replace(u=turned)
    assert_equal(case, backend)


@pytest.mark.parametrize("half, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
def test_half_precision(half, tolerance, backend):
    case = Case(2, 5, 5, 3, dtype=half)
    assert {n: t.dtype for n, t in case.run(backend).items() if t.dtype != half}.keys() == {
        f"d {name} {which}" for which in ("ahead", "behind") for name in ("A", "D", "delta_bias")
    }
    assert_equal(case, backend, tolerance)


# As a GPU runs them, a state to a tensor and 32 threads: training's plan, one with a ragged chunk, block and group, and
# one with several segments in two parts.
@pytest.mark.parametrize(
    ("plan", "shape", "dtype", "tolerance"),
    [
        ((64, 4, 4, 1, 2), (3, 4, 128, 16), torch.bfloat16, 2e-2),
        ((64, 4, 4, 1, 2), (2, 4, 64, 16), torch.float32, 2e-5),
        ((128, 2, 8, 1, 1), (1, 3, 70, 12), torch.float16, 4e-3),
        ((32, 4, 4, 2, 2), (1, 37, 3, 3), torch.float32, 2e-5),
    ],
)
def test_plans_for_gpus(plan, shape, dtype, tolerance, monkeypatch):
    pytest.importorskip("triton")
    from avion.ops.selective_scan import triton_launch

    monkeypatch.setattr(triton_launch, "forward_plans", lambda u, states: [triton_launch.Plan(*plan)])
    monkeypatch.setattr(triton_launch, "backward_plans", lambda u, states: [triton_launch.Plan(*plan)])
    case = Case(*shape, dtype=dtype)
    rows, steps, channels, states = shape
    weights = torch.randn(rows, steps, 2 * states + 4, device=DEVICE).to(dtype)  # B and C as x_proj hands them out
    for name, start in (("B", 4), ("C", 4 + states)):
        case.ahead = case.ahead._replace(**{name: weights[..., start : start + states].requires_grad_()})
    assert_equal(case, "triton", tolerance)


def test_two_runs_agree_bit_for_bit(backend, monkeypatch):
    if backend == "triton":
        from avion.ops.selective_scan import triton_launch

        monkeypatch.setattr(triton_launch, "SEGMENT", 8)  # so that few steps are several segments and parts
    case = Case(1, 18, 3, 2)
    first, second = case.run(backend), case.run(backend)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_float64_where_the_backend_has_it():
    case = Case(2, 3, 4, 2)
    doubles = [ScanInputs(*(t.double() for t in p)) for p in (case.ahead, case.behind)]
    out = gated_bidirectional_scan(*doubles, case.z.double(), backend="torch")
    assert_close("out", out.detach(), case.expected()["out"], 1e-12)
    with pytest.raises(UserError, match="'triton' cannot run on .*float64"):
        gated_bidirectional_scan(*doubles, case.z.double(), backend="triton")


@pytest.mark.parametrize("field, shape", [("B", (2, 3, 5)), ("u", (2, 4, 4)), ("A", (3, 2))])
@pytest.mark.parametrize("which", ["forward", "backward"])
def test_shapes_that_do_not_fit_are_refused(which, field, shape, backend):
    case = Case(2, 3, 4, 2)
    both = {"forward": case.ahead, "backward": case.behind}
    both[which] = both[which]._replace(**{field: torch.zeros(shape, device=DEVICE)})
    with pytest.raises(ValueError, match=r"must be \("):
        gated_bidirectional_scan(both["forward"], both["backward"], case.z, backend=backend)


def test_z_of_another_shape_is_refused(backend):
    case = Case(2, 3, 4, 2)
    with pytest.raises(ValueError, match=r"z must be \(2, 3, 4\) as u is, got \(2, 3, 5\)"):
        gated_bidirectional_scan(case.ahead, case.behind, torch.zeros(2, 3, 5, device=DEVICE), backend=backend)


def test_only_inputs_and_few_states_are_kept_by_triton():
    pytest.importorskip("triton")
    case = Case(3, 34, 3, 4)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        gated_bidirectional_scan(case.ahead, case.behind, case.z, backend="triton")
    inputs = {t.data_ptr() for t in case.tensors().values()}
    extra = [tuple(t.shape) for t in saved if t.data_ptr() not in inputs]
    assert extra == [(3, 1, 4, 3)] * 2  # before step 32, of either direction


def test_tritons_operator_keeps_torch_librarys_rules(monkeypatch):
    pytest.importorskip("triton")
    from avion.ops.selective_scan import triton_launch

    monkeypatch.setattr(triton_launch, "SEGMENT", 4)  # so that states are kept of few steps
    case = Case(2, 6, 3, 4)
    assert triton_launch.kept_shape(case.z, 4, True) == (2, 1, 4, 3)
    case.run("triton")  # registers it
    arguments = (list(case.ahead), list(case.behind), case.z, True)
    torch.library.opcheck(torch.ops.avion.gated_scan_triton.default, arguments)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiled_and_checkpointed_mixers_give_the_same_gradients(checkpointed, backend):
    from torch.utils.checkpoint import checkpoint

    from avion.models.vim import BiMambaMixer

    torch.manual_seed(3)
    mixer = BiMambaMixer(6, d_state=2, scan_backend=backend).to(DEVICE)
    h = torch.randn(2, 3, 6, device=DEVICE)

    def gradients(run) -> list[torch.Tensor]:
        mixer.zero_grad()
        out = run(h)
        out.square().sum().backward()
        return [out.detach().clone(), *(p.grad.clone() for p in mixer.parameters())]

    def again(x):
        return checkpoint(mixer, x, use_reentrant=False)

    plain = gradients(mixer)
    changed = gradients(again if checkpointed else torch.compile(mixer, fullgraph=True, backend="aot_eager"))
    for actual, expected in zip(changed, plain, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_directions_without_a_bias(backend):
    case = Case(2, 3, 5, 2)
    no_bias = [p._replace(delta_bias=None) for p in (case.ahead, case.behind)]
    zero_bias = [p._replace(delta_bias=torch.zeros_like(p.D)) for p in (case.ahead, case.behind)]
    out, expected = (gated_bidirectional_scan(*p, case.z, backend=backend) for p in (no_bias, zero_bias))
    assert_close("out", out, expected, 0)
    grads = (torch.autograd.grad(y, case.ahead[:6], case.weight) for y in (out, expected))
    for name, a, b in zip(NAMES[:6], *grads, strict=True):
        assert_close(f"d {name}", a, b, 0)
