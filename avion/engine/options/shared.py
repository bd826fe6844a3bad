"""The groups of flags that the entry points share."""

from dataclasses import dataclass
from typing import ClassVar

from avion.constants import NORM_STYLES, OPTIMIZERS, OTHER_RUN
from avion.engine.args import Options, flag, other_default
from avion.errors import UserError
from avion.numbers import (
    COUNT,
    COUNT_OR_OFF,
    PORT,
    PROCESSES,
    RANK,
    SEED,
    SHARE_BELOW_1,
    WORKERS,
    Number,
    whole,
)

from .model_args import settle_model_args

EK100_ANNOTATIONS = "datasets/EK100/epic-kitchens-100-annotations/retrieval_annotations"
FRAMES = whole(1, 65536)
THREADS = whole(0, 1024)
BLOCKS = whole(0, 1024)
LEARNING_RATE = Number(float, 0, 1000, above=True)


def check_scale_range(scale_range: list[float]) -> None:
    """Refuse a range of crops whose smallest area is above the largest.

    Args:
        scale_range: The two areas, as shares of the frame.

    Raises:
        UserError: The smaller share does not come first.
    """
    smallest, largest = scale_range
    if smallest > largest:
        raise UserError(f"--scale-range {smallest:g} {largest:g}: the smaller share comes first")


@dataclass(frozen=True)
class VideoOptions(Options):
    """How clips are read and augmented, the same for every task."""

    TITLE: ClassVar[str] = "video"

    video_chunk_length: int = flag(
        15, "length of a video chunk in seconds; -1: whole videos", whole(1, 86400, also=(-1,)), metavar="S"
    )
    video_layout: str = flag(
        "auto",
        "layout of the video folder: chunks as AVION names them ({video}.mp4/{start}.mp4), chunks as Video "
        "Mamba Suite names them ({video}/{number}.mp4), or whole videos; auto: as the files in the folder show",
        choices=["auto", "avion", "vms", "whole"],
    )
    decoder: str = flag(
        "auto",
        "video decoder; auto: PyAV, or decord without PyAV (docs/data.md says why)",
        choices=["auto", "decord", "pyav"],
    )
    video_index: str = flag(
        "auto",
        "packet index of the videos (tools/index_videos.py), with which a clip is read without reading the "
        "container; auto: packets.index in the folder of the videos, where there is one; off: no index",
        metavar="FILE",
    )
    decode_threads: int = flag(1, "threads of one video decoder; 0: the decoder chooses", THREADS)
    clip_length: int = flag(4, "frames per clip", FRAMES)
    clip_stride: int = flag(
        16,
        "distance between the frames of a clip, in frames of the video; only --frame-sampling strided uses it",
        FRAMES,
    )
    frame_sampling: str = flag(
        "uniform",
        "which frames of a clip are read; uniform: one frame from each of --clip-length equal segments, as "
        "AVION does; strided: every --clip-stride-th frame around the middle of the clip",
        choices=["uniform", "strided"],
    )
    norm_style: str = flag(
        "openai",
        "mean and standard deviation that pixels are normalised with; openai: those of CLIP; openai_legacy: "
        "those of AVION and LaViLa with the mistyped mean of red, for their released checkpoints only; timm: those of "
        "ImageNet",
        choices=list(NORM_STYLES),
    )
    fused_decode_crop: bool = flag(
        False,
        "crop, resize and convert clips to uint8 RGB in one pass in the data-loading process, and normalise "
        "them on the device: less time, memory and copying, the same crops",
    )
    strict_data: bool = flag(
        False, "stop at the first clip that cannot be read, instead of replacing and reporting the clip"
    )


@dataclass(frozen=True)
class PluginOptions(Options):
    """Modules of the user's own. Every program imports them as soon as its flags are parsed (`avion.engine.args`)."""

    TITLE: ClassVar[str] = "your own modules"

    plugins: list[str] = flag(
        [],
        "modules, or paths of .py files, to import first: they register models and mixers (docs/add_a_model.md)",
        names=["--import"],
        metavar="MODULE",
    )


