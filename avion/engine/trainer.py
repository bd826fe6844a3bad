"""The training loop: epochs, optimizer steps, checkpoints, evaluations.

A batch goes one way: from the loader to the trainer, from the trainer to the objective of the task, and from there
through the model to the loss.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

from avion.data.mixture import Mixture
from avion.errors import UserError
from avion.models.locking import train_mode
from avion.models.utils import time_gates
from avion.optim import build_optimizer, constant_scheduler, cosine_scheduler
from avion.weights import Checkpoint

from . import changes, signals, state
from .console import Progress, sums_of_all
from .distributed import World
from .loader import ReplacedClips, TrainBatchSampler, batches_of, build_loader, read, to_device
from .options import ModelOptions, OptimOptions, TrainingOptions
from .peers import LostPeer
from .precision import Precision
from .resume import Start
from .run_files import EPOCHS, EVALUATIONS
from .sinks import RunLog
from .tasks.base import Task

logger = logging.getLogger(__name__)

# A run whose gradients are not finite in this many steps in a row will not recover by itself.
MAX_SKIPPED_IN_A_ROW = 20


def learning_rate_schedule(task: Task, options: OptimOptions, steps: int) -> np.ndarray:
    """Compute the learning rate of every optimizer step.

    Args:
        task: The task, which states the learning rates.
        options: The flags of the schedule.
        steps: The number of optimizer steps of an epoch.

    Returns:
        (epochs · steps,) float64.
    """
    peak, start, end = task.learning_rates()
    if options.fix_lr:
        return constant_scheduler(peak, options.epochs, steps)
    return cosine_scheduler(
        peak, end, options.epochs, steps, warmup_epochs=options.warmup_epochs, start_warmup_value=start
    )


def train_sampler(dataset: Dataset, options: TrainingOptions, world: World) -> TrainBatchSampler:
    """Build the sampler of the micro-batches of this process.

    Args:
        dataset: The clips to train on.
        options: The flags of the run.
        world: The processes of the run.

    Returns:
        The sampler.
    """
    return TrainBatchSampler(
        len(dataset),
        options.batch_size,
        update_freq=options.update_freq,
        rank=world.rank,
        size=world.size,
        seed=options.seed,
        sources=dataset.sources if isinstance(dataset, Mixture) else None,
    )


def start_training(
    task: Task,
    model: nn.Module,
    checkpoint: Checkpoint | None,
    start: Start,
    options: TrainingOptions,
    world: World,
    precision: Precision,
    sampler: TrainBatchSampler,
) -> state.Training:
    """Build the optimizer, and make the state that a training starts from.

    Args:
        task: The task, for the learning rate.
        model: The model on the device, with its weights.
        checkpoint: The checkpoint that the training resumes, if there is one.
        start: How the run came by the checkpoint.
        options: The optimizer, and the number of the first epoch.
        world: The processes of the run.
        precision: The settings of autocast.
        sampler: The sampler of the clips; it is set to where the training stands.

    Returns:
        The state.

    Raises:
        UserError: The checkpoint has the state of another optimizer.
    """
    optimizer = build_optimizer(
        model,
        options.optimizer,
        lr=task.learning_rates()[0],
        weight_decay=options.wd,
        betas=tuple(options.betas),
        eps=options.eps,
        use_zero=options.use_zero and world.size > 1,
    )
    if options.optimizer == "sgd" and options.was_given("eps"):
        logger.info("--eps has no effect with --optimizer sgd (nor had it in AVION)")
    scaler = torch.amp.GradScaler(world.device.type, enabled=precision.dtype is torch.float16)
    training = state.Training(
        model,
        optimizer,
        scaler,
        state.Position(epoch=options.start_epoch),
        start.began_from,
        task.data() if world.is_main else {},
        start.best,
    )
    if checkpoint is not None:
        batches = (state.global_batch(checkpoint), sampler.global_batch)
        found = changes.find_changes(checkpoint, options, model, training.data, batches)
        changes.settle(found, checkpoint.path, options.allow_changes, tell=world.is_main)
        kept = None if changes.trains_others(found) else optimizer
        position = training.position = state.restore(checkpoint, start, options, world, kept, scaler)
        if position.step and not position.clips:  # a checkpoint that says neither clips nor batch size
            position.clips = position.step * sampler.global_batch
        sampler.set_position(position.epoch, position.clips)
        position.step = sampler.start_step
        if any(change.flag == "val-metadata" for change in found):  # values on other clips do not compare
            position.best, training.best, training.evaluates_anew = float("-inf"), float("-inf"), True
        schedule, done = learning_rate_schedule(task, options, sampler.steps), position.steps_done(sampler.steps)
        if world.is_main and done < len(schedule):
            changes.tell_schedule(found, float(optimizer.param_groups[0]["lr"]), float(schedule[done]))
        logger.info("going on from %s: epoch %d, step %d", checkpoint.path, position.epoch, position.step)
    return training


def wrapped(model: nn.Module, options: ModelOptions, world: World) -> nn.Module:
    """Wrap a model as a training step calls it: compiled with `--compile`, and in DDP where there are several
    processes.

    The weights must be loaded before. All processes call this function.

    Args:
        model: The model on the device.
        options: `--compile`.
        world: The processes of the run.

    Returns:
        The wrapped model.
    """
    model = torch.compile(model) if options.compile else model
    if world.size == 1:
        return model
    ids = [world.device.index] if world.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


class Trainer:
    """Trains the model of a task from where its training stands to the last epoch.

    Args:
        task: Gives the objective and evaluates the model.
        training: What changes in the course of the training. `training.model` is the model itself.
        model: The same model as a training step calls it (`wrapped`).
        dataset: The clips to train on.
        sampler: Says which clips an optimizer step is made of.
        options: The options of the run.
        world: The processes of the run.
        precision: The settings of autocast.
        log: Where metrics go.
    """

    def __init__(
        self,
        task: Task,
        training: state.Training,
        model: nn.Module,
        dataset: Dataset,
        sampler: TrainBatchSampler,
        options: TrainingOptions,
        world: World,
        precision: Precision,
        log: RunLog,
    ):
        self.task, self.training, self.model, self.sampler = task, training, model, sampler
        self.options, self.world, self.precision, self.log = options, world, precision, log
        self.output = Path(options.output_dir)
        self.loader = build_loader(
            dataset, sampler, workers=options.workers, device=world.device, timeout=options.data_timeout
        )
        self.schedule = learning_rate_schedule(task, options, sampler.steps)
        self.replaced = ReplacedClips()
        self._stored_best = self.position.best
        self.position.best = max(self.position.best, training.best)
        self._sums = self._stored_sums
        self._skipped_in_a_row = 0
        self._saved = self._began = self.done

    @property
    def position(self) -> state.Position:
        """Where the training stands."""
        return self.training.position

    @property
    def done(self) -> int:
        """The number of optimizer steps since the beginning of the training."""
        return self.position.steps_done(self.sampler.steps)

    def fit(self) -> dict[str, float]:
        """Train to the last epoch, and return the metrics of the last evaluation."""
        metrics: dict[str, float] = {}
        if self.position.pending is not None:
            metrics = self._conclude()
        if self.position.epoch >= self.options.epochs:
            logger.info(
                "nothing left to train: epoch %d of %d is done; raise --epochs or change --output-dir",
                self.position.epoch,
                self.options.epochs,
            )
        while self.position.epoch < self.options.epochs:
            epoch = self.position.epoch
            row = {f"train_{k}": v for k, v in self.train_epoch(epoch).items()}
            self.training.position = state.Position(epoch + 1, 0, self.position.best, pending={**row, "epoch": epoch})
            self.save()  # before the evaluation, so that nothing is lost where the evaluation fails or is asked to stop
            metrics = self._conclude() or metrics
        return metrics

    def _conclude(self) -> dict[str, float]:
        """Write the line of log.txt of the epoch that was trained last, after its evaluation if it is to be evaluated.

        A process may die before and after each file that is written here. The next process comes here again, with the
        checkpoint that was written before the evaluation or with a later one, and does what is not done yet: a line
        that was added to the logs after that checkpoint is not written again, and its evaluation is not repeated.

        Returns:
            The metrics of the evaluation, empty if there was none.
        """
        row, metrics = dict(self.position.pending), {}
        epoch = row.pop("epoch")
        recorded = self._recorded(EPOCHS, epoch)
        if recorded is not None:
            metrics = {k.removeprefix("test_"): v for k, v in recorded.items() if k.startswith("test_")}
        elif self._is_evaluated(epoch):
            found = None if self.training.evaluates_anew else self._recorded(EVALUATIONS, epoch)
            metrics = self.evaluate(epoch) if found is None else {k: v for k, v in found.items() if k != "epoch"}
            row |= {f"test_{k}": v for k, v in metrics.items()}
        if self.task.metric in metrics and not (recorded is not None and self.training.evaluates_anew):
            self._keep_if_best(metrics[self.task.metric])
        if recorded is None:
            self._record(epoch, row)
        self.position.pending = None
        return metrics

    def _is_evaluated(self, epoch: int) -> bool:
        """Return whether the model is evaluated after an epoch."""
        last = epoch + 1 == self.options.epochs
        return self.task.metric is not None and (last or (epoch + 1) % self.options.eval_freq == 0)

    def _keep_if_best(self, value: float) -> None:
        """Write checkpoints where an evaluation is the best so far."""
        if value > self.position.best:
            self.position.best = value
            self.save(is_best=True)
        elif self.position.best > self._stored_best:  # a process died after checkpoint_best.pt, before checkpoint.pt
            self.save()

    def _recorded(self, name: str, epoch: int) -> dict[str, Any] | None:
        """Return the line of an epoch in a log that was written after the checkpoint that the run goes on from."""
        found = None
        with self.world.together(f"reading {name}"):
            if self.world.is_main:
                found = self.log.since(self.position.logs, name, epoch)
        return self.world.broadcast(found)

    def _stored_sums(self) -> Mapping[str, Any]:
        """Return the sums of an epoch between two epochs, or before its first step in this process."""
        return self.position.sums

    def save(self, is_best: bool = False) -> None:
        """Write a checkpoint. All processes call this method."""
        self.position.sums = self._sums()
        if self.position.pending is None or not self.position.logs:  # lines of that epoch may be there already
            with self.world.together("reading the logs"):
                lengths = self.log.lengths() if self.world.is_main else {}
            self.position.logs = self.world.broadcast(lengths)
        flags = self.task.saved_flags(self.training.model)
        state.save_checkpoint(self.training, self.options, flags, self.world, is_best=is_best)
        self._saved, self._stored_best = self.done, self.position.best

    def _stop(self, number: int) -> None:
        """Leave between two steps, after a checkpoint."""
        if self._saved != self.done:
            self.save()
        where = f"at epoch {self.position.epoch}, step {self.position.step} of {self.sampler.steps}"
        if self.done == self._began:
            where += ", before the first optimizer step: there was nothing to save"
        else:
            where += f", which the checkpoint in {self.output} holds"
        raise signals.Stopped(f"{signals.name(number)} {where}")

    def _keep(self) -> None:
        """Write a checkpoint of the steps that were made before an error ends the run."""
        if self._saved == self.done:
            return
        try:
            self.save()
        except UserError as e:
            logger.warning("%s", e)
            return
        logger.info(
            "the checkpoint in %s holds epoch %d, step %d", self.output, self.position.epoch, self.position.step
        )

    def evaluate(self, epoch: int) -> dict[str, float]:
        """Evaluate the model, and write the metrics to eval_log.txt and the log.

        Args:
            epoch: The number of the epoch that was trained last.

        Returns:
            The metrics, on every process.
        """
        metrics = self.task.evaluate(self.training.model, self.precision)
        with self.world.together("writing eval_log.txt"):
            if self.world.is_main:
                self.log.evaluation({**metrics, "epoch": epoch})
        logger.info("epoch %d evaluation: %s", epoch, self.task.summary(metrics))
        return metrics

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """Train one epoch, or what is left of it.

        Args:
            epoch: The number of the epoch.

        Returns:
            The means of the metrics over optimizer steps and processes.
        """
        train_mode(self.training.model, self.model)
        position = self.position
        self.sampler.set_position(epoch, position.clips)
        first = position.step = self.sampler.start_step
        if position.clips == 0:
            seed = int(np.random.SeedSequence((self.options.seed, epoch, self.world.rank)).generate_state(1)[0])
            torch.manual_seed(seed)  # for dropout; data order and augmentation have generators of their own
            np.random.seed(seed)  # for mixup, which is timm's
        progress = Progress(
            self.world,
            epoch=epoch,
            epochs=self.options.epochs,
            steps=self.sampler.steps,
            done=first,
            print_freq=self.options.print_freq,
            write=lambda row: self.log.progress(row | self._alpha("")),
            sums=position.sums,
        )
        replaced_before = self.replaced.count - (position.sums.get("replaced", 0) if self.world.is_main else 0)

        def sums() -> Mapping[str, Any]:
            replaced = self.world.gather(self.replaced.count - replaced_before)
            return sums_of_all(self.world.gather(progress.sums()), sum(replaced))

        self._sums = sums
        batches = batches_of(self.loader)
        for step in range(first, self.sampler.steps):
            micro_batches, asked = self._micro_batches(batches)
            if asked:
                progress.close()
                self._stop(asked)
            progress.data_ready()
            metrics = self.optimizer_step(micro_batches, self.schedule[epoch * self.sampler.steps + step])
            progress.step(self.sampler.global_batch, metrics)
            position.step, position.clips = step + 1, position.clips + self.sampler.global_batch
            if self.options.save_steps and (step + 1) % self.options.save_steps == 0 and step + 1 < self.sampler.steps:
                self.save()
        means, self._sums = progress.close(), self._stored_sums
        values = self.world.mean([*means.values(), self.replaced.count - replaced_before])
        replaced = round(values.pop() * self.world.size)
        finite = {name: v for name, v in zip(means, values, strict=True) if math.isfinite(v)}
        return finite | {"skipped_steps": means["skipped_steps"], "replaced_clips": replaced}

    def _record(self, epoch: int, row: dict[str, float]) -> None:
        """Write a line of log.txt."""
        done = {"epoch": epoch, "global_step": (epoch + 1) * self.sampler.steps}
        with self.world.together("writing log.txt"):
            if self.world.is_main:
                self.log.epoch({**row, **self._alpha("train_"), **done})

    def _alpha(self, prefix: str) -> dict[str, list[float]]:
        """Return the time gates of all blocks in their order; nothing for a model without time gates."""
        gates = time_gates(self.training.model)
        return {f"{prefix}alpha": torch.stack(gates).tolist()} if gates else {}

    def _micro_batches(self, batches: Iterator[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
        """Return the micro-batches of one optimizer step on the device, and the signal that asked any process to stop
        before it.

        The signal is 0 if there was none. An error of any process stops all processes.
        """
        error: Exception | None = None
        micro_batches = []
        try:
            self.log.check()
            for _ in range(self.options.update_freq):
                micro_batches.append(read(batches))
        except Exception as e:
            error = e
        try:
            asked = self.world.go_on(error, "reading the data")
        except LostPeer:
            raise
        except Exception:  # all processes come here together
            self._keep()
            raise
        self.replaced.report(micro_batches)
        return [to_device(b, self.world.device, self.options.norm_style) for b in micro_batches], asked

    def optimizer_step(self, micro_batches: list[dict[str, Any]], lr: float) -> dict[str, float]:
        """Change the weights once. A step whose gradients are not finite is skipped.

        Args:
            micro_batches: The micro-batches on the device.
            lr: The learning rate.

        Returns:
            The metrics of the step, with the norm of the gradients.

        Raises:
            UserError: The gradients were not finite in many steps in a row.
        """
        optimizer, scaler, objective = self.training.optimizer, self.training.scaler, self.task.objective
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad(set_to_none=True)
        metrics = objective.step(self.model, micro_batches, self.precision, scaler.scale)
        scaler.unscale_(optimizer)
        limit = self.options.grad_clip_norm if self.options.grad_clip_norm is not None else math.inf
        norm = float(nn.utils.clip_grad_norm_(self.training.model.parameters(), limit))
        # The gradients are the same on all processes, so either all of them skip the step or none does.
        if math.isfinite(norm):
            self._skipped_in_a_row = 0
            scaler.step(optimizer)
            objective.after_step(self.training.model)
        else:
            self._skip()
        scaler.update()
        return {**{k: float(v) for k, v in metrics.items()}, "grad_norm": norm, "lr": float(lr)}

    def _skip(self) -> None:
        self._skipped_in_a_row += 1
        if self.training.scaler.is_enabled():
            logger.info("fp16 overflow: step skipped, loss scale %g is lowered", self.training.scaler.get_scale())
        else:
            logger.warning("gradients are not finite: step skipped (%d in a row)", self._skipped_in_a_row)
        if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise UserError(
                f"gradients were not finite in {MAX_SKIPPED_IN_A_ROW} steps in a row; the last good checkpoint is in "
                f"{self.output}; lower --lr, set --grad-clip-norm or use --precision bf16"
            )
