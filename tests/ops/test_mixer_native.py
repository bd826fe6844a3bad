"""The mixer in C: what only that way can get wrong. (tests/test_c_code.py: how C code is compiled and kept.)"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from avion import c_code
from avion.ops.mixer import MixerWeights, c_functions, mixer_of_whole_rows, native_backend
from avion.ops.mixer.c_functions import MIXER, native
from avion.ops.selective_scan import torch_blocks
from tests.ops.named import assert_close
from tests.ops.test_mixer import assert_equals_the_definition, gradients, random_case
from tests.sanitizers import run_sanitized

needs_it = pytest.mark.skipif(native().library is None, reason=native().reason)


@pytest.fixture
def threads():
    """Sets the number of threads until the end of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@needs_it
@pytest.mark.parametrize("rows, count", [(7, 2), (7, 3), (2, 5), (1, 4)])
def test_threads_share_the_rows(rows, count, threads):
    """Also where there are more threads than rows."""
    case = random_case(rows, 4, 20, 16, dtype=torch.float32)
    weight = torch.randn(rows, 4, 20)
    alone = gradients(mixer_of_whole_rows(*case), case, weight)
    threads(count)
    assert_equals_the_definition(case, 2e-5)
    for name, gradient in gradients(mixer_of_whole_rows(*case), case, weight).items():
        assert_close(name, gradient, alone[name], 2e-6)


@needs_it
@pytest.mark.parametrize("rows", [1, 5, 12])
def test_groups_join_seamlessly(rows, monkeypatch):
    monkeypatch.setattr(native_backend, "budget", lambda device: torch_blocks.Budget(block=0, group=200))  # 5 rows
    assert_equals_the_definition(random_case(rows, 4, 10, 16, dtype=torch.float32), 2e-5)


@needs_it
def test_step_sizes_of_any_size():
    """From steps that are too small for float32's softplus to steps after which nothing is left of a state."""
    xz, ahead, behind = random_case(40, 4, 20, 16, dtype=torch.float32)
    with torch.no_grad():
        for p in (ahead, behind):
            p.delta_bias.copy_(torch.linspace(-110, 110, 20))
            p.A.mul_(torch.logspace(-6, 6, 16))
    assert_equals_the_definition((xz, ahead, behind), 2e-5)


@needs_it
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("field", ["xz", "conv", "x_proj", "A", "D", "delta_bias"])
def test_what_is_no_number_is_seen(field, value):
    """A loss that is not finite is how training notices that something went wrong."""
    case = random_case(3, 4, 20, 16, dtype=torch.float32)
    with torch.no_grad():
        tensor = case[0] if field == "xz" else getattr(case[1], field)
        tensor.view(-1)[7] = -value if field == "A" else value
    finite = torch.isfinite(mixer_of_whole_rows(*case, backend="torch"))
    assert torch.equal(torch.isfinite(mixer_of_whole_rows(*case)), finite)
    assert not finite.all() or (field, value) == ("A", float("inf"))  # decay rates may be infinite


@needs_it
def test_growing_states_overflow():
    """Decay rates that are positive by mistake: the operators' output is not finite either."""
    case = random_case(3, 4, 20, 16, dtype=torch.float32)
    with torch.no_grad():
        case[1].A.fill_(200)
        case[1].delta_bias.fill_(5)
    finite = torch.isfinite(mixer_of_whole_rows(*case, backend="torch"))
    assert finite[:, 0].all() and not finite[:, 1:].any()
    assert torch.equal(torch.isfinite(mixer_of_whole_rows(*case)), finite)


@needs_it
def test_numbers_of_any_size():
    """SiLU, its slope and the softplus far out; decay rates that leave nothing of a state, also in the gradients."""
    # A few draws in a hundred cancel so far that PyTorch's operators in float32 miss the bound too.
    torch.manual_seed(0)
    xz, ahead, behind = random_case(40, 4, 20, 16, dtype=torch.float32)
    sizes = torch.cat([torch.linspace(-130, 90, 16), torch.tensor([-1e30, -1e10, -1e5, -1e3])])
    with torch.no_grad():
        xz[..., 20:] = sizes
        ahead.conv_bias.copy_(sizes.flip(0))
        ahead.A[:, :4] = -1e37
    assert_equals_the_definition((xz, ahead, behind), 2e-5)


