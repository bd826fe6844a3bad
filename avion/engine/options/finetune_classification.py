"""The flags of `main_finetune_classification.py`."""

from dataclasses import dataclass
from typing import ClassVar

from avion.engine.args import flag, other_default
from avion.errors import UserError
from avion.numbers import COUNT, SHARE, SHARE_ABOVE_0, SHARE_BELOW_1, Number

from .shared import ModelOptions, OptimOptions, RunOptions, TrainingOptions, VideoOptions, check_scale_range

_ANNOTATIONS = "datasets/EK100/epic-kitchens-100-annotations"
_LEVELS = tuple(range(6))
_ALPHA = Number(float, 0, 1000)


@dataclass(frozen=True)
class FinetuneClassificationOptions(TrainingOptions):
    """The options of `main_finetune_classification.py`."""

    TITLE: ClassVar[str] = "action recognition"

    dataset: str = flag("ek100_cls", "data; demo: the embedded demo dataset", choices=["ek100_cls", "demo"])
    root: str = flag("datasets/EK100/EK100_256p_15sec/", "folder of the videos of both splits", metavar="DIR")
    train_metadata: str = flag(f"{_ANNOTATIONS}/EPIC_100_train.csv", "clips to train on", metavar="FILE")
    val_metadata: str = flag(
        f"{_ANNOTATIONS}/EPIC_100_validation.csv",
        "clips to evaluate on; with --evaluate the clips may have no labels",
        metavar="FILE",
    )
    action_metadata: list[str] = flag(
        [], "labelled clips that the list of actions is made from [--train-metadata and --val-metadata]", metavar="FILE"
    )
    tail_verbs: str | None = flag(
        None, "list of the tail classes of verbs; accuracies on them are reported", metavar="FILE"
    )
    tail_nouns: str | None = flag(
        None, "list of the tail classes of nouns; accuracies on them are reported", metavar="FILE"
    )
    unseen_participants: str | None = flag(
        None,
        "list of the participants that are not in the training clips; accuracies on them are reported",
        metavar="FILE",
    )
    num_crops: int = flag(1, "spatial crops per clip in evaluation, 1 (the centre) or 3", choices=(1, 3))
    num_clips: int = flag(1, "segments of --clip-length frames per clip in evaluation", COUNT)
    scale_range: list[float] = flag(
        [0.5, 1.0], "smallest and largest area of a random crop, as shares of the frame", SHARE_ABOVE_0, metavar="X"
    )
    use_multi_epochs_loader: bool = flag(
        False, "keep data-loading processes alive between epochs, which they are without this flag too", off=""
    )
    pickle_filename: str | None = flag(
        None, "file that the predictions of the last evaluation are written to", metavar="FILE"
    )
    submission: str | None = flag(
        None,
        "zip file for the challenge server that the predictions of the last evaluation are written to",
        metavar="FILE.zip",
    )
    sls_pt: int = flag(2, "level of supervision of the pretraining that a submission declares", choices=_LEVELS)
    sls_tl: int = flag(3, "level of supervision of the training labels that a submission declares", choices=_LEVELS)
    sls_td: int = flag(3, "level of supervision of the training data that a submission declares", choices=_LEVELS)

    pretrain_model: str | None = flag(
        None,
        "pretrained checkpoint to start from, which sets the model and its sizes: a path or hf:owner/repo/file",
        metavar="PATH",
    )
    num_classes: int = flag(3806, "classes of the head; without this flag, as many as there are actions", COUNT)
    dropout_rate: float = flag(0.5, "rate of dropout before the head", SHARE_BELOW_1)

    mixup: float = flag(0.8, "alpha of mixup; 0: no mixup", _ALPHA)
    cutmix: float = flag(1.0, "alpha of cutmix; 0: no cutmix", _ALPHA)
    cutmix_minmax: list[float] = flag(
        [], "shortest and longest side of the box of cutmix, as shares of the frame; overrides --cutmix", SHARE
    )
    mixup_prob: float = flag(1.0, "probability that a batch is mixed at all", SHARE)
    mixup_switch_prob: float = flag(0.5, "probability of cutmix where both are on", SHARE)
    mixup_mode: str = flag(
        "batch", "whether the mixture is drawn once per batch, per pair or per clip", choices=["batch", "pair", "elem"]
    )
    smoothing: float = flag(0.1, "share of label smoothing", SHARE_BELOW_1)

    model: str = other_default(
        ModelOptions,
        "model",
        "CLIP_VITB16",
        "name of a registered model, where the checkpoint does not say which model it is",
    )
    drop_path_rate: float = other_default(ModelOptions, "drop_path_rate", 0.1)
    clip_length: int = other_default(VideoOptions, "clip_length", 16)
    clip_stride: int = other_default(VideoOptions, "clip_stride", 2)
    epochs: int = other_default(OptimOptions, "epochs", 100)
    warmup_epochs: int = other_default(OptimOptions, "warmup_epochs", 2)
    batch_size: int = other_default(OptimOptions, "batch_size", 32)
    optimizer: str = other_default(
        OptimOptions, "optimizer", "sgd", "optimizer; the momentum of SGD is the first of --betas"
    )
    lr: float = other_default(
        OptimOptions, "lr", 3e-3, "peak learning rate for a global batch of 128, scaled to the global batch"
    )
    lr_start: float = other_default(
        OptimOptions, "lr_start", 1e-6, "learning rate at the start of the warm-up, for a global batch of 128"
    )
    lr_end: float = other_default(
        OptimOptions, "lr_end", 1e-5, "learning rate at the end of the cosine schedule, for a global batch of 128"
    )
    wd: float = other_default(OptimOptions, "wd", 4e-5)
    eval_freq: int = other_default(RunOptions, "eval_freq", 5)

    def check(self) -> None:
        """Raise UserError for shares that are not a pair and for batches that cannot be mixed."""
        check_scale_range(self.scale_range)
        if self.cutmix_minmax and not (len(self.cutmix_minmax) == 2 and self.cutmix_minmax[0] < self.cutmix_minmax[1]):
            found = " ".join(f"{share:g}" for share in self.cutmix_minmax)
            raise UserError(f"--cutmix-minmax {found}: two shares are required, the smaller one first")
        mixes = self.mixup or self.cutmix or self.cutmix_minmax
        if not self.evaluate and self.batch_size % 2 and mixes:
            raise UserError(
                f"--batch-size {self.batch_size}: mixup and cutmix take clips in pairs; give an even number, or "
                "--mixup 0 --cutmix 0"
            )
