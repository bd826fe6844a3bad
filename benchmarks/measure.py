"""What the benchmarks share: medians of alternating rounds, a device's measured ceilings, tables with the place and the
date of the measurement.
"""

import datetime
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch


def medians(work: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, float]:
    """Return the median milliseconds of each work, after a warm-up round; the rounds alternate between them. On a GPU
    they are timed with CUDA events.
    """
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds + 1):
        for name, function in work.items():
            times[name].append(milliseconds(function, device))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def milliseconds(work: Callable[[], object], device: str) -> float:
    if not device.startswith("cuda"):
        start = time.perf_counter()
        work()
        return (time.perf_counter() - start) * 1e3
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


class Ceilings(NamedTuple):
    """What the device reached: bytes read and written, float32 instructions (a multiply-add counts as one) and base-2
    exponentials, each per second, and bf16 matrix products in FLOP per second.
    """

    bytes: float
    float32: float
    exponentials: float
    matmul: float

    def __str__(self) -> str:
        return (
            f"{self.bytes / 1e12:.2f} TB/s, {self.float32 / 1e12:.1f} T float32 instructions/s, "
            f"{self.exponentials / 1e12:.2f} T exponentials/s, {self.matmul / 1e12:.0f} TFLOP/s in bf16 products"
        )


def measure_ceilings(device: str, toy: bool = False) -> Ceilings:
    """Measure large copies, matrix products, and two kernels that only compute multiply-adds or exponentials."""
    from benchmarks.ceiling_kernels import issue_rates

    numbers = torch.randn(2**12 if toy else 2**29, device=device)
    target, size = torch.empty_like(numbers), 64 if toy else 8192
    left = torch.randn(size, size, device=device).bfloat16()
    right = torch.randn(size, size, device=device).bfloat16()
    rounds = 2 if toy else 9
    found = medians({"copy": lambda: target.copy_(numbers), "matmul": lambda: left @ right}, rounds, device)
    multiply_adds, exponentials = issue_rates(device, rounds, toy, medians)
    return Ceilings(
        2 * numbers.nbytes / found["copy"] * 1e3, multiply_adds, exponentials, 2 * size**3 / found["matmul"] * 1e3
    )


def where(device: str) -> str:
    """Return date, device and versions in one line."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads"
    versions = [f"torch {torch.__version__}", f"Triton {_version('triton')}"]
    if torch.version.cuda is not None:
        versions.append(f"CUDA {torch.version.cuda}")
    for package in ("mamba-ssm", "causal-conv1d"):
        versions.append(f"{package} {_version(package)}")
    return f"{datetime.date.today()}, {name}, {', '.join(versions)}, commit {_commit()}"


def _version(package: str) -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    root = Path(__file__).resolve().parents[1]
    try:
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"


def markdown_table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [
        "| " + " | ".join(columns) + " |",
        "|" + "|".join("-" if i == 0 else "-:" for i in range(len(columns))) + "|",
    ]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def report(title: str, parts: list[str], output: str | None) -> None:
    """Print the parts, and write them to a Markdown file where one is given."""
    text = "\n\n".join([f"# {title}", *parts]) + "\n"
    print(text)
    if output is not None:
        path = Path(output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
