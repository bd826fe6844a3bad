import math

import pytest
import torch
import torch.nn.functional as F

from avion.errors import UserError
from avion.models.vim import BiMambaMixer

# Forward parameter -> its backward twin.
TWINS = {
    "conv1d.weight": "conv1d_b.weight",
    "conv1d.bias": "conv1d_b.bias",
    "x_proj.weight": "x_proj_b.weight",
    "dt_proj.weight": "dt_proj_b.weight",
    "dt_proj.bias": "dt_proj_b.bias",
    "A_log": "A_b_log",
    "D": "D_b",
}


def random_mixer(dim=6, **options) -> BiMambaMixer:
    """Float64, with no parameter at an initial value that hides it (D = 1, equal A rows, small steps)."""
    mixer = BiMambaMixer(dim, **options).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.normal_(std=0.5)
    return mixer


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


# ---- what it computes --------------------------------------------------------------------------------


def by_hand(mixer: BiMambaMixer, h: torch.Tensor) -> torch.Tensor:
    """One row h (T, D), element by element, straight from the definition (facts: "bimamba v2")."""
    p = {name: parameter.detach() for name, parameter in mixer.named_parameters()}
    steps, inner, rank, states = h.shape[0], p["D"].shape[0], mixer.dt_rank, mixer.d_state
    taps = p["conv1d.weight"].shape[2]
    xz = h @ p["in_proj.weight"].t()  # (T, 2I)
    x, z = xz[:, :inner], xz[:, inner:]
    total = torch.zeros(steps, inner, dtype=h.dtype)
    for suffix, A_log, order in [("", "A_log", range(steps)), ("_b", "A_b_log", range(steps - 1, -1, -1))]:
        order = list(order)  # the order in which this direction sees the steps
        u = torch.zeros(steps, inner, dtype=h.dtype)
        for place, t in enumerate(order):
            for i in range(inner):
                value = p[f"conv1d{suffix}.bias"][i].item()
                for k in range(taps):  # the last tap weighs the step itself, the first the oldest
                    seen = place - (taps - 1) + k
                    if seen >= 0:
                        value += p[f"conv1d{suffix}.weight"][i, 0, k].item() * x[order[seen], i].item()
                u[t, i] = value * sigmoid(value)
        state = torch.zeros(inner, states, dtype=h.dtype)
        for t in order:
            projected = p[f"x_proj{suffix}.weight"] @ u[t]
            dt, B, C = projected[:rank], projected[rank : rank + states], projected[rank + states :]
            for i in range(inner):
                raw = (p[f"dt_proj{suffix}.weight"][i] @ dt + p[f"dt_proj{suffix}.bias"][i]).item()
                step = math.log1p(math.exp(raw))
                for n in range(states):
                    decay = math.exp(-step * math.exp(p[A_log][i, n].item()))
                    state[i, n] = decay * state[i, n] + step * B[n] * u[t, i]
                total[t, i] += state[i] @ C + p[f"D{suffix}"][i] * u[t, i]
    gated = torch.tensor([[total[t, i] * z[t, i] * sigmoid(z[t, i]) for i in range(inner)] for t in range(steps)])
    return gated @ p["out_proj.weight"].t()


@pytest.mark.parametrize("options", [{}, {"expand": 2, "d_state": 3, "d_conv": 2, "dt_rank": 2}])
@pytest.mark.parametrize("steps", [1, 5])
def test_it_is_the_definition_written_out_per_element(steps, options):
    mixer = random_mixer(4, **options)
    h = torch.randn(2, steps, 4, dtype=torch.float64)
    expected = torch.stack([by_hand(mixer, row) for row in h])
    torch.testing.assert_close(mixer(h), expected, rtol=1e-11, atol=1e-11)


def test_swapped_directions_on_reversed_time_give_the_reversed_output():
    mixer, twin = random_mixer(), random_mixer()
    state = mixer.state_dict()
    swapped = dict(state)
    for forward, backward in TWINS.items():
        swapped[forward], swapped[backward] = state[backward], state[forward]
    twin.load_state_dict(swapped)
    h = torch.randn(3, 7, 6, dtype=torch.float64)
    torch.testing.assert_close(twin(h.flip(1)).flip(1), mixer(h), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(twin(h), mixer(h), atol=1e-3)  # the directions do differ


def test_gradcheck():
    mixer = random_mixer(3, d_state=2, d_conv=3, dt_rank=1)
    names = [name for name, _ in mixer.named_parameters()]
    h = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)

    def run(h, *parameters):
        return torch.func.functional_call(mixer, dict(zip(names, parameters, strict=True)), (h,))

    assert torch.autograd.gradcheck(run, (h, *mixer.parameters()))


