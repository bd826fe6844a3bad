"""What differs between the tasks: data, model, loss, figures. The trainer serves all of them."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from avion.data.video import VideoStore, is_remote
from avion.engine import encode
from avion.engine.build import build_model
from avion.engine.distributed import World
from avion.engine.steps import Precision
from avion.errors import UserError
from avion.weights import Checkpoint

logger = logging.getLogger(__name__)

# Errors of single clips are logged one by one up to here, then only counted.
_SHOWN_ERRORS = 20


class Task:
    """One entry point's data, model, loss and figures.

    `metric` names the figure that decides which model is best (higher is better).
    """

    metric: str

    def __init__(self, args: Any, world: World):
        self.args, self.world = args, world
        self.replaced = 0

    def build_model(self, checkpoint: Checkpoint | None) -> nn.Module:
        """The model with the weights of a checkpoint, or with those it is trained from."""
        return build_model(self.args, checkpoint)

    def facts(self) -> dict[str, Any]:
        """What all processes must have in common."""
        raise NotImplementedError

    def train_dataset(self) -> Dataset:
        raise NotImplementedError

    def learning_rates(self) -> tuple[float, float, float]:
        """The schedule's peak, its start and its end; the flags' unless a task scales them."""
        return self.args.lr, self.args.lr_start, self.args.lr_end

    def step(
        self, model: nn.Module, micro_batches: list[dict[str, Any]], precision: Precision, scale: Callable
    ) -> dict[str, torch.Tensor]:
        """Leave the gradients of one optimizer step in `.grad`; return its figures, `loss` among them."""
        raise NotImplementedError

    def after_step(self, model: nn.Module) -> None:
        """Keep parameters in their range."""

    def evaluate(self, model: nn.Module, precision: Precision) -> dict[str, float]:
        """Figures of the evaluation data, the same on all processes."""
        raise NotImplementedError

    def summary(self, figures: dict[str, float]) -> str:
        """The figures on one line."""
        raise NotImplementedError

    def table(self, figures: dict[str, float]) -> str:
        """The figures as a table."""
        raise NotImplementedError

    def report(self, micro_batches: list[dict[str, Any]]) -> None:
        """Name the clips that could not be read and were replaced by others."""
        for batch in micro_batches:
            for error in filter(None, batch["error"]):
                self.replaced += 1
                if self.replaced <= _SHOWN_ERRORS:
                    logger.warning("clip replaced by another one: %s", error)
                if self.replaced == _SHOWN_ERRORS:
                    logger.warning("further clips that cannot be read are replaced without a word")

    def store(self, root: str, flag: str) -> VideoStore:
        """The videos below a folder that was given as `flag`, read as the flags say."""
        if not is_remote(root) and not Path(root).is_dir():
            raise UserError(f"{flag} {root}: no such folder; give the folder that the videos are in")
        a = self.args
        return VideoStore(
            root,
            chunk_length=a.video_chunk_length,
            layout=a.video_layout,
            decoder=a.decoder,
            threads=a.decode_threads,
            index={"auto": "auto", "off": None}.get(a.video_index, a.video_index),
        )

    def leave_out_unreadable(self, features: encode.Features, root_flag: str, root: str) -> None:
        """Say how many clips an evaluation is without; UserError if none could be read."""
        if features.errors:
            logger.warning(
                "%d of %d clips cannot be read and are left out of the figures: %s",
                len(features.errors), len(features.values), encode.describe(features.errors),
            )  # fmt: skip
        if len(features.readable) == 0:
            raise UserError(f"{root_flag} {root}: no clip can be read: {encode.describe(features.errors, 1)}")
