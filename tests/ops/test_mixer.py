"""The mixer between its projections, at once, against its definition: outputs and every gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from avion.errors import UserError
from avion.ops.buffers import forget_spare_buffers
from avion.ops.mixer import MixerWeights, mixer_of_whole_rows, runs_whole
from avion.ops.mixer.c_functions import native
from avion.ops.selective_scan import selective_scan, torch_blocks
from tests.ops.named import assert_close, poisoned_memory


@pytest.fixture(autouse=True)
def poison():
    forget_spare_buffers()  # memory of earlier calls holds numbers, not NaN
    with poisoned_memory():
        yield


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks in a group and several groups, the last ones smaller."""
    monkeypatch.setattr(torch_blocks, "budget", lambda device: torch_blocks.Budget(block=160, group=80))


def random_case(rows, steps, channels, states, taps=4, rank=3, dtype=torch.float64):
    """xz and both directions' weights, with no value that hides another."""

    def direction() -> MixerWeights:
        shapes = ((channels, taps), (channels,), (rank + 2 * states, channels), (channels, rank))
        conv, conv_bias, x_proj, dt_proj = (torch.randn(shape, dtype=dtype) * 0.5 for shape in shapes)
        A = -torch.rand(channels, states, dtype=dtype) * 3
        D, bias = torch.randn(channels, dtype=dtype), torch.randn(channels, dtype=dtype) - 1
        return MixerWeights(*(t.requires_grad_() for t in (conv, conv_bias, x_proj, dt_proj, A, D, bias)))

    xz = torch.randn(rows, steps, 2 * channels, dtype=dtype, requires_grad=True)
    return xz, direction(), direction()


def definition(xz, ahead: MixerWeights, behind: MixerWeights) -> torch.Tensor:
    """Each direction along its own time: the convolution as PyTorch's, the scan as the reference."""
    x, z = xz.chunk(2, dim=-1)
    y = along_time(x, ahead) + along_time(x.flip(1), behind).flip(1)
    return y * z * torch.sigmoid(z)


def along_time(x, p: MixerWeights) -> torch.Tensor:
    taps, states = p.conv.shape[1], p.A.shape[1]
    u = F.conv1d(F.pad(x.transpose(1, 2), (taps - 1, 0)), p.conv[:, None], p.conv_bias, groups=len(p.conv))
    u = (u * torch.sigmoid(u)).transpose(1, 2)
    dt, B, C = (u @ p.x_proj.t()).split([p.dt_proj.shape[1], states, states], dim=-1)
    return selective_scan(u, dt @ p.dt_proj.t(), p.A, B, C, p.D, delta_bias=p.delta_bias, backend="reference")


def gradients(output, case, weight) -> dict[str, torch.Tensor]:
    xz, ahead, behind = case
    found = torch.autograd.grad(output, [xz, *ahead, *behind], weight)
    names = ["xz", *ahead._fields, *(f"{name} behind" for name in behind._fields)]
    return {f"d {name}": gradient for name, gradient in zip(names, found, strict=True)}


@pytest.fixture(params=["in C", "operators"])
def backend(request) -> str:
    """Both ways to compute in float32, as `mixer_of_whole_rows` takes them."""
    if request.param == "in C" and native().library is None:
        pytest.skip(native().reason)
    return "auto" if request.param == "in C" else "torch"


def assert_equals_the_definition(case, tolerance: float = 1e-11, backend: str = "auto") -> None:
    exact = tuple(
        MixerWeights(*(t.detach().double().requires_grad_() for t in part))
        if isinstance(part, MixerWeights)
        else part.detach().double().requires_grad_()
        for part in case
    )
    actual, expected = mixer_of_whole_rows(*case, backend=backend), definition(*exact)
    assert actual.dtype == case[0].dtype
    assert_close("out", actual.double(), expected, tolerance)
    weight = torch.randn_like(actual)
    found, wanted = gradients(actual, case, weight), gradients(expected, exact, weight.double())
    for (name, gradient), like in zip(found.items(), [case[0], *case[1], *case[2]], strict=True):
        assert gradient.dtype == like.dtype, name
        assert_close(name, gradient.double(), wanted[name], tolerance)
    with torch.no_grad():
        assert torch.equal(mixer_of_whole_rows(*case, backend=backend), actual)


@pytest.mark.parametrize(
    "shape", [(5, 4, 7, 16), (3, 1, 8, 4), (0, 4, 8, 5), (2, 32, 3, 4), (1, 2, 1, 1), (3, 3, 5, 4, 2), (4, 6, 5, 3, 7)]
)
def test_output_and_every_gradient_equal_the_definition(shape):
    assert_equals_the_definition(random_case(*shape))


@pytest.mark.parametrize("rows, steps", [(1, 4), (13, 3), (5, 5), (9, 14)])
def test_blocks_and_groups_join_seamlessly(small_blocks, rows, steps):
    assert_equals_the_definition(random_case(rows, steps, 5, 4))


