"""A training task that takes milliseconds: a real model, synthetic clips, metrics that follow from the weights.

All else is the project's own: options, processes, trainer, checkpoints, logs.
"""

import os
import signal
import zlib
from pathlib import Path

import torch
from torch.utils.data import Dataset

from avion.engine import signals
from avion.engine.args import parse
from avion.engine.build import build_model
from avion.engine.options import PretrainOptions
from avion.engine.run import train_or_evaluate
from avion.engine.steps import Contrastive
from avion.engine.tasks.base import Task
from avion.losses import ClipLoss

WORDS = (
    "--model TIMEMAMBA_VITT16 --model-args img_size=16 embed_dim=16 depth=1 num_heads=1 text_width=16 text_heads=1 "
    "text_layers=1 --context-length 4 --vocab-size 16 --project-embed-dim 8 --pretrain-zoo none --clip-length 1 "
    "--batch-size 4 --epochs 3 --lr 1e-2 --workers 0 --print-freq 2 --device cpu --save-steps 2"
).split()


class Clips(Dataset):
    """Clips whose pixels follow from their numbers."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key):
        epoch, index = key
        generator = torch.Generator().manual_seed(1000 * epoch + index)
        return {
            "video": torch.randn(3, 1, 16, 16, generator=generator),
            "tokens": torch.randint(1, 15, (4,), generator=generator),
            "index": index,
            "error": "",
        }


class Seen(Contrastive):
    """The objective of pretraining; with SEEN in the environment, a line in {SEEN}.{rank} has the clips of a step.

    With STOP_AFTER, process 0 is asked to stop after so many steps.
    """

    def step(self, model, micro_batches, precision, scale):
        metrics = super().step(model, micro_batches, precision, scale)
        vars(self)["steps"] += 1
        if self.rank == 0 and self.steps == int(os.environ.get("STOP_AFTER", "0")):
            os.kill(os.getpid(), signal.SIGTERM)
        if path := os.environ.get("SEEN"):
            numbers = [str(int(i)) for batch in micro_batches for i in batch["index"]]
            with open(f"{path}.{self.rank}", "a") as file:
                file.write(" ".join(numbers) + "\n")
        return metrics


class Quick(Task[PretrainOptions]):
    """Pretraining on 16 synthetic clips, or as many as the environment variable CLIPS says."""

    metric = "avg_map"

    def __init__(self, options, world, checkpoint=None):
        super().__init__(options, world, checkpoint)
        loss = ClipLoss(rank=world.rank, world_size=world.size)
        self.objective = Seen(lambda video, text, scale, _: loss(video, text, scale), log_scale_range=(0.0, 4.6))
        vars(self.objective).update(rank=world.rank, steps=0)

    def facts(self):
        return {}

    def data(self):
        return {"train-metadata": os.environ.get("CLIPS", "16"), "val-metadata": os.environ.get("VAL_CLIPS", "7")}

    def build_model(self):
        return build_model(self.options, self.checkpoint)

    def train_dataset(self, inputs):
        return Clips(int(os.environ.get("CLIPS", "16")))

    def evaluate(self, model, precision):
        weights = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
        return {"avg_map": zlib.crc32(weights) / 2**32, "clips": 7}

    def summary(self, metrics):
        return f"{metrics['avg_map']:.4f}"

    def table(self, metrics):
        return f"avg_map {metrics['avg_map']}"


def options(folder: Path | str, *words: str) -> PretrainOptions:
    return parse(PretrainOptions, [*WORDS, "--output-dir", str(folder), *words], "main_pretrain.py", "")


def run(folder: Path | str, *words: str) -> dict[str, float]:
    """Train in this process; the metrics of the last evaluation."""
    return train_or_evaluate(Quick, options(folder, *words))


def run_as_rank(rank: int, size: int, folder: str, words: list[str], environment: dict[str, str]) -> str:
    """`run` for `tests.processes.run_processes`; what was raised, empty for nothing."""
    os.environ.update(environment)
    try:
        with signals.heeded():
            run(folder, *words)
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    return ""
