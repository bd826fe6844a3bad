"""What ViM costs in place of attention: ID6's video tower against ID4's, in one process.

    python benchmarks/bench_towers.py [--threads 2] [--rounds 5] [--clips 2] [--frames 4] [--device cpu]

The towers are ViT-B/16 at 224 px in fp32, with random weights and open gates. The benchmark prints medians of rounds
that alternate between the models, forward and forward + backward. Peak memory is measured in a process of its own for
each model, as the peak resident size of one forward + backward pass: above the size when model and video were ready,
and in all. Ratios are ID6 over ID4.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from avion.models import create_model

MODELS = {"ID4": "TIMESFORMER_VITB16", "ID6": "TIMEMAMBA_VITB16"}


def build(name: str, args: argparse.Namespace) -> tuple[torch.nn.Module, torch.Tensor]:
    """Return the video tower, in training mode, and a video (B, 3, T, 224, 224)."""
    torch.manual_seed(0)
    tower = create_model(MODELS[name], num_frames=args.frames, text_layers=1).visual.to(args.device).train()
    with torch.no_grad():
        for parameter_name, parameter in tower.named_parameters():
            if "alpha_timeattn" in parameter_name:
                parameter.fill_(0.5)
    return tower, torch.randn(args.clips, 3, args.frames, 224, 224, device=args.device)


def forward(tower: torch.nn.Module, video: torch.Tensor) -> None:
    with torch.no_grad():
        tower(video)


def forward_backward(tower: torch.nn.Module, video: torch.Tensor) -> None:
    tower(video).sum().backward()


def seconds(work, *arguments, device: str) -> float:
    start = time.perf_counter()
    work(*arguments)
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare_times(args: argparse.Namespace) -> None:
    towers = {name: build(name, args) for name in MODELS}
    for what, work in (("forward", forward), ("forward + backward", forward_backward)):
        times: dict[str, list[float]] = {name: [] for name in towers}
        for _ in range(args.rounds + 1):
            for name, arguments in towers.items():
                times[name].append(seconds(work, *arguments, device=args.device))
        median = {name: statistics.median(values[1:]) for name, values in times.items()}
        shown = ", ".join(f"{name} {median[name]:.2f} s" for name in MODELS)
        print(f"{what}: {shown}; ratio {median['ID6'] / median['ID4']:.2f}")


def peak_memory(name: str, args: argparse.Namespace) -> tuple[float, float]:
    """Return the MB at the peak of one forward + backward pass: in all, and above the state before it."""
    tower, video = build(name, args)
    for parameter in tower.parameters():
        parameter.grad = torch.zeros_like(parameter)  # as in every optimizer step but the first
    if args.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        forward_backward(tower, video)
        peak = torch.cuda.max_memory_allocated()
        return peak / 1e6, (peak - before) / 1e6
    before = resident_kb("VmRSS")
    forward_backward(tower, video)
    peak = resident_kb("VmHWM")
    return peak / 1e3, (peak - before) / 1e3


def resident_kb(what: str) -> int:
    """Return Linux's VmRSS (now) or VmHWM (at most so far); getrusage's peak would include the parent process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what))


def compare_memory(args: argparse.Namespace, argv: list[str]) -> None:
    found = {}
    for name in MODELS:
        command = [sys.executable, __file__, *argv, "--peak-memory-of", name]
        found[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    for index, what in enumerate(("in all", "above model, gradients and video")):
        shown = ", ".join(f"{name} {values[index]:,.0f} MB" for name, values in found.items())
        print(f"peak memory {what}: {shown}; ratio {found['ID6'][index] / found['ID4'][index]:.2f}")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clips", type=int, default=2)
    parser.add_argument("--frames", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peak-memory-of", choices=MODELS, help="print that model's peak memory as JSON and stop")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.peak_memory_of:
        print(json.dumps(peak_memory(args.peak_memory_of, args)))
        return
    print(f"torch {torch.__version__}, {args.device}, {args.threads} threads, load average {os.getloadavg()[0]:.1f}")
    compare_memory(args, argv)
    compare_times(args)
    print(f"load average afterwards {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
