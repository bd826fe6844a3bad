"""The flags of `tools/extract_features.py`."""

from dataclasses import dataclass
from typing import ClassVar

from avion.constants import FEATURE_KINDS, SHARD_DTYPES, SHARD_FORMATS
from avion.engine.args import flag, other_default
from avion.numbers import COUNT

from .model_args import settle_model_args
from .shared import FRAMES, DeviceOptions, ModelOptions, RunOptions, VideoOptions


@dataclass
class FeatureOptions:
    """`tools/extract_features.py`."""

    TITLE: ClassVar[str] = "features"

    videos: str = flag(
        "", "what to extract from: a text file with a line `file` or `file,start,end` (seconds) per video, an Ego4D "
        "pickle (.pkl) or an EK-100 CSV", metavar="FILE",
    )  # fmt: skip
    root: str = flag(".", "folder of the videos", metavar="DIR")
    checkpoint: str = flag("", "any checkpoint: a path or hf:owner/repo/file", metavar="PATH")
    output_dir: str = flag("", "where shards and index go; finished shards there are left as they are", metavar="DIR")
    features: list[str] = flag([], "kinds of features [clip]", choices=FEATURE_KINDS)
    frames: int | None = flag(None, "frames per clip [the checkpoint's]", FRAMES)
    format: str = flag("npz", "of the shards", choices=SHARD_FORMATS)
    dtype: str = flag("fp32", "type of the features in the shards; bf16 in safetensors only", choices=SHARD_DTYPES)
    shard_size: int = flag(256, "clips per shard", COUNT)
    batch_size: int = flag(16, "clips per forward pass", COUNT)
    workers: int = other_default(RunOptions, "workers", 2, "data-loading processes")

    model: str | None = other_default(
        ModelOptions, "model", None, "registered model, where the checkpoint does not say"
    )
    model_args: list[str] = other_default(ModelOptions, "model_args", [])
    use_fast_conv1: bool = other_default(ModelOptions, "use_fast_conv1", False)
    use_flash_attn: bool | None = other_default(ModelOptions, "use_flash_attn", None)
    scan_backend: str = other_default(ModelOptions, "scan_backend", "auto")

    norm_style: str = other_default(VideoOptions, "norm_style", "openai")
    video_chunk_length: int = other_default(
        VideoOptions, "video_chunk_length", 15, "length of a video chunk in seconds, of pickles and CSVs"
    )
    video_layout: str = other_default(VideoOptions, "video_layout", "auto")
    decoder: str = other_default(VideoOptions, "decoder", "auto")
    decode_threads: int = other_default(VideoOptions, "decode_threads", 1)
    device: str = other_default(DeviceOptions, "device", "auto")
    precision: str | None = other_default(DeviceOptions, "precision", None)
    debug: bool = other_default(RunOptions, "debug", False)

    settle = staticmethod(settle_model_args)