# Widths below, at and beside multiples of the vector's; the published case, T = 4 and N = 16, and others.
@pytest.mark.parametrize(
    "shape",
    [
        (70, 4, 12, 16), (3, 4, 48, 16), (5, 4, 35, 16), (2, 1, 16, 16), (4, 32, 17, 4), (1, 9, 100, 16, 4, 7),
        (3, 7, 8, 33), (6, 3, 20, 1, 2), (4, 6, 5, 3, 7), (2, 2, 16, 5, 1), (0, 4, 16, 16),
    ],
)  # fmt: skip
def test_float32(shape, backend):
    assert_equals_the_definition(random_case(*shape, dtype=torch.float32), 2e-5, backend)


@pytest.mark.parametrize("half, tolerance", [(torch.bfloat16, 6e-2), (torch.float16, 1e-2)])
def test_half_precision_xz_with_float32_parameters(half, tolerance, backend):
    """As under autocast: the products in 16 bits, the rest in float32."""
    xz, ahead, behind = random_case(6, 4, 8, 5, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert_equals_the_definition((xz.detach().to(half).requires_grad_(), ahead, behind), tolerance, backend)


def test_xz_of_any_strides_in_float32(backend):
    _, *weights = random_case(3, 4, 20, 4, dtype=torch.float32)
    turned = torch.randn(4, 3, 40).transpose(0, 1).requires_grad_()
    assert_equals_the_definition((turned, *weights), 2e-5, backend)


def test_xz_of_any_strides():
    _, *weights = random_case(3, 4, 5, 4)
    turned = torch.randn(4, 3, 10, dtype=torch.float64).transpose(0, 1).requires_grad_()
    assert_equals_the_definition((turned, *weights))


def test_two_runs_agree_bit_for_bit(backend):
    case = random_case(40, 4, 12, 16, dtype=torch.float32)
    weight = torch.randn(40, 4, 12)
    first, second = (gradients(mixer_of_whole_rows(*case, backend=backend), case, weight) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_what_is_kept_is_xz_the_sum_and_what_x_proj_gave():
    case = random_case(3, 4, 20, 5)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        mixer_of_whole_rows(*case)
    given = {t.data_ptr() for t in (case[0], *case[1], *case[2])}
    assert [tuple(t.shape) for t in saved if t.data_ptr() not in given] == [(12, 20), (12, 13), (12, 13)]


def test_activation_checkpointing_and_compilation():
    xz, ahead, behind = random_case(3, 4, 5, 4)
    inputs = [xz, *ahead, *behind]

    def run(xz, *weights):
        return mixer_of_whole_rows(xz, MixerWeights(*weights[:7]), MixerWeights(*weights[7:]))

    expected = torch.autograd.grad(run(*inputs).square().sum(), inputs)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for output in (checkpoint(run, *inputs, use_reentrant=False), compiled(*inputs)):
        for left, right in zip(torch.autograd.grad(output.square().sum(), inputs), expected, strict=True):
            assert_close("gradient", left, right, 1e-12)


def test_the_operator_keeps_torch_librarys_rules():
    xz, ahead, behind = random_case(2, 3, 5, 4)
    torch.library.opcheck(torch.ops.avion.mixer_whole_rows.default, (list(ahead), list(behind), xz, True))


@pytest.mark.parametrize("steps", [0, 33])
def test_rows_of_other_lengths_are_refused(steps):
    with pytest.raises(ValueError, match=f"T must be 1 to 32, got {steps}"):
        mixer_of_whole_rows(*random_case(2, steps, 3, 4))


@pytest.mark.parametrize("field", MixerWeights._fields)
@pytest.mark.parametrize("direction", [1, 2])
def test_tensors_that_do_not_belong_together(field, direction):
    """C would read beyond them."""
    case = list(random_case(2, 4, 6, 3, dtype=torch.float32))
    tensor = getattr(case[direction], field)
    good = case[direction]
    for wrong in (tensor[1:], tensor[None], tensor.to("meta")):
        case[direction] = good._replace(**{field: wrong})
        with pytest.raises(ValueError, match="mixer_of_whole_rows: .* must be"):
            mixer_of_whole_rows(*case)


@pytest.mark.parametrize("shape", [(2, 4, 13), (2, 4, 0), (4, 12), (2, 4, 14)])
def test_xz_that_does_not_belong_to_the_weights(shape):
    with pytest.raises(ValueError, match="mixer_of_whole_rows: .* must be"):
        mixer_of_whole_rows(torch.zeros(shape), *random_case(2, 4, 6, 3)[1:])


def test_what_it_is_made_for():
    xz = torch.zeros(2, 32, 8)
    assert runs_whole(xz, "auto") and runs_whole(xz, "torch") and runs_whole(xz.double(), "auto")
    assert not runs_whole(xz, "reference")
    assert not runs_whole(torch.zeros(2, 33, 8), "torch")
    assert not runs_whole(torch.zeros(2, 4, 8, device="meta"), "torch")
    with pytest.raises(UserError, match="did you mean"):
        runs_whole(xz, "torhc")
