"""The training loop: epochs, optimizer steps, checkpoints, evaluations. What is learnt is the task's business."""

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from avion.errors import UserError
from avion.json_lines import read_json_lines
from avion.models.utils import time_gates
from avion.optim import build_optimizer, constant_scheduler, cosine_scheduler
from avion.weights import Checkpoint

from . import signals, state
from .console import Progress
from .distributed import World
from .loader import TrainBatchSampler, build_loader, read, to_device
from .sinks import RunLog
from .steps import Precision
from .tasks import Task

logger = logging.getLogger(__name__)

# A run whose gradients are not finite so many steps in a row will not recover by itself.
MAX_SKIPPED_IN_A_ROW = 20


def choose_precision(args: Any, device: torch.device) -> Precision:
    """`--precision`, `--use-bf16` and `--disable-amp` to autocast settings; contradictions are refused."""
    named = {
        "--precision " + str(args.precision): args.precision,
        "--use-bf16": "bf16" if args.use_bf16 else None,
        "--disable-amp": "fp32" if args.disable_amp else None,
    }
    wanted = {flag: value for flag, value in named.items() if value is not None}
    if len(set(wanted.values())) > 1:
        raise UserError(f"{' and '.join(wanted)} contradict each other; give one of them")
    name = next(iter(wanted.values()), "bf16" if device.type == "cuda" else "fp32")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    return Precision(device.type, dtype)


