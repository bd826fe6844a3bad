"""The base of tasks whose two-tower model is evaluated by retrieval."""

import logging
from typing import Any, TypeVar

from torch import nn

from avion.data.clip_dataset import ClipDataset
from avion.data.narrations import NarrationTable
from avion.data.transforms import EvalTransform
from avion.engine import predictions
from avion.engine.distributed import World
from avion.engine.inputs import ModelInputs
from avion.engine.options import TrainingOptions
from avion.engine.precision import Precision
from avion.weights import Checkpoint

from .base import Task
from .evaluations import Evaluation

logger = logging.getLogger(__name__)

T = TypeVar("T", bound=TrainingOptions)


class RetrievalTask(Task[T]):
    """A two-tower model and its evaluation.

    Args:
        evaluation: The evaluation of the model.
        similarity_file: The file that the similarities of an evaluation are written to, if there is one.
    """

    @staticmethod
    def check_similarity_file(options: TrainingOptions, path: str | None, world: World) -> None:
        """Refuse a `--similarity-filename` that cannot be written, before annotations are read.

        Args:
            options: The flags.
            path: The value of `--similarity-filename`; None where it was not given.
            world: The processes; only process 0 checks the file.

        Raises:
            UserError: The file cannot be written, or must not be replaced.
        """
        if world.is_main:
            predictions.check_run_target(options, path, "--similarity-filename", ".npy")

    def __init__(
        self,
        options: T,
        world: World,
        checkpoint: Checkpoint | None,
        *,
        evaluation: Evaluation,
        similarity_file: str | None,
    ):
        super().__init__(options, world, checkpoint)
        if options.frame_sampling == "uniform" and options.was_given("clip_stride"):
            logger.info("--clip-stride has no effect with --frame-sampling uniform (nor had it in AVION)")
        self.similarity_file = similarity_file
        self.evaluation, self.metric = evaluation, evaluation.metric
        if self.metric is not None:
            self.store(evaluation.root, evaluation.flag)  # a folder that is not there is told before the first epoch

    @property
    def clips(self) -> NarrationTable:
        """The evaluation clips."""
        return self.evaluation.clips

    def facts(self) -> dict[str, Any]:
        return self.evaluation.facts()

    def data(self) -> dict[str, str]:
        return self.evaluation.data()

    def val_dataset(self, inputs: ModelInputs) -> ClipDataset:
        """Build the dataset of the evaluation clips, in the order of their file and without texts."""
        options = self.options
        return ClipDataset(
            self.clips,
            self.store(self.evaluation.root, self.evaluation.flag),
            num_frames=inputs.num_frames,
            transform=EvalTransform(inputs.img_size, norm_style=options.norm_style, fused=options.fused_decode_crop),
            tokenizer=None,
            train=False,
            sampling=options.frame_sampling,
            stride=options.clip_stride,
        )

    def evaluate(self, model: nn.Module, precision: Precision) -> dict[str, float]:
        return self.evaluation.run(self, model, precision)

    def summary(self, metrics: dict[str, float]) -> str:
        return self.evaluation.summary(metrics)

    def table(self, metrics: dict[str, float]) -> str:
        return self.evaluation.table(metrics)
