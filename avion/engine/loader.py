"""Which process reads which sample when: a function of seed and epoch alone."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from avion.data.transforms import normalize_clip
from avion.errors import UserError

from . import signals


class TrainBatchSampler(Sampler):
    """Micro-batches of (epoch, index) keys for one process.

    An epoch is one permutation, drawn from (seed, epoch). It is cut into global batches of
    `batch_size · update_freq · size` samples (what is left over sits out, another part each epoch); of each, process r
    takes the r-th contiguous share and cuts it into `update_freq` micro-batches. So the samples of an optimizer
    step depend on the size of the global batch only, not on how many processes or micro-batches make it up.
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
    ):
        self.global_batch = batch_size * update_freq * size
        if count < self.global_batch:
            raise UserError(
                f"--batch-size {batch_size}: a global batch of {self.global_batch} clips ({size} processes x "
                f"{batch_size} clips x update-freq {update_freq}) is larger than the dataset of {count}; lower it"
            )
        self.count, self.batch_size, self.update_freq = count, batch_size, update_freq
        self.rank, self.seed = rank, seed
        self.steps = count // self.global_batch
        self.epoch = self.start_step = 0

    def set_position(self, epoch: int, step: int = 0) -> None:
        """The next iteration yields `epoch` from optimizer step `step` on."""
        self.epoch, self.start_step = epoch, step

    def __len__(self) -> int:
        return (self.steps - self.start_step) * self.update_freq

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.count)
        share = self.batch_size * self.update_freq
        for step in range(self.start_step, self.steps):
            first = step * self.global_batch + self.rank * share
            for micro in range(self.update_freq):
                begin = first + micro * self.batch_size
                yield [(self.epoch, int(i)) for i in order[begin : begin + self.batch_size]]


class EvalBatchSampler(Sampler):
    """Batches of indices 0 … count-1 for one process: batch number i goes to process i mod size.

    Batches are made up the same way for any number of processes, and all have the same size (the last one
    repeats its last index), so that a clip's features do not depend on how many processes there are.
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
    """A dataset whose UserErrors come out as {"fatal": message}.

    A DataLoader would wrap an exception of a worker in that worker's traceback; a message stays one line.
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
    """Tensors are stacked, numbers become int64 tensors, everything else stays a list.

    If a sample is {"fatal": message}, so is the batch.
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


class _Loader(DataLoader):
    """A loader whose workers outlive the signals that a scheduler sends to all processes of a job."""

    def __iter__(self) -> Iterator:
        with signals.held():
            return super().__iter__()


# A worker that has sent nothing for so long is stuck on a dead file system or decoder.
LOADER_TIMEOUT_S = 900


def build_loader(
    dataset: Dataset, sampler: Sampler | Sequence, *, workers: int, device: torch.device, large_samples: bool = False
) -> DataLoader:
    """A loader over the sampler's batches. Workers live as long as the loader.

    large_samples: of hundreds of megabytes; the sampler gives single keys, samples come as they are, and a worker has
    at most one waiting. A UserError in the dataset arrives as a batch {"fatal": message}; `read` raises it.
    """
    how = {"batch_sampler": sampler, "collate_fn": collate, "pin_memory": device.type == "cuda"}
    if large_samples:
        how = {"sampler": sampler, "batch_size": None, "prefetch_factor": 1 if workers > 0 else None}
    return _Loader(
        _ErrorsAsSamples(dataset), num_workers=workers, persistent_workers=workers > 0,
        timeout=LOADER_TIMEOUT_S if workers > 0 else 0, worker_init_fn=signals.obey_parent_only, **how,
        # Its own generator: starting an epoch must not advance the one that dropout draws from.
        generator=torch.Generator(),
    )  # fmt: skip


def read(batches: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """The next batch; what went wrong in the dataset or its workers is a UserError here."""
    try:
        batch = next(batches)
    except RuntimeError as e:
        if "DataLoader" not in str(e):
            raise
        raise UserError(
            f"a data-loading process died or hung ({str(e).splitlines()[0]}); lower --workers if memory ran out"
        ) from e
    if "fatal" in batch:
        raise UserError(batch["fatal"])
    return batch


def to_device(batch: dict[str, Any], device: torch.device, norm_style: str) -> dict[str, Any]:
    """Move tensors without waiting; clips that are still uint8 are normalised there."""
    moved = {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    moved["video"] = normalize_clip(moved["video"], norm_style)
    return moved
