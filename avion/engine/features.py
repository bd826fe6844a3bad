"""Features of videos from any checkpoint: of one video in memory, or of a list of videos into shards on disk.

There are three kinds, for B clips of T frames with N patches each, a tower of width D and an embedding of width E:

    clip      (B, E)        `encode_image`; of a fine-tuned classifier the CLS token that its head reads, (B, D)
    spatial   (B, N, T, D)  the patches of every frame after the last block and norm of the tower, row by row
    frame     (B, T, D)     the mean of `spatial` over the patches of each frame
"""

import dataclasses
import functools
import hashlib
import logging
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from avion.constants import FEATURE_KINDS
from avion.data.transforms import EvalTransform, normalize_clip
from avion.data.video import find_layout, list_videos
from avion.data.video.prepare_plan import parse_shard
from avion.data.video_list import SpanDataset, VideoList, read_span, read_video_list
from avion.data.windows import VideoFinder
from avion.errors import UserError
from avion.models.long_video import default_max_tokens, encode_long_video
from avion.weights import Checkpoint

from .build import build_any_as_saved
from .console import duration
from .distributed import World
from .egoschema.results import fingerprint
from .feature_folder import Part
from .feature_shards import STORED, Shards
from .feature_videos import VideoFiles
from .loader import batches_of, build_loader, read
from .options.features import FeatureOptions
from .precision import choose_precision
from .run import joined, shared_flags
from .signals import Stopped, name
from .text_features import read_sentences, write_texts
from .window_features import extract_rows, grouped, windowed

logger = logging.getLogger(__name__)


# ---- one video ---------------------------------------------------------------------------------


def load_clip(
    path: str | os.PathLike,
    frames: int,
    model: nn.Module,
    *,
    start: float = 0.0,
    end: float | None = None,
    norm_style: str = "openai",
    decoder: str = "auto",
) -> torch.Tensor:
    """Read a clip from a video file as a model takes it.

    The frames are the middles of equal segments. The shorter side is resized, the centre is cut out, and the pixels are
    normalised.

    Args:
        path: The video file.
        frames: The number of frames.
        model: The model that the clip is for.
        start: Where the clip begins, in seconds.
        end: Where the clip ends, in seconds; None: at the end of the video.
        norm_style: A key of NORM_STYLES.
        decoder: "auto", "pyav" or "decord".

    Returns:
        (1, 3, frames, size, size) float32, on the device of the model.

    Raises:
        UserError: The file cannot be read.
    """
    clip = read_span(
        path, frames, EvalTransform(model.config.img_size, fused=True), start=start, end=end, decoder=decoder
    )
    return normalize_clip(clip[None].to(next(model.parameters()).device), norm_style)


@torch.inference_mode()
def extract(model: nn.Module, video: torch.Tensor, kinds: Sequence[str] = FEATURE_KINDS) -> dict[str, torch.Tensor]:
    """Compute features of clips. This puts the model into evaluation mode.

    `clip` alone takes clips of any length in bounded memory; the other two kinds hold all tokens of the clips.

    Args:
        model: The model.
        video: Normalised clips (B, 3, T, height, width).
        kinds: Names out of FEATURE_KINDS.

    Returns:
        The features by kind, in the shapes that this file begins with.

    Raises:
        UserError: There is no such kind, or the tower has no token features.
    """
    unknown = [kind for kind in kinds if kind not in FEATURE_KINDS]
    if unknown or not kinds:
        raise UserError(f"features: {', '.join(unknown) or 'nothing'} asked for; there are {', '.join(FEATURE_KINDS)}")
    model.eval()
    if set(kinds) == {"clip"}:
        return {"clip": _encode(model, video)}
    tower = model.visual
    if not hasattr(tower, "token_features"):
        raise UserError(f"{type(tower).__name__}: has no token features, only clip can be extracted from it")
    cls, tokens = tower.token_features(video)  # (B, D), (B, N, T, D)
    found = {"clip": model.project(cls), "frame": tokens.mean(dim=1), "spatial": tokens}
    return {kind: found[kind] for kind in kinds}


