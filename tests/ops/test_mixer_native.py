"""The mixer in C: what only that way can get wrong, and how it is compiled, kept and done without."""

import logging
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from avion.errors import UserError
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


@needs_it
def test_nothing_beside_the_tensors_is_touched(tmp_path, fresh_seed):
    """The code in a program of its own, with the compiler's sanitizers of memory and of undefined behaviour."""
    driver = Path(__file__).with_name("native_memory.c")
    words = ["gcc", "-std=gnu11", "-g", "-O1", "-fopenmp", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    empty = tmp_path / "empty.c"
    empty.write_text("int main(void) { return 0; }")
    if (
        not shutil.which("gcc")
        or subprocess.run([*words, "-o", tmp_path / "empty", empty], capture_output=True).returncode
    ):
        pytest.skip("gcc has no sanitizers here")
    program = tmp_path / "memory"
    subprocess.run([*words, f'-DSOURCE="{native_build.SOURCE}"', "-Wno-psabi", "-o", program, driver], check=True)
    # The threads' stacks are small on some systems. What is leaked cannot be counted under a debugger.
    there = {**os.environ, "OMP_STACKSIZE": "64k", "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([program, "150", str(fresh_seed)], capture_output=True, text=True, timeout=120, env=there)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[:3000]


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
    assert python(code, {key: value for key, value in os.environ.items() if key != "CC"}) == "1\n"


# ---- the compiler ----------------------------------------------------------------------------------------


def python(code: str, variables: dict[str, str]) -> str:
    """What a new process prints. `variables` are all of the process's."""
    return beginning(code, variables).communicate(timeout=120)[0]


def beginning(code: str, variables: dict[str, str]) -> subprocess.Popen:
    root = Path(__file__).resolve().parents[2]
    return subprocess.Popen([sys.executable, "-c", code], cwd=root, env=variables, stdout=subprocess.PIPE, text=True)


REASON = "from avion.ops.mixer.native_build import native; print(native().reason)"


@pytest.fixture
def anew(tmp_path, monkeypatch, caplog):
    """As in a process that has not looked for the library yet, with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # Clang's OpenMP may be there from the test before, and is the same one.
    monkeypatch.setattr(native_build, "has_llvm_openmp", lambda: False)
    caplog.set_level(logging.INFO, "avion")
    forget()
    yield tmp_path / "cache/avion/native"
    forget()


def forget() -> None:
    native_build.looked_for.cache_clear()


def works() -> None:
    assert_equals_the_definition(random_case(3, 4, 20, 4, dtype=torch.float32), 2e-5)


def said(caplog, level: int) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == level]


def program(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@needs_it
@pytest.mark.parametrize("mask", [0o022, 0o002, 0o000, 0o077])
def test_it_is_compiled_once_and_kept(anew, caplog, mask):
    before = os.umask(mask)
    try:
        works()
    finally:
        os.umask(before)
    assert native().library and [text for text in said(caplog, logging.INFO) if "compiling" in text]
    (library,) = anew.iterdir()  # nothing else is left
    written = library.stat()
    assert written.st_mode & 0o777 == 0o700
    caplog.clear()
    forget()
    works()
    assert not caplog.records and library.stat().st_mtime_ns == written.st_mtime_ns


FAILS = "test $1 = -march=native && echo '#define __x86_64__ 1' && exit; echo 'x.c:1: error: no' >&2; exit 1"


@pytest.mark.parametrize("text, reason", [(FAILS, "x.c:1: error: no"), ("exit 3", "status 3")])
def test_a_compiler_that_fails(anew, text, reason, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("CC", str(program(tmp_path, "broken-cc", text)))
    monkeypatch.setenv("PATH", str(tmp_path))  # there is no other
    assert native().library is None and reason in native().reason
    works()
    (warning,) = said(caplog, logging.WARNING)  # once
    assert "PyTorch's operators take its place" in warning and reason in warning
    assert not anew.exists() or not list(anew.iterdir())


@needs_it
@pytest.mark.parametrize("cc", ["{}/broken-cc -m3", "gcc 'a", "{}/is-not-there"])
def test_the_next_compiler_takes_the_place_of_one_that_fails(anew, cc, tmp_path, monkeypatch, caplog):
    program(tmp_path, "broken-cc", FAILS)
    monkeypatch.setenv("CC", cc.format(tmp_path))
    works()
    assert native().library and not said(caplog, logging.WARNING)
    assert "broken" not in cc or "broken-cc -m3: x.c:1: error: no; " in caplog.text


def test_a_compiler_that_hangs(anew, tmp_path, monkeypatch):
    pid = tmp_path / "pid"
    monkeypatch.setenv("CC", str(program(tmp_path, "slow-cc", f"/bin/sleep 600 & echo $! > {pid}; wait")))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(native_build, "COMPILE_S", 1)
    assert "timed out after 1 seconds" in native().reason
    works()
    state = Path(f"/proc/{pid.read_text().strip()}/stat")  # no process of the compiler is left
    assert not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z"


@needs_it
@pytest.mark.parametrize("flag", ["-march=native", "-m*"])
def test_a_compiler_that_does_not_know_the_flags_for_this_cpu(anew, flag, tmp_path, monkeypatch):
    """GCC for POWER knows only -mcpu=native, and some compilers know neither."""
    refusing = f'for word; do case $word in {flag}) echo "what is $word" >&2; exit 1;; esac; done; exec gcc "$@"'
    monkeypatch.setenv("CC", str(program(tmp_path, "other-cc", refusing)))
    if not shutil.which("gcc"):
        pytest.skip("gcc is not installed")
    monkeypatch.setattr(native_build, "compilers", lambda: iter([[os.environ["CC"]]]))
    works()
    assert native().library, native().reason


def test_no_compiler(anew, tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    works()
    assert "there is no C compiler" in native().reason
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.parametrize("text", ["0", "no", "False", "OFF"])
def test_it_can_be_switched_off(anew, monkeypatch, text):
    monkeypatch.setenv("AVION_NATIVE", text)
    works()
    assert f"AVION_NATIVE={text}" in native().reason and not anew.exists()


def test_neither_yes_nor_no(anew, monkeypatch):
    monkeypatch.setenv("AVION_NATIVE", "2")
    with pytest.raises(UserError, match="AVION_NATIVE 2: give 0 "):
        native()


@needs_it
def test_a_compiler_whose_openmp_would_end_the_process(anew, tmp_path, monkeypatch):
    clang = program(tmp_path, "clang", "echo '#define __clang__ 1'")
    monkeypatch.setenv("CC", str(clang))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(native_build, "has_llvm_openmp", lambda: True)
    works()
    assert "its OpenMP would be loaded beside PyTorch's" in native().reason


# ---- where it is kept ------------------------------------------------------------------------------------


@needs_it
def test_a_library_that_others_may_write_to_is_compiled_again(anew):
    works()
    (library,) = anew.iterdir()
    forget()
    library.chmod(0o666)
    works()
    assert native().library and library.stat().st_mode & 0o777 == 0o700


@needs_it
def test_a_folder_that_others_may_write_to(anew, caplog):
    anew.mkdir(parents=True)
    anew.chmod(0o777)
    works()
    assert native().library and not list(anew.iterdir()) and not said(caplog, logging.WARNING)
    assert f"compiled for this process only: {anew}: belongs to another user, or others may" in caplog.text


@needs_it
def test_a_folder_that_cannot_be_made(anew, tmp_path, caplog):
    (tmp_path / "cache").write_text("a file")
    works()
    assert native().library and "Not a directory" in native().problem and not said(caplog, logging.WARNING)
    assert "compiled for this process only" in caplog.text


@needs_it
def test_no_home_folder(anew, monkeypatch, caplog):
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", home)
    works()
    assert native().library and "there is no home folder; set XDG_CACHE_HOME" in caplog.text


@needs_it
def test_processes_that_compile_at_the_same_time_and_a_library_that_was_cut_short(tmp_path):
    there = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    running = [beginning(REASON, there) for _ in range(3)]
    assert [process.communicate(timeout=120)[0] for process in running] == ["\n", "\n", "\n"]
    (library,) = (tmp_path / "avion/native").iterdir()
    whole = library.read_bytes()
    for size in (0, 100, 5000, len(whole) - 1):  # the loader of the system dies of SIGBUS with the third one
        library.write_bytes(whole[:size])
        assert python(REASON, there) == "\n" and len(library.read_bytes()) == len(whole)
