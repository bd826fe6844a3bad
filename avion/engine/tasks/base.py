"""What differs between the tasks: data, model, objective, metrics. The trainer serves all of them."""

import logging
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import nn
from torch.utils.data import Dataset

from avion.data.video import VideoStore, is_remote
from avion.engine import encode
from avion.engine.distributed import World
from avion.engine.inputs import ModelInputs
from avion.engine.options import TrainingOptions
from avion.engine.steps import Objective, Precision
from avion.errors import UserError
from avion.weights import Checkpoint

logger = logging.getLogger(__name__)

T = TypeVar("T", bound=TrainingOptions)


class Task(Generic[T]):
    """The data, the model, the objective and the metrics of one entry point.

    Attributes:
        metric: The name of the metric that decides which model is best; a higher value is better. None: nothing is
            evaluated.
        options: The options of the run. `--dataset demo` has the paths of the demo dataset.
        world: The processes of the run.
        checkpoint: The checkpoint that the run resumes or evaluates, if there is one.
        objective: What an optimizer step follows.
    """

    metric: str | None
    objective: Objective

    def __init__(self, options: T, world: World, checkpoint: Checkpoint | None = None):
        self.options, self.world, self.checkpoint = options, world, checkpoint

    def build_model(self) -> nn.Module:
        """The model on the CPU, with the weights of the checkpoint or with those that training starts from."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """What must be the same on all processes, by name."""
        raise NotImplementedError

    def data(self) -> dict[str, str]:
        """What identifies the clips of the run, by the flag that names them: a text that changes with the clips.

        It does not change with the place of the files. A run that goes on compares it with its checkpoint.
        """
        return {}

    def train_dataset(self, inputs: ModelInputs) -> Dataset:
        """The clips to train on, in the sizes that the model takes."""
        raise NotImplementedError

    def learning_rates(self) -> tuple[float, float, float]:
        """The learning rates at the peak, the start and the end of the schedule."""
        return self.options.lr, self.options.lr_start, self.options.lr_end

    def saved_flags(self, model: nn.Module) -> dict[str, Any]:
        """The flags as the checkpoints of this run store them."""
        return self.options.values()

    def evaluate(self, model: nn.Module, precision: Precision) -> dict[str, float]:
        """The metrics on the evaluation data, the same on all processes."""
        raise NotImplementedError

    def summary(self, metrics: dict[str, float]) -> str:
        """The metrics on one line."""
        raise NotImplementedError

    def table(self, metrics: dict[str, float]) -> str:
        """The metrics as a table."""
        raise NotImplementedError

    def store(self, root: str, flag: str) -> VideoStore:
        """The videos in the folder `root`, which was given as `flag`, read as the options say."""
        if not is_remote(root) and not Path(root).is_dir():
            raise UserError(f"{flag} {root}: no such folder; give the folder that the videos are in")
        return VideoStore(
            root,
            chunk_length=self.options.video_chunk_length,
            layout=self.options.video_layout,
            decoder=self.options.decoder,
            threads=self.options.decode_threads,
            index={"auto": "auto", "off": None}.get(self.options.video_index, self.options.video_index),
        )

    def leave_out_unreadable(self, features: encode.Features, root_flag: str, root: str) -> None:
        """Log how many clips an evaluation leaves out; raise UserError if no clip can be read."""
        if features.errors:
            logger.warning(
                "%d of %d clips cannot be read and are left out of the metrics: %s",
                len(features.errors),
                len(features.values),
                encode.describe(features.errors),
            )
        if len(features.readable) == 0:
            raise UserError(f"{root_flag} {root}: no clip can be read: {encode.describe(features.errors, 1)}")
