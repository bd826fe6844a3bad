"""The demo's pretraining for some steps, in every way in which it can be run; the losses of its steps. Needs no pytest.

The model, the losses, the optimizer, the loop and the checkpoints are those of `main_pretrain.py`; the clips are drawn
and tokenised beforehand (`make_clips.py`).
"""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

from avion.engine.args import parse
from avion.engine.distributed import World
from avion.engine.options import PretrainOptions
from avion.engine.steps import contrastive_step
from avion.engine.tasks.base import Task
from avion.engine.trainer import Trainer, choose_precision
from avion.losses import ClipLoss
from avion.optim import build_optimizer
from avion.weights import Checkpoint

ROOT = Path(__file__).resolve().parents[2]
CLIPS = Path(__file__).parent / "demo_clips.npz"
BATCH, EPOCHS = 16, 3  # nine steps of 48 clips


class Mode(NamedTuple):
    """How to train: further words of the command line, and how far a loss may be from the CPU's in fp32, as a share."""

    words: tuple[str, ...]
    tolerance: float
    zero: bool = False


MODES = {
    "fp32": Mode(("--precision", "fp32"), 5e-3),
    "bf16": Mode(("--precision", "bf16"), 5e-2),
    "fp16, scaled": Mode(("--precision", "fp16"), 5e-2),
    "checkpointed": Mode(("--precision", "fp32", "--grad-checkpointing"), 5e-3),
    "accumulated": Mode(("--precision", "fp32", "--batch-size", str(BATCH // 2), "--update-freq", "2"), 5e-3),
    "compiled": Mode(("--precision", "fp32", "--compile"), 5e-3),
    "compiled, bf16": Mode(("--precision", "bf16", "--compile"), 5e-2),
    "ZeRO, group of one": Mode(("--precision", "fp32"), 5e-3, zero=True),
}


class _Clips(Dataset):
    """`dataset[(epoch, index)]` as `ClipDataset` has it."""

    def __init__(self):
        with np.load(CLIPS) as content:
            self.frames = torch.from_numpy(content["frames"]).permute(0, 4, 1, 2, 3).contiguous()  # (N, 3, T, H, W)
            self.tokens = torch.from_numpy(content["tokens"]).long()

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        _, index = key
        return {
            "index": index, "video": self.frames[index], "tokens": self.tokens[index], "clamped": 0, "error": "",
            "replaced_by": -1,
        }  # fmt: skip


class DemoClips(Task):
    """Pretraining without videos; remembers the loss of every step."""

    metric = "loss"

    def __init__(self, args: Any, world: World):
        super().__init__(args, world)
        self.loss = ClipLoss(local_loss=args.local_loss, gather_with_grad=args.gather_with_grad)
        self.losses: list[float] = []

    def train_dataset(self) -> Dataset:
        return _Clips()

    def step(self, model, micro_batches, precision, scale):
        figures = contrastive_step(
            model, micro_batches, lambda video, text, scale, _: self.loss(video, text, scale), precision, scale
        )
        self.losses.append(float(figures["loss"]))
        return figures


def losses(mode: str, device: str, folder: Path) -> list[float]:
    """Of every step in this mode. ZeRO's run is stopped after an epoch, saved, and resumed by another trainer."""
    words, zero = MODES[mode].words, MODES[mode].zero
    folder.mkdir(parents=True, exist_ok=True)
    with _group_of_one(device, folder) if zero else contextlib.nullcontext():
        trainer, task = _trainer(words, device, folder, zero)
        if not zero:
            _train(trainer, EPOCHS)
            return task.losses
        _train(trainer, 1)
        trainer.save()
        again, other = _trainer(words, device, folder, zero, Checkpoint.open(folder / "checkpoint.pt"))
        _train(again, EPOCHS)
        return task.losses + other.losses


def far_off(mode: str, found: list[float], of_cpu: list[float]) -> str | None:
    """What is wrong with the losses of a mode, beside the CPU's in fp32; None where nothing is."""
    if len(found) != len(of_cpu):
        return f"{len(found)} steps, not {len(of_cpu)}"
    if not all(map(math.isfinite, found)):
        return f"a loss that is not finite: {found}"
    if mode.startswith("fp16"):  # a step or two are skipped until the loss scale fits: later losses lag behind
        return None if found[-1] < found[0] else f"no progress: {found[0]:.4f} to {found[-1]:.4f}"
    worst = max(abs(a - b) / b for a, b in zip(found, of_cpu, strict=True))
    limit = MODES[mode].tolerance
    return None if worst <= limit else f"up to {worst:.1%} from the CPU's losses, at most {limit:.1%} expected"


def _trainer(
    words: tuple[str, ...], device: str, folder: Path, zero: bool, checkpoint: Checkpoint | None = None
) -> tuple[Trainer, DemoClips]:
    flags = [
        "--config", str(ROOT / "recipes" / "demo_pretrain.yaml"), "--batch-size", str(BATCH), "--epochs", str(EPOCHS),
        "--workers", "0", "--output-dir", str(folder), "--lr", "5e-4", *words,
    ]  # fmt: skip
    args = parse(PretrainOptions, flags, "main_pretrain.py", "")
    world = World(device=device)
    task = DemoClips(args, world)
    torch.manual_seed(args.seed)
    model = task.build_model(checkpoint)
    trainer = Trainer(task, model, args, world, choose_precision(args, world.device))
    trainer.wrap()
    if zero:
        trainer.optimizer = build_optimizer(trainer.bare, "adamw", lr=args.lr, weight_decay=args.wd, use_zero=True)
        trainer.model = DistributedDataParallel(trainer.bare)
    if checkpoint is not None:
        trainer.restore(checkpoint)
    return trainer, task


def _train(trainer: Trainer, until: int) -> None:
    while trainer.position.epoch < until:
        epoch = trainer.position.epoch
        trainer.train_epoch(epoch)
        trainer.position = type(trainer.position)(epoch + 1)


@contextlib.contextmanager
def _group_of_one(device: str, folder: Path) -> Iterator[None]:
    """nccl's on a GPU."""
    backend = "nccl" if device.startswith("cuda") else "gloo"
    if device.startswith("cuda"):
        torch.cuda.set_device(torch.device(device))
    dist.init_process_group(backend, init_method=f"file://{folder}/meeting", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
