"""The Triton kernels through the real compiler, for a GPU that need not be there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]


def test_all_kernels_compile_for_an_h100(tmp_path):
    """In a process of its own: with TRITON_INTERPRET there is no compiler."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    found = subprocess.run(
        [sys.executable, "-m", "tests.ops.compile_kernels"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr[-2000:]
    lines = found.stdout.splitlines()
    assert len(lines) == 8
    short_forward = next(line for line in lines if "selective_scan" in line and "forward_kernel" in line)
    assert re.search(r"STACK:0 ", short_forward), f"it spills registers: {short_forward}"
