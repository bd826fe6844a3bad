"""How C code is compiled where it runs, kept, and done without."""

import ctypes
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from avion import c_code
from avion.c_code import CCode, native
from avion.errors import UserError

SMALL = Path(__file__).with_name("small.c")
FUNCTIONS = {"add": ([ctypes.c_int, ctypes.c_int], ctypes.c_int)}


def small(openmp: bool = False) -> CCode:
    return CCode("small", "the small C code", "Python", SMALL, FUNCTIONS, openmp)


needs_it = pytest.mark.skipif(native(small()).library is None, reason=native(small()).reason)


def python(code: str, variables: dict[str, str]) -> str:
    """What a new process prints. `variables` are all of the process's."""
    return beginning(code, variables).communicate(timeout=120)[0]


def beginning(code: str, variables: dict[str, str]) -> subprocess.Popen:
    root = Path(__file__).resolve().parents[1]
    return subprocess.Popen([sys.executable, "-c", code], cwd=root, env=variables, stdout=subprocess.PIPE, text=True)


REASON = "from tests.test_c_code import native, small; print(native(small()).reason)"


@pytest.fixture
def anew(tmp_path, monkeypatch, caplog):
    """As in a process that has not looked for the library yet, with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    caplog.set_level(logging.INFO, "avion")
    c_code.forget()
    yield tmp_path / "cache/avion/native"
    c_code.forget()


CODE = small()


def works() -> None:
    found = native(CODE).library
    assert found is not None and found.add(2, 40) == 42


def said(caplog, level: int) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == level]


def program(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@needs_it
@pytest.mark.parametrize("openmp", [False, True])
def test_with_and_without_openmp(anew, openmp):
    found = native(small(openmp)).library
    assert found is not None and found.add(2, 40) == 42


@needs_it
@pytest.mark.parametrize("mask", [0o022, 0o002, 0o000, 0o077])
def test_it_is_compiled_once_and_kept(anew, caplog, mask):
    before = os.umask(mask)
    try:
        works()
    finally:
        os.umask(before)
    assert [text for text in said(caplog, logging.INFO) if "compiling" in text]
    (library,) = anew.iterdir()  # nothing else is left
    written = library.stat()
    assert written.st_mode & 0o777 == 0o700
    caplog.clear()
    c_code.forget()
    works()
    assert not caplog.records and library.stat().st_mtime_ns == written.st_mtime_ns


FAILS = "test $1 = -march=native && echo '#define __x86_64__ 1' && exit; echo 'x.c:1: error: no' >&2; exit 1"


@pytest.mark.parametrize("text, reason", [(FAILS, "x.c:1: error: no"), ("exit 3", "status 3")])
def test_a_compiler_that_fails(anew, text, reason, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("CC", str(program(tmp_path, "broken-cc", text)))
    monkeypatch.setenv("PATH", str(tmp_path))  # there is no other
    assert native(CODE).library is None and reason in native(CODE).reason
    (warning,) = said(caplog, logging.WARNING)  # once
    assert "the small C code cannot be used, and its work is done by Python: " in warning and reason in warning
    assert not anew.exists() or not list(anew.iterdir())


@needs_it
@pytest.mark.parametrize("cc", ["{}/broken-cc -m3", "gcc 'a", "{}/is-not-there"])
def test_the_next_compiler_takes_the_place_of_one_that_fails(anew, cc, tmp_path, monkeypatch, caplog):
    program(tmp_path, "broken-cc", FAILS)
    monkeypatch.setenv("CC", cc.format(tmp_path))
    works()
    assert not said(caplog, logging.WARNING)
    assert "broken" not in cc or "broken-cc -m3: x.c:1: error: no; " in caplog.text


def test_a_compiler_that_hangs(anew, tmp_path, monkeypatch):
    pid = tmp_path / "pid"
    monkeypatch.setenv("CC", str(program(tmp_path, "slow-cc", f"/bin/sleep 600 & echo $! > {pid}; wait")))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(c_code, "COMPILE_S", 1)
    assert "timed out after 1 seconds" in native(CODE).reason
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
    monkeypatch.setattr(c_code, "compilers", lambda: iter([[os.environ["CC"]]]))
    works()


def test_no_compiler(anew, tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert native(CODE).library is None
    assert "there is no C compiler" in native(CODE).reason
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.parametrize("text", ["0", "no", "False", "OFF"])
def test_it_can_be_switched_off(anew, monkeypatch, text):
    monkeypatch.setenv("AVION_NATIVE", text)
    assert native(CODE).library is None and not anew.exists()
    assert f"AVION_NATIVE={text} asks for Python" == native(CODE).reason


def test_neither_yes_nor_no(anew, monkeypatch):
    monkeypatch.setenv("AVION_NATIVE", "2")
    with pytest.raises(UserError, match="AVION_NATIVE 2: give 0 "):
        native(CODE)


@needs_it
def test_a_compiler_whose_openmp_would_end_the_process(anew, tmp_path, monkeypatch):
    clang = program(tmp_path, "clang", "echo '#define __clang__ 1'")
    monkeypatch.setenv("CC", str(clang))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(c_code, "has_llvm_openmp", lambda: True)
    assert "its OpenMP would be loaded beside PyTorch's" in native(small(openmp=True)).reason
    assert "its OpenMP" not in native(CODE).reason


# ---- where it is kept ------------------------------------------------------------------------------------


@needs_it
def test_a_library_that_others_may_write_to_is_compiled_again(anew):
    works()
    (library,) = anew.iterdir()
    c_code.forget()
    library.chmod(0o666)
    works()
    assert library.stat().st_mode & 0o777 == 0o700


@needs_it
def test_a_folder_that_others_may_write_to(anew, caplog):
    anew.mkdir(parents=True)
    anew.chmod(0o777)
    works()
    assert not list(anew.iterdir()) and not said(caplog, logging.WARNING)
    assert f"compiled for this process only: {anew}: belongs to another user, or others may" in caplog.text


@needs_it
def test_a_folder_that_cannot_be_made(anew, tmp_path, caplog):
    (tmp_path / "cache").write_text("a file")
    works()
    assert "Not a directory" in native(CODE).problem and not said(caplog, logging.WARNING)
    assert "compiled for this process only" in caplog.text


@needs_it
def test_no_home_folder(anew, monkeypatch, caplog):
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", home)
    works()
    assert "there is no home folder; set XDG_CACHE_HOME" in caplog.text


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


# A second thread is in the middle of what takes the lock while the process forks, as a DataLoader does.
FORKED = """
import os, signal, threading
{begin}
began, may_end = threading.Event(), threading.Event()
def held():
    with {lock}:
        began.set()
        may_end.wait()