@needs_it
def test_default_dtypes_and_devices_of_others():
    case = random_case(3, 4, 20, 16, dtype=torch.float32)
    weight = torch.randn(3, 4, 20)
    expected = gradients(mixer_of_whole_rows(*case), case, weight)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = gradients(mixer_of_whole_rows(*case), case, weight)
    finally:
        torch.set_default_dtype(before)
    for name in found:
        assert torch.equal(found[name], expected[name]), name


@needs_it
def test_torch_asks_for_operators(monkeypatch):
    def fail(*arguments):
        raise AssertionError("the C code was called")

    case = random_case(2, 4, 20, 4, dtype=torch.float32)
    monkeypatch.setattr(c_functions, "call", fail)
    mixer_of_whole_rows(*case, backend="torch")
    mixer_of_whole_rows(*random_case(2, 4, 20, 4))  # float64
    with pytest.raises(AssertionError, match="the C code was called"):
        mixer_of_whole_rows(*case)


@needs_it
def test_compilation_and_torch_librarys_rules():
    xz, ahead, behind = random_case(3, 4, 20, 5, dtype=torch.float32)
    inputs = [xz, *ahead, *behind]

    def run(xz, *weights):
        return mixer_of_whole_rows(xz, MixerWeights(*weights[:7]), MixerWeights(*weights[7:]))

    expected = torch.autograd.grad(run(*inputs).square().sum(), inputs)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for left, right in zip(torch.autograd.grad(compiled(*inputs).square().sum(), inputs), expected, strict=True):
        assert_close("gradient", left, right, 1e-6)
    torch.library.opcheck(torch.ops.avion.mixer_native.default, (list(ahead), list(behind), xz, True))


@needs_it
def test_nothing_beside_the_tensors_is_touched(tmp_path, fresh_seed):
    run_sanitized(MIXER, Path(__file__).with_name("native_memory.c"), tmp_path, 150, fresh_seed)


# ---- where it runs ---------------------------------------------------------------------------------------


@needs_it
def test_several_python_threads_at_once():
    cases = [random_case(30, 4, 20, 16, dtype=torch.float32) for _ in range(4)]
    weight = torch.randn(30, 4, 20)

    def found(case) -> list[torch.Tensor]:
        return [*gradients(mixer_of_whole_rows(*case), case, weight).values()]

    expected = [found(case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        for results in pool.map(lambda _: [found(case) for case in cases], range(8)):
            for left, right in zip(results, expected, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@needs_it
def test_one_openmp_serves_pytorch_and_the_library():
    """Two of them would have two pools of threads, which take the cores from each other."""
    code = """
import torch
from avion.ops.mixer import mixer_of_whole_rows
from tests.ops.test_mixer import random_case

torch.set_num_threads(2)
mixer_of_whole_rows(*random_case(9, 4, 20, 16, dtype=torch.float32)).sum().backward()
maps = open("/proc/self/maps").read()
assert "/mixer-" in maps
print(len({line.split()[-1] for line in maps.splitlines() if "libgomp" in line or "libomp" in line}))
"""
    there = {key: value for key, value in os.environ.items() if key != "CC"}
    root = Path(__file__).resolve().parents[2]
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=root, env=there, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr[-2000:]


# ---- without it ------------------------------------------------------------------------------------------


@pytest.fixture
def not_looked_for():
    c_code.forget()
    yield
    c_code.forget()


@pytest.mark.parametrize("name, value", [("AVION_NATIVE", "0"), ("PATH", ""), ("CC", "/bin/false")])
def test_the_operators_do_the_work_where_it_cannot_be_used(name, value, not_looked_for, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv(name, value)
    assert native().library is None
    assert_equals_the_definition(random_case(3, 4, 20, 4, dtype=torch.float32), 2e-5)
