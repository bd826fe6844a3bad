"""Features of whole datasets, the same for any number of processes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from avion.errors import UserError
from avion.evaluation.vectors import unit

from . import signals
from .distributed import World
from .loader import DATA_TIMEOUT_S, EvalBatchSampler, batches_of, build_loader, read, to_device
from .options import TrainingOptions
from .precision import Precision


@dataclass
class Features:
    """The features of all samples.

    Attributes:
        values: (n, E) float32; row i belongs to sample i.
        errors: By the index of a sample that could not be read, what was wrong.
    """

    values: np.ndarray
    errors: dict[int, str] = field(default_factory=dict)

    @property
    def readable(self) -> np.ndarray:
        """The indices of the samples that could be read, ascending (int64)."""
        return np.array([i for i in range(len(self.values)) if i not in self.errors], dtype=np.int64)


def _assemble(parts: list[tuple[np.ndarray, np.ndarray, dict[int, str]]], count: int) -> Features:
    """Put the rows of all processes in order, each sample once."""
    width = next((p[1].shape[1] for p in parts if len(p[0])), 0)
    values = np.zeros((count, width), dtype=np.float32)
    seen = np.zeros(count, dtype=bool)
    errors: dict[int, str] = {}
    for indices, rows, failed in parts:
        if len(indices) == 0:  # more processes than batches
            continue
        values[indices] = rows
        seen[indices] = True
        errors.update(failed)
    assert seen.all(), f"{(~seen).sum()} of {count} samples were never encoded"
    return Features(values, dict(sorted(errors.items())))


def _gather(world: World, indices: list, rows: list, errors: dict[int, str], count: int) -> Features:
    own = (
        np.concatenate(indices) if indices else np.zeros(0, dtype=np.int64),
        np.concatenate(rows) if rows else np.zeros((0, 0), dtype=np.float32),
        errors,
    )
    return _assemble(world.gather(own), count)


@torch.inference_mode()
def encode_clips(
    model: nn.Module,
    dataset: Dataset,
    world: World,
    precision: Precision,
    *,
    batch_size: int,
    workers: int,
    norm_style: str,
    timeout: float = DATA_TIMEOUT_S,
    strict: bool = False,
    prepare: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Features:
    """Compute the features that `model.encode_image` gives to every clip of a dataset.

    Args:
        model: The model on the device.
        dataset: The clips.
        world: The processes, which share the clips.
        precision: The settings of autocast.
        batch_size: Clips per forward pass.
        workers: Data-loading processes.
        timeout: Seconds after which workers that send nothing are given up.
        norm_style: A key of NORM_STYLES.
        strict: Whether a clip that cannot be read is a UserError, instead of an entry of `errors`.
        prepare: A function that is applied to the normalised clips (B, 3, T, H, W) on the device.

    Returns:
        The features (n, E) float32 of all clips, on every process.

    Raises:
        UserError: The data cannot be read; it is raised on all processes.
        Stopped: A signal asked a process to stop.
    """
    model.eval()
    sampler = EvalBatchSampler(len(dataset), batch_size, rank=world.rank, size=world.size)
    indices, rows, errors = [], [], {}
    with world.together("encoding the clips"):
        batches = batches_of(build_loader(dataset, sampler, workers=workers, device=world.device, timeout=timeout))
        for _ in range(len(sampler)):
            signals.raise_if_asked("while clips were encoded")
            batch = read(batches)
            numbers = batch["index"].numpy()
            errors.update({int(i): e for i, e in zip(numbers, batch["error"], strict=True) if e})
            if strict and errors:
                raise UserError(f"--strict-data: {next(iter(errors.values()))}")
            video = to_device(batch, world.device, norm_style)["video"]
            if prepare is not None:
                video = prepare(video)
            with precision.autocast():
                features = model.encode_image(video)
            indices.append(numbers)
            rows.append(features.float().cpu().numpy())
    return _gather(world, indices, rows, errors, len(dataset))


@torch.inference_mode()
def encode_texts(
    model: nn.Module,
    texts: Sequence[str],
    tokenizer: Callable[[Sequence[str]], torch.Tensor],
    world: World,
    precision: Precision,
    *,
    batch_size: int = 64,
) -> Features:
    """Compute the features that `model.encode_text` gives to every text.

    Args:
        model: The model on the device.
        texts: The texts.
        tokenizer: Makes tokens (n, context_length) int64 of texts.
        world: The processes, which share the texts.
        precision: The settings of autocast.
        batch_size: Texts per forward pass.

    Returns:
        The features (n, E) float32 of all texts, on every process.
    """
    model.eval()
    indices, rows = [], []
    with world.together("encoding the texts"):
        for batch in EvalBatchSampler(len(texts), batch_size, rank=world.rank, size=world.size):
            signals.raise_if_asked("while texts were encoded")
            tokens = tokenizer([texts[i] for i in batch]).to(world.device)
            with precision.autocast():
                features = model.encode_text(tokens)
            indices.append(np.array(batch))
            rows.append(features.float().cpu().numpy())
    return _gather(world, indices, rows, {}, len(texts))


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Compute the cosine similarities of the rows of two arrays.

    Args:
        a: (n, E).
        b: (m, E).

    Returns:
        (n, m) float32.
    """
    return (unit(a, None) @ unit(b, None).T).astype(np.float32)


def describe(errors: dict[int, str], limit: int = 3) -> str:
    """Return the first few errors on one line."""
    shown = "; ".join(list(errors.values())[:limit])
    return shown + (f"; and {len(errors) - limit} more" if len(errors) > limit else "")


def settings(options: TrainingOptions) -> dict[str, Any]:
    """Return the keyword arguments of `encode_clips` that come from flags."""
    return {
        "batch_size": options.eval_batch_size or options.batch_size,
        "workers": options.workers,
        "timeout": options.data_timeout,
        "norm_style": options.norm_style,
        "strict": options.strict_data,
    }