thread = threading.Thread(target=held)
thread.start()
began.wait()
child = os.fork()
if child == 0:
    signal.alarm(30)
    {use}
    os._exit(0)
status = os.waitpid(child, 0)[1]
may_end.set()
print(status)
"""
LOCKS = {
    "compiling": {
        "begin": "from avion import c_code\nfrom tests.test_c_code import small",
        "lock": "c_code._one_thread",
        "use": "c_code.native(small())",
    },
    "decoders": {
        "begin": "from avion.data.video import contexts",
        "lock": "contexts._lock",
        "use": "contexts.forget_decoders()",
    },
}


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_that_is_held_while_the_process_forks(tmp_path, name):
    said = python(FORKED.format(**LOCKS[name]), {**os.environ, "XDG_CACHE_HOME": str(tmp_path)})
    assert said == "0\n"


@needs_it
def test_what_killed_compilations_left_is_deleted(anew):
    for name, hours in (("compiling-old", 5), ("compiling-new", 0)):
        (anew / name).mkdir(parents=True)
        (anew / name / "part.s").write_text("half")
        at = time.time() - 3600 * hours
        os.utime(anew / name, (at, at))
    for folder in (anew.parent, anew):
        folder.chmod(0o700)
    works()
    assert not (anew / "compiling-old").exists()
    assert (anew / "compiling-new/part.s").exists()