class Trainer:
    """Trains a task's model from wherever its checkpoint stands to the last epoch."""

    def __init__(self, task: Task, model: nn.Module, args: Any, world: World, precision: Precision):
        self.task, self.args, self.world, self.precision = task, args, world, precision
        self.bare = model.to(world.device)
        self.output = Path(args.output_dir)
        dataset = task.train_dataset()
        self.sampler = TrainBatchSampler(
            len(dataset), args.batch_size, update_freq=args.update_freq,
            rank=world.rank, size=world.size, seed=args.seed,
        )  # fmt: skip
        self.loader = build_loader(dataset, self.sampler, workers=args.workers, device=world.device)
        self.schedule = self._schedule()
        self.optimizer = build_optimizer(
            self.bare, args.optimizer, lr=task.learning_rates()[0], weight_decay=args.wd, betas=tuple(args.betas),
            eps=args.eps, use_zero=args.use_zero and world.size > 1,
        )  # fmt: skip
        if args.optimizer == "sgd" and "eps" in args.given:
            logger.info("--eps has no effect with --optimizer sgd (nor had it in AVION)")
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=precision.dtype is torch.float16)
        self.position = state.Position(epoch=args.start_epoch)
        self._skipped_in_a_row = 0
        self._saved = self.done
        self.log = RunLog(self.output)

    def _schedule(self) -> np.ndarray:
        a = self.args
        peak, start, end = self.task.learning_rates()
        if a.fix_lr:
            return constant_scheduler(peak, a.epochs, self.sampler.steps)
        return cosine_scheduler(
            peak, end, a.epochs, self.sampler.steps, warmup_epochs=a.warmup_epochs, start_warmup_value=start
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Optimizer, generators and position from a checkpoint whose weights the model already has."""
        self.position = state.restore(checkpoint, self.args, self.world, self.optimizer, self.scaler)
        if self.position.step >= self.sampler.steps:  # written with more steps per epoch than there are now
            self.position = state.Position(self.position.epoch + 1, 0, self.position.best)
        self._saved = self.done
        logger.info("going on from %s: epoch %d, step %d", checkpoint.path, self.position.epoch, self.position.step)

    @property
    def done(self) -> int:
        """Optimizer steps since the beginning of training."""
        return self.position.epoch * self.sampler.steps + self.position.step

    def wrap(self) -> None:
        """Compile and distribute the model, once its weights are in place."""
        model = torch.compile(self.bare) if self.args.compile else self.bare
        if self.world.size > 1:
            ids = [self.world.device.index] if self.world.device.type == "cuda" else None
            model = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
        self.model = model

    def fit(self) -> dict[str, float]:
        """Train to the last epoch. Returns the figures of the last evaluation."""
        figures: dict[str, float] = {}
        due = self.position.due
        if due is not None and not self.world.broadcast(self.world.is_main and self._is_recorded(due["epoch"])):
            figures = self._conclude()
        elif self.position.epoch >= self.args.epochs:
            logger.info(
                "nothing left to train: epoch %d of %d is done; raise --epochs or change --output-dir",
                self.position.epoch, self.args.epochs,
            )  # fmt: skip
        while self.position.epoch < self.args.epochs:
            epoch = self.position.epoch
            row = {f"train_{k}": v for k, v in self.train_epoch(epoch).items()}
            self.position = state.Position(epoch + 1, 0, self.position.best, due={**row, "epoch": epoch})
            self.save()  # before the evaluation, so that nothing is lost should that fail or be asked to stop
            figures = self._conclude() or figures
        return figures

    def _conclude(self) -> dict[str, float]:
        """Evaluate the epoch that was trained last, if it is to be evaluated, and write its line of log.txt."""
        row, figures = dict(self.position.due), {}
        epoch = row.pop("epoch")
        if (epoch + 1) % self.args.eval_freq == 0 or epoch + 1 == self.args.epochs:
            figures = self.evaluate(epoch)
            row |= {f"test_{k}": v for k, v in figures.items()}
            if figures[self.task.metric] > self.position.best:
                self.position.best = figures[self.task.metric]
                self.save(is_best=True)
        self._record(epoch, row)
        self.position.due = None
        return figures

    def save(self, is_best: bool = False) -> None:
        state.save_checkpoint(
            self.args, self.world, self.bare, self.optimizer, self.scaler, self.position, is_best=is_best
        )
        self._saved = self.done

    def _stop(self, number: int) -> None:
        """Leave between two steps, with a checkpoint."""
        if self._saved != self.done:
            self.save()
        raise signals.Stopped(
            f"{signals.name(number)} at epoch {self.position.epoch}, step {self.position.step} of "
            f"{self.sampler.steps}, which the checkpoint in {self.output} holds"
        )

    def evaluate(self, epoch: int) -> dict[str, float]:
        """The task's figures, on every process; a line of eval_log.txt and of the log."""
        figures = self.task.evaluate(self.bare, self.precision)
        with self.world.together("writing eval_log.txt"):
            if self.world.is_main:
                self.log.evaluation({**figures, "epoch": epoch})
        logger.info("epoch %d evaluation: %s", epoch, self.task.summary(figures))
        return figures

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """One epoch, or what is left of it. Returns the means of its figures over steps and processes."""
        self.model.train()
        first = self.position.step
        self.sampler.set_position(epoch, first)
        if first == 0:
            seed = int(np.random.SeedSequence((self.args.seed, epoch, self.world.rank)).generate_state(1)[0])
            torch.manual_seed(seed)  # of dropout; data order and augmentation have their own
            np.random.seed(seed)  # of timm's mixup
        progress = Progress(
            self.world, epoch=epoch, epochs=self.args.epochs, steps=self.sampler.steps, done=first,
            print_freq=self.args.print_freq, write=lambda row: self.log.progress(row | self._alpha("")),
        )  # fmt: skip
        replaced_before = self.task.replaced
        batches = iter(self.loader)
        for step in range(first, self.sampler.steps):
            micro_batches, asked = self._next(batches)
            if asked:
                progress.close()
                self._stop(asked)
            progress.data_ready()
            figures = self._optimizer_step(micro_batches, self.schedule[epoch * self.sampler.steps + step])
            progress.step(self.sampler.global_batch, figures)
            self.position.step = step + 1
            if self.args.save_steps and (step + 1) % self.args.save_steps == 0 and step + 1 < self.sampler.steps:
                self.save()
        means = progress.close()
        values = self.world.mean([*means.values(), self.task.replaced - replaced_before])
        replaced = round(values.pop() * self.world.size)
        finite = {name: v for name, v in zip(means, values, strict=True) if math.isfinite(v)}
        return finite | {"skipped_steps": means["skipped_steps"], "replaced_clips": replaced}

    def _record(self, epoch: int, row: dict[str, float]) -> None:
        """A line of log.txt."""
        done = {"epoch": epoch, "global_step": (epoch + 1) * self.sampler.steps}
        with self.world.together("writing log.txt"):
            if self.world.is_main:
                self.log.epoch({**row, **self._alpha("train_"), **done})

    def _is_recorded(self, epoch: int) -> bool:
        """Whether log.txt has this epoch's line."""
        return any(row.get("epoch") == epoch for row in read_json_lines(self.output / "log.txt").objects)

    def _alpha(self, prefix: str) -> dict[str, list[float]]:
        """The time gates of all blocks in their order; nothing for a model without."""
        gates = time_gates(self.bare)
        return {f"{prefix}alpha": torch.stack(gates).tolist()} if gates else {}

    def _next(self, batches: Iterator) -> tuple[list[dict[str, Any]], int]:
        """The micro-batches of one step, on the device, and the signal that asked any process to stop before it (0:
        none did). An error of any process stops all of them."""
        error: Exception | None = None
        micro_batches = []
        try:
            self.log.check()
            for _ in range(self.args.update_freq):
                micro_batches.append(read(batches))
        except Exception as e:
            error = e
        asked = self.world.go_on(error, "read its data")
        self.task.report(micro_batches)
        return [to_device(b, self.world.device, self.args.norm_style) for b in micro_batches], asked

    def _optimizer_step(self, micro_batches: list[dict[str, Any]], lr: float) -> dict[str, float]:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        figures = self.task.step(self.model, micro_batches, self.precision, self.scaler.scale)
        self.scaler.unscale_(self.optimizer)
        limit = self.args.grad_clip_norm if self.args.grad_clip_norm is not None else math.inf
        norm = float(nn.utils.clip_grad_norm_(self.bare.parameters(), limit))
        # Gradients are the same on all processes, so all of them skip or none does.
        if math.isfinite(norm):
            self._skipped_in_a_row = 0
            self.scaler.step(self.optimizer)
            self.task.after_step(self.bare)
        else:
            self._skip()
        self.scaler.update()
        return {**{k: float(v) for k, v in figures.items()}, "grad_norm": norm, "lr": float(lr)}

    def _skip(self) -> None:
        self._skipped_in_a_row += 1
        if self.scaler.is_enabled():
            logger.info("fp16 overflow: step skipped, loss scale %g is lowered", self.scaler.get_scale())
        else:
            logger.warning("gradients are not finite: step skipped (%d in a row)", self._skipped_in_a_row)
        if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise UserError(
                f"gradients were not finite in {MAX_SKIPPED_IN_A_ROW} steps in a row; the last good checkpoint is in "
                f"{self.output}; lower --lr, set --grad-clip-norm or use --precision bf16"
            )