@dataclass(frozen=True)
class CaptionOptions(Options):
    """Clips and captions of the user's own, in the place of a dataset's annotations."""

    TITLE: ClassVar[str] = "your own captions"

    caption_columns: list[str] = flag(
        [],
        "names of the columns of caption files, where they are not video, start, end and caption, such as "
        "video=clip_id caption=sentence",
        metavar="FIELD=COLUMN",
    )
    val_fraction: float = flag(
        0.0,
        "share of the videos of --train-metadata that are held out; their recall is the evaluation, in place of "
        "--val-metadata",
        SHARE_BELOW_1,
    )

    def check(self) -> None:
        """Raise UserError where two evaluations are asked for, or the evaluation of nothing."""
        if self.val_fraction and self.was_given("val_metadata"):
            raise UserError("--val-fraction and --val-metadata: both say what to evaluate on; give one of them")
        if self.evaluate and self.val_metadata == "none" and not self.val_fraction:
            raise UserError("--evaluate: there is nothing to evaluate on with --val-metadata none; give a file")


@dataclass(frozen=True)
class TextLockOptions(Options):
    """Which part of the text tower is trained."""

    TITLE: ClassVar[str] = "model"

    lock_text: int | None = flag(
        None,
        "train only the last N blocks of the text tower, the norm behind them and the projection; 0: the projection "
        "alone [all is trained]",
        BLOCKS,
        metavar="N",
    )


@dataclass(frozen=True)
class ModelOptions(Options):
    """The model and how it computes."""

    TITLE: ClassVar[str] = "model"

    model: str = flag(
        "CLIP_VITB16", "name of a registered model; `python -m avion.models` lists the names", metavar="NAME"
    )
    model_args: list[str] = flag(
        [], "fields of the model's configuration to change, for example depth=6 embed_dim=384", metavar="FIELD=VALUE"
    )
    grad_checkpointing: bool = flag(False, "recompute activations in the backward pass, which saves memory")
    use_fast_conv1: bool = flag(False, "compute the patch embedding as one matrix product", off="--disable-fast-conv1")
    use_flash_attn: bool | None = flag(
        None, "use fused attention kernels only; unset: PyTorch chooses the kernels", off="--disable-flash-attn"
    )
    patch_dropout: float = flag(
        0.0, "share of the patches that training leaves out, the same patches in every frame", SHARE_BELOW_1
    )
    drop_path_rate: float = flag(
        0.0, "rate of stochastic depth in the last block; it rises linearly from 0 in the first block", SHARE_BELOW_1
    )
    scan_backend: str = flag(
        "auto", "backend of the selective scan of Mamba models; auto: the fastest one that can run here", metavar="NAME"
    )
    lock_video: int | None = flag(
        None,
        "train only the last N blocks of the video tower, the norm behind them and the projection; 0: the projection "
        "or the head alone [all is trained]",
        BLOCKS,
        metavar="N",
    )
    lock_except: list[str] = flag(
        [],
        "what is trained in the locked part of a tower too: gates (alpha of the blocks), norms (of all layers)",
        choices=["gates", "norms"],
    )
    compile: bool = flag(False, "compile the model with torch.compile")
    resume: str = flag(
        "", "checkpoint to resume training from, or to evaluate: a path or hf:owner/repo/file", metavar="PATH"
    )

    settle = staticmethod(settle_model_args)


