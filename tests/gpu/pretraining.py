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
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

from avion.engine import trainer as trainer_module
from avion.engine.args import parse
from avion.engine.build import build_model
from avion.engine.distributed import World
from avion.engine.inputs import ModelInputs
from avion.engine.options import PretrainOptions
from avion.engine.precision import choose_precision
from avion.engine.resume import Start
from avion.engine.sinks import RunLog
from avion.engine.state import Position
from avion.engine.steps import Contrastive
from avion.engine.tasks.base import Task
from avion.engine.trainer import Trainer, start_training, train_sampler, wrapped
from avion.losses import ClipLoss
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
            "index": index,
            "video": self.frames[index],
            "tokens": self.tokens[index],
            "clamped": 0,
            "error": "",
            "replaced_by": -1,
        }


class DemoClips(Task):
    """Pretraining without videos."""

    metric = "loss"

    def __init__(self, options: PretrainOptions, world: World, checkpoint: Checkpoint | None = None):
        super().__init__(options, world, checkpoint)
        loss = ClipLoss(local_loss=options.local_loss, gather_with_grad=options.gather_with_grad)
        self.objective = Contrastive(lambda video, text, logit_scale, _: loss(video, text, logit_scale))

    def build_model(self) -> nn.Module:
        return build_model(self.options, self.checkpoint)

    def train_dataset(self, inputs: ModelInputs) -> Dataset:
        return _Clips()


class _Recorder(Trainer):
    """Keeps the loss of every step."""

    losses: list[float]

    def optimizer_step(self, micro_batches, lr):
        metrics = super().optimizer_step(micro_batches, lr)
        self.losses.append(float(metrics["loss"]))
        return metrics

    def train_until(self, epochs: int) -> None:
        while self.position.epoch < epochs:
            epoch = self.position.epoch
            self.train_epoch(epoch)
            self.training.position = Position(epoch + 1)


def losses(mode: str, device: str, folder: Path) -> list[float]:
    """Of every step in this mode. ZeRO's run is stopped after an epoch, saved, and resumed by another trainer."""
    words, zero = MODES[mode].words, MODES[mode].zero
    folder.mkdir(parents=True, exist_ok=True)
    with _group_of_one(device, folder) if zero else contextlib.nullcontext():
        trainer = _trainer(words, device, folder, zero)
        if not zero:
            trainer.train_until(EPOCHS)
            return trainer.losses
        trainer.train_until(1)
        trainer.save()
        again = _trainer(words, device, folder, zero, Checkpoint.open(folder / "checkpoint.pt"))
        again.train_until(EPOCHS)
        return trainer.losses + again.losses


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
) -> _Recorder:
    flags = [
        "--config",
        str(ROOT / "recipes" / "demo_pretrain.yaml"),
        "--batch-size",
        str(BATCH),
        "--epochs",
        str(EPOCHS),
        "--workers",
        "0",
        "--output-dir",
        str(folder),
        "--lr",
        "5e-4",
        *words,
    ]
    options = parse(PretrainOptions, flags, "main_pretrain.py", "")
    world = World(device=device)
    task = DemoClips(options, world, checkpoint)
    torch.manual_seed(options.seed)
    model = task.build_model().to(world.device)
    dataset, precision = _Clips(), choose_precision(options, world.device)
    sampler = train_sampler(dataset, options, world)
    # By itself a run of one process has neither ZeRO nor DistributedDataParallel.
    patched = _with_zero if zero else contextlib.nullcontext
    with patched():
        start = Start() if checkpoint is None else Start(checkpoint.path, own=True)
        training = start_training(task, model, checkpoint, start, options, world, precision, sampler)
    step_model = DistributedDataParallel(model) if zero else wrapped(model, options, world)
    trainer = _Recorder(task, training, step_model, dataset, sampler, options, world, precision, RunLog(folder))
    trainer.losses = []
    return trainer


@contextlib.contextmanager
def _with_zero() -> Iterator[None]:
    build = trainer_module.build_optimizer
    trainer_module.build_optimizer = lambda *args, **options: build(*args, **{**options, "use_zero": True})
    try:
        yield
    finally:
        trainer_module.build_optimizer = build


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
