"""The flags that entry points share, in groups."""

from dataclasses import dataclass
from typing import ClassVar

from avion.constants import NORM_STYLES, OPTIMIZERS
from avion.engine.args import flag
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
LEARNING_RATE = Number(float, 0, 1000, above=True)


def check_scale_range(scale_range: list[float]) -> None:
    """UserError where the smallest area of a random crop is above the largest."""
    smallest, largest = scale_range
    if smallest > largest:
        raise UserError(f"--scale-range {smallest:g} {largest:g}: the smaller share comes first")


@dataclass
class VideoOptions:
    """Reading and augmenting clips, the same for every task."""

    TITLE: ClassVar[str] = "video"

    video_chunk_length: int = flag(
        15, "length of a video chunk in seconds; -1: whole videos", whole(1, 86400, also=(-1,)), metavar="S"
    )
    video_layout: str = flag(
        "auto", "chunks as AVION ({video}.mp4/{start}.mp4) or Video Mamba Suite ({video}/{number}.mp4) lay "
        "them out, or whole videos", choices=["auto", "avion", "vms", "whole"],
    )  # fmt: skip
    decoder: str = flag(
        "auto", "video decoder; auto: PyAV, else decord (docs/data.md says why)", choices=["auto", "decord", "pyav"]
    )
    video_index: str = flag(
        "auto", "packet index of the videos (tools/index_videos.py), with which a clip is read without its container; "
        "auto: packets.index in their folder, where there is one; off: none", metavar="FILE",
    )  # fmt: skip
    decode_threads: int = flag(1, "threads of one decoder; 0: as many as it likes", THREADS)
    clip_length: int = flag(4, "frames per clip", FRAMES)
    clip_stride: int = flag(16, "frames from one to the next, used with --frame-sampling strided", FRAMES)
    frame_sampling: str = flag(
        "uniform", "uniform: one frame from each of clip-length equal segments (AVION's way); strided: every "
        "clip-stride-th frame around the middle of the clip", choices=["uniform", "strided"],
    )  # fmt: skip
    norm_style: str = flag(
        "openai", "pixel mean and std: CLIP's; AVION's and LaViLa's with the mistyped red mean "
        "(openai_legacy, for their released checkpoints only); ImageNet's (timm)", choices=list(NORM_STYLES),
    )  # fmt: skip
    fused_decode_crop: bool = flag(
        False, "cut, resize and convert to uint8 RGB in one pass in the worker, normalise on the device: less time, "
        "memory and copying, same crops",
    )  # fmt: skip
    strict_data: bool = flag(False, "stop at the first clip that cannot be read instead of replacing and reporting it")


@dataclass
class ModelOptions:
    TITLE: ClassVar[str] = "model"

    model: str = flag("CLIP_VITB16", "registered model; `python -m avion.models` lists them", metavar="NAME")
    model_args: list[str] = flag(
        [], "fields of the model's configuration to change, e.g. depth=6 embed_dim=384", metavar="FIELD=VALUE"
    )
    grad_checkpointing: bool = flag(False, "recompute activations in the backward pass to save memory")
    use_fast_conv1: bool = flag(False, "patch embedding as one matrix product", off="--disable-fast-conv1")
    use_flash_attn: bool | None = flag(
        None, "fused attention kernels only; unset: PyTorch chooses", off="--disable-flash-attn"
    )
    patch_dropout: float = flag(0.0, "fraction of patches left out in training, the same in every frame", SHARE_BELOW_1)
    drop_path_rate: float = flag(0.0, "stochastic depth, rising linearly to this rate in the last block", SHARE_BELOW_1)
    scan_backend: str = flag("auto", "selective-scan backend of the Mamba models", metavar="NAME")
    compile: bool = flag(False, "torch.compile the model")
    resume: str = flag("", "checkpoint to go on from, or to evaluate: a path or hf:owner/repo/file", metavar="PATH")

    settle = staticmethod(settle_model_args)


