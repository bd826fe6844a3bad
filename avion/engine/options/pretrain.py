"""The flags of `main_pretrain.py`."""

import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from avion.engine.args import flag, flag_words
from avion.errors import UserError
from avion.numbers import SHARE_ABOVE_0, whole

from .egoschema import EgoSchemaOptions
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
    dataset_val: str = flag(
        "ek100_mir", "evaluation data; egoschema: says which command answers it", choices=["ek100_mir", "egoschema"]
    )
    evaluate_task: str = flag(
        "ek100_mir", "what is evaluated: multi-instance retrieval (mir is the same); egoschema: as above",
        choices=["ek100_mir", "mir", "egoschema"],
    )  # fmt: skip
    similarity_filename: str | None = flag(
        None, "write the similarities of the last evaluation there, for tools/make_submission.py", metavar="FILE.npy"
    )
    scale_range: list[float] = flag(
        [0.5, 1.0], "area of a random crop relative to the frame", SHARE_ABOVE_0, metavar="X"
    )
    context_length: int = flag(77, "tokens per text", whole(3, 65536))
    vocab_size: int = flag(49408, "size of the vocabulary", whole(3, 10_000_000))
    project_embed_dim: int = flag(256, "width of the joint embedding", whole(1, 1_000_000))
    freeze_temperature: bool = flag(False, "keep the temperature at 1/0.07")
    pretrain_zoo: str = flag("openai", "initial weights", choices=["openai", "open_clip", "lavila", "none"])
    pretrain_path: str | None = flag(None, "file or open_clip tag of the initial weights", metavar="PATH")
    local_loss: bool = flag(False, "each process computes its own rows of the loss; same result, less work")
    gather_with_grad: bool = flag(True, "gradients through the gathered features of the other processes")

    def check(self) -> None:
        """UserError for what another entry point does, for an empty range of crops, and for a model that cannot be."""
        asked = [name for name in ("dataset_val", "evaluate_task") if getattr(self, name) == "egoschema"]
        if asked:
            flags = " and ".join(f"--{name.replace('_', '-')} egoschema" for name in asked)
            raise UserError(f"{flags}: EgoSchema has an entry point of its own; run: {egoschema_command(self)}")
        check_scale_range(self.scale_range)
        starts_anew = not self.resume and not (Path(self.output_dir) / "checkpoint.pt").exists()
        if "model" in self.given or starts_anew:  # else the model and its sizes are the checkpoint's
            check_model(self)


def egoschema_command(args: PretrainOptions) -> str:
    """The command that evaluates on EgoSchema what Video Mamba Suite's pretraining script would with these flags.

    There `--root-val` has the videos, `--val-metadata` the questions, and `--clip-length` is the number of frames.
    """
    latest = Path(args.output_dir) / "checkpoint.pt"
    model = args.resume or (str(latest) if latest.exists() else "CHECKPOINT")
    values: dict[str, Any] = {"pretrain_model": model, "frames": [args.clip_length]}
    if args.dataset == "demo":
        values["dataset"] = "demo"
    for name, theirs in (("root", "root_val"), ("questions", "val_metadata")):
        if theirs in args.given:
            values[name] = getattr(args, theirs)
    common = {field.name for field in fields(EgoSchemaOptions)} & args.given - {"dataset", "root"}
    values |= {name: getattr(args, name) for name in sorted(common)}
    return shlex.join(["python", "main_egoschema.py", *flag_words("--evaluate-task", values, EgoSchemaOptions)])
