"""The flags of `main_finetune_retrieval.py`."""

from dataclasses import dataclass
from typing import ClassVar

from avion.engine.args import flag, other_default
from avion.numbers import SHARE_ABOVE_0, SHARE_BELOW_1, Number

from .model_args import check_model
from .shared import (
    EK100_ANNOTATIONS,
    DeviceOptions,
    ModelOptions,
    OptimOptions,
    RunOptions,
    VideoOptions,
    check_scale_range,
)


@dataclass
class FinetuneRetrievalOptions(VideoOptions, ModelOptions, OptimOptions, RunOptions, DeviceOptions):
    """`main_finetune_retrieval.py`."""

    TITLE: ClassVar[str] = "retrieval fine-tuning"

    dataset: str = flag("ek100_mir", "data; demo: the embedded demo dataset", choices=["ek100_mir", "demo"])
    root: str = flag("datasets/EK100/EK100_256p_15sec/", "videos of both splits", metavar="DIR")
    train_metadata: str = flag(
        f"{EK100_ANNOTATIONS}/EPIC_100_retrieval_train.csv", "clips to train on; ..._sentence.csv lies beside it",
        metavar="FILE",
    )  # fmt: skip
    val_metadata: str = flag(
        f"{EK100_ANNOTATIONS}/EPIC_100_retrieval_test.csv", "clips to evaluate on, likewise", metavar="FILE"
    )
    relevancy_path: str = flag(
        f"{EK100_ANNOTATIONS}/relevancy/caption_relevancy_EPIC_100_retrieval_test.pkl",
        "relevancy of the clips to evaluate on; {} in it stands for train and test",
        metavar="FILE",
    )
    train_relevancy_path: str | None = flag(
        None, "relevancy of the clips to train on [as --relevancy-path, with train for test]", metavar="FILE"
    )
    relevancy_threshold: float = flag(0.1, "sentences of a higher relevancy are a clip's positives", SHARE_BELOW_1)
    relevancy_weighting: bool = flag(False, "weight a clip's part of the loss by its sentence's relevancy")
    margin: float = flag(0.2, "margin of the ranking loss, a difference of cosines", Number(float, 0, 2, above=True))
    similarity_filename: str | None = flag(
        None, "write the similarities of the last evaluation there, for tools/make_submission.py", metavar="FILE.npy"
    )
    scale_range: list[float] = flag(
        [0.5, 1.0], "area of a random crop relative to the frame", SHARE_ABOVE_0, metavar="X"
    )
    use_multi_epochs_loader: bool = flag(
        False, "keep data-loading processes alive between epochs, which is always done", off=""
    )

    model: str = other_default(
        ModelOptions, "model", "CLIP_VITB16", "registered model, if not what the checkpoint says it is"
    )
    pretrain_model: str | None = flag(
        None, "pretrained checkpoint to start from, its model and sizes: a path or hf:owner/repo/file", metavar="PATH"
    )
    local_loss: bool = flag(False, "each process computes its own rows of the loss; same result, less work")
    gather_with_grad: bool = flag(True, "gradients through the gathered features of the other processes")

    clip_length: int = other_default(VideoOptions, "clip_length", 16)
    clip_stride: int = other_default(VideoOptions, "clip_stride", 4)
    epochs: int = other_default(OptimOptions, "epochs", 100)
    eval_freq: int = other_default(RunOptions, "eval_freq", 5)

    def check(self) -> None:
        """UserError for a range of crops that is empty, and for a model that cannot be."""
        check_scale_range(self.scale_range)
        if "model" in self.given:  # else the model and its sizes are the checkpoint's
            check_model(self)
