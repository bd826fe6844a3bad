"""Both scans of the mixer and its gate, forward and forward + backward, on a GPU, with every backend that runs there.

    python benchmarks/bench_scan.py [--rounds 21] [--backends triton torch mamba_ssm] [--output FILE.md]
    TRITON_INTERPRET=1 python benchmarks/bench_scan.py --toy      # shows on a CPU that it runs

Where there is no GPU, the scan's backends are measured on the CPU, at smaller sizes (`scan_on_cpu.py`).

The shapes have D = 768 and N = 16, in bf16: R = 12,544 rows (64 clips of 196 patches) with T = 4, 16, 64; R = 196 with
T = 256, 1,024, 8,192; R = 64 (space-time) with T = 784, 3,136. First the benchmark checks correctness: outputs and all
gradients of some of the rows against the reference in float64 on the same bf16 numbers, computed alone and within the
whole. Then it prints medians of alternating rounds, timed with CUDA events; the ratio to mamba-ssm's kernels where they
are installed; and the ratio to the floor, the largest of exponentials, float32 instructions and bytes, each divided by
what the device was measured to do per second.
"""

import argparse
import functools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from avion.ops.gated_scan import ScanInputs, gated_bidirectional_scan
from avion.ops.selective_scan import available_backends
from benchmarks import scan_on_cpu
from benchmarks.measure import Ceilings, markdown_table, measure_ceilings, medians, report, where

SHAPES = ((12544, 4), (12544, 16), (12544, 64), (196, 256), (196, 1024), (196, 8192), (64, 784), (64, 3136))
TOY_SHAPES = ((6, 4), (2, 40))
PEER = "mamba_ssm"
WHAT = {"forward": "forward", "both": "forward + backward"}
# The tolerance for bf16 inputs, whose gradients are rounded to bf16 as well.
TOLERANCE = 2e-2
# Per row, step, channel and state and direction: float32 instructions forward (ΔA; ΔBu; the state; y), and backward
# (these four once more; the adjoint, dC, dB, by Δu, the carry, by ΔA, dΔ, dA).
FORWARD, BACKWARD = 4, 12


class Case:
    """Random inputs of one shape, as the mixer makes them."""

    def __init__(self, rows: int, steps: int, channels: int, states: int, device: str):
        self.shape = (rows, steps, channels, states)
        self.z, self.weight = (torch.randn(rows, steps, channels, device=device).bfloat16() for _ in range(2))
        self.directions = [self._direction(device) for _ in range(2)]
        for tensor in self.tensors():
            tensor.requires_grad_()

    def _direction(self, device: str) -> ScanInputs:
        rows, steps, channels, states = self.shape

        def half(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(shape, device=device) * scale).bfloat16()

        A = -torch.arange(1, states + 1, device=device) * (1 + 0.1 * torch.rand(channels, states, device=device))
        return ScanInputs(
            half(rows, steps, channels),
            half(rows, steps, channels, scale=0.5),
            A,
            half(rows, steps, states),
            half(rows, steps, states),
            torch.ones(channels, device=device),
            torch.randn(channels, device=device) - 4,
        )

    def tensors(self) -> list[torch.Tensor]:
        return [*self.directions[0], *self.directions[1], self.z]

    def forward(self, backend: str) -> torch.Tensor:
        with torch.no_grad():
            return gated_bidirectional_scan(*self.directions, self.z, backend=backend)

    def both(self, backend: str) -> list[torch.Tensor]:
        """Return the output and every gradient."""
        out = gated_bidirectional_scan(*self.directions, self.z, backend=backend)
        return [out.detach(), *torch.autograd.grad(out, self.tensors(), self.weight.to(out.dtype))]

    def of_rows(self, rows: list[int], dtype: torch.dtype | None = None) -> "Case":
        """Return the same numbers for some of the rows."""
        some = object.__new__(Case)
        some.shape = (len(rows), *self.shape[1:])

        def pick(tensor: torch.Tensor) -> torch.Tensor:
            tensor = tensor.detach()[rows] if tensor.ndim == 3 else tensor.detach().clone()
            return (tensor if dtype is None else tensor.to(dtype)).requires_grad_()

        some.directions = [ScanInputs(*map(pick, p)) for p in self.directions]
        some.z, some.weight = pick(self.z), pick(self.weight).detach()
        return some