def _encode(model: nn.Module, video: torch.Tensor) -> torch.Tensor:
    """(B, 3, T, height, width) → (B, E)."""
    config, frames = model.config, video.shape[2]
    patches = (video.shape[3] // config.patch_size) * (video.shape[4] // config.patch_size)
    if patches * frames <= default_max_tokens(video.device):
        return model.encode_image(video) if hasattr(model, "encode_image") else model.visual(video)
    clips = [encode_long_video(model, lambda i, j, clip=clip: clip[:, i:j], frames) for clip in video]
    return torch.stack(clips)


# ---- a list of videos --------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """What an extraction did.

    Attributes:
        count: How many videos, rows or sentences this run was asked for.
        unit: What is counted.
        errors: What cannot be read, by its row ("row 3") or its video.
        is_main: Whether this process is the one that tells it.
    """

    count: int
    unit: str
    errors: dict[str, str]
    is_main: bool = True


def extract_features(options: FeatureOptions) -> Report:
    """Write the features of `--videos` and of `--texts` into `--output-dir`.

    What an earlier run with the same settings finished is left as it is.

    Returns:
        What was done by all processes of this run.

    Raises:
        UserError: A flag or a file is wrong.
        Stopped: A signal asked the run to stop; the same options go on from where it stands.
    """
    with joined(options, None) as world:
        world.agree({**shared_flags(options), "torch": torch.__version__})
        with world.together("building the model"):
            run = _Run(options, world)
        world.agree({"weights": run.mark})
        if options.texts:
            run.texts()
        report = run.videos() if options.videos or options.window else Report(len(run.sentences), "sentences", {})
        if not options.videos and not options.window:
            return dataclasses.replace(report, is_main=world.is_main)
        errors: dict[str, str] = {}
        for part in world.gather(report.errors):
            errors.update(part)
        return Report(sum(world.gather(report.count)), report.unit, errors, world.is_main)


class _Run:
    """One extraction: the model, the device, and the options."""

    def __init__(self, options: FeatureOptions, world: World):
        self.options, self.world = options, world
        self.kinds = [kind for kind in FEATURE_KINDS if kind in (options.features or ["clip"])]
        self.precision = choose_precision(options, world.device)
        self.spans = read_video_list(options.videos) if options.videos else None
        self.sentences = read_sentences(options.texts) if options.texts else []
        asked = options.frames if options.fps is None else round(options.fps * options.window)
        self.model = build_any_as_saved(options, Checkpoint.open(options.checkpoint), asked).to(world.device).eval()
        self.frames = asked if asked is not None else self.model.config.num_frames
        self.mark = fingerprint(self.model, {})
        index, of = parse_shard(options.shard)
        self.part = Part(index * world.size + world.rank, of * world.size)

    def _settings(self) -> dict[str, Any]:
        """Return the settings that all kinds of features depend on."""
        options = self.options
        return {
            "version": 2,
            "model": self.model.config.name,
            "weights": self.mark,
            "precision": str(self.precision.dtype),
            "dtype": options.dtype,
            "format": options.format,
        }

    def _video_settings(self) -> dict[str, Any]:
        options = self.options
        return {
            **self._settings(),
            "root": options.root,
            "frames": self.frames,
            "img_size": self.model.config.img_size,
            "features": self.kinds,
            "norm_style": options.norm_style,
        }

    def texts(self) -> None:
        """Write the features of the sentences. Among the jobs of an array, only the first one does it."""
        if parse_shard(self.options.shard)[0] == 0:
            write_texts(self.model, self.sentences, self._settings(), self.world, self.precision, self.options)

    def videos(self) -> Report:
        """Write the features of the videos of this part."""
        return self._files() if self.options.files_per_video else self._shards()

    def _finder(self, in_store: bool) -> VideoFinder:
        options = self.options
        return VideoFinder(
            options.root,
            in_store=in_store,
            chunk_length=options.video_chunk_length,
            layout=options.video_layout,
            decoder=options.decoder,
            threads=options.decode_threads,
            index={"auto": "auto", "off": None}.get(options.video_index, options.video_index),
        )

    def _files(self) -> Report:
        options = self.options
        with self.world.together("opening the folder"):
            finder = self._finder(self.spans is None or self.spans.in_store)
            if self.spans is None:
                layout = find_layout(options.root, options.video_layout)
                rows = windowed(list_videos(options.root, layout), options.window, options.stride or options.window)
            elif options.window is None:
                rows = grouped(self.spans)
            else:
                rows = windowed(self.spans, options.window, options.stride or options.window)
                if any(span.start > 0 or span.end is not None for span in self.spans):
                    logger.info("the windows run over whole videos: the starts and ends in the list are not used")
            settings = {**self._video_settings(), "per_video": True, "window": rows.window, "stride": rows.stride}
            digests = [rows.digest(i) for i in range(len(rows.videos))]
            files = VideoFiles(options.output_dir, rows.videos, digests, settings, self.part, options.retry)
        with files:
            extract_rows(
                files,
                rows,
                finder,
                functools.partial(extract, self.model, kinds=self.kinds),
                self.world,
                frames=self.frames,
                size=self.model.config.img_size,
                norm_style=options.norm_style,
                precision=self.precision,
                dtype=options.dtype,
                batch_size=options.batch_size,
                workers=options.workers,
                timeout=options.data_timeout,
            )
            return Report(len(files.own()), "videos", dict(files.errors))

    def _shards(self) -> Report:
        options, spans = self.options, self.spans
        assert spans is not None, "a list of videos"
        with self.world.together("opening the folder"):
            dataset = SpanDataset(
                spans, self._finder(spans.in_store), num_frames=self.frames, size=self.model.config.img_size
            )
            settings = {
                **self._video_settings(),
                "videos": _digest(spans),
                "clips": len(spans),
                "shard_size": options.shard_size,
            }
            shards = Shards(options.output_dir, len(spans), settings, self.part, options.retry)
        with shards:
            _extract_shards(shards, dataset, self)
            rows = sum(len(shards.rows(shard)) for shard in shards.shards())
            return Report(rows, "rows", {f"row {row}": error for row, error in sorted(shards.errors.items())})


def _digest(spans: VideoList) -> str:
    digest = hashlib.sha256()
    for span in spans:
        digest.update(repr((span.video, span.start, span.end, span.id)).encode())
    return digest.hexdigest()[:32]


def _batches(rows: range, size: int) -> Iterator[list[int]]:
    return ([*rows[i : i + size]] for i in range(0, len(rows), size))


def _extract_shards(shards: Shards, dataset: SpanDataset, run: _Run) -> None:
    """Write the shards of this part that are not finished. All processes take each step together, a batch at a time."""
    options, world, todo = run.options, run.world, shards.todo()
    logger.info(
        "%d clips in %d shards, %d of them finished before",
        shards.count,
        len(shards.shards()),
        len(shards.shards()) - len(todo),
    )
    # Batches do not reach from one shard into the next, so that features do not depend on which shards are finished.
    plan = [(shard, batch) for shard in todo for batch in _batches(shards.rows(shard), options.batch_size)]
    loader = build_loader(
        dataset,
        [batch for _, batch in plan],
        workers=options.workers,
        device=world.device,
        timeout=options.data_timeout,
    )
    samples = batches_of(loader)
    parts: dict[str, list[torch.Tensor]] = {}
    entries: list[dict[str, Any]] = []
    started, at = time.perf_counter(), 0
    while world.any(at < len(plan)):
        failure: Exception | None = None
        if at < len(plan):
            shard = plan[at][0]
            try:
                _extract_batch(read(samples), dataset, run, parts, entries)
                if at + 1 == len(plan) or plan[at + 1][0] != shard:
                    shards.write(shard, {kind: torch.cat(values) for kind, values in parts.items()}, entries)
                    left = (time.perf_counter() - started) / (at + 1) * (len(plan) - at - 1)
                    logger.info("%s: %d clips, %s left", shards.path(shard).name, len(entries), duration(left))
                    parts, entries = {}, []
                at += 1
            except Exception as e:  # raised below, once the other processes know
                failure = e
        asked = world.go_on(failure, "extracting the features")
        if asked:  # on all processes, those that are done too
            raise Stopped(f"{name(asked)} with {len(shards.todo())} shards left; {shards.folder} keeps the others")


def _extract_batch(
    batch: dict[str, Any],
    dataset: SpanDataset,
    run: _Run,
    parts: dict[str, list[torch.Tensor]],
    entries: list[dict[str, Any]],
) -> None:
    video = normalize_clip(batch["video"].to(run.world.device), run.options.norm_style)
    with run.precision.autocast():
        found = extract(run.model, video, run.kinds)
    for kind, values in found.items():
        parts.setdefault(kind, []).append(values.to("cpu", STORED[run.options.dtype]))
    for row, error in zip(batch["index"].tolist(), batch["error"], strict=True):
        span = dataset.spans[row]
        entry = {"row": row, "video": span.video, "start": span.start, "end": span.end, "id": span.id}
        entries.append({**entry, "error": error} if error else entry)
