"""Clips of 256 to 8,192 frames: memory above the inputs, and cost per frame.

    python benchmarks/bench_long_video.py [b16] [memory] [time] [--frames 256 512 ...] [--rounds 3]

b16 prints the bounds of `avion.models.long_video.memory_bytes` for ViT-B/16 at 8,192 frames, and compares a real B/16
tower of two blocks (the memory does not depend on the number of blocks) with its bound at --b16-frames.

memory runs a process for each length and takes the process's peak resident size above its size before the first frame.
Frames are made as they are asked for, so that all of this memory belongs to the forward pass: the residual stream, and
the tokens that are computed. Its growth from one length to the next is compared with the growth of the stream (4 bytes
per channel), and its size with its bound. The tower has width 192, 2 blocks and 64 patches per frame; 8,192 tokens are
computed at a time, one row of the longest clip, so that this part is the same for all lengths.

time runs a tower of B/16's width with 2 blocks and 9 patches per frame, with ViM or attention in time, in fp32; frames
are read from memory. It measures the CPU time of one thread, which other programs disturb less than the clock. It
prints medians of rounds that go through all lengths (attention: one round); the ratios are to the cheapest length of
the same model. The cost of attention per frame grows with the clip, and the cost of ViM should not. Memory comes in
huge pages where the system grants them: fresh pages of 4 kB cost up to a fifth of the time, and long clips need more of
them at a time.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch reads it once

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from avion.models import create_model
from avion.models.long_video import default_max_tokens, encode_long_video, memory_bytes
from avion.models.registry import model_config

TIMED = {"ViM": "TIMEMAMBA_VITB16", "attention": "TIMESFORMER_VITB16"}
TIMED_SIZE = {"img_size": 48, "depth": 2, "text_layers": 1}
MEASURED = ("TIMEMAMBA_VITT16", "TIMESFORMER_VITT16", "TIMEMAMBA_FROZEN_VITT16")
MEASURED_SIZE = {"img_size": 128, "depth": 2, "text_layers": 1}
MEASURED_TOKENS = 8_192
B16 = {"depth": 2, "text_layers": 1}
WEIGHTS_B16 = 175_000_000  # of both towers, about


def build(name: str, overrides: dict):
    """Build a model in evaluation mode with open time gates, so that nothing is multiplied by zero."""
    torch.manual_seed(0)
    model = create_model(name, **overrides).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "alpha_timeattn" in parameter_name:
                parameter.fill_(0.5)
    return model


def compare_times(args: argparse.Namespace) -> None:
    models = {kind: build(name, TIMED_SIZE) for kind, name in TIMED.items()}
    side = TIMED_SIZE["img_size"]
    video = torch.randn(3, max(args.frames), side, side)

    def seconds(model, frames: int) -> float:
        start = time.process_time()
        encode_long_video(model, lambda a, b: video[:, a:b], frames)
        return time.process_time() - start

    times: dict[tuple, list[float]] = {}
    for kind, model in models.items():
        seconds(model, args.frames[0])  # warm
        for _ in range(args.rounds if kind == "ViM" else 1):
            for frames in args.frames:
                times.setdefault((kind, frames), []).append(seconds(model, frames))
    print(f"{'frames':>9}" + "".join(f"{kind + ', CPU ms a frame':>28}" for kind in models))
    cost = {key: 1e3 * statistics.median(found) / key[1] for key, found in times.items()}
    least = {kind: min(cost[kind, frames] for frames in args.frames) for kind in models}
    for frames in args.frames:
        cells = [f"{cost[kind, frames]:.3f} ({cost[kind, frames] / least[kind]:.2f} x)" for kind in models]
        print(f"{frames:>9,}" + "".join(f"{cell:>28}" for cell in cells))


# ---- memory ------------------------------------------------------------------------------------


def resident_kb(what: str) -> int:
    """Return Linux's VmRSS (now) or VmHWM (at most so far); getrusage's peak would include the parent process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what))


