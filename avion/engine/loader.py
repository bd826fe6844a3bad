"""Which process reads which sample when, which depends on seed and epoch alone; batches on their way to the device."""

import contextlib
import errno
import logging
import multiprocessing.queues
import os
import re
import resource
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from avion.data.mixture import drawn_rows, rows_per_epoch
from avion.data.transforms import normalize_clip
from avion.errors import UserError

from . import signals

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
        """Let the next iteration yield `epoch` from its clip number `clip` on.

        The clips before are those that the epoch has trained on, in batches of any size: none of them comes again, and
        none is left out but those that fill no global batch at the end.
        """
        self.epoch, self.start_clip = epoch, clip

    @property
    def start_step(self) -> int:
        """The number of the first optimizer step, so that the epoch ends with step `steps` whatever came before."""
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
        """From a place in the epoch to the key of its sample."""
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
    """Make a batch of samples: tensors are stacked, numbers become int64 tensors, everything else becomes a list.

    If a sample is {"fatal": message}, the batch is that too.
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


def _collate_in_worker(samples: Sequence[dict[str, Any]] | dict[str, Any]) -> dict[str, Any]:
    """`collate`, its tensors already where the parent process will map them.

    Left to the queue, this happens in a thread whose errors nobody sees, and the parent waits for a batch that is lost.
    """
    batch = collate(samples) if isinstance(samples, list) else samples
    if torch.utils.data.get_worker_info() is None:
        return batch
    try:
        for value in batch.values():
            for tensor in value.values() if isinstance(value, dict) else [value]:
                if isinstance(tensor, torch.Tensor):
                    tensor.share_memory_()
    except (RuntimeError, OSError) as e:
        if cause := _shortage(str(e), getattr(e, "errno", None)):
            return {"fatal": cause}
        raise
    return batch


def _begin_worker(worker: int) -> None:
    signals.obey_parent_only(worker)
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end_worker)


def _end_worker(error: BaseException, _item: Any) -> None:
    """What a worker cannot send, the parent would wait for: end, with a status that says why."""
    text = str(error)
    os._exit(_NO_FILES if _TOO_MANY_FILES.search(text) else _NO_MEMORY if _FULL.search(text) else 1)


_NO_FILES, _NO_MEMORY = 71, 72  # exit statuses of a worker
_TOO_MANY_FILES = re.compile(r"too many open files|ancdata|exit code 71\b", re.IGNORECASE)
_FULL = re.compile(
    r"no space left|bus error|unable to (allocate|write|mmap|resize).*(shm|shared|torch_)|exit code 72\b", re.IGNORECASE
)


def _shortage(text: str, number: int | None = None) -> str | None:
    """What this machine lacks for data-loading processes, and the cure, in one line. None: the error is another one."""
    if number in (errno.EMFILE, errno.ENFILE) or _TOO_MANY_FILES.search(text):
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return (
            f"too many files are open (this process may open {limit}): data-loading processes hand over batches as "
            "open files; allow more with `ulimit -n 65536`, or lower --workers"
        )
    if number == errno.ENOSPC or _FULL.search(text):
        free = ""
        with contextlib.suppress(OSError):
            usage = shutil.disk_usage("/dev/shm")
            free = f" ({usage.free / 2**20:.0f} of {usage.total / 2**20:.0f} MiB are free)"
        return (
            f"/dev/shm is full{free}: data-loading processes hand over batches there; give it more room (`mount -o "
            "remount,size=16G /dev/shm`; Docker: --shm-size=16g), or lower --workers or --batch-size"
        )
    return None


class _Loader(DataLoader):
    """A loader whose workers outlive the signals that a scheduler sends to all processes of a job."""

    def __iter__(self) -> Iterator:
        with signals.held():
            try:
                return super().__iter__()
            except OSError as e:
                if cause := _shortage(str(e), e.errno):
                    raise UserError(cause) from e
                raise


# A worker that has sent nothing for this long is stuck on a dead file system or in a decoder.
LOADER_TIMEOUT_S = 900


def build_loader(
    dataset: Dataset, sampler: Sampler | Sequence, *, workers: int, device: torch.device, large_samples: bool = False
) -> DataLoader:
    """A loader of the batches of a sampler. Its workers live as long as the loader.

    A UserError in the dataset arrives as a batch {"fatal": message}, and `read` raises it.

    Args:
        dataset: The samples.
        sampler: The keys of each batch.
        workers: Data-loading processes; 0: this process loads the samples.
        device: The device that the batches are meant for.
        large_samples: Whether a sample has hundreds of megabytes. Then the sampler gives single keys, samples are not
            collated, and each worker has at most one sample waiting.
    """
    how = {"batch_sampler": sampler, "collate_fn": _collate_in_worker, "pin_memory": device.type == "cuda"}
    if large_samples:
        how = {"sampler": sampler, "batch_size": None, "prefetch_factor": 1 if workers > 0 else None}
        how["collate_fn"] = _collate_in_worker
    return _Loader(
        _ErrorsAsSamples(dataset), num_workers=workers, persistent_workers=workers > 0,
        timeout=LOADER_TIMEOUT_S if workers > 0 else 0, worker_init_fn=_begin_worker, **how,
        # A generator of its own: the start of an epoch must not advance the generator that dropout draws from.
        generator=torch.Generator(),
    )  # fmt: skip


def read(batches: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """The next batch. Raises UserError for what went wrong in the dataset or in its workers."""
    try:
        batch = next(batches)
    except (RuntimeError, OSError) as e:
        # PyTorch tells a worker's exit status in the error that it raises first, and only its number in the second.
        text = f"{e} {e.__cause__ or ''} {e.__context__ or ''}"
        if cause := _shortage(text, getattr(e, "errno", None)):
            raise UserError(cause) from e
        if "DataLoader" not in text:
            raise
        raise UserError(
            f"a data-loading process died or hung ({str(e).splitlines()[0]}); lower --workers if memory ran out"
        ) from e
    if "fatal" in batch:
        raise UserError(batch["fatal"])
    return batch


def to_device(batch: dict[str, Any], device: torch.device, norm_style: str) -> dict[str, Any]:
    """Move the tensors of a batch to the device without waiting; clips that are still uint8 are normalised there."""
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
