"""AVION's `avion.utils.meters`: running averages, and the line that shows them."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from avion.errors import UserError

from .distributed import is_dist_avail_and_initialized


class AverageMeter:
    """The last value of something and the mean of all values so far: `val`, `avg`, `sum`, `count`.

    Args:
        name: The name that is printed.
        fmt: The format in which both are printed, such as ":6.2f".
    """

    def __init__(self, name: str, fmt: str = ":f"):
        self.name, self.fmt = name, fmt
        self.reset()

    def reset(self) -> None:
        """Forget all values."""
        self.val = self.avg = self.sum = self.count = 0

    def update(self, val: float, n: int = 1) -> None:
        """Add n values whose mean is `val`."""
        self.val = val
        self.sum += val * n
        self.count += n
        self.avg = self.sum / self.count if self.count else 0

    def synchronize(self) -> None:
        """Compute `sum`, `count` and `avg` over all processes; every process must call this."""
        if not is_dist_avail_and_initialized():
            return
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        both = torch.tensor([self.sum, self.count], dtype=torch.float64, device=device)
        dist.all_reduce(both)
        self.sum, self.count = both.tolist()
        self.avg = self.sum / self.count if self.count else 0

    def __str__(self) -> str:
        number = "{" + self.fmt + "}"
        return f"{self.name} {number.format(self.val)} ({number.format(self.avg)})"


class ProgressMeter:
    """Prints a line of meters: the prefix, "[ 3/12]", and every meter, with tabs between them."""

    def __init__(self, num_batches: int, meters: Sequence[AverageMeter], prefix: str = ""):
        if num_batches < 0:
            raise UserError(f"num_batches: {num_batches} must not be negative")
        self.num_batches, self.meters, self.prefix = num_batches, meters, prefix

    def display(self, batch: int) -> None:
        """Print the line of the batch with this number."""
        width = len(str(self.num_batches))
        place = f"{self.prefix}[{batch:{width}d}/{self.num_batches}]"
        print("\t".join([place, *map(str, self.meters)]))

    def synchronize(self) -> None:
        """Synchronize all meters, in their order."""
        for meter in self.meters:
            meter.synchronize()