def print_peak(case: dict) -> None:
    """Print, in a process of its own, the bytes at the peak above the state before, as JSON."""
    model = build(case["name"], case["overrides"])
    side = model.config.img_size
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case["bf16"]):
        for frames in (4, case["frames"]):  # the first call loads kernels and casts weights
            before = resident_kb("VmRSS")
            encode_long_video(
                model, lambda a, b: torch.randn(3, b - a, side, side), frames, max_tokens=case["max_tokens"]
            )
    print(json.dumps((resident_kb("VmHWM") - before) * 1024))


def peak(name: str, overrides: dict, frames: int, bf16: bool, max_tokens: int) -> int:
    case = {"name": name, "overrides": overrides, "frames": frames, "bf16": bf16, "max_tokens": max_tokens}
    command = [sys.executable, __file__, "--peak-of", json.dumps(case)]
    # Freed memory goes back to the system at once, so that the peak counts only what was in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "THP_MEM_ALLOC_ENABLE": "0"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(done.stdout)


def bounds(name: str, overrides: dict, frames: int, bf16: bool, max_tokens: int) -> dict[str, int]:
    with torch.device("meta"):
        config = create_model(name, **overrides).config
    return memory_bytes(config, frames, autocast=bf16, max_tokens=max_tokens)


def compare_memory(args: argparse.Namespace) -> None:
    for name in MEASURED:
        print(f"{name}: peak above the inputs (bound), and its growth over that of the stream")
        last = None
        for frames in args.frames:
            found = peak(name, MEASURED_SIZE, frames, False, MEASURED_TOKENS)
            parts = bounds(name, MEASURED_SIZE, frames, False, MEASURED_TOKENS)
            growth = f"{(found - last[0]) / (parts['stream'] - last[1]):>8.2f} x" if last else ""
            print(f"{frames:>9,}{found / 1e6:>9.0f} MB ({sum(parts.values()) / 1e6:.0f} MB){growth}")
            last = found, parts["stream"]


def compute_b16(args: argparse.Namespace) -> None:
    frames = 8192
    print(f"ViT-B/16, 224 px, {frames:,} frames, bf16 autocast, a GPU's {default_max_tokens('cuda'):,} tokens in work:")
    for name in ("TIMEMAMBA_VITB16", "TIMEMAMBA_FROZEN_VITB16", "TIMESFORMER_VITB16", "TIMEMAMBA_SPACETIME_VITB16"):
        parts = bounds(name, {}, frames, True, default_max_tokens("cuda"))
        parts |= {"uint8 frames": 3 * 224 * 224 * frames, "weights": 6 * WEIGHTS_B16}  # fp32 and their bf16 casts
        listed = ", ".join(f"{what} {size / 1e9:.2f}" for what, size in parts.items())
        print(f"  {model_config(name).name:<27} {sum(parts.values()) / 1e9:5.2f} GB at most ({listed})")
    if not args.b16_frames:
        return
    print(f"two blocks of B/16 on this CPU, {args.b16_frames:,} frames: measured (bound)")
    for name in ("TIMEMAMBA_VITB16", "TIMEMAMBA_FROZEN_VITB16"):
        for bf16 in (False, True):
            tokens = default_max_tokens("cpu")
            found = peak(name, B16, args.b16_frames, bf16, tokens)
            bound = sum(bounds(name, B16, args.b16_frames, bf16, tokens).values())
            dtype = "bf16" if bf16 else "fp32"
            print(f"  {name:<27} {dtype}: {found / 1e9:.2f} GB ({bound / 1e9:.2f} GB)")


PARTS = {"b16": compute_b16, "memory": compare_memory, "time": compare_times}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{', '.join(PARTS)}; default: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--frames", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--b16-frames", type=int, default=256, help="0: leave the real tower out")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.peak_of:
        print_peak(json.loads(args.peak_of))
        return
    unknown = set(args.parts) - PARTS.keys()
    if unknown:
        parser.error(f"no such part: {', '.join(unknown)}")
    print(f"torch {torch.__version__}, one thread, load average {os.getloadavg()[0]:.1f}")
    for part in args.parts or PARTS:
        PARTS[part](args)
    print(f"load average afterwards {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
