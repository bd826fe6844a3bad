"""Decides which process reads which sample at which step, by seed and epoch alone, and moves batches to the device."""

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from avion.data.mixture import drawn_rows, rows_per_epoch
from avion.data.transforms import normalize_clip
from avion.errors import UserError

from .workers import DATA_TIMEOUT_S, WatchedLoader, collate_in_worker, early_death, shortage

logger = logging.getLogger(__name__)

# Errors of single clips are logged one by one up to this number; further ones are only counted.
_SHOWN_ERRORS = 20


class TrainBatchSampler(Sampler):
    """Micro-batches of (epoch, index) keys for one process.

    An epoch is one permutation, drawn from (seed, epoch). The permutation is cut into global batches of
    `batch_size · update_freq · size` samples; the samples that are left over, others in each epoch, are not used.
    Process r takes share number r of each global batch and cuts it into `update_freq` micro-batches. So the samples
    of an optimizer step depend only on the size of the global batch, and not on how many processes or micro-batches
    the global batch consists of.

    Args:
        sources: (rows, weight) of the parts of a mixture. An epoch has the rows that `drawn_rows` takes. A row that
            an epoch takes again has the key (epoch, index, how often the epoch took the row before).
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        *,
        update_freq: int = 1,
        rank: int = 0,
        size: int = 1,
        seed: int = 0,
        sources: Sequence[tuple[int, float]] | None = None,
    ):
        self.global_batch = batch_size * update_freq * size
        count = count if sources is None else rows_per_epoch(sources)
        if count < self.global_batch:
            raise UserError(
                f"--batch-size {batch_size}: a global batch of {self.global_batch} clips ({size} processes x "
                f"{batch_size} clips x update-freq {update_freq}) is larger than the dataset of {count}; lower it"
            )
        self.count, self.batch_size, self.update_freq = count, batch_size, update_freq
        self.rank, self.seed, self.sources = rank, seed, sources
        self.steps = count // self.global_batch
        self.epoch = self.start_clip = 0

    def set_position(self, epoch: int, clip: int = 0) -> None:
        """Let the next iteration yield an epoch from one of its clips on.

        The clips before are those that the epoch has trained on, in batches of any size: none of them comes again. No
        other clip is left out, except those at the end that fill no global batch.

        Args:
            epoch: The number of the epoch.
            clip: The position in the epoch of the next clip.
        """
        self.epoch, self.start_clip = epoch, clip

    @property
    def start_step(self) -> int:
        """The number of the first optimizer step of the iteration; the epoch ends with step `steps` in any case."""
        return self.steps - max(self.count - self.start_clip, 0) // self.global_batch

    def __len__(self) -> int:
        return (self.steps - self.start_step) * self.update_freq

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.count)
        keys = self._keys()
        share = self.batch_size * self.update_freq
        for step in range(self.steps - self.start_step):
            first = self.start_clip + step * self.global_batch + self.rank * share
            for micro in range(self.update_freq):
                begin = first + micro * self.batch_size
                yield [keys(int(i)) for i in order[begin : begin + self.batch_size]]

    def _keys(self) -> Callable[[int], tuple[int, ...]]:
        """Return a function from a place in the epoch to the key of the sample at this place."""
        epoch = self.epoch
        if self.sources is None:
            return lambda place: (epoch, place)
        rows, copies = drawn_rows(self.sources, self.seed, epoch)
        return lambda place: (epoch, int(rows[place]), *([int(copies[place])] if copies[place] else []))


class EvalBatchSampler(Sampler):
    """Batches of the indices 0 … count-1 for one process: batch number i goes to process i mod size.

    The batches are the same for any number of processes, and all of them have the same size (the last batch repeats its
    last index), so that the features of a clip do not depend on the number of processes.
    """

    def __init__(self, count: int, batch_size: int, *, rank: int = 0, size: int = 1):
        self.count, self.batch_size, self.rank, self.size = count, batch_size, rank, size

    def __len__(self) -> int:
        return len(range(self.rank, -(-self.count // self.batch_size), self.size))

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(self.rank, -(-self.count // self.batch_size), self.size):
            first = batch * self.batch_size
            yield [min(i, self.count - 1) for i in range(first, first + self.batch_size)]


class _ErrorsAsSamples(Dataset):
    """A dataset that returns {"fatal": message} where another dataset raises a UserError.

    A DataLoader would wrap an exception of a worker in the traceback of that worker; a message stays one line.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Any) -> dict[str, Any]:
        try:
            return self.dataset[key]
        except UserError as e:
            return {"fatal": str(e)}


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Make a batch of samples: tensors are stacked, numbers become int64 tensors, and everything else becomes a list.

    Args:
        samples: The samples.

    Returns:
        The batch; {"fatal": message} where a sample is {"fatal": message}.
    """
    fatal = next((s for s in samples if "fatal" in s), None)
    if fatal is not None:
        return fatal
    batch: dict[str, Any] = {}
    for key, first in samples[0].items():
        values = [s[key] for s in samples]
        if isinstance(first, torch.Tensor):
            batch[key] = torch.stack(values)
        elif isinstance(first, int):
            batch[key] = torch.tensor(values)
        else:
            batch[key] = values
    return batch


def build_loader(
    dataset: Dataset,
    sampler: Sampler | Sequence,
    *,
    workers: int,
    device: torch.device,
    timeout: float = DATA_TIMEOUT_S,
    large_samples: bool = False,
) -> DataLoader:
    """Build a loader of the batches of a sampler. The workers live as long as the loader.

    A UserError in the dataset arrives as a batch {"fatal": message}, and `read` raises it.

    Args:
        dataset: The samples.
        sampler: The keys of each batch.
        workers: Data-loading processes; 0: this process loads the samples.
        device: The device that the batches are meant for.
        timeout: Seconds after which workers that send nothing are given up (`--data-timeout`).
        large_samples: Whether a sample has hundreds of megabytes. Then the sampler gives single keys, samples are not
            collated, and each worker has at most one sample waiting.

    Returns:
        The loader; `batches_of` and `read` read it.
    """
    how = {"batch_sampler": sampler, "collate_fn": functools.partial(collate_in_worker, collate)}
    if large_samples:
        how = {"sampler": sampler, "batch_size": None, "prefetch_factor": 1 if workers > 0 else None}
        how["collate_fn"] = functools.partial(collate_in_worker, None)
    return WatchedLoader(
        _ErrorsAsSamples(dataset),
        timeout,
        device,
        num_workers=workers,
        persistent_workers=workers > 0,
        **how,
        # A generator of its own: the start of an epoch must not advance the generator that dropout draws from.
        generator=torch.Generator(),
    )


def batches_of(loader: DataLoader) -> Iterator[dict[str, Any]]:
    """Iterate over the batches of an epoch. The workers start when the first batch is read, so that `read` reports
    their errors.
    """
    yield from loader


def read(batches: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """Read the next batch of `batches_of`.

    Args:
        batches: The iterator.

    Returns:
        The batch.

    Raises:
        StopIteration: The epoch has no further batch.
        UserError: The dataset or a worker failed; the message is one line.
        Stopped: A signal asked this process to stop while no batch had arrived.
    """
    try:
        batch = next(batches)
    except (RuntimeError, OSError) as e:
        if cause := shortage(f"{e} {e.__cause__ or ''} {e.__context__ or ''}", getattr(e, "errno", None)):
            raise UserError(cause) from e
        if "DataLoader worker" in str(e):  # one that died before this process watched it
            raise UserError(early_death(str(e))) from e
        raise
    if "fatal" in batch:
        raise UserError(batch["fatal"])
    return batch


def to_device(batch: dict[str, Any], device: torch.device, norm_style: str) -> dict[str, Any]:
    """Move the tensors of a batch to the device without waiting. Clips that are still uint8 are normalised on the
    device.

    Args:
        batch: The batch.
        device: The device.
        norm_style: A key of NORM_STYLES.

    Returns:
        The batch on the device.
    """
    moved = {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    moved["video"] = normalize_clip(moved["video"], norm_style)
    return moved


class ReplacedClips:
    """Counts the training clips that could not be read and were replaced by others, and names the first of them."""

    def __init__(self) -> None:
        self.count = 0

    def report(self, micro_batches: Sequence[dict[str, Any]]) -> None:
        """Count the errors of these batches, and log them as long as there are few."""
        for batch in micro_batches:
            for error in filter(None, batch["error"]):
                self.count += 1
                if self.count <= _SHOWN_ERRORS:
                    logger.warning("clip replaced by another one: %s", error)
                if self.count == _SHOWN_ERRORS:
                    logger.warning("further clips that cannot be read are replaced without a word")
