"""A run of a training task: from options to a trained or evaluated model."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from avion import folder_lock
from avion.constants import ZERO_SHOT
from avion.files import remove_partial_files
from avion.json_lines import append_json
from avion.models.locking import lock_towers, parameter_counts
from avion.weights import Checkpoint

from . import distributed, mirror, signals, sinks
from .args import Options
from .console import setup_logging
from .distributed import World
from .inputs import ModelInputs
from .mirror import in_working_folder, readable, working_folder
from .options import DeviceOptions, TrainingOptions
from .peers import LostPeer
from .precision import Precision, choose_precision
from .resume import Start, find_start
from .run_files import EVALUATIONS
from .tasks.base import Task
from .trainer import Trainer, start_training, train_sampler, wrapped
from .workers import end_all_workers

logger = logging.getLogger(__name__)

T = TypeVar("T", bound=TrainingOptions)

# The files in --output-dir of which a killed run may have left a part.
_WRITTEN = ("checkpoint*.pt", "wandb_id.txt", "egoschema_*", *(f"{name}.*" for name in ZERO_SHOT))


def train_or_evaluate(task_class: type[Task[T]], options: T) -> dict[str, float]:
    """Train the model of a task, or with `--evaluate` evaluate it.

    Returns:
        The metrics of the last evaluation, on every process.

    Raises:
        UserError: A flag, a file or the environment is wrong.
        Stopped: A signal asked the run to stop; the same options go on from where it stands.
    """
    options = in_working_folder(options)
    with joined(options, None if options.evaluate else options.output_dir) as world:
        # Before anything slow, because a process that was started with other flags would only be noticed much later.
        world.agree({**shared_flags(options), "torch": torch.__version__})
        with world.together("looking for packages"):
            sinks.check_flags(options)
        with world.together("looking for a checkpoint"):
            start, checkpoint = find_start(options) if world.is_main else (Start(), None)
        start = readable(world.broadcast(start), options, world)
        precision, task = _read_data(task_class, options, start.path, checkpoint, world)
        world.agree(task.facts())
        world.stop_if_asked("before the model was built")
        with world.together("building the model"):
            torch.manual_seed(options.seed)
            model = task.build_model().to(world.device)
        if options.evaluate:
            return _evaluate(task, model, precision, start.path)
        return _train(task, model, precision, start)


@contextlib.contextmanager
def joined(options: DeviceOptions, log_dir: str | None) -> Iterator[World]:
    """Find the processes of a run and open its log, until the block is left.

    Args:
        options: How the processes meet.
        log_dir: The folder of the log file and of all that the run writes. Process 0 holds this folder until the end,
            so that no other run begins while a process still writes there. None: the run writes no log file.

    Yields:
        The processes of the run.

    Raises:
        UserError: The processes cannot meet, or the log cannot be written.
    """
    world = distributed.init_world(options)
    lost = False
    with contextlib.ExitStack() as held:
        try:
            with world.together("opening the log"):
                setup_logging(world)
                if world.is_main and (log_dir is not None or options.address):
                    held.enter_context(_folder(options, log_dir))
                if options.address:  # on every machine
                    working_folder(options.address).mkdir(parents=True, exist_ok=True)
                setup_logging(world, log_dir)
            yield world
            world.leave(None)
        except BaseException as e:
            instead = world.leave(e)
            lost = isinstance(instead or e, LostPeer)
            if instead is not None:
                raise instead from e
            raise
        finally:
            end_all_workers()
            distributed.shutdown(lost)


@contextlib.contextmanager
def _folder(options: DeviceOptions, log_dir: str | None) -> Iterator[None]:
    """Hold the folder of a run, and keep the remote folder like it where `--output-dir` is an address."""
    folder = working_folder(options.address) if options.address else Path(log_dir or ".")

    def stop_if_asked() -> None:
        signals.raise_if_asked("before it began")

    with contextlib.ExitStack() as held:
        held.enter_context(folder_lock.held(folder, meanwhile=stop_if_asked))
        remove_partial_files(folder, *_WRITTEN)
        if options.address:
            held.enter_context(mirror.kept(options.address, folder, stop_if_asked))
        yield


def shared_flags(options: Options) -> dict[str, Any]:
    """Return all flags that must be the same on all processes, by their names."""
    own = {"rank", "local_rank", "gpu", "workers", "decode_threads", "debug"}
    return {"--" + k.replace("_", "-"): v for k, v in options.values().items() if k not in own}


def _read_data(
    task_class: type[Task[T]], options: T, path: str | None, checkpoint: Checkpoint | None, world: World
) -> tuple[Precision, Task[T]]:
    """Open the checkpoint at `path`, unless process 0 has opened it already, and read the data of the task."""
    with world.together("reading the data"):
        precision = choose_precision(options, world.device)
        if path is not None and checkpoint is None:
            checkpoint = Checkpoint.open(path, verify=world.is_main)  # one process reads the whole file
        return precision, task_class(options, world, checkpoint)


def _train(task: Task, model: nn.Module, precision: Precision, start: Start) -> dict[str, float]:
    options, world = task.options, task.world
    with world.together("preparing the training"):
        lock_towers(model, options.lock_video, getattr(options, "lock_text", None), options.lock_except)
        logger.info("%s", parameter_counts(model))
        dataset = task.train_dataset(ModelInputs.of(model.config, options))
        sampler = train_sampler(dataset, options, world)
        training = start_training(task, model, task.checkpoint, start, options, world, precision, sampler)
    wrapped_model = wrapped(model, options, world)
    logger.info(
        "%s: %d clips, %d steps of %d clips per epoch, epochs %d to %d, %s on %s",
        model.config.name,
        sampler.count,
        sampler.steps,
        sampler.global_batch,
        training.position.epoch,
        options.epochs - 1,
        str(precision.dtype).removeprefix("torch."),
        world,
    )
    with sinks.opened(options, task.saved_flags(model), world, training.position.steps_done(sampler.steps)) as log:
        trainer = Trainer(task, training, wrapped_model, dataset, sampler, options, world, precision, log)
        if start.is_older:
            trainer.save()  # so that there is a latest checkpoint again
        return trainer.fit()


def _evaluate(task: Task, model: nn.Module, precision: Precision, source: str | None) -> dict[str, float]:
    options = task.options
    if source is None:
        logger.info("no checkpoint given (--resume): evaluating the initial weights")
    metrics = task.evaluate(model, precision)
    if task.world.is_main:
        if options.was_given("output_dir"):
            Path(options.output_dir).mkdir(parents=True, exist_ok=True)
            append_json(Path(options.output_dir) / EVALUATIONS, {**metrics, "checkpoint": source})
        print(task.table(metrics))
    return metrics
