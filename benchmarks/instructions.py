"""What the Triton kernels cost on a GPU, counted in their machine code; no GPU is needed.

    python benchmarks/instructions.py [--guess-only] [--cases training] [--clock 1.755] [--multiprocessors 132]
                                      [--output FILE.md] [--json FILE.json]

Every kernel is compiled for sm_90 as the launch code launches it, with every plan that it would try on an H100 (with
--guess-only: the first one), and disassembled. The program prints the instructions of the loops that walk over rows and
steps, by class, per step, state and channel of a thread, that is per 32 channels of a warp. The instructions of a loop
are divided by the steps of one iteration (a chunk, a segment of 32 or a whole row), by the states and by the channels
of a thread. What runs once per program is not included and is printed as a number of its own. Loops count as if every
instruction ran.

The time is the larger of two bounds: a multiprocessor starts four instructions of a warp per cycle, and computes 16
exponentials, reciprocals or roots (MUFU) per cycle. Waiting and memory are not included. The floor counts in the same
way what every way of computing the scan needs: 4 float32 instructions forward and 12 backward (`bench_scan.py` lists
them), and an exponential for all but the first step. The numbers of the convolutions are per step and channel.
"""

import argparse
import functools
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from avion.errors import UserError
from avion.ops.causal_conv import triton_backend as conv
from avion.ops.selective_scan import triton_launch as scan
from avion.ops.selective_scan.inputs import ScanInputs, Time
from benchmarks.machine_code import CLASSES, Launch, count_by_class, launches
from benchmarks.measure import markdown_table

# Rows, steps, channels and states, in bf16. Training in time at B = 64, long rows of time (`bench_scan.py` times them),
# a single long one, and sizes that fill no block, chunk or word.
SHAPES = {
    "training": (12544, 4, 768, 16),
    "long": (196, 1024, 768, 16),
    "few": (1, 8192, 768, 16),
    "ragged": (300, 7, 100, 6),
}
RANK = 48  # of the step size: columns that lie beside B and C
FLOOR = {"forward_kernel": 4, "backward_kernel": 12}
SCHEDULERS, MUFU_CYCLES = 4, 8  # of a multiprocessor; of one warp's MUFU on one scheduler's share of the units


class Count(NamedTuple):
    """The instructions of one kernel with one plan, per step, state and channel of a thread, all and by class."""

    case: str
    kernel: str
    plan: str
    registers: int
    local_bytes: int
    total: float
    classes: dict[str, float]
    once: int  # instructions that a program runs once
    ms: float | None
    floor_ms: float | None


