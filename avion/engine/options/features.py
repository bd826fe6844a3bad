"""The flags of `tools/extract_features.py`."""

from dataclasses import dataclass
from typing import ClassVar

from avion.constants import FEATURE_FORMATS, FEATURE_KINDS, SHARD_DTYPES
from avion.engine.args import flag, other_default
from avion.errors import UserError
from avion.numbers import COUNT, Number

from .shared import FRAMES, DeviceOptions, RunOptions, SavedModelOptions, VideoOptions

_SECONDS = Number(float, 0, 1_000_000, above=True)


@dataclass(frozen=True)
class FeatureOptions(SavedModelOptions, DeviceOptions):
    """The options of `tools/extract_features.py`."""

    TITLE: ClassVar[str] = "features"

    videos: str = flag(
        "",
        "list of the videos: a CSV with a column video, a text file with a line `file` or `file,start,end` "
        "(seconds) per video, captions, an Ego4D pickle (.pkl) or an EK-100 CSV; without it, --window "
        "takes all videos below --root",
        metavar="FILE",
    )
    root: str = flag(".", "folder of the videos", metavar="DIR")
    checkpoint: str = flag("", "checkpoint of the model: a path or hf:owner/repo/file", metavar="PATH")
    output_dir: str = flag("", "folder of the features; what is finished in it is left as it is", metavar="DIR")
    features: list[str] = flag([], "kinds of features to extract [clip]", choices=FEATURE_KINDS)
    frames: int | None = flag(None, "frames per clip or window [as many as the checkpoint has]", FRAMES)
    window: float | None = flag(
        None,
        "length in seconds of windows over the whole videos of the list: a row per window, a file per video",
        _SECONDS,
        metavar="S",
    )
    stride: float | None = flag(None, "seconds from window to window [--window]", _SECONDS, metavar="S")
    fps: float | None = flag(
        None, "frames per second of a window, in place of --frames", Number(float, 0, 1000, above=True), metavar="F"
    )
    per_video: bool = flag(
        False, "write a file per video, with a row per clip of the list; --window does so too", off=""
    )
    texts: str = flag(
        "",
        "sentences whose features are written to texts.npz: a text file with a sentence per line, or a CSV with a "
        "column sentence, narration, caption or text",
        metavar="FILE",
    )
    format: str = flag(
        "npz",
        "file format of the features; npy and pt hold the array alone, for one kind and a file per video",
        choices=FEATURE_FORMATS,
    )
    dtype: str = flag("fp32", "number format of the features; bf16 is in safetensors and pt only", choices=SHARD_DTYPES)
    shard_size: int = flag(256, "clips per shard, where there is no file per video", COUNT)
    shard: str = flag(
        "0/1", "only part I of N of the work, counted from 0, as the jobs of a SLURM array do it", metavar="I/N"
    )
    retry: bool = flag(False, "try again what could not be read before", off="")
    batch_size: int = flag(16, "clips per forward pass", COUNT)
    workers: int = other_default(RunOptions, "workers", 2, "data-loading processes")
    data_timeout: float = other_default(RunOptions, "data_timeout", 900.0)

    video_chunk_length: int = other_default(
        VideoOptions, "video_chunk_length", 15, "length of a video chunk in seconds, for videos in chunks"
    )
    video_layout: str = other_default(VideoOptions, "video_layout", "auto")
    video_index: str = other_default(VideoOptions, "video_index", "auto")
    decoder: str = other_default(VideoOptions, "decoder", "auto")
    decode_threads: int = other_default(VideoOptions, "decode_threads", 1)
    debug: bool = other_default(RunOptions, "debug", False)

    @property
    def files_per_video(self) -> bool:
        """Whether features are written to a file per video, and not to shards of the list."""
        return self.per_video or self.window is not None

    def check(self) -> None:
        """Raise UserError for combinations that make no sense."""
        from avion.data.video.prepare_plan import parse_shard  # reads videos, which no other flag needs

        for name in ("checkpoint", "output_dir"):
            if not getattr(self, name):
                raise UserError(f"--{name.replace('_', '-')}: not given; see --help")
        if not (self.videos or self.window or self.texts):
            raise UserError("--videos: not given; name a list of videos, or give --window or --texts")
        parse_shard(self.shard)
        for name in ("stride", "fps"):
            if getattr(self, name) is not None and self.window is None:
                raise UserError(f"--{name}: is of the windows of --window, which is not given")
        if self.fps is not None and self.frames is not None:
            raise UserError("--fps and --frames: both say how many frames a window has; give one of them")
        if self.fps is not None and not 1 <= round(self.fps * self.window) <= FRAMES.high:
            raise UserError(
                f"--fps {self.fps:g}: gives a window of {self.window:g} s {round(self.fps * self.window)} frames; "
                f"a number {FRAMES.range} is required"
            )
        if self.dtype == "bf16" and self.format in ("npz", "npy"):
            raise UserError("--dtype bf16: NumPy has no such type; give --format safetensors or pt, or --dtype fp16")
        if self.format in ("npy", "pt") and (not self.files_per_video or len(set(self.features)) > 1):
            raise UserError(
                f"--format {self.format}: holds one array per video; give --window or --per-video and one kind of "
                "--features, or --format npz"
            )
