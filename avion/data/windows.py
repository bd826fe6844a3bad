"""Windows over whole videos: which there are, and their frames, decoded once where windows overlap."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from avion.data.transforms import EvalTransform
from avion.data.video import VIDEO_EXTENSIONS, VideoError, VideoStore
from avion.errors import UserError

# A rest of a video that is shorter than this, in seconds, gets no window of its own.
SHORTEST_REST_S = 0.1
# No video has more windows. A length that a damaged file states must not fill the memory.
MOST_WINDOWS = 10_000_000


def windows_of(length: float, window: float, stride: float) -> np.ndarray:
    """The windows of a video: window k begins at k · stride and is `window` long.

    The last window ends with the video, where it is shorter than the others. A video that is shorter than a window has
    one window.

    Args:
        length: The length of the video in seconds.
        window, stride: Of the windows, in seconds.

    Returns:
        (n, 2) float64, begin and end of each window in seconds; n is at least 1.

    Raises:
        ValueError: There would be more than MOST_WINDOWS.
    """
    whole = max(math.floor((length - window) / stride + 1e-6) + 1, 0)
    if whole > MOST_WINDOWS:
        raise ValueError(f"a video of {length:g} s would have {whole} windows")
    rest = length - ((whole - 1) * stride + window)
    one_more = whole == 0 or (rest > min(SHORTEST_REST_S, stride / 2) + 1e-6 and whole * stride < length)
    starts = np.arange(whole + one_more) * float(stride)
    return np.stack([starts, np.minimum(starts + window, length)], axis=1)


class VideoFinder:
    """The videos of a list: files by their paths, other names in the layout of the root (chunked videos among them).

    Args:
        root: The folder of the videos.
        in_store: Whether all names are names in the layout of the root, as those of annotations are.
        chunk_length, layout, decoder, threads, index: As in `VideoStore`.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        *,
        in_store: bool,
        chunk_length: int = 15,
        layout: str = "auto",
        decoder: str = "auto",
        threads: int = 1,
        index: str | os.PathLike | None = "auto",
    ):
        self._how = {"chunk_length": chunk_length, "decoder": decoder, "threads": threads, "index": index}
        self._root, self._layout, self._in_store = root, layout, in_store
        self._store: VideoStore | None = None
        self._no_store = False
        self._files = None if in_store else VideoStore(root, layout="files", **self._how)
        if in_store:
            self._store = VideoStore(root, layout=layout, **self._how)

    def find(self, video: str) -> tuple[VideoStore, str]:
        """The store that has a video, and the name of the video in that store."""
        if self._files is None:
            assert self._store is not None, "names in a store"
            return self._store, video
        storage = self._files.storage
        try:
            if storage.exists(path := storage.join(storage.root, video)) and not storage.is_dir(path):
                return self._files, video
        except OSError:  # opening the file will say why
            return self._files, video
        stem, extension = os.path.splitext(video.rstrip("/"))
        name = stem if extension.lower() in VIDEO_EXTENSIONS else video.rstrip("/")
        store = None if os.path.isabs(video) or ".." in name.split("/") else self._layout_store()
        if store is not None and store.last_chunk(name) is not None:
            return store, name
        return self._files, video

    def _layout_store(self) -> VideoStore | None:
        """The store in the layout of the root; None where the root has no known layout."""
        if self._store is None and not self._no_store:
            try:
                self._store = VideoStore(self._root, layout=self._layout, **self._how)
            except UserError:  # the video is then reported as a file that is not there
                self._no_store = True
        return self._store


@dataclass(frozen=True)
class Block:
    """Consecutive clips of one video. first: the number of the first clip among the clips of the video."""

    video: int
    first: int
    spans: tuple[tuple[float, float], ...]


class BlockDataset(Dataset):
    """Clips of blocks: `dataset[blocks]` is {"video": (n, 3, T, size, size) uint8, "blocks": blocks, "error": n texts}.

    `error` says why a clip cannot be read ("" if it can be read); the clip is then zeros. The frames are the middles of
    equal segments, the shorter side is resized, and the centre is cut out, in one pass with the conversion to RGB.

    Args:
        videos: The names of the videos that `Block.video` counts.
        finder: Where the videos are.
        num_frames, size: Frames per clip; height and width of the clips in pixels.
    """

    def __init__(self, videos: Sequence[str], finder: VideoFinder, *, num_frames: int, size: int):
        self.videos, self.finder, self.num_frames = videos, finder, num_frames
        self.transform = EvalTransform(size, fused=True)

    def __getitem__(self, blocks: Sequence[Block]) -> dict[str, object]:
        clips: list[torch.Tensor] = []
        errors: list[str] = []
        for block in blocks:
            try:
                clips += self._read(block, block.spans)
                errors += [""] * len(block.spans)
            except VideoError:  # of one of the clips at least: the others can be read
                for span in block.spans:
                    try:
                        clips += self._read(block, [span])
                        errors.append("")
                    except VideoError as error:
                        side = self.transform.crop_size
                        clips.append(torch.zeros(3, self.num_frames, side, side, dtype=torch.uint8))
                        errors.append(str(error))
        return {"video": torch.stack(clips), "blocks": list(blocks), "error": errors}

    def _read(self, block: Block, spans: Sequence[tuple[float, float]]) -> list[torch.Tensor]:
        store, name = self.finder.find(self.videos[block.video])
        frames, _ = store.read_clips(name, spans, self.num_frames, scaling=self._scaling)
        return [self.transform.from_scaled(clip) for clip in frames]

    def _scaling(self, height: int, width: int):
        return self.transform.scaling(height, width, None)
