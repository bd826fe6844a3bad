"""Features of videos from any checkpoint: of one video in memory, or of a list of videos into shards on disk.

There are three kinds, for B clips of T frames with N patches each, a tower of width D and an embedding of width E:

    clip      (B, E)        `encode_image`; of a fine-tuned classifier the CLS token that its head reads, (B, D)
    spatial   (B, N, T, D)  the patches of every frame after the last block and norm of the tower, row by row
    frame     (B, T, D)     the mean of `spatial` over the patches of each frame
"""

import hashlib
import logging
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from avion.constants import FEATURE_KINDS
from avion.data.transforms import EvalTransform, normalize_clip
from avion.data.video_list import SpanDataset, VideoList, read_span, read_video_list
from avion.errors import UserError
from avion.models.long_video import default_max_tokens, encode_long_video
from avion.weights import Checkpoint

from .build import build_any_as_saved
from .console import duration
from .distributed import choose_device
from .egoschema.results import fingerprint
from .feature_shards import STORED, Shards
from .loader import build_loader, read
from .options.features import FeatureOptions
from .steps import Precision
from .trainer import precision_named

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
    )  # fmt: skip
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


def extract_features(options: FeatureOptions) -> dict[int, str]:
    """Write the features of every row of `--videos` into shards in `--output-dir`.

    Shards that an earlier run with the same settings finished are left as they are.

    Returns:
        By the number of a row that cannot be read, what is wrong with it.

    Raises:
        UserError: A flag or a file is wrong.
    """
    kinds = [kind for kind in FEATURE_KINDS if kind in (options.features or ["clip"])]
    if options.dtype == "bf16" and options.format == "npz":
        raise UserError("--dtype bf16: NumPy has no such type; give --format safetensors, or --dtype fp16")
    for name in ("videos", "checkpoint", "output_dir"):
        if not getattr(options, name):
            raise UserError(f"--{name.replace('_', '-')}: not given; see --help")
    spans = read_video_list(options.videos)
    device = choose_device(options.device, None, 0)
    precision = precision_named(options.precision, device)
    model = build_any_as_saved(options, Checkpoint.open(options.checkpoint), options.frames).to(device).eval()
    frames = options.frames if options.frames is not None else model.config.num_frames
    dataset = SpanDataset(
        spans, options.root, num_frames=frames, size=model.config.img_size, chunk_length=options.video_chunk_length,
        layout=options.video_layout, decoder=options.decoder, threads=options.decode_threads,
    )  # fmt: skip
    settings = {
        "videos": _digest(spans), "clips": len(spans), "root": options.root, "model": model.config.name,
        "weights": fingerprint(model, {}), "frames": frames, "img_size": model.config.img_size, "features": kinds,
        "norm_style": options.norm_style, "precision": str(precision.dtype), "dtype": options.dtype,
        "format": options.format, "shard_size": options.shard_size,
    }  # fmt: skip
    with Shards(options.output_dir, len(spans), settings) as shards:
        _extract_shards(shards, dataset, model, precision, kinds, options)
        return dict(sorted(shards.errors.items()))


def _digest(spans: VideoList) -> str:
    digest = hashlib.sha256()
    for span in spans:
        digest.update(repr((span.video, span.start, span.end, span.id)).encode())
    return digest.hexdigest()[:32]


def _batches(rows: range, size: int) -> Iterator[list[int]]:
    return ([*rows[i : i + size]] for i in range(0, len(rows), size))


def _extract_shards(
    shards: Shards,
    dataset: SpanDataset,
    model: nn.Module,
    precision: Precision,
    kinds: list[str],
    options: FeatureOptions,
) -> None:
    todo = shards.todo()
    total = -(-shards.count // shards.size)
    logger.info("%d clips in %d shards, %d of them finished before", shards.count, total, total - len(todo))
    if not todo:
        return
    device = next(model.parameters()).device
    # Batches do not reach from one shard into the next, so that features do not depend on which shards are finished.
    plan = {shard: list(_batches(shards.rows(shard), options.batch_size)) for shard in todo}
    loader = build_loader(
        dataset, [b for batches in plan.values() for b in batches], workers=options.workers, device=device
    )
    samples, started = iter(loader), time.perf_counter()
    for done, (shard, batches) in enumerate(plan.items(), 1):
        parts: dict[str, list[torch.Tensor]] = {kind: [] for kind in kinds}
        entries: list[dict[str, Any]] = []
        for _ in batches:
            batch = read(samples)
            readable = torch.tensor([not error for error in batch["error"]])
            with precision.autocast():
                found = extract(model, normalize_clip(batch["video"].to(device), options.norm_style), kinds)
            for kind, values in found.items():
                parts[kind].append(values.cpu()[readable].to(STORED[options.dtype]))
            for row, error in zip(batch["index"].tolist(), batch["error"], strict=True):
                span = dataset.spans[row]
                entry = {"row": row, "video": span.video, "start": span.start, "end": span.end, "id": span.id}
                entries.append({**entry, "error": error} if error else entry)
        shards.write(shard, {kind: torch.cat(values) for kind, values in parts.items()}, entries)
        left = (time.perf_counter() - started) / done * (len(todo) - done)
        logger.info("%s: %d clips, %s left", shards.path(shard).name, len(entries), duration(left))
