"""The flags of `tools/extract_features.py`."""

from dataclasses import dataclass
from typing import ClassVar

from avion.constants import FEATURE_KINDS, SHARD_DTYPES, SHARD_FORMATS
from avion.engine.args import flag, other_default
from avion.numbers import COUNT

from .shared import FRAMES, DeviceOptions, RunOptions, SavedModelOptions, VideoOptions


@dataclass(frozen=True)
class FeatureOptions(SavedModelOptions):
    """The options of `tools/extract_features.py`."""

    TITLE: ClassVar[str] = "features"

    videos: str = flag(
        "", "list of the videos: a text file with a line `file` or `file,start,end` (seconds) per video, an Ego4D "
        "pickle (.pkl) or an EK-100 CSV", metavar="FILE",
    )  # fmt: skip
    root: str = flag(".", "folder of the videos", metavar="DIR")
    checkpoint: str = flag("", "checkpoint of the model: a path or hf:owner/repo/file", metavar="PATH")
    output_dir: str = flag("", "folder of shards and index; finished shards in it are left as they are", metavar="DIR")
    features: list[str] = flag([], "kinds of features to extract [clip]", choices=FEATURE_KINDS)
    frames: int | None = flag(None, "frames per clip [as many as the checkpoint has]", FRAMES)
    format: str = flag("npz", "file format of the shards", choices=SHARD_FORMATS)
    dtype: str = flag(
        "fp32", "number format of the features in the shards; bf16 is in safetensors only", choices=SHARD_DTYPES
    )
    shard_size: int = flag(256, "clips per shard", COUNT)
    batch_size: int = flag(16, "clips per forward pass", COUNT)
    workers: int = other_default(RunOptions, "workers", 2, "data-loading processes")

    video_chunk_length: int = other_default(
        VideoOptions, "video_chunk_length", 15, "length of a video chunk in seconds, for the videos of pickles and CSVs"
    )
    video_layout: str = other_default(VideoOptions, "video_layout", "auto")
    decoder: str = other_default(VideoOptions, "decoder", "auto")
    decode_threads: int = other_default(VideoOptions, "decode_threads", 1)
    device: str = other_default(DeviceOptions, "device", "auto")
    precision: str | None = other_default(DeviceOptions, "precision", None)
    debug: bool = other_default(RunOptions, "debug", False)
