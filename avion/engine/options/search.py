"""The flags of `tools/search_videos.py`."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from avion.engine.args import flag, other_default
from avion.errors import UserError
from avion.numbers import COUNT, PORT, Number
from avion.targets import check_here

from .features import FeatureOptions
from .shared import FRAMES, DeviceOptions, RunOptions, SavedModelOptions, VideoOptions

_SECONDS = Number(float, 0, 1_000_000, above=True)
DEFAULT_INDEX = "search_index"


@dataclass(frozen=True)
class IndexOptions(SavedModelOptions, DeviceOptions):
    """The options of `tools/search_videos.py index`."""

    TITLE: ClassVar[str] = "index"

    root: str = flag("", "folder of the videos, in chunks or whole; may be given without the flag", metavar="FOLDER")
    checkpoint: str = flag("", "checkpoint of the model: a path or hf:owner/repo/file", metavar="PATH")
    index: str = flag(DEFAULT_INDEX, "folder of the index", metavar="DIR")
    window: float = flag(2.0, "length of a window in seconds", _SECONDS, metavar="S")
    stride: float | None = flag(None, "seconds from window to window [half of --window]", _SECONDS, metavar="S")
    frames: int | None = flag(None, "frames per window [as many as the checkpoint has]", FRAMES)
    shard: str = other_default(FeatureOptions, "shard", "0/1")
    retry: bool = other_default(FeatureOptions, "retry", False)
    batch_size: int = other_default(FeatureOptions, "batch_size", 16)
    workers: int = other_default(FeatureOptions, "workers", 2)
    video_chunk_length: int = other_default(FeatureOptions, "video_chunk_length", 15)
    video_layout: str = other_default(VideoOptions, "video_layout", "auto")
    video_index: str = other_default(VideoOptions, "video_index", "auto")
    decoder: str = other_default(VideoOptions, "decoder", "auto")
    decode_threads: int = other_default(VideoOptions, "decode_threads", 1)
    debug: bool = other_default(RunOptions, "debug", False)

    def check(self) -> None:
        """Raise UserError where a flag that is required is missing."""
        if not self.root:
            raise UserError("FOLDER: not given; name the folder of the videos")
        if not self.checkpoint:
            raise UserError("--checkpoint: not given; name the checkpoint that makes the index")
        check_here(self.index, "--index")
        self.as_features("").check()

    def as_features(self, output_dir: str) -> FeatureOptions:
        """Return the options by which `tools/extract_features.py` computes the features of the windows."""
        own = {f.name for f in dataclasses.fields(FeatureOptions)} - {"_given"}
        values = {name: value for name, value in self.values().items() if name in own}
        values |= {"stride": self.stride or self.window / 2, "dtype": "fp16", "output_dir": output_dir or "."}
        return FeatureOptions(**values, _given=frozenset(values))


@dataclass(frozen=True)
class QueryOptions(SavedModelOptions, DeviceOptions):
    """The flags that searches have in common."""

    TITLE: ClassVar[str] = "search"

    index: str = flag(DEFAULT_INDEX, "folder of the index", metavar="DIR")
    checkpoint: str = flag("", "checkpoint, where it does not lie where the index was made from it", metavar="PATH")
    top: int = flag(10, "how many moments are shown", COUNT)
    longest: float = flag(30.0, "length in seconds up to which neighbouring windows are merged", _SECONDS, metavar="S")
    template: list[str] = flag(
        [],
        "texts in which {} stands for the query, such as '#C C {}', Ego4D's mark of the camera wearer; the mean of "
        "several counts [{}]",
        metavar="TEXT",
    )
    debug: bool = other_default(RunOptions, "debug", False)


@dataclass(frozen=True)
class SearchOptions(QueryOptions):
    """The options of `tools/search_videos.py search`."""

    query: str = flag("", "what the moments show; may be given without the flag", metavar="TEXT")
    image: str = flag("", "an image as the query", metavar="FILE")
    clip: str = flag("", "a video file as the query", metavar="FILE")
    clip_start: float = flag(
        0.0, "second of --clip at which the query begins", Number(float, 0, 1_000_000), metavar="S"
    )
    clip_end: float | None = flag(None, "second of --clip at which it ends [the end]", _SECONDS, metavar="S")
    videos: list[str] = flag(
        [], "search only videos whose names have one of these parts, or match a pattern with * and ?", metavar="NAME"
    )
    json: bool = flag(False, "print JSON", off="")

    def check(self) -> None:
        """Raise UserError unless there is one query."""
        given = [name for name in ("query", "image", "clip") if getattr(self, name)]
        if len(given) != 1:
            found = " and ".join(f"--{name}" for name in given) or "no query"
            raise UserError(f"{found}: give one of a sentence, --image and --clip")
        if (self.clip_start or self.clip_end is not None) and not self.clip:
            raise UserError("--clip-start and --clip-end: are of --clip, which is not given")
        if self.clip_end is not None and self.clip_end <= self.clip_start:
            raise UserError(f"--clip-end {self.clip_end:g}: is not after --clip-start {self.clip_start:g}")


@dataclass(frozen=True)
class ServeOptions(QueryOptions):
    """The options of `tools/search_videos.py serve`."""

    host: str = flag(
        "127.0.0.1",
        "address that the page is served on; 0.0.0.0 lets everyone in the network search and watch",
        metavar="ADDRESS",
    )
    port: int = flag(7860, "port of the page; 0: a free one", Number(int, 0, PORT.high))
