"""The flags of `main_finetune_retrieval.py`."""

from dataclasses import dataclass
from typing import ClassVar

from avion.engine.args import flag, other_default
from avion.numbers import SHARE_ABOVE_0, SHARE_BELOW_1, Number

from .model_args import check_model
from .shared import (
    EK100_ANNOTATIONS,
    CaptionOptions,
    ModelOptions,
    OptimOptions,
    RunOptions,
    TextLockOptions,
    TrainingOptions,
    VideoOptions,
    check_scale_range,
)


@dataclass(frozen=True)
class FinetuneRetrievalOptions(CaptionOptions, TextLockOptions, TrainingOptions):
    """The options of `main_finetune_retrieval.py`."""

    TITLE: ClassVar[str] = "retrieval fine-tuning"

    dataset: str = flag("ek100_mir", "data; demo: the embedded demo dataset", choices=["ek100_mir", "demo"])
    root: str = flag("datasets/EK100/EK100_256p_15sec/", "folder of the videos of both splits", metavar="DIR")
    train_metadata: str = flag(
        f"{EK100_ANNOTATIONS}/EPIC_100_retrieval_train.csv",
        "clips to train on: a CSV of EPIC-KITCHENS-100, with the sentences in ..._sentence.csv beside this file, or "
        "captions (docs/data.md)",
        metavar="FILE",
    )
    val_metadata: str = flag(
        f"{EK100_ANNOTATIONS}/EPIC_100_retrieval_test.csv",
        "clips to evaluate on: a CSV of EPIC-KITCHENS-100, or captions; none: no evaluation",
        metavar="FILE",
    )
    relevancy_path: str = flag(
        f"{EK100_ANNOTATIONS}/relevancy/caption_relevancy_EPIC_100_retrieval_test.pkl",
        "relevancies of the clips to evaluate on; {} in the name stands for train and for test",
        metavar="FILE",
    )
    train_relevancy_path: str | None = flag(
        None, "relevancies of the clips to train on [--relevancy-path with train in the place of test]", metavar="FILE"
    )
    relevancy_threshold: float = flag(0.1, "sentences of a higher relevancy are the positives of a clip", SHARE_BELOW_1)
    relevancy_weighting: bool = flag(False, "weight the loss of each clip by the relevancy of its sentence")
    margin: float = flag(0.2, "margin of the ranking loss, a difference of cosines", Number(float, 0, 2, above=True))
    similarity_filename: str | None = flag(
        None,
        "file that the similarities of the last evaluation are written to, for tools/make_submission.py",
        metavar="FILE.npy",
    )
    scale_range: list[float] = flag(
        [0.5, 1.0], "smallest and largest area of a random crop, as shares of the frame", SHARE_ABOVE_0, metavar="X"
    )
    use_multi_epochs_loader: bool = flag(
        False, "keep data-loading processes alive between epochs, which they are without this flag too", off=""
    )

    model: str = other_default(
        ModelOptions,
        "model",
        "CLIP_VITB16",
        "name of a registered model, where the checkpoint does not say which model it is",
    )
    pretrain_model: str | None = flag(
        None,
        "pretrained checkpoint to start from, which sets the model and its sizes: a path or hf:owner/repo/file",
        metavar="PATH",
    )
    local_loss: bool = flag(
        False, "each process computes only the rows of its own clips in the loss: the same result with less work"
    )
    gather_with_grad: bool = flag(True, "let gradients flow through the gathered features of the other processes")

    clip_length: int = other_default(VideoOptions, "clip_length", 16)
    clip_stride: int = other_default(VideoOptions, "clip_stride", 4)
    epochs: int = other_default(OptimOptions, "epochs", 100)
    eval_freq: int = other_default(RunOptions, "eval_freq", 5)

    def check(self) -> None:
        """Raise UserError for an empty range of crops, and for a model that cannot be built."""
        check_scale_range(self.scale_range)
        if self.was_given("model"):  # otherwise the checkpoint sets the model and its sizes
            check_model(self)
