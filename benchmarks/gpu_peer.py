"""Builds mamba-ssm and causal-conv1d, whose kernels are compared with ours, in the background.

They are built from the source in the package index and for the GPU at hand only, because a build for all architectures
takes an hour. Their set-up files name every architecture, so nvcc is wrapped: the wrapper leaves out what belongs to
other architectures.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

PACKAGES = ("causal-conv1d", "mamba-ssm")
ROOT = Path(__file__).resolve().parents[1]

_WRAPPER = '''#!{python}
"""nvcc for one architecture."""
import os, sys
sys.path.insert(0, {root!r})
from benchmarks.gpu_peer import for_one_architecture
os.execv({nvcc!r}, [{nvcc!r}, *for_one_architecture(sys.argv[1:], {arch!r})])
'''


def for_one_architecture(words: list[str], arch: str) -> list[str]:
    """Return nvcc's command line with code for `arch` ("90") only, where it makes code at all."""
    kept, skip, asked = [], False, False
    for word, after in zip(words, [*words[1:], ""], strict=True):
        if skip:
            skip = False
        elif word in ("-gencode", "--generate-code"):
            skip, asked = True, True
        elif word.startswith(("-gencode=", "--generate-code=", "-arch=", "--gpu-architecture=")):
            asked = True
        elif word in ("-arch", "--gpu-architecture") and after:
            skip, asked = True, True
        else:
            kept.append(word)
    return [*kept, "-gencode", f"arch=compute_{arch},code=sm_{arch}"] if asked else kept


def pinned(requirements: Path) -> list[str]:
    """Return the packages as requirements-cuda.txt pins them."""
    lines = [line.split("#")[0].strip() for line in requirements.read_text(encoding="utf-8").splitlines()]
    found = {line.split("==")[0].strip().lower(): line for line in lines if line}
    return [found.get(name, name) for name in PACKAGES]


class Build:
    """A build in the background. As a context manager it stops what still runs at the end."""

    def __init__(self, target: Path, log: Path, env: dict[str, str]):
        self.target, self.log, self.env = target, log, env
        self._process: subprocess.Popen | None = None
        self._line = ""
        self.is_built = False

    def __enter__(self) -> "Build":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(5)

    def begin(self, device: dict[str, Any]) -> None:
        """Start the build, if there is a GPU and an nvcc.

        Args:
            device: What the section on the device has found.
        """
        nvcc = _nvcc_path(self.env)
        if "capability" not in device or nvcc is None:
            why = "there is no GPU" if "capability" not in device else "nvcc was not found (set CUDA_HOME)"
            self._line = f"mamba-ssm is not built: {why}."
            return
        wrapper = self.target / "bin" / "nvcc"
        wrapper.parent.mkdir(parents=True, exist_ok=True)
        arch = "".join(map(str, device["capability"]))
        wrapper.write_text(_WRAPPER.format(python=sys.executable, root=str(ROOT), nvcc=nvcc, arch=arch))
        wrapper.chmod(0o755)
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--no-deps",
            "--no-build-isolation",
            "--no-binary",
            ":all:",
            "--target",
            str(self.target),
            *pinned(ROOT / "requirements-cuda.txt"),
        ]
        jobs = max(1, (os.cpu_count() or 2) // 2)  # the other half is for the report
        env = {
            **self.env,
            "PYTORCH_NVCC": str(wrapper),
            "MAX_JOBS": str(jobs),
            "MAMBA_FORCE_BUILD": "TRUE",
            "CAUSAL_CONV1D_FORCE_BUILD": "TRUE",
            "TORCH_CUDA_ARCH_LIST": ".".join(map(str, device["capability"])),
        }
        with self.log.open("w", encoding="utf-8") as out:
            self._process = subprocess.Popen(
                ["nice", *command] if shutil.which("nice") else command,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def is_pending(self) -> bool:
        """Return whether the build still runs, or has ended without a call of `news` since."""
        return self._process is not None or bool(self._line)

    def news(self) -> str:
        """Return a line that says how the build ended, once; otherwise ""."""
        if self._process is not None and not self.is_built and self._process.poll() is not None:
            self.is_built = self._process.returncode == 0
            self._line = "mamba-ssm and causal-conv1d were built." if self.is_built else self._why()
            self._process = None
        line, self._line = self._line, ""
        return line

    def _why(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        errors = [line.strip() for line in lines if "rror" in line]
        return f"mamba-ssm could not be built: {(errors or lines or ['pip said nothing'])[-1][:200]} (see {self.log})."


def _nvcc_path(env: Mapping[str, str]) -> str | None:
    home = env.get("CUDA_HOME") or env.get("CUDA_PATH")
    inside = Path(home) / "bin" / "nvcc" if home else Path("/usr/local/cuda/bin/nvcc")
    return str(inside) if inside.exists() else shutil.which("nvcc", path=env.get("PATH"))
