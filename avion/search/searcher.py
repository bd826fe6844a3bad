"""Answers queries: a sentence, an image or a clip becomes a unit vector, which the index compares with its windows."""

from __future__ import annotations

import fnmatch
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from avion.data.transforms import EvalTransform, normalize_clip
from avion.data.video_list import read_span
from avion.engine.precision import Precision
from avion.engine.zeroshot.classes import class_embeddings
from avion.errors import UserError
from avion.reading import open_file

from .index import SearchIndex, unit_rows
from .moments import Moment, find_moments
from .rank import similarities

_LARGEST_IMAGE = 100_000_000  # pixels


class Searcher:
    """A model and an index that the model made.

    Args:
        model: A dual encoder in evaluation mode.
        index: The index.
        weights: The fingerprint of the weights of the model.
        precision: The settings of autocast.
        templates: Texts in which the sentence takes the place of {}; the features of several templates are averaged.

    Raises:
        UserError: The index was made with other weights.
    """

    def __init__(
        self, model: nn.Module, index: SearchIndex, weights: str, precision: Precision, templates: Sequence[str] = ()
    ):
        if weights != index.facts["weights"]:
            raise UserError(
                f"--index {index.folder}: was made with other weights than this checkpoint's, whose features cannot be "
                f"compared with it; give the checkpoint that made it ({index.facts['checkpoint']}), or index again"
            )
        if not hasattr(model, "encode_text") or not hasattr(model, "textual"):
            raise UserError("--checkpoint: is a classifier and has no text tower; give a dual encoder")
        self.model, self.index, self.precision = model, index, precision
        self.templates = tuple(templates) or ("{}",)
        self.device = next(model.parameters()).device

    def text(self, sentence: str) -> np.ndarray:
        """Compute the unit vector of a sentence.

        Args:
            sentence: The sentence.

        Returns:
            (E,) float32 of length 1.

        Raises:
            UserError: The sentence is empty.
        """
        if not sentence.strip():
            raise UserError('query: is empty; write what the moments show, such as "folds a cloth"')
        with self.precision.autocast():
            found = class_embeddings(self.model, [sentence.strip()], self.templates)
        return found[0].float().cpu().numpy()

    def image(self, path: str | os.PathLike) -> np.ndarray:
        """Compute the unit vector of an image, which the model sees as a clip of that image only.

        Args:
            path: The file of the image.

        Returns:
            (E,) float32 of length 1.

        Raises:
            UserError: The file cannot be read, or the image has too many pixels.
        """
        from PIL import Image, ImageOps, UnidentifiedImageError

        try:
            with open_file(path) as opened, Image.open(opened) as image:
                if image.width * image.height > _LARGEST_IMAGE:
                    raise UserError(f"image {path}: has {image.width} x {image.height} pixels, which are too many")
                picture = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        except FileNotFoundError:
            raise UserError(f"image {path}: no such file") from None
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f"image {path}: cannot be read ({str(error).splitlines()[0][:80]})") from None
        frames = np.repeat(picture[None], self.index.facts["frames"], axis=0)
        return self._video(EvalTransform(self.model.config.img_size, fused=True)(frames, None))

    def clip(self, path: str | os.PathLike, start: float = 0.0, end: float | None = None) -> np.ndarray:
        """Compute the unit vector of the seconds [start, end) of a video file.

        Args:
            path: The video file.
            start: The begin, in seconds.
            end: The end, in seconds; None: the end of the video.

        Returns:
            (E,) float32 of length 1.

        Raises:
            UserError: The file cannot be read.
        """
        transform = EvalTransform(self.model.config.img_size, fused=True)
        return self._video(read_span(path, self.index.facts["frames"], transform, start=start, end=end))

    @torch.inference_mode()
    def _video(self, clip: torch.Tensor) -> np.ndarray:
        video = normalize_clip(clip[None].to(self.device), self.index.facts["norm_style"])
        with self.precision.autocast():
            found = self.model.encode_image(video)
        return unit_rows(found.float().cpu().numpy())[0]

    def videos_like(self, patterns: Sequence[str]) -> list[int] | None:
        """Find the videos whose names match one of several patterns.

        Args:
            patterns: Each is the name of a video, a part of names, or names with the wildcards * and ?.

        Returns:
            The numbers of the videos; None where there is no pattern.

        Raises:
            UserError: No video matches.
        """
        patterns = [pattern for pattern in patterns if pattern.strip()]
        if not patterns:
            return None

        names = set(self.index.videos)

        def fits(name: str) -> bool:
            return any(p == name if p in names else p in name or fnmatch.fnmatchcase(name, p) for p in patterns)

        found = [i for i, name in enumerate(self.index.videos) if fits(name)]
        if not found:
            some = ", ".join(self.index.videos[:3])
            raise UserError(f"--videos {' '.join(patterns)}: no video of the index matches; there are {some}, …")
        return found

    def search(
        self, query: np.ndarray, count: int, *, videos: Sequence[int] | None = None, longest: float = 30.0
    ) -> tuple[list[Moment], float]:
        """Find the best moments for a unit vector.

        Args:
            query: (E,) of length 1.
            count: The largest number of moments.
            videos: The numbers of the videos to search; None: all.
            longest: As in `find_moments`.

        Returns:
            The moments, and the seconds that the search took.
        """
        began = time.perf_counter()
        scores = similarities(query, self.index.windows)
        moments = find_moments(self.index, scores, count, longest=longest, videos=videos)
        return moments, time.perf_counter() - began


def is_image(path: str | os.PathLike) -> bool:
    """Return whether the extension of a file is that of an image."""
    return Path(path).suffix.lower() in (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
