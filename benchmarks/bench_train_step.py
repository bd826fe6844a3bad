"""A whole optimizer step on a GPU: forward, loss, backward, AdamW, for ID4, ID6, ID7 and ID8 with every scan backend.

    python benchmarks/bench_train_step.py [--clips 64] [--frames 4] [--rounds 11] [--output FILE.md]
    TRITON_INTERPRET=1 python benchmarks/bench_train_step.py --toy      # shows on a CPU that it runs

The models are ViT-B/16 at 224 px under bf16 autocast, with random clips and narrations. The step is the one that
training takes (`avion/engine/steps.py`, with CLIP's loss). The benchmark prints medians of rounds that alternate
between the configurations, timed with CUDA events: clips per second, the step's time over ID4's, the time with
mamba-ssm's kernels over this time, and the peak memory of a step. Model FLOP utilisation is three times the
multiply-adds of the forward pass (counted by PyTorch in matrix products and attention, plus those of the scans), times
two, over the step's time and what bf16 matrix products reach on this device.
"""

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from avion.engine.precision import Precision
from avion.engine.steps import contrastive_step
from avion.losses import ClipLoss
from avion.models import create_model
from avion.models.vim import BiMambaMixer
from avion.ops.selective_scan import available_backends
from avion.optim import build_optimizer
from benchmarks.measure import markdown_table, measure_ceilings, medians, report, where

MODELS = {
    "ID4": "TIMESFORMER_VITB16",
    "ID6": "TIMEMAMBA_VITB16",
    "ID7": "TIMEMAMBA_FROZEN_VITB16",
    "ID8": "TIMEMAMBA_SPACETIME_VITB16",
}
PEER = "mamba_ssm"
TOY = {
    "img_size": 16, "embed_dim": 8, "depth": 1, "num_heads": 2, "text_width": 16, "text_heads": 2, "text_layers": 1,
    "context_length": 16, "project_embed_dim": 8,
}  # fmt: skip
# The multiply-adds of the scan per row, step, channel, state and direction: ΔA, ΔBu, the state, y.
SCAN_MULTIPLY_ADDS = 4


class Step:
    """A model with its optimizer, and one optimizer step."""

    def __init__(self, row: str, backend: str | None, args: argparse.Namespace):
        torch.manual_seed(0)
        fields: dict[str, Any] = TOY if args.toy else {}
        if backend is not None:
            fields = {**fields, "scan_backend": backend}
        self.model = create_model(
            MODELS[row], num_frames=args.frames, grad_checkpointing=args.grad_checkpointing, **fields
        )
        self.model.to(args.device).train()
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if "alpha_timeattn" in name:
                    parameter.fill_(0.5)  # a closed gate would let no gradient through
        self.optimizer = build_optimizer(self.model, "adamw", lr=3e-5, weight_decay=0.01)
        self.precision = Precision(args.device, torch.bfloat16)
        self.loss = ClipLoss()

    def run(self, batch: dict[str, torch.Tensor]) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        contrastive_step(
            self.model,
            [batch],
            lambda video, text, scale, _: self.loss(video, text, scale),
            self.precision,
            lambda loss: loss,
        )
        self.optimizer.step()

    def flops_per_clip(self, batch: dict[str, torch.Tensor]) -> float:
        """Return the floating-point operations of forward and backward, which takes twice those of the forward pass."""
        one = {name: tensor[:1] for name, tensor in batch.items()}
        scans, handles = [0.0], []

        def count(mixer: BiMambaMixer, inputs: tuple[torch.Tensor], _) -> None:
            scans[0] += 2 * 2 * SCAN_MULTIPLY_ADDS * inputs[0].numel() * mixer.d_state

        for module in self.model.modules():
            if isinstance(module, BiMambaMixer):
                handles.append(module.register_forward_hook(count))
        with torch.no_grad(), self.precision.autocast(), FlopCounterMode(display=False) as counter:
            self.model(one["video"], one["tokens"])
        for handle in handles:
            handle.remove()
        return 3 * (counter.get_total_flops() + scans[0])


