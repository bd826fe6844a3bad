"""Makes an index, and a searcher, from the flags of `tools/search_videos.py`."""

from __future__ import annotations

import dataclasses
import os

from avion.data.video import find_layout, is_remote, list_videos
from avion.engine.build import build_as_saved
from avion.engine.distributed import choose_device
from avion.engine.egoschema.results import fingerprint
from avion.engine.features import Report, extract_features
from avion.engine.options.search import IndexOptions, QueryOptions
from avion.engine.precision import choose_precision
from avion.features import read
from avion.weights import Checkpoint

from .index import FEATURES, SearchIndex, build_index, open_index
from .searcher import Searcher


def make_index(options: IndexOptions) -> tuple[Report, SearchIndex | None, int]:
    """Compute the features of all windows that do not exist yet, and make the index.

    Args:
        options: The flags.

    Returns:
        What was extracted; the index, or None on a process that does not write it and while other jobs still have
        videos to index; and the number of videos that are still to be indexed.

    Raises:
        UserError: A flag is wrong, or a file cannot be read or written.
        Stopped: A signal asked the run to stop; the same options continue from there.
    """
    features = os.path.join(options.index, FEATURES)
    layout = find_layout(options.root, options.video_layout)
    report = extract_features(options.as_features(features))
    if not report.is_main:
        return report, None, 0
    videos = list_videos(options.root, layout)
    done = read(features)
    left = sum(name not in done and name not in done.errors for name in videos)
    if left:
        return report, None, left
    local = os.path.exists(options.checkpoint)
    facts = {
        "root": options.root if is_remote(options.root) else os.path.abspath(options.root),
        "video_layout": layout.kind,
        "video_chunk_length": options.video_chunk_length,
        "norm_style": options.norm_style,
        "checkpoint": os.path.abspath(options.checkpoint) if local else options.checkpoint,
        "model": options.model,
        "model_args": options.model_args,
        "frames": done.settings["frames"],
    }
    return report, build_index(options.index, facts, videos), 0


def open_searcher(options: QueryOptions) -> Searcher:
    """Open an index and the model that made it.

    Args:
        options: The flags.

    Returns:
        The searcher.

    Raises:
        UserError: The index or the checkpoint cannot be read, or the index was made with other weights.
    """
    index = open_index(options.index)
    facts = index.facts
    saved = {name: facts[name] for name in ("model", "model_args", "norm_style") if not options.was_given(name)}
    options = dataclasses.replace(options, **saved)
    device = choose_device(options.device, options.gpu, options.local_rank)
    checkpoint = Checkpoint.open(options.checkpoint or facts["checkpoint"])
    model = build_as_saved(options, checkpoint, facts["frames"]).to(device).eval()
    return Searcher(model, index, fingerprint(model, {}), choose_precision(options, device), options.template)
