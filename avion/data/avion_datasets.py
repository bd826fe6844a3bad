"""AVION's datasets for people's own scripts, with AVION's arguments in AVION's order and AVION's items.

`avion.data.clip_dataset`, AVION's import path, also holds these names.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Subset

from avion.data.captions import read_narrations
from avion.data.ek100 import load_relevancy, read_ek100_retrieval, read_sentences, sentence_path
from avion.data.ek100_actions import read_ek100_actions
from avion.data.narrations import Narration
from avion.data.retrieval_dataset import ClipsWithPositives
from avion.data.transforms import EvalTransform, TrainTransform
from avion.data.video import VideoStore
from avion.errors import UserError

logger = logging.getLogger(__name__)

_DATASETS = ("ego4d", "ek100_mir", "ek100_cls")
_POSITIVE = 0.1  # a sentence with a relevancy above this number is a positive of its clip
_RELEVANCY = "caption_relevancy_EPIC_100_retrieval_{split}.pkl"

Frames = torch.Tensor | Any  # whatever the script's transform returns


class _AvionDataset(Dataset):
    """Clips of an annotation file, read as AVION reads them; the subclasses say what belongs to a clip.

    The random numbers come from torch's generator. A clip that cannot be read raises VideoError.
    """

    def __init__(
        self,
        dataset: str,
        root,
        metadata,
        transform,
        is_training: bool,
        chunk_len: int,
        clip_length: int,
        clip_stride: int,
        threads: int,
        fast_rrc: bool,
        rrc_params: tuple,
        fast_rcc: bool,
        rcc_params: tuple,
        subsample_stride: int | None = None,
    ):
        if fast_rrc and fast_rcc:
            raise UserError("fast_rrc and fast_rcc: only one of the two crops can be taken")
        if clip_length < 1:
            raise UserError(f"clip_length: {clip_length} is not at least 1 frame")
        self.dataset, self.root, self.metadata = dataset, root, metadata
        self.samples, self.labels = _read(dataset, metadata)
        if subsample_stride is not None:
            self.samples, self.labels = _every(subsample_stride, self.samples, self.labels)
        layout, chunk_len = ("whole", 1) if chunk_len == -1 else ("auto", chunk_len)
        self.store = VideoStore(root, chunk_length=chunk_len, layout=layout, threads=threads)
        self.transform, self.is_training = transform, is_training
        self.clip_length, self.clip_stride = clip_length, clip_stride
        self._crop = None
        if fast_rrc:
            self._crop = TrainTransform(rrc_params[0], scale=tuple(rrc_params[1]), fused=True)
        elif fast_rcc:
            self._crop = EvalTransform(rcc_params[0], fused=True)

    def __len__(self) -> int:
        return len(self.samples)

    def _generator(self, i: int) -> np.random.Generator:
        if not -len(self) <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        return np.random.default_rng(int(torch.randint(2**62, ())))

    def _frames(self, row: Narration, rng: np.random.Generator) -> Frames:
        clip = self.store.read_clip(
            row.video, row.start, row.end, self.clip_length, rng=rng if self.is_training else None
        )
        if self._crop is None:
            frames = torch.from_numpy(clip.frames).float()
        else:
            frames = self._crop(clip.frames, rng).permute(1, 2, 3, 0).float()  # (T, h, w, 3)
        return frames if self.transform is None else self.transform(frames)


class VideoCaptionDatasetCLIP(_AvionDataset):
    """Clips with their captions: items are (frames, tokens or text, relevancy).

    `frames` is what `transform` returns for float32 (T, H, W, 3), 0 to 255, or these frames without a transform.
    `tokens` is `tokenizer(text)[0]`, or the text itself without a tokenizer. `relevancy` is 0.0 for "ego4d". For
    "ek100_mir" it is 1 in evaluation; in training it is the relevancy of the sentence, which is drawn among the
    sentences whose relevancy to the clip is above 0.1, all equally likely. Training clips of "ek100_mir" without such a
    sentence are left out, which the log says.

    Args:
        dataset: "ego4d" (`metadata` is a pickle; in training one of several wordings is drawn), "ek100_mir" (`metadata`
            is a CSV; for training, its sentences lie beside it as `…_sentence.csv`, and the folder `relevancy` holds
            EPIC's file of the split, "train" or "test", that the name of the CSV contains), or "ek100_cls" (a CSV; the
            text is the action, "verb_class:noun_class").
        root: The folder of the videos.
        metadata: The annotation file.
        transform: A function of the frames, or None.
        is_training: Whether the frames are jittered and the texts drawn.
        tokenizer: A function of a text, or None.
        chunk_len: The seconds in a file; -1 means whole videos.
        clip_length: T.
        clip_stride: Without effect, as in AVION, whose sampling is uniform.
        threads: The number of threads of the decoder.
        fast_rrc: Whether a random box with an area share of rrc_params[1] is cropped and resized to rrc_params[0]
            pixels before the transform, as uint8 frames.
        rrc_params: The size and the range of area shares.
        fast_rcc: Whether the centre is cropped to rcc_params[0] pixels before the transform, as uint8 frames.
        rcc_params: The size.
        subsample_stride: Take every so many-th clip.

    Raises:
        UserError: A file is not as described.
    """

    def __init__(
        self,
        dataset: str,
        root: str | os.PathLike,
        metadata: str | os.PathLike,
        transform: Callable[[torch.Tensor], Frames] | None = None,
        is_training: bool = True,
        tokenizer: Callable[[str], torch.Tensor] | None = None,
        chunk_len: int = 300,
        clip_length: int = 32,
        clip_stride: int = 2,
        threads: int = 1,
        fast_rrc: bool = False,
        rrc_params: tuple = (224, (0.5, 1.0)),
        fast_rcc: bool = False,
        rcc_params: tuple = (224,),
        subsample_stride: int | None = None,
    ):
        super().__init__(
            dataset,
            root,
            metadata,
            transform,
            is_training,
            chunk_len,
            clip_length,
            clip_stride,
            threads,
            fast_rrc,
            rrc_params,
            fast_rcc,
            rcc_params,
            subsample_stride,
        )
        self.tokenizer = tokenizer
        if dataset == "ek100_mir" and is_training:
            self.samples = _with_positives(self.samples, metadata, subsample_stride or 1)

    def __getitem__(self, i: int) -> tuple[Frames, torch.Tensor | str, float]:
        rng = self._generator(i)
        row = self.samples[i]
        text, relevancy = self._caption(i, row, rng)
        frames = self._frames(row, rng)
        return frames, text if self.tokenizer is None else self.tokenizer(text)[0], relevancy

    def _caption(self, i: int, row: Narration, rng: np.random.Generator) -> tuple[str, float]:
        if self.dataset == "ek100_cls":
            return self.labels[i], 0.0
        if isinstance(self.samples, ClipsWithPositives):
            text, fields = self.samples.draw(i % len(self), rng)
            return text, float(fields["relevancy"])
        text = row.texts[rng.integers(len(row.texts)) if self.is_training else 0]
        return text, 0.0 if self.dataset == "ego4d" else 1


class VideoClassyDataset(_AvionDataset):
    """Clips with their classes: items are (frames, label).

    `label` is "verb_class:noun_class", or the number that `label_mapping` gives to this text. Only "ek100_cls" has
    classes. The arguments are those of `VideoCaptionDatasetCLIP`.

    Raises:
        UserError: `label_mapping` lacks a class, or an argument asks for something that AVION accepts and ignores:
            several clips of one action, sparse sampling, videos that are not trimmed.
    """

    def __init__(
        self,
        dataset: str,
        root: str | os.PathLike,
        metadata: str | os.PathLike,
        transform: Callable[[torch.Tensor], Frames] | None = None,
        is_training: bool = True,
        label_mapping: Mapping[str, int] | None = None,
        num_clips: int = 1,
        chunk_len: int = 300,
        clip_length: int = 32,
        clip_stride: int = 2,
        threads: int = 1,
        fast_rrc: bool = False,
        rrc_params: tuple = (224, (0.5, 1.0)),
        fast_rcc: bool = False,
        rcc_params: tuple = (224,),
        sparse_sample: bool = False,
        is_trimmed: bool = True,
    ):
        if dataset != "ek100_cls":
            raise UserError(f"dataset: {dataset!r} has no classes to be read here; 'ek100_cls' has")
        if num_clips != 1 or sparse_sample or not is_trimmed:
            raise UserError(
                f"num_clips={num_clips}, sparse_sample={sparse_sample}, is_trimmed={is_trimmed}: AVION's dataset does "
                "not look at them; main_finetune_classification.py --num-clips evaluates several clips of an action"
            )
        super().__init__(
            dataset,
            root,
            metadata,
            transform,
            is_training,
            chunk_len,
            clip_length,
            clip_stride,
            threads,
            fast_rrc,
            rrc_params,
            fast_rcc,
            rcc_params,
        )
        if label_mapping is not None:
            unknown = next((label for label in self.labels if label not in label_mapping), None)
            if unknown is not None:
                raise UserError(f"annotations {metadata}: action {unknown!r} is not in label_mapping")
        self.label_mapping = label_mapping

    def __getitem__(self, i: int) -> tuple[Frames, int | str]:
        rng = self._generator(i)
        label = self.labels[i]
        frames = self._frames(self.samples[i], rng)
        return frames, label if self.label_mapping is None else self.label_mapping[label]


def get_downstream_dataset(
    transform: Callable[[torch.Tensor], Frames] | None,
    crop_size: int,
    args: Any,
    subset: str = "train",
    label_mapping: Mapping[str, int] | None = None,
) -> VideoClassyDataset:
    """Return the clips with classes of one of the splits that AVION's flags name.

    Args:
        transform: A function of the frames, or None.
        crop_size: The size of the fused crop, in pixels.
        args: Has `dataset`, `root`, `train_metadata`, `val_metadata`, `num_clips`, `video_chunk_length`, `clip_length`,
            `clip_stride`, `decode_threads` and `fused_decode_crop`.
        subset: "train" or "val".
        label_mapping: The number of each class, or None.

    Raises:
        UserError: The subset has another name.
    """
    if subset not in ("train", "val"):
        raise UserError(f"subset: {subset!r} is not one of train, val")
    training = subset == "train"
    crop = "fast_rrc" if training else "fast_rcc"
    return VideoClassyDataset(
        args.dataset,
        args.root,
        args.train_metadata if training else args.val_metadata,
        transform,
        is_training=training,
        label_mapping=label_mapping,
        num_clips=args.num_clips,
        chunk_len=args.video_chunk_length,
        clip_length=args.clip_length,
        clip_stride=args.clip_stride,
        threads=args.decode_threads,
        rrc_params=(crop_size, (0.5, 1.0)),
        rcc_params=(crop_size,),
        **{crop: args.fused_decode_crop},
    )


# ---- annotations ---------------------------------------------------------------------------------


def _read(dataset: str, metadata: str | os.PathLike) -> tuple[Sequence[Narration], list[str] | None]:
    """Return the clips of an annotation file, and for "ek100_cls" the actions "verb:noun"."""
    if dataset not in _DATASETS:
        raise UserError(f"dataset: {dataset!r} is not one of {', '.join(_DATASETS)}")
    if dataset != "ek100_cls":
        return read_narrations([metadata]) if dataset == "ego4d" else read_ek100_retrieval(metadata), None
    table = read_ek100_actions(metadata)
    if table.verb_class is None:
        raise UserError(f"annotations {metadata}: the columns 'verb_class' and 'noun_class' are missing")
    return table, [f"{verb}:{noun}" for verb, noun in zip(table.verb_class, table.noun_class, strict=True)]


def _every(stride: int, samples: Sequence[Narration], labels: list[str] | None):
    if not isinstance(stride, int) or isinstance(stride, bool) or stride < 1:
        raise UserError(f"subsample_stride: {stride!r} is not a whole number of at least 1, or None")
    return Subset(samples, range(0, len(samples), stride)), None if labels is None else labels[::stride]


def _with_positives(clips: Sequence[Narration], metadata: str | os.PathLike, stride: int) -> ClipsWithPositives:
    """Return every `stride`th clip of a retrieval split with the sentences that are relevant to the clip."""
    path = Path(metadata)
    split = next((split for split in ("train", "test") if split in path.name), None)
    if split is None:
        raise UserError(f"annotations {path}: its name has neither 'train' nor 'test', which tells the relevancy file")
    _, sentences = read_sentences(sentence_path(path))
    total = len(clips) if stride == 1 else len(clips.dataset)
    file = path.parent / "relevancy" / _RELEVANCY.format(split=split)
    relevancy = load_relevancy(file, total, len(sentences))[::stride]
    pairs = ClipsWithPositives(clips, sentences, relevancy, _POSITIVE)
    if len(pairs) == 0:
        raise UserError(f"relevancy {file}: no clip of {path} has a sentence of relevancy above {_POSITIVE:g}")
    if pairs.skipped:
        logger.warning("annotations %s: %d clips without a relevant sentence are left out", path, pairs.skipped)
    return pairs
