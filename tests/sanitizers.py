"""Runs C code of this project in a program of its own, with the compiler's sanitizers."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from avion.c_code import CCode


def run_sanitized(code: CCode, driver: Path, folder: Path, cases: int, seed: int) -> None:
    """Compile `driver`, which includes the file of `code`, with the sanitizers of memory and of undefined behaviour,
    and run it. It prints "done" at its end.
    """
    openmp = ["-fopenmp"] * code.openmp
    words = ["gcc", "-std=gnu11", "-g", "-O1", *openmp, "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    empty = folder / "empty.c"
    empty.write_text("int main(void) { return 0; }")
    if (
        not shutil.which("gcc")
        or subprocess.run([*words, "-o", folder / "empty", empty], capture_output=True).returncode
    ):
        pytest.skip("gcc has no sanitizers here")
    program = folder / "memory"
    subprocess.run([*words, f'-DSOURCE="{code.source}"', "-Wno-psabi", "-o", program, driver], check=True)
    # The threads' stacks are small on some systems. What is leaked cannot be counted under a debugger.
    there = {**os.environ, "OMP_STACKSIZE": "64k", "ASAN_OPTIONS": "detect_leaks=0"}
    words = [program, str(cases), str(seed)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=there)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[:3000]