def half(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def scan_inputs(rows: int, steps: int, channels: int, states: int) -> ScanInputs:
    """Return inputs as the mixer makes them: B and C are columns of one product."""
    product = half(rows, steps, RANK + 2 * states)
    A, D = torch.empty(channels, states, device="meta"), torch.empty(channels, device="meta")
    B, C = product[..., RANK : RANK + states], product[..., RANK + states :]
    return ScanInputs(half(rows, steps, channels), half(rows, steps, channels), A, B, C, D, D)


def scan_work(case: str, processors: int, guess_only: bool) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """Yield (case, plan, work) of the directions, forward and backward."""
    rows, steps, channels, states = SHAPES[case]
    p = scan_inputs(*SHAPES[case])
    z, y = half(rows, steps, 2 * channels)[..., channels:], half(rows, steps, channels)
    kept = torch.empty(scan.kept_shape(p.u, states, keep=True), device="meta")
    forward = scan.forward_plans_for((rows, steps, channels), processors)
    backward = scan.backward_plans_for((rows, steps, channels), states, processors)
    # Both directions are counted in training's shape only. The code of the second one, which also gates, is the longer
    # one.
    for second in (False, True) if case == "training" else (True,):
        time, name = Time(reverse=second), f"{case}, {'second' if second else 'first'} direction"
        for plan in forward[: 1 if guess_only else None]:
            gate = scan.Gate(z, add=True) if second else None
            yield name, _describe(plan), functools.partial(scan.forward, p, plan, y, True, time, gate)
        for plan in backward[: 1 if guess_only else None]:
            work = functools.partial(scan.backward, p, plan, y, kept, time, scan.Gate(z, add=second), y)
            yield name, _describe(plan), work


def _describe(plan: scan.Plan) -> str:
    group = f", {plan.group} states at a time" if plan.group else ""
    parts = f", {plan.parts} parts" if plan.parts > 1 else ""
    return f"{plan.block_d} channels, {plan.chunk} steps{group}{parts}"


def conv_work() -> Iterator[tuple[str, str, Callable[[], object]]]:
    """Yield both directions of the convolution in one launch."""
    rows, steps, channels, _ = SHAPES["training"]
    weight, bias = torch.empty(channels, 4, device="meta"), torch.empty(channels, device="meta")
    x, both = half(rows, steps, 2 * channels)[..., :channels], [(weight, bias), (weight, bias)]
    yield "convolution", "", lambda: conv.forward(x, both, 1)
    yield "convolution", "", lambda: conv.backward([half(rows, steps, channels)] * 2, x, both, 1)


def count(case: str, plan: str, launch: Launch, processors: int, clock: float) -> Count:
    """Count the instructions of a launch; `clock` is in GHz."""
    constants = launch.constants
    rows, steps, channels, _ = SHAPES["training" if case == "convolution" else case.split(",")[0]]
    states = constants.get("n", 1)
    chunk = constants.get("chunk", constants.get("block_t", 1))
    per_thread = constants.get("block_d", constants.get("BLOCK", 32)) / (32 * launch.warps)
    if launch.kernel == "join_kernel":
        states = 1
    numbers: Counter[str] = Counter()
    for loop in launch.loops:
        walked = chunk if launch.is_innermost(loop) else steps if loop.depth == 0 else scan.SEGMENT
        for name, found in count_by_class(launch.own(loop)).items():
            numbers[name] += found / (walked * states * per_thread)
    once = len(launch.own(None))
    if not launch.loops:  # a program is one step of the work
        numbers.update({k: v / (chunk * per_thread) for k, v in count_by_class(launch.own(None)).items()})
        once = 0
    total = sum(numbers.values())
    warps = rows * steps * channels * states / 32
    milliseconds = warps / (processors * SCHEDULERS * clock * 1e6)
    floor = None
    if launch.kernel in FLOOR and "convolution" not in case:
        floor = milliseconds * max(FLOOR[launch.kernel], MUFU_CYCLES * (steps - 1) / steps)
    bound = milliseconds * max(total, MUFU_CYCLES * numbers["MUFU"])
    if launch.kernel == "join_kernel":  # this kernel walks over parts, not over steps
        bound = None
    classes = {name: numbers[name] for name in CLASSES}
    return Count(case, launch.kernel, plan, launch.registers, launch.local_bytes, total, classes, once, bound, floor)


def counts(cases: list[str], processors: int, clock: float, guess_only: bool) -> Iterator[Count]:
    for case in cases:
        work = conv_work() if case == "convolution" else scan_work(case, processors, guess_only)
        for name, plan, run in work:
            for launch in launches(run):
                yield count(name, plan, launch, processors, clock)


def as_table(found: list[Count]) -> str:
    columns = ["case", "kernel", "plan", "registers", "spills", "instructions", *CLASSES, "once", "ms", "/ floor"]
    rows = []
    for c in found:
        classes = [f"{c.classes[name]:.2f}" for name in CLASSES]
        ratio = "" if c.floor_ms is None else f"{c.ms / c.floor_ms:.1f} ×"
        spilled = f"{c.local_bytes} B" if c.local_bytes else "none"
        rows.append(
            [
                c.case,
                c.kernel,
                c.plan,
                str(c.registers),
                spilled,
                f"{c.total:.2f}",
                *classes,
                str(c.once),
                "" if c.ms is None else f"{c.ms:.3f}",
                ratio,
            ]
        )
    return markdown_table(columns, rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [*SHAPES, "convolution"]
    parser.add_argument("--cases", nargs="+", choices=every, default=every, help="which of the shapes (default: all)")
    parser.add_argument("--guess-only", action="store_true", help="only the first plan of each kernel")
    parser.add_argument("--multiprocessors", type=int, default=132, help="of the GPU (default: an H100 SXM's 132)")
    parser.add_argument("--clock", type=float, default=1.755, help="in GHz (default: 1.755, an H100 SXM under load)")
    parser.add_argument("--output", help="a Markdown file to write the table to")
    parser.add_argument("--json", help="a JSON file to write the numbers to")
    args = parser.parse_args(argv)
    found = []
    try:
        for item in counts(args.cases, args.multiprocessors, args.clock, args.guess_only):
            print(f"{item.case}: {item.kernel} ({item.plan}): {item.total:.2f}", file=sys.stderr, flush=True)
            found.append(item)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    shapes = ", ".join(f"{name}: R × T × D × N = {' × '.join(map(str, SHAPES[name]))}" for name in SHAPES)
    setting = f"sm_90, bf16; {shapes}; {args.multiprocessors} multiprocessors at {args.clock} GHz"
    text = f"# Instructions per step, state and channel of a thread\n\n{setting}\n\n{as_table(found)}\n"
    print(text)
    if args.output is not None:
        Path(args.output).write_text(text, encoding="utf-8")
    if args.json is not None:
        Path(args.json).write_text(json.dumps([c._asdict() for c in found], indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
