"""The flags that entry points share, in groups."""

from dataclasses import dataclass
from typing import ClassVar

from avion.constants import NORM_STYLES
from avion.engine.args import flag
from avion.optim.factory import OPTIMIZERS

EK100_ANNOTATIONS = "datasets/EK100/epic-kitchens-100-annotations/retrieval_annotations"


@dataclass
class VideoOptions:
    """Reading and augmenting clips, the same for every task."""

    TITLE: ClassVar[str] = "video"

    video_chunk_length: int = flag(15, "length of a video chunk in seconds; -1: whole videos", metavar="S")
    video_layout: str = flag(
        "auto", "chunks as AVION ({video}.mp4/{start}.mp4) or Video Mamba Suite ({video}/{number}.mp4) lay "
        "them out, or whole videos", choices=["auto", "avion", "vms", "whole"],
    )  # fmt: skip
    decoder: str = flag(
        "auto", "video decoder; auto: PyAV, else decord (docs/data.md says why)", choices=["auto", "decord", "pyav"]
    )
    decode_threads: int = flag(1, "threads of one decoder")
    clip_length: int = flag(4, "frames per clip")
    clip_stride: int = flag(16, "frames from one to the next, used with --frame-sampling strided")
    frame_sampling: str = flag(
        "uniform", "uniform: one frame from each of clip-length equal segments (AVION's way); strided: every "
        "clip-stride-th frame around the middle of the clip", choices=["uniform", "strided"],
    )  # fmt: skip
    norm_style: str = flag(
        "openai", "pixel mean and std: CLIP's; AVION's and LaViLa's with the mistyped red mean "
        "(openai_legacy, for their released checkpoints only); ImageNet's (timm)", choices=list(NORM_STYLES),
    )  # fmt: skip
    fused_decode_crop: bool = flag(
        False, "crop and resize as uint8 in the worker, normalise on the device: less memory and copying, "
        "same crops",
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
    patch_dropout: float = flag(0.0, "fraction of patches left out in training, the same in every frame")
    drop_path_rate: float = flag(0.0, "stochastic depth, rising linearly to this rate in the last block")
    scan_backend: str = flag("auto", "selective-scan backend of the Mamba models", metavar="NAME")
    compile: bool = flag(False, "torch.compile the model")
    resume: str = flag("", "checkpoint to go on from, or to evaluate: a path or hf:owner/repo/file", metavar="PATH")


@dataclass
class OptimOptions:
    TITLE: ClassVar[str] = "optimisation"

    epochs: int = flag(5, "epochs to train")
    start_epoch: int = flag(0, "number of the first epoch; a resumed checkpoint's own number takes precedence")
    warmup_epochs: int = flag(1, "epochs of linear warm-up")
    batch_size: int = flag(16, "clips per process and micro-batch")
    update_freq: int = flag(1, "micro-batches per optimizer step; gradients are those of the whole batch")
    optimizer: str = flag("adamw", "optimizer", choices=list(OPTIMIZERS))
    lr: float = flag(3e-5, "peak learning rate")
    lr_start: float = flag(1e-6, "learning rate at the start of the warm-up")
    lr_end: float = flag(1e-5, "learning rate that the cosine falls to")
    fix_lr: bool = flag(False, "constant learning rate, without warm-up or decay")
    wd: float = flag(0.01, "weight decay")
    betas: list[float] = flag([0.9, 0.999], "AdamW's betas; the first is SGD's momentum")
    eps: float = flag(1e-8, "AdamW's epsilon; SGD has none")
    grad_clip_norm: float | None = flag(None, "largest gradient norm; larger ones are scaled down")
    use_zero: bool = flag(False, "shard the optimizer's state over the processes (ZeRO stage 1)")


@dataclass
class RunOptions:
    TITLE: ClassVar[str] = "run"

    output_dir: str = flag("./", "where checkpoints and logs go; a checkpoint.pt there is resumed", metavar="DIR")
    evaluate: bool = flag(False, "evaluate only", off="")
    eval_freq: int = flag(1, "epochs between evaluations; the last epoch is always evaluated")
    eval_batch_size: int = flag(0, "clips per forward pass in evaluation; 0: as --batch-size")
    save_steps: int = flag(0, "optimizer steps between checkpoints within an epoch; 0: at its end only")
    print_freq: int = flag(10, "optimizer steps between progress lines")
    tensorboard: bool = flag(False, "figures to TensorBoard too, in {output-dir}/tensorboard (docs/logging.md)")
    wandb: bool = flag(False, "figures to Weights & Biases too")
    wandb_project: str = flag("avion-timemamba", "its project", metavar="NAME")
    wandb_name: str | None = flag(None, "its name of the run [the name of --output-dir]", metavar="NAME")
    wandb_mode: str = flag(
        "online", "offline: into {output-dir}/wandb, for `wandb sync`", choices=["online", "offline"]
    )
    workers: int = flag(8, "data-loading processes per training process", names=["-j"])
    seed: int = flag(0, "seed of initialisation, data order and augmentation")
    debug: bool = flag(False, "show the traceback of every error", off="")


@dataclass
class DeviceOptions:
    TITLE: ClassVar[str] = "device and processes"

    device: str = flag("auto", "auto: cuda where there is one", choices=["auto", "cpu", "cuda"])
    precision: str | None = flag(None, "autocast type [bf16 on GPUs, fp32 on CPUs]", choices=["fp32", "bf16", "fp16"])
    use_bf16: bool = flag(False, "the same as --precision bf16", off="")
    disable_amp: bool = flag(False, "the same as --precision fp32", off="")
    gpu: int | None = flag(None, "GPU of this process, counted from 0 among those it sees [that of its number]")
    world_size: int = flag(1, "processes, where neither torchrun nor srun says so")
    rank: int = flag(0, "number of this process, likewise")
    local_rank: int = flag(0, "number of this process on its machine, likewise", names=["--local_rank"])
    dist_url: str = flag("env://", "where processes meet, likewise: env:// or tcp://host:port", metavar="URL")
    dist_backend: str = flag("nccl", "process-group backend on GPUs; gloo on CPUs", choices=["nccl", "gloo"])
    dist_timeout: float = flag(30.0, "minutes after which a process that waits for the others gives up")