@dataclass(frozen=True)
class OptimOptions(Options):
    """The optimizer and the schedule of the learning rate."""

    TITLE: ClassVar[str] = "optimisation"

    epochs: int = flag(5, "number of epochs", COUNT)
    start_epoch: int = flag(
        0,
        "number of the first epoch, counted from 0; the number in a resumed checkpoint takes precedence",
        COUNT_OR_OFF,
    )
    warmup_epochs: int = flag(1, "epochs of linear warm-up, at most --epochs", COUNT_OR_OFF)
    batch_size: int = flag(16, "clips per process and micro-batch", COUNT)
    update_freq: int = flag(1, "micro-batches per optimizer step; the gradients are those of the whole batch", COUNT)
    optimizer: str = flag("adamw", "optimizer", choices=list(OPTIMIZERS))
    lr: float = flag(3e-5, "peak learning rate", LEARNING_RATE)
    lr_start: float = flag(1e-6, "learning rate at the start of the warm-up, at most --lr", Number(float, 0, 1000))
    lr_end: float = flag(1e-5, "learning rate at the end of the cosine schedule, at most --lr", Number(float, 0, 1000))
    fix_lr: bool = flag(False, "constant learning rate, without warm-up or decay")
    wd: float = flag(0.01, "weight decay", Number(float, 0, 100))
    betas: list[float] = flag([0.9, 0.999], "betas of AdamW; the first one is the momentum of SGD", SHARE_BELOW_1)
    eps: float = flag(1e-8, "epsilon of AdamW; SGD does not use it", Number(float, 1e-30, 1))
    grad_clip_norm: float | None = flag(
        None,
        "largest norm of the gradients; gradients of a larger norm are scaled down",
        Number(float, 0, 1e9, above=True),
    )
    use_zero: bool = flag(False, "shard the state of the optimizer over the processes (ZeRO stage 1)")


@dataclass(frozen=True)
class RunOptions(Options):
    """Checkpoints, logs, evaluations, data-loading processes."""

    TITLE: ClassVar[str] = "run"

    output_dir: str = flag(
        "./",
        "folder of checkpoints and logs, or an address (s3://bucket/run); training resumes from a checkpoint.pt in it",
        metavar="DIR",
    )
    evaluate: bool = flag(False, "evaluate without training", off="")
    overwrite: bool = flag(
        False,
        "replace the files that --pickle-filename, --submission or --similarity-filename name where they exist",
        off="",
    )
    eval_freq: int = flag(1, "epochs between evaluations; the last epoch is always evaluated", COUNT)
    eval_batch_size: int = flag(0, "clips per forward pass in evaluation; 0: as many as --batch-size", COUNT_OR_OFF)
    save_steps: int = flag(
        0,
        "optimizer steps between checkpoints within an epoch; 0: only at the end of an epoch",
        whole(0, 1_000_000_000),
    )
    keep_checkpoints: int = flag(
        2, "checkpoints to keep beside the best one: the latest, and those written before it", whole(1, 1000)
    )
    allow_changes: list[str] = flag(
        [],
        "flags that may differ from those in the checkpoint, though the change makes the run another run "
        "(docs/checkpoints.md)",
        choices=OTHER_RUN,
    )
    print_freq: int = flag(10, "optimizer steps between progress lines", whole(1, 1_000_000_000))
    tensorboard: bool = flag(False, "write metrics to TensorBoard too, in {output-dir}/tensorboard (docs/logging.md)")
    wandb: bool = flag(False, "send metrics to Weights & Biases too")
    wandb_project: str = flag("avion-timemamba", "project of the run at Weights & Biases", metavar="NAME")
    wandb_name: str | None = flag(
        None, "name of the run at Weights & Biases [the name of --output-dir]", metavar="NAME"
    )
    wandb_mode: str = flag(
        "online",
        "how metrics go to Weights & Biases; offline: into {output-dir}/wandb, for `wandb sync`",
        choices=["online", "offline"],
    )
    workers: int = flag(
        8,
        "data-loading processes per training process; 0: the training process loads the data itself",
        WORKERS,
        names=["-j"],
    )
    data_timeout: float = flag(
        900.0,
        "seconds after which data-loading processes that send nothing count as stuck, and the run ends",
        Number(float, 0, 10**7, above=True),
        metavar="S",
    )
    seed: int = flag(0, "seed of initialisation, data order and augmentation", SEED)
    debug: bool = flag(False, "show the traceback of every error", off="")


