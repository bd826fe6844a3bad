"""The flags of `main_pretrain.py`."""

import shlex
from dataclasses import dataclass
from typing import Any, ClassVar

from avion.engine.args import flag, flag_fields, flag_words
from avion.engine.run_files import checkpoints
from avion.errors import UserError
from avion.numbers import SHARE_ABOVE_0, whole
from avion.remote import is_remote

from .egoschema import EgoSchemaOptions
from .model_args import check_model
from .shared import EK100_ANNOTATIONS, CaptionOptions, TextLockOptions, TrainingOptions, check_scale_range


@dataclass(frozen=True)
class PretrainOptions(CaptionOptions, TextLockOptions, TrainingOptions):
    """The options of `main_pretrain.py`."""

    TITLE: ClassVar[str] = "pretraining"

    dataset: str = flag("ego4d", "training data; demo: the embedded demo dataset", choices=["ego4d", "demo"])
    root: str = flag("datasets/Ego4D/videos_320px_15sec/", "folder of the training videos", metavar="DIR")
    root_val: str = flag("datasets/EK100/EK100_320p_15sec/", "folder of the evaluation videos", metavar="DIR")
    train_metadata: str = flag(
        "datasets/Ego4D/ego4d_train.pkl",
        "narrations of the training videos: a pickle of Ego4D, or captions in a "
        ".csv, .jsonl, .json or .parquet file (docs/data.md)",
        metavar="FILE",
    )
    train_metadata_aux: list[str] = flag(
        [],
        "files of more narrations or captions, such as those of LaViLa's narrator; the number behind a colon says "
        "how often an epoch takes each clip (1)",
        metavar="FILE[:WEIGHT]",
    )
    root_aux: list[str] = flag(
        [],
        "folders of the videos of the first, second, ... file of --train-metadata-aux; -: the folder of --root",
        metavar="DIR",
    )
    val_metadata: str = flag(
        f"{EK100_ANNOTATIONS}/EPIC_100_retrieval_test.csv",
        "clips to evaluate on: a CSV of EPIC-KITCHENS-100, or "
        "captions, of which recall is measured; none: no evaluation",
        metavar="FILE",
    )
    relevancy_path: str = flag(
        f"{EK100_ANNOTATIONS}/relevancy/caption_relevancy_EPIC_100_retrieval_test.pkl",
        "relevancies of the clips to evaluate on",
        metavar="FILE",
    )
    dataset_val: str = flag(
        "ek100_mir",
        "evaluation data; egoschema: the error names the command that answers EgoSchema",
        choices=["ek100_mir", "egoschema"],
    )
    evaluate_task: str = flag(
        "ek100_mir",
        "task of the evaluation; ek100_mir and mir: multi-instance retrieval; egoschema: the error names "
        "the command that answers EgoSchema",
        choices=["ek100_mir", "mir", "egoschema"],
    )
    similarity_filename: str | None = flag(
        None,
        "file that the similarities of the last evaluation are written to, for tools/make_submission.py",
        metavar="FILE.npy",
    )
    scale_range: list[float] = flag(
        [0.5, 1.0], "smallest and largest area of a random crop, as shares of the frame", SHARE_ABOVE_0, metavar="X"
    )
    context_length: int = flag(77, "tokens per text", whole(3, 65536))
    vocab_size: int = flag(49408, "size of the vocabulary", whole(3, 10_000_000))
    project_embed_dim: int = flag(256, "width of the joint embedding", whole(1, 1_000_000))
    freeze_temperature: bool = flag(False, "keep the logit scale at 1/0.07")
    pretrain_zoo: str = flag(
        "openai", "source of the initial weights", choices=["openai", "open_clip", "lavila", "none"]
    )
    pretrain_path: str | None = flag(None, "file of the initial weights, or their tag in open_clip", metavar="PATH")
    pretrain_model: str | None = flag(
        None,
        "checkpoint whose weights a new run starts from, in place of --pretrain-zoo and --pretrain-path; "
        "without --model it sets the model and its sizes: a path or hf:owner/repo/file",
        metavar="PATH",
    )
    local_loss: bool = flag(
        False, "each process computes only the rows of its own clips in the loss: the same result with less work"
    )
    gather_with_grad: bool = flag(True, "let gradients flow through the gathered features of the other processes")

    def check(self) -> None:
        """Refuse an evaluation that another entry point does, an empty range of crops, and a model that cannot be
        built.
        """
        asked = [name for name in ("dataset_val", "evaluate_task") if getattr(self, name) == "egoschema"]
        if asked:
            flags = " and ".join(f"--{name.replace('_', '-')} egoschema" for name in asked)
            raise UserError(f"{flags}: EgoSchema has an entry point of its own; run: {egoschema_command(self)}")
        check_scale_range(self.scale_range)
        known = self.resume or self.pretrain_model or is_remote(self.output_dir) or checkpoints(self.output_dir)
        if self.was_given("model") or not known:  # otherwise the checkpoint sets the model and its sizes
            check_model(self)


def egoschema_command(options: PretrainOptions) -> str:
    """Write the command that does the EgoSchema evaluation of Video Mamba Suite's pretraining script with these flags.

    In that script, `--root-val` is the folder of the videos, `--val-metadata` is the file of the questions, and
    `--clip-length` is the number of frames.

    Args:
        options: The flags.

    Returns:
        The command as a user types it.
    """
    model = options.resume or next(map(str, checkpoints(options.output_dir)), "CHECKPOINT")
    values: dict[str, Any] = {"pretrain_model": model, "frames": [options.clip_length]}
    if options.dataset == "demo":
        values["dataset"] = "demo"
    for name, theirs in (("root", "root_val"), ("questions", "val_metadata")):
        if options.was_given(theirs):
            values[name] = getattr(options, theirs)
    common = flag_fields(EgoSchemaOptions).keys() & options.given() - {"dataset", "root"}
    values |= {name: getattr(options, name) for name in sorted(common)}
    return shlex.join(["python", "main_egoschema.py", *flag_words("--evaluate-task", values, EgoSchemaOptions)])