def random_batch(args: argparse.Namespace) -> dict[str, torch.Tensor]:
    size, length = (TOY["img_size"], TOY["context_length"]) if args.toy else (224, 77)
    tokens = torch.randint(1, 49406, (args.clips, length))
    tokens[:, length // 4] = 49407  # the end of the text
    tokens[:, length // 4 + 1 :] = 0
    video = torch.randn(args.clips, 3, args.frames, size, size)
    return {"video": video.to(args.device), "tokens": tokens.to(args.device)}


def peak_gb(step: Step, batch: dict[str, torch.Tensor], others_gb: float) -> float:
    """Return the peak memory of one step in GB on a GPU, with model, optimizer and batch, without the other
    configurations.
    """
    torch.cuda.reset_peak_memory_stats()
    step.run(batch)
    return torch.cuda.max_memory_allocated() / 1e9 - others_gb


def build_all(args: argparse.Namespace, batch) -> tuple[dict[str, Step], list[dict]]:
    """Build every configuration that fits.

    Returns:
        The configurations by name; and a record of each: row, backend (None for ID4), peak_gb (None on a CPU),
            out_of_memory.
    """
    steps: dict[str, Step] = {}
    records = []
    for row in args.rows:
        for backend in [None] if row == "ID4" else args.backends:
            name = row if backend is None else f"{row}, {backend}"
            record = {"name": name, "row": row, "backend": backend, "peak_gb": None, "out_of_memory": False}
            records.append(record)
            others_gb = 0.0 if args.device == "cpu" else (torch.cuda.memory_allocated() - batch["video"].nbytes) / 1e9
            try:
                step = Step(row, backend, args)
                step.run(batch)
                if args.device != "cpu":
                    record["peak_gb"] = peak_gb(step, batch, others_gb)
            except torch.OutOfMemoryError:
                record["out_of_memory"] = True
                step = None
                torch.cuda.empty_cache()
                continue
            steps[name] = step
            print(f"{name}: runs", flush=True)
    return steps, records


def complete(records: list[dict], found: dict[str, float], flops: dict[str, float], matmul: float | None, clips: int):
    """Add what was measured to the records: ms, clips_per_s, to_id4, to_peer (None where the other side was not
    measured), mfu (None on a CPU).
    """
    for record in records:
        ms = found.get(record["name"])
        if ms is None:
            continue
        peer = found.get(f"{record['row']}, {PEER}")
        speed = clips / ms * 1e3
        record |= {
            "ms": ms,
            "clips_per_s": speed,
            "to_id4": ms / found["ID4"] if "ID4" in found else None,
            "to_peer": None if peer is None else peer / ms,
            "mfu": None if matmul is None else flops[record["name"]] * speed / matmul,
        }


def table_row(record: dict) -> list[str]:
    def shown(key: str, form: str) -> str:
        return "–" if record[key] is None else form.format(record[key])

    if record["out_of_memory"]:
        return [record["name"], "out of memory", "", "", "", "", ""]
    return [
        record["name"],
        shown("ms", "{:.1f}"),
        shown("clips_per_s", "{:.1f}"),
        shown("to_id4", "{:.2f} ×"),
        shown("to_peer", "{:.2f} ×"),
        shown("peak_gb", "{:.2f}"),
        "–" if record["mfu"] is None else f"{100 * record['mfu']:.1f}",
    ]


def measure(args: argparse.Namespace) -> tuple[list[dict], str]:
    """Return the records of all configurations, and a line that says what was measured."""
    batch = random_batch(args)
    steps, records = build_all(args, batch)
    found = medians(
        {name: functools.partial(step.run, batch) for name, step in steps.items()}, args.rounds, args.device
    )
    # On a CPU, the other ceilings would be those of Triton's interpreter.
    matmul = measure_ceilings(args.device, toy=args.toy).matmul if args.toy or args.device != "cpu" else None
    flops = {name: step.flops_per_clip(batch) for name, step in steps.items()}
    complete(records, found, flops, matmul, args.clips)
    setting = (
        f"{args.clips} clips of {args.frames} frames, bf16 autocast, AdamW"
        f"{', activation checkpointing' if args.grad_checkpointing else ''}; "
        f"bf16 matrix products {'were not measured' if matmul is None else f'reach {matmul / 1e12:.1f} TFLOP/s here'}"
    )
    return records, setting


def table(records: list[dict]) -> str:
    columns = [
        "row, scan backend",
        "median ms",
        "clips/s",
        "time / ID4's",
        "mamba-ssm's time / this",
        "peak GB",
        "MFU, %",
    ]
    return markdown_table(columns, [table_row(record) for record in records])


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, help="64; of toys 2")
    parser.add_argument("--frames", type=int, default=4)
    parser.add_argument("--rounds", type=int, help="11; of toys 1")
    parser.add_argument("--rows", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--backends", nargs="*", help="scan backends; all that can run, the reference aside")
    parser.add_argument("--grad-checkpointing", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", help="a Markdown file to write the table to")
    parser.add_argument("--toy", action="store_true", help="tiny models on the CPU, in Triton's interpreter")
    args = parser.parse_args(argv)
    args.clips, args.rounds = args.clips or (2 if args.toy else 64), args.rounds or (1 if args.toy else 11)
    if args.toy:
        args.device = "cpu"
    args.backends = args.backends or [b for b in available_backends(args.device) if b != "reference"]
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    records, setting = measure(args)
    report("A training step", [where(args.device), setting, table(records)], args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