@dataclass
class OptimOptions:
    TITLE: ClassVar[str] = "optimisation"

    epochs: int = flag(5, "epochs to train", COUNT)
    start_epoch: int = flag(
        0, "number of the first epoch; a resumed checkpoint's own number takes precedence", COUNT_OR_OFF
    )
    warmup_epochs: int = flag(1, "epochs of linear warm-up, at most --epochs", COUNT_OR_OFF)
    batch_size: int = flag(16, "clips per process and micro-batch", COUNT)
    update_freq: int = flag(1, "micro-batches per optimizer step; gradients are those of the whole batch", COUNT)
    optimizer: str = flag("adamw", "optimizer", choices=list(OPTIMIZERS))
    lr: float = flag(3e-5, "peak learning rate", LEARNING_RATE)
    lr_start: float = flag(1e-6, "learning rate at the start of the warm-up, at most --lr", Number(float, 0, 1000))
    lr_end: float = flag(1e-5, "learning rate that the cosine falls to, at most --lr", Number(float, 0, 1000))
    fix_lr: bool = flag(False, "constant learning rate, without warm-up or decay")
    wd: float = flag(0.01, "weight decay", Number(float, 0, 100))
    betas: list[float] = flag([0.9, 0.999], "AdamW's betas; the first is SGD's momentum", SHARE_BELOW_1)
    eps: float = flag(1e-8, "AdamW's epsilon; SGD has none", Number(float, 1e-30, 1))
    grad_clip_norm: float | None = flag(
        None, "largest gradient norm; larger ones are scaled down", Number(float, 0, 1e9, above=True)
    )
    use_zero: bool = flag(False, "shard the optimizer's state over the processes (ZeRO stage 1)")

    def check(self) -> None:
        """UserError for schedules that cannot be meant. An evaluation (`--evaluate`) has no schedule."""
        if getattr(self, "evaluate", False):
            return
        if self.start_epoch >= self.epochs:
            raise UserError(
                f"--start-epoch {self.start_epoch}: epochs are counted from 0, and the last of --epochs {self.epochs} "
                f"is {self.epochs - 1}: nothing would be trained"
            )
        if self.fix_lr:
            return
        if "warmup_epochs" in self.given and self.warmup_epochs > self.epochs:
            raise UserError(f"--warmup-epochs {self.warmup_epochs}: --epochs {self.epochs} end before the warm-up does")
        if self.lr_end > self.lr:
            raise UserError(f"--lr-end {self.lr_end:g}: is above --lr {self.lr:g}, from which the cosine falls to it")
        if self.warmup_epochs and self.lr_start > self.lr:
            raise UserError(f"--lr-start {self.lr_start:g}: is above --lr {self.lr:g}, to which the warm-up rises")


@dataclass
class RunOptions:
    TITLE: ClassVar[str] = "run"

    output_dir: str = flag("./", "where checkpoints and logs go; a checkpoint.pt there is resumed", metavar="DIR")
    evaluate: bool = flag(False, "evaluate only", off="")
    eval_freq: int = flag(1, "epochs between evaluations; the last epoch is always evaluated", COUNT)
    eval_batch_size: int = flag(0, "clips per forward pass in evaluation; 0: as --batch-size", COUNT_OR_OFF)
    save_steps: int = flag(
        0, "optimizer steps between checkpoints within an epoch; 0: at its end only", whole(0, 1_000_000_000)
    )
    print_freq: int = flag(10, "optimizer steps between progress lines", whole(1, 1_000_000_000))
    tensorboard: bool = flag(False, "figures to TensorBoard too, in {output-dir}/tensorboard (docs/logging.md)")
    wandb: bool = flag(False, "figures to Weights & Biases too")
    wandb_project: str = flag("avion-timemamba", "its project", metavar="NAME")
    wandb_name: str | None = flag(None, "its name of the run [the name of --output-dir]", metavar="NAME")
    wandb_mode: str = flag(
        "online", "offline: into {output-dir}/wandb, for `wandb sync`", choices=["online", "offline"]
    )
    workers: int = flag(8, "data-loading processes per training process; 0: none of their own", WORKERS, names=["-j"])
    seed: int = flag(0, "seed of initialisation, data order and augmentation", SEED)
    debug: bool = flag(False, "show the traceback of every error", off="")


@dataclass
class DeviceOptions:
    TITLE: ClassVar[str] = "device and processes"

    device: str = flag("auto", "auto: cuda where there is one", choices=["auto", "cpu", "cuda"])
    precision: str | None = flag(None, "autocast type [bf16 on GPUs, fp32 on CPUs]", choices=["fp32", "bf16", "fp16"])
    use_bf16: bool = flag(False, "the same as --precision bf16", off="")
    disable_amp: bool = flag(False, "the same as --precision fp32", off="")
    gpu: int | None = flag(None, "GPU of this process, counted from 0 among those it sees [that of its number]", RANK)
    world_size: int = flag(1, "processes, where neither torchrun nor srun says so", PROCESSES)
    rank: int = flag(0, "number of this process, likewise; below --world-size", RANK)
    local_rank: int = flag(0, "number of this process on its machine, likewise", RANK, names=["--local_rank"])
    dist_url: str = flag("env://", "where processes meet, likewise: env:// or tcp://host:port", metavar="URL")
    dist_backend: str = flag("nccl", "process-group backend on GPUs; gloo on CPUs", choices=["nccl", "gloo"])
    dist_timeout: float = flag(
        30.0, "minutes after which a process that waits for the others gives up", Number(float, 0, 43200, above=True)
    )

    def check(self) -> None:
        """UserError for an address without a port."""
        host, colon, port = self.dist_url.removeprefix("tcp://").rpartition(":")
        if self.dist_url.startswith("tcp://") and not (host and colon and port.isdecimal() and int(port) in PORT):
            raise UserError(f"--dist-url {self.dist_url}: expected tcp://host:port, with a port {PORT.range}")
