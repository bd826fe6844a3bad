"""The flags of `main_pretrain.py`."""

from dataclasses import dataclass
from typing import ClassVar

from avion.engine.args import flag

from .shared import EK100_ANNOTATIONS, DeviceOptions, ModelOptions, OptimOptions, RunOptions, VideoOptions


@dataclass
class PretrainOptions(VideoOptions, ModelOptions, OptimOptions, RunOptions, DeviceOptions):
    """`main_pretrain.py`."""

    TITLE: ClassVar[str] = "pretraining"

    dataset: str = flag("ego4d", "training data; demo: the embedded demo dataset", choices=["ego4d", "demo"])
    root: str = flag("datasets/Ego4D/videos_320px_15sec/", "training videos", metavar="DIR")
    root_val: str = flag("datasets/EK100/EK100_320p_15sec/", "evaluation videos", metavar="DIR")
    train_metadata: str = flag("datasets/Ego4D/ego4d_train.pkl", "narrations of the training videos", metavar="FILE")
    train_metadata_aux: list[str] = flag([], "more narrations, e.g. of LaViLa's narrator", metavar="FILE")
    val_metadata: str = flag(f"{EK100_ANNOTATIONS}/EPIC_100_retrieval_test.csv", "clips to evaluate on", metavar="FILE")
    relevancy_path: str = flag(
        f"{EK100_ANNOTATIONS}/relevancy/caption_relevancy_EPIC_100_retrieval_test.pkl",
        "their relevancy",
        metavar="FILE",
    )
    dataset_val: str = flag("ek100_mir", "evaluation data", choices=["ek100_mir"])
    evaluate_task: str = flag("mir", "what is evaluated: multi-instance retrieval", choices=["mir"])
    similarity_filename: str | None = flag(
        None, "write the similarities of the last evaluation there, for tools/make_submission.py", metavar="FILE.npy"
    )
    scale_range: list[float] = flag([0.5, 1.0], "area of a random crop relative to the frame", metavar="X")
    context_length: int = flag(77, "tokens per text")
    vocab_size: int = flag(49408, "size of the vocabulary")
    project_embed_dim: int = flag(256, "width of the joint embedding")
    freeze_temperature: bool = flag(False, "keep the temperature at 1/0.07")
    pretrain_zoo: str = flag("openai", "initial weights", choices=["openai", "open_clip", "lavila", "none"])
    pretrain_path: str | None = flag(None, "file or open_clip tag of the initial weights", metavar="PATH")
    local_loss: bool = flag(False, "each process computes its own rows of the loss; same result, less work")
    gather_with_grad: bool = flag(True, "gradients through the gathered features of the other processes")