@dataclass(frozen=True)
class DeviceOptions(Options):
    """The device, the precision and the processes."""

    TITLE: ClassVar[str] = "device and processes"

    device: str = flag(
        "auto", "device to compute on; auto: a GPU (cuda) where there is one", choices=["auto", "cpu", "cuda"]
    )
    precision: str | None = flag(
        None, "number format of autocast [bf16 on GPUs, fp32 on CPUs]", choices=["fp32", "bf16", "fp16"]
    )
    use_bf16: bool = flag(False, "the same as --precision bf16", off="")
    disable_amp: bool = flag(False, "the same as --precision fp32", off="")
    gpu: int | None = flag(
        None,
        "GPU of this process, counted from 0 among the visible ones [the number of the process on its machine]",
        RANK,
    )
    world_size: int = flag(1, "number of processes, where neither torchrun nor srun started them", PROCESSES)
    rank: int = flag(0, "number of this process, below --world-size, where neither torchrun nor srun started it", RANK)
    local_rank: int = flag(
        0,
        "number of this process on its machine, where neither torchrun nor srun started it",
        RANK,
        names=["--local_rank"],
    )
    dist_url: str = flag(
        "env://",
        "where processes meet that neither torchrun nor srun started: env:// or tcp://host:port",
        metavar="URL",
    )
    dist_backend: str = flag(
        "nccl", "backend of the process group on GPUs; on CPUs it is gloo", choices=["nccl", "gloo"]
    )
    dist_timeout: float = flag(
        30.0, "minutes after which a process that waits for the others gives up", Number(float, 0, 43200, above=True)
    )

    def check(self) -> None:
        """Raise UserError for an address without a port."""
        host, colon, port = self.dist_url.removeprefix("tcp://").rpartition(":")
        if self.dist_url.startswith("tcp://") and not (host and colon and port.isdecimal() and int(port) in PORT):
            raise UserError(f"--dist-url {self.dist_url}: expected tcp://host:port, with a port {PORT.range}")


@dataclass(frozen=True)
class TrainingOptions(VideoOptions, ModelOptions, OptimOptions, RunOptions, DeviceOptions, PluginOptions):
    """All groups that an entry point with a training has."""

    REMOTE_OUTPUT: ClassVar[bool] = True

    def check(self) -> None:
        """Raise UserError for exceptions from no lock and for schedules that make no sense. An evaluation
        (`--evaluate`) has no schedule.
        """
        if self.lock_except and self.lock_video is None and getattr(self, "lock_text", None) is None:
            text = " or --lock-text N" if hasattr(self, "lock_text") else ""
            raise UserError(f"--lock-except {' '.join(self.lock_except)}: nothing is locked; give --lock-video N{text}")
        if self.evaluate:
            return
        if self.start_epoch >= self.epochs:
            raise UserError(
                f"--start-epoch {self.start_epoch}: epochs are counted from 0, and the last of --epochs {self.epochs} "
                f"is {self.epochs - 1}: nothing would be trained"
            )
        if self.fix_lr:
            return
        if self.was_given("warmup_epochs") and self.warmup_epochs > self.epochs:
            raise UserError(f"--warmup-epochs {self.warmup_epochs}: --epochs {self.epochs} end before the warm-up does")
        if self.lr_end > self.lr:
            raise UserError(f"--lr-end {self.lr_end:g}: is above --lr {self.lr:g}, from which the cosine falls to it")
        if self.warmup_epochs and self.lr_start > self.lr:
            raise UserError(f"--lr-start {self.lr_start:g}: is above --lr {self.lr:g}, to which the warm-up rises")


@dataclass(frozen=True)
class SavedModelOptions(PluginOptions):
    """A model that is used as its checkpoint describes it, without training."""

    TITLE: ClassVar[str] = "model"

    model: str | None = other_default(
        ModelOptions, "model", None, "name of a registered model, where the checkpoint does not say which model it is"
    )
    model_args: list[str] = other_default(ModelOptions, "model_args", [])
    use_fast_conv1: bool = other_default(ModelOptions, "use_fast_conv1", False)
    use_flash_attn: bool | None = other_default(ModelOptions, "use_flash_attn", None)
    scan_backend: str = other_default(ModelOptions, "scan_backend", "auto")
    norm_style: str = other_default(VideoOptions, "norm_style", "openai")

    settle = staticmethod(settle_model_args)
