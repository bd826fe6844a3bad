"""The interface of the tasks: data, model, objective and metrics. One trainer serves all tasks."""

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
from avion.engine.precision import Precision
from avion.engine.steps import Objective
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
        """Build the model on the CPU, with the weights of the checkpoint or with those that training starts from."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """Return what must be the same on all processes, by name."""
        raise NotImplementedError

    def data(self) -> dict[str, str]:
        """Return what identifies the clips of the run: by flag, a text that changes with the clips of the file it
        names.

        The text does not change with the place of the files. A run that goes on compares it with its checkpoint.
        """
        return {}

    def train_dataset(self, inputs: ModelInputs) -> Dataset:
        """Build the dataset of the clips to train on.

        Args:
            inputs: The sizes that the model takes.

        Returns:
            The dataset.
        """
        raise NotImplementedError

    def learning_rates(self) -> tuple[float, float, float]:
        """Return the learning rates at the peak, the start and the end of the schedule."""
        return self.options.lr, self.options.lr_start, self.options.lr_end

    def saved_flags(self, model: nn.Module) -> dict[str, Any]:
        """Return the flags as the checkpoints of this run store them."""
        return self.options.values()

    def evaluate(self, model: nn.Module, precision: Precision) -> dict[str, float]:
        """Compute the metrics on the evaluation data.

        Args:
            model: The model on the device.
            precision: The settings of autocast.

        Returns:
            The metrics by name, the same on all processes.
        """
        raise NotImplementedError

    def summary(self, metrics: dict[str, float]) -> str:
        """Format metrics on one line."""
        raise NotImplementedError

    def table(self, metrics: dict[str, float]) -> str:
        """Format metrics as a table."""
        raise NotImplementedError

    def store(self, root: str, flag: str) -> VideoStore:
        """Open a folder of videos, which are read as the options say.

        Args:
            root: The folder.
            flag: The flag that names the folder, for messages.

        Returns:
            The videos.

        Raises:
            UserError: There is no such folder.
        """
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
        """Log how many clips an evaluation leaves out.

        Args:
            features: The features, with the errors of clips that cannot be read.
            root_flag: The flag that names the folder of the videos.
            root: The folder of the videos.

        Raises:
            UserError: No clip can be read.
        """
        if features.errors:
            logger.warning(
                "%d of %d clips cannot be read and are left out of the metrics: %s",
                len(features.errors),
                len(features.values),
                encode.describe(features.errors),
            )
        if len(features.readable) == 0:
            raise UserError(f"{root_flag} {root}: no clip can be read: {encode.describe(features.errors, 1)}")