def test_backends_agree_in_outputs_and_every_gradient():
    fast = random_mixer(8, scan_backend="torch")
    slow = BiMambaMixer(8, scan_backend="reference").double()
    slow.load_state_dict(fast.state_dict())
    h, weight = torch.randn(2, 5, 9, 8, dtype=torch.float64).unbind(0)
    outputs = []
    for mixer in (fast, slow):
        y = mixer(h)
        (y * weight).sum().backward()
        outputs.append({"y": y} | {name: p.grad for name, p in mixer.named_parameters()})
    assert len(outputs[0]) == 17  # y and every parameter
    for name in outputs[1]:
        torch.testing.assert_close(outputs[0][name], outputs[1][name], rtol=1e-10, atol=1e-10, msg=name)


def test_rows_do_not_see_each_other():
    mixer = random_mixer()
    h = torch.randn(5, 4, 6, dtype=torch.float64)
    torch.testing.assert_close(mixer(h)[3:4], mixer(h[3:4]), rtol=1e-12, atol=1e-12)


def test_no_rows():
    assert random_mixer()(torch.zeros(0, 4, 6, dtype=torch.float64)).shape == (0, 4, 6)


# ---- precision, compilation ----------------------------------------------------------------------------


def test_autocast_keeps_parameters_gradients_in_float32_and_stays_near():
    mixer = BiMambaMixer(32)
    h = torch.randn(6, 8, 32, requires_grad=True)
    expected = mixer(h)
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer(h)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert {p.grad.dtype for p in mixer.parameters()} == {torch.float32}
    scale = expected.abs().max()
    assert (y.float() - expected).abs().max() / scale < 0.05


def test_compiles_into_one_graph():
    mixer = random_mixer(8)
    h = torch.randn(3, 4, 8, dtype=torch.float64)
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(h), mixer(h), rtol=1e-12, atol=1e-12)


# ---- parameters ----------------------------------------------------------------------------------------


def test_parameters_are_those_of_the_released_checkpoints():
    mixer = BiMambaMixer(768)
    shapes = {name: tuple(p.shape) for name, p in mixer.named_parameters()}
    assert sum(math.prod(shape) for shape in shapes.values()) == 2_001_408
    one_direction = {
        "conv1d.weight": (768, 1, 4),
        "conv1d.bias": (768,),
        "x_proj.weight": (80, 768),
        "dt_proj.weight": (768, 48),
        "dt_proj.bias": (768,),
        "A_log": (768, 16),
        "D": (768,),
    }
    expected = one_direction | {TWINS[name]: shape for name, shape in one_direction.items()}
    assert shapes == expected | {"in_proj.weight": (1536, 768), "out_proj.weight": (768, 768)}
    assert set(mixer.state_dict()) == set(shapes)


def test_expansion_widens_the_inside():
    shapes = {name: tuple(p.shape) for name, p in BiMambaMixer(8, expand=2).named_parameters()}
    assert (shapes["in_proj.weight"], shapes["out_proj.weight"], shapes["A_log"]) == ((32, 8), (8, 16), (16, 16))


def test_initial_values():
    mixer = BiMambaMixer(256)
    for A_log, D in ((mixer.A_log, mixer.D), (mixer.A_b_log, mixer.D_b)):
        torch.testing.assert_close(A_log.exp(), torch.arange(1.0, 17).expand(256, 16))
        assert (D == 1).all()
    bound = 16**-0.5
    for weight in (mixer.dt_proj.weight, mixer.dt_proj_b.weight):
        assert 0.95 * bound < weight.abs().max() <= bound
    steps = F.softplus(mixer.dt_proj.bias)
    assert (steps > 0.99e-3).all() and (steps < 0.101).all()
    # Log-uniform: about half of the 256 below the geometric mean 0.01 (binomial, five deviations).
    assert abs((steps < 0.01).sum().item() - 128) < 40
    # The backward direction's bias is nn.Linear's own: centred on zero, hence steps near log 2.
    assert mixer.dt_proj_b.bias.abs().max() <= bound and (mixer.dt_proj_b.bias > 0).any()


def test_unknown_scan_backend_is_refused_at_once():
    with pytest.raises(UserError, match=r"'refrence' does not exist: did you mean reference\?"):
        BiMambaMixer(8, scan_backend="refrence")


def test_an_adapter_or_a_hook_on_x_proj_is_not_passed_by():
    """The operator for short rows on a CPU takes x_proj's weight; a module that does more has to be called."""
    mixer = random_mixer(6)
    h = torch.randn(2, 4, 6, dtype=torch.float64)
    plain = mixer(h)
    seen = []
    handle = mixer.x_proj_b.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    torch.testing.assert_close(mixer(h), plain, rtol=1e-11, atol=1e-11)
    assert len(seen) == 1
    handle.remove()

    class Adapted(torch.nn.Linear):
        def forward(self, u):
            return super().forward(u) + 1

    adapted = Adapted(mixer.x_proj.in_features, mixer.x_proj.out_features, bias=False).double()
    adapted.load_state_dict(mixer.x_proj.state_dict())
    mixer.x_proj = adapted
    assert not torch.allclose(mixer(h), plain)