def worst_error(case: Case, backend: str) -> float:
    """Return the largest difference from the float64 reference, relative to a tensor's largest value.

    All gradients of a few rows alone are compared, and those of the same rows within the whole.
    """
    count = max(1, min(4, case.shape[0], 8192 // case.shape[1]))
    rows = sorted({round(i * (case.shape[0] - 1) / max(1, count - 1)) for i in range(count)})
    expected = case.of_rows(rows, torch.float64).both("reference")
    alone, whole = case.of_rows(rows).both(backend), case.both(backend)
    errors = [_difference(a, e) for a, e in zip(alone, expected, strict=True)]
    errors += [_difference(w[rows], e) for w, e in zip(whole, expected, strict=True) if w.ndim == 3]
    return max(errors)


def _difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    found = ((actual.double() - expected).abs().max() / expected.abs().max()).item()
    return found if found == found else float("inf")


def floor_ms(shape: tuple[int, int, int, int], ceilings: Ceilings, backward: bool) -> float:
    """Return the least time in ms that the exponentials, float32 instructions or bytes of both directions take, forward
    or forward + backward.
    """
    rows, steps, channels, states = shape
    elements = 2 * rows * steps * channels * states
    exponentials = elements * (steps - 1) / steps  # the first step needs no exponential
    # Forward: u and delta of both directions, z and the output. Backward: all inputs again, and their gradients.
    tensors, small = (6, 4) if not backward else (6 + 6 + 5, 4 + 4 + 4)
    bytes_moved = 2 * rows * steps * (tensors * channels + small * states)
    passes = 2 if backward else 1
    instructions = elements * (FORWARD + (BACKWARD if backward else 0))
    return 1e3 * max(
        passes * exponentials / ceilings.exponentials, instructions / ceilings.float32, bytes_moved / ceilings.bytes
    )


def peak_mb(case: Case, backend: str) -> float:
    """Return the memory in MB that forward + backward take above the inputs, on a GPU."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    case.both(backend)
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def measure(shape: tuple[int, int], args: argparse.Namespace, ceilings: Ceilings) -> list[dict]:
    """Return a record for each backend and pass: R, T, what, backend and error; for right backends also ms, floor_ms,
    peer_ms (None without mamba-ssm) and peak_mb.
    """
    case = Case(*shape, args.dim, args.states, args.device)
    records, errors = [], {}
    for backend in args.backends:
        try:
            errors[backend] = worst_error(case, backend)
        except torch.OutOfMemoryError:
            records.append({"R": shape[0], "T": shape[1], "what": "both", "backend": backend, "error": None})
            continue
        print(f"R = {shape[0]}, T = {shape[1]}: {backend} within {errors[backend]:.1e} of float64", flush=True)
    for what in WHAT:
        found = medians({b: functools.partial(getattr(case, what), b) for b in errors}, args.rounds, args.device)
        for backend, ms in found.items():
            records.append(
                {
                    "R": shape[0],
                    "T": shape[1],
                    "what": what,
                    "backend": backend,
                    "error": errors[backend],
                    "ms": ms,
                    "floor_ms": floor_ms(case.shape, ceilings, backward=what == "both"),
                    "peer_ms": found.get(PEER),
                    "peak_mb": peak_mb(case, backend) if what == "both" and case.z.is_cuda else None,
                }
            )
    return records


def is_right(record: dict) -> bool:
    return record["error"] is None or record["error"] < TOLERANCE


def table_row(record: dict) -> list[str]:
    size = f"{record['R']:,} × {record['T']:,}"
    if record["error"] is None:
        return [size, record["backend"], "out of memory", "", "", "", ""]
    ms, peer, peak = record["ms"], record["peer_ms"], record["peak_mb"]
    versus = "–" if peer is None else f"{peer / ms:.1f} ×"
    to_floor = f"{ms / record['floor_ms']:.1f} ×"
    memory = "" if peak is None else f"{peak:,.0f}"
    return [size, WHAT[record["what"]], record["backend"], f"{ms:.3f}", versus, to_floor, memory]


def a_shape(text: str) -> tuple[int, int]:
    try:
        rows, steps = map(int, text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not ROWSxSTEPS, for example 12544x4") from None
    return rows, steps


def table(records: list[dict]) -> str:
    columns = ["R × T", "what", "backend", "median ms", "mamba-ssm's time / this", "this / floor", "peak MB"]
    return markdown_table(columns, [table_row(record) for record in records])


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="21; of toys 1")
    parser.add_argument("--dim", type=int, help="768; of toys 4")
    parser.add_argument("--states", type=int, default=16)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backends", nargs="*", help="all that can run, the reference aside")
    parser.add_argument("--shapes", nargs="*", type=a_shape, metavar="RxT", help="in place of those above")
    parser.add_argument("--output", help="a Markdown file to write the table to")
    parser.add_argument("--toy", action="store_true", help="tiny shapes on the CPU, in Triton's interpreter")
    args = parser.parse_args(argv)
    args.rounds, args.dim = args.rounds or (1 if args.toy else 21), args.dim or (4 if args.toy else 768)
    args.device = "cpu" if args.toy else args.device
    args.shapes = args.shapes or (TOY_SHAPES if args.toy else SHAPES)
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if not args.toy and not torch.cuda.is_available():
        print("no GPU here: the CPU's backends at the CPU's sizes\n", flush=True)
        scan_on_cpu.main([])
        return 0
    torch.manual_seed(0)
    args.backends = args.backends or [b for b in available_backends(args.device) if b != "reference"]
    ceilings = measure_ceilings(args.device, toy=args.toy)
    records = [record for shape in args.shapes for record in measure(shape, args, ceilings)]
    all_right = all(map(is_right, records))
    setting = f"D = {args.dim}, N = {args.states}, bf16, both directions and the gate; measured ceilings: {ceilings}"
    verdict = f"Within {TOLERANCE} of the float64 reference: {'all' if all_right else 'NOT ALL; see the lines above'}."
    report("The gated bidirectional scan", [where(args.device), setting, verdict, table(records)], args.output)
    return 0 if all_right else 1


if __name__ == "__main__":
    sys.exit(main())
