"""A run: options in, a trained or evaluated model out. `program` has the command line and the exit status."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from avion.json_lines import append_json
from avion.weights import Checkpoint

from . import distributed, sinks, state
from .console import setup_logging
from .distributed import World
from .tasks import Task
from .trainer import Trainer, choose_precision

logger = logging.getLogger(__name__)


def run(task_class: type[Task], args: Any) -> dict[str, float]:
    """Train (or with `--evaluate` evaluate) and return the figures of the last evaluation."""
    with joined(args, None if args.evaluate else args.output_dir) as world:
        return _run(task_class, args, world)


@contextlib.contextmanager
def joined(args: Any, log_dir: str | None) -> Iterator[World]:
    """The processes of a run, its log open (with a file in `log_dir`, where one is given), until the block is left."""
    world = distributed.init_world(args)
    try:
        with world.together("opening the log"):
            setup_logging(world, log_dir)
        yield world
    finally:
        distributed.shutdown()


def _run(task_class: type[Task], args: Any, world: World) -> dict[str, float]:
    source = state.find_resume(args)
    # Before anything slow: a process started with other flags would only be noticed much later.
    world.agree({**shared_flags(args), "checkpoint to go on from": source, "torch": torch.__version__})
    with world.together("looking for packages"):
        sinks.check_flags(args)
    with world.together("reading the data"):
        precision = choose_precision(args, world.device)
        task = task_class(args, world)
    world.agree(task.facts())
    world.stop_if_asked("before the model was built")
    with world.together("building the model"):
        checkpoint = None if source is None else Checkpoint.open(source)
        torch.manual_seed(args.seed)
        model = task.build_model(checkpoint)
    if args.evaluate:
        return _evaluate(task, model, args, world, precision, source)
    with world.together("preparing the training"):
        trainer = Trainer(task, model, args, world, precision)
        if checkpoint is not None:
            trainer.restore(checkpoint)
    trainer.wrap()
    logger.info(
        "%s: %d clips, %d steps of %d clips per epoch, epochs %d to %d, %s on %s, %d process%s (%s)",
        model.config.name, trainer.sampler.count, trainer.sampler.steps, trainer.sampler.global_batch,
        trainer.position.epoch, args.epochs - 1, str(precision.dtype).removeprefix("torch."),
        world.device.type, world.size, "" if world.size == 1 else "es", world.how,
    )  # fmt: skip
    with sinks.opened(args, world, trainer.done) as trainer.log:
        return trainer.fit()


def _evaluate(task: Task, model, args: Any, world: World, precision, source: str | None) -> dict[str, float]:
    if source is None:
        logger.info("no checkpoint given (--resume): evaluating the initial weights")
    figures = task.evaluate(model.to(world.device), precision)
    if world.is_main:
        if "output_dir" in args.given:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            append_json(Path(args.output_dir) / "eval_log.txt", {**figures, "checkpoint": source})
        print(task.table(figures))
    return figures


def shared_flags(args: Any) -> dict[str, Any]:
    """All flags but those that are a process's own."""
    own = {"rank", "local_rank", "gpu", "workers", "decode_threads", "debug"}
    return {"--" + k.replace("_", "-"): v for k, v in vars(args).items() if k not in own and k != "given"}
