"""The selective scan's backends against the reference on a CPU, in one process; `bench_scan.py` is for GPUs.

    python benchmarks/scan_on_cpu.py [--threads 2] [--rounds 9] [--long-rounds 5] [--dim 768] [--states 16]
        [--device cpu]

First every output and gradient is compared with the reference. Then, at R = 392 rows and T = 4 steps (ViT-B/16, two
clips), the program prints the median times of forward and of forward + backward, with rounds that alternate between the
backends, and their ratios to the reference. Last, for long sequences, it prints what a step of a row costs each backend
but the reference at T = 64, 1,024 and 8,192, with the same number of rows x steps, and the ratios to T = 64: with as
much work, and with as many rows as at T = 8,192. Under load the times mean little, so the load average is printed.
"""

import argparse
import functools
import math
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from avion.ops.selective_scan import available_backends, selective_scan
from benchmarks.measure import medians

SHORT = (392, 4)  # rows, steps
LONG = ((512, 64), (32, 1024), (4, 8192))  # of equal work
SAME_ROWS = (4, 64)  # as many as of the longest
NAMES = ("u", "delta", "A", "B", "C", "D", "delta_bias")


class Case:
    """Random inputs of one shape, as the mixer makes them, and what is timed on them."""

    def __init__(self, rows: int, steps: int, dim: int, states: int, device: str):
        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=device)

        spread = 1 + 0.1 * torch.rand(dim, states, device=device)
        A = -torch.arange(1, states + 1, device=device) * spread
        self.inputs = [
            randn(rows, steps, dim),
            randn(rows, steps, dim) * 0.5,
            A,
            randn(rows, steps, states),
            randn(rows, steps, states),
            torch.ones(dim, device=device),
            randn(dim) - 4,
        ]
        self.inputs = [tensor.requires_grad_() for tensor in self.inputs]
        self.weight = randn(rows, steps, dim)

    def scan(self, backend: str) -> torch.Tensor:
        *main, bias = self.inputs
        return selective_scan(*main, delta_bias=bias, backend=backend)

    def forward(self, backend: str) -> None:
        with torch.no_grad():
            self.scan(backend)

    def both(self, backend: str) -> tuple[torch.Tensor, ...]:
        y = self.scan(backend)
        return (y.detach(), *torch.autograd.grad(y, self.inputs, self.weight))

    def worst_error(self, backend: str) -> tuple[str, float]:
        """Return the output or gradient that differs most from the reference's, and the difference relative to its
        largest value.
        """
        errors = {}
        for name, actual, expected in zip(("y", *NAMES), self.both(backend), self.both("reference"), strict=True):
            errors[name] = ((actual - expected).abs().max() / expected.abs().max()).item()
        return max(errors.items(), key=lambda item: item[1])


def compare_short(args: argparse.Namespace, backends: tuple[str, ...]) -> None:
    case = Case(*SHORT, args.dim, args.states, args.device)
    for backend in backends:
        if backend != "reference":
            name, error = case.worst_error(backend)
            print(f"{backend}: worst relative error against the reference {error:.1e} ({name})")
    print(f"\nR = {SHORT[0]}, T = {SHORT[1]}, D = {args.dim}, N = {args.states}, float32")
    for what, run in (("forward", case.forward), ("forward + backward", case.both)):
        found = medians({b: functools.partial(run, b) for b in backends}, args.rounds, args.device)
        for backend, median in found.items():
            ratio = found["reference"] / median
            print(f"  {what:<19} {backend:<10} {median:8.1f} ms   {ratio:5.1f} x the reference's speed")


def compare_long(args: argparse.Namespace, backends: tuple[str, ...]) -> None:
    print("\nper step and row of long sequences, against T = 64 (as much work; as many rows)")
    cases = {shape: Case(*shape, args.dim, args.states, args.device) for shape in (SAME_ROWS, *LONG)}
    for backend in backends:
        if backend == "reference":
            continue
        for what in ("forward", "both"):
            work = {shape: functools.partial(getattr(case, what), backend) for shape, case in cases.items()}
            found = medians(work, args.long_rounds, args.device)
            cost = {shape: median / math.prod(shape) * 1e3 for shape, median in found.items()}
            shown = ", ".join(
                f"R = {rows}, T = {steps}: {us:.1f} µs ({us / cost[LONG[0]]:.2f} x, {us / cost[SAME_ROWS]:.2f} x)"
                for (rows, steps), us in cost.items()
            )
            print(f"  {'forward' if what == 'forward' else 'forward + backward':<19} {backend:<10} {shown}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--long-rounds", type=int, default=5)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--states", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    backends = available_backends(args.device)
    print(f"torch {torch.__version__}, {args.device}, {args.threads} threads, load average {os.getloadavg()[0]:.1f}")
    compare_short(args, backends)
    compare_long(args, backends)
    print(f"\nload average afterwards {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
