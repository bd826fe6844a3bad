"""The mixer in C: what only that way can get wrong, and how it is compiled, kept and done without."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from avion.ops.mixer import MixerWeights, mixer_of_whole_rows, native_backend, native_build
from avion.ops.mixer.native_build import native
from avion.ops.selective_scan import torch_blocks
from tests.ops.named import assert_close
from tests.ops.test_mixer import assert_equals_the_definition, gradients, random_case

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
def test_torch_asks_for_operators(monkeypatch):
    def fail(*arguments):
        raise AssertionError("the C code was called")

    case = random_case(2, 4, 20, 4, dtype=torch.float32)
    monkeypatch.setattr(native_build, "call", fail)
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


# ---- the compiler ----------------------------------------------------------------------------------------


@pytest.fixture
def anew(tmp_path, monkeypatch, caplog):
    """As in a process that has not looked for the library yet, with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    caplog.set_level(logging.INFO, "avion")
    native.cache_clear()
    yield tmp_path / "cache/avion"
    native.cache_clear()


def works() -> None:
    assert_equals_the_definition(random_case(3, 4, 20, 4, dtype=torch.float32), 2e-5)


def program(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@needs_it
def test_it_is_compiled_once_and_kept(anew, caplog):
    works()
    assert [r.getMessage() for r in caplog.records if "compiling" in r.getMessage()]
    (library,) = anew.iterdir()  # nothing else is left
    before = library.stat()
    caplog.clear()
    native.cache_clear()
    works()
    assert not caplog.records and library.stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize(
    "text, reason",
    [
        ("echo fake 1; test $# -eq 1 || { echo 'x.c:1: error: no' >&2; exit 1; }", "x.c:1: error: no"),
        ("exit 3", "status 3"),
    ],
)
def test_a_compiler_that_fails(anew, text, reason, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("CC", str(program(tmp_path, "broken-cc", text)))
    assert native().library is None and reason in native().reason
    works()
    (said,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]  # once
    assert "PyTorch's operators take its place" in said and reason in said
    assert not anew.exists() or not list(anew.iterdir())


def test_no_compiler(anew, tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    works()
    assert "there is no C compiler" in native().reason
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_it_can_be_switched_off(anew, monkeypatch):
    monkeypatch.setenv("AVION_NATIVE", "0")
    works()
    assert "AVION_NATIVE=0" in native().reason and not anew.exists()


@needs_it
def test_a_library_that_others_may_write_to(anew, caplog):
    works()
    (library,) = anew.iterdir()
    native.cache_clear()
    library.chmod(0o666)
    works()
    assert native().library is None and f"{library}: belongs to another user, or others may" in native().reason
    assert "PyTorch's operators" in caplog.text


def beginning(cache: Path) -> subprocess.Popen:
    """A process that looks for the library, and says why there is none."""
    code = "from avion.ops.mixer.native_build import native; print(native().reason)"
    there = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    root = Path(__file__).resolve().parents[2]
    return subprocess.Popen([sys.executable, "-c", code], cwd=root, env=there, stdout=subprocess.PIPE, text=True)


@needs_it
def test_processes_that_compile_at_the_same_time_and_a_damaged_library(tmp_path):
    running = [beginning(tmp_path) for _ in range(3)]
    assert [process.communicate(timeout=120)[0] for process in running] == ["\n", "\n", "\n"]
    (library,) = (tmp_path / "avion").iterdir()
    library.write_bytes(library.read_bytes()[:100])
    assert str(library) in beginning(tmp_path).communicate(timeout=120)[0]
