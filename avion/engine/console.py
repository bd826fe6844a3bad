"""Reports a run to people and programs: lines in a log, a progress bar on a terminal, rows of JSON."""

import logging
import math
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from avion.errors import UserError, printable
from avion.reading import check_regular

if TYPE_CHECKING:
    import torch

    from .distributed import World

logger = logging.getLogger(__name__)


class _Lines(logging.Formatter):
    """Lines in which names from outside cannot forge other lines or move the cursor.

    What a message is filled with becomes one line; what the program itself writes keeps its line ends.
    """

    def format(self, record: logging.LogRecord) -> str:
        args = record.args
        if isinstance(args, tuple):
            record = logging.makeLogRecord({**record.__dict__, "args": tuple(map(_shown, args))})
        return "\n".join(map(printable, super().format(record).split("\n")))


def _shown(value: object) -> object:
    return printable(str(value)) if isinstance(value, str | Path | BaseException) else value


class _BarFriendly(logging.StreamHandler):
    """Writes log lines above a progress bar rather than through it."""

    def emit(self, record: logging.LogRecord) -> None:
        # With its end, in one write: else the lines of several processes would be glued together.
        with tqdm.external_write_mode(file=sys.stderr):
            sys.stderr.write(f"{self.format(record)}\n")


def setup_logging(world: "World", output_dir: str | None = None) -> None:
    """Set up the log: rank 0 writes all lines to stderr and to `train.log`; other ranks write only warnings and errors.

    Args:
        world: The processes of the run.
        output_dir: The folder of `train.log`; None: no file is written.

    Raises:
        UserError: The file cannot be written.
    """
    root = logging.getLogger()
    for handler in list(root.handlers):
        if getattr(handler, "of_this_project", False):
            root.removeHandler(handler)
            handler.close()
    name = "" if world.size == 1 else f" [{world.rank}]"
    line = _Lines(f"%(asctime)s{name} %(levelname).1s %(message)s", datefmt="%H:%M:%S")
    handlers: list[logging.Handler] = [_BarFriendly()]
    if world.is_main and output_dir is not None:
        try:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            log = Path(output_dir) / "train.log"
            if log.exists():  # opening a named pipe would wait for a reader
                check_regular(log.stat().st_mode)
            handlers.append(logging.FileHandler(log, encoding="utf-8"))
        except OSError as e:
            raise UserError(f"--output-dir {output_dir}: cannot be written ({e.strerror}); choose another") from e
    for handler in handlers:
        handler.of_this_project = True
        handler.setFormatter(line)
        root.addHandler(handler)
    root.setLevel(logging.INFO if world.is_main else logging.WARNING)


def memory_gb(device: "torch.device") -> float:
    """Return the largest memory that was used so far, in GB (10⁹ bytes): of the GPU, or else of this process."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 1e9
    scale = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e9


def duration(seconds: float) -> str:
    """Return a duration as the text h:mm:ss."""
    seconds = int(seconds + 0.5)
    return f"{seconds // 3600}:{seconds % 3600 // 60:02d}:{seconds % 60:02d}"


class Meter:
    """A running mean of the finite values: since the beginning, and since the last progress line."""

    def __init__(self, total: float = 0.0, count: float = 0.0):
        self.total, self.count = total, count
        self._recent_total = self._recent_count = 0.0

    def add(self, value: float) -> None:
        """Take a value; values that are not finite are left out."""
        if not math.isfinite(value):  # of a skipped step, which is counted elsewhere
            return
        self.total += value
        self.count += 1
        self._recent_total += value
        self._recent_count += 1

    @property
    def mean(self) -> float:
        """The mean of all values, NaN where there is none."""
        return self.total / self.count if self.count else math.nan

    def recent(self) -> float:
        """Return the mean of the values since the last call, NaN where there is none."""
        value = self._recent_total / self._recent_count if self._recent_count else math.nan
        self._recent_total = self._recent_count = 0.0
        return value


class Progress:
    """The progress of one epoch of training: rate, time left, share of the time spent waiting for data, memory.

    The trainer calls `data_ready()` when a batch has arrived and `step(...)` when the optimizer step is done. Rank 0
    passes the metrics of each progress line to `write`.
    """

    def __init__(
        self,
        world: "World",
        *,
        epoch: int,
        epochs: int,
        steps: int,
        done: int,
        print_freq: int,
        write: Callable[[dict[str, Any]], None],
        sums: Mapping[str, Any] | None = None,
    ):
        self.world, self.epoch, self.epochs, self.steps = world, epoch, epochs, steps
        self.print_freq, self.write = print_freq, write
        self.meters: dict[str, Meter] = {}
        self._start = self._last = time.perf_counter()
        self._window_start, self._window_clips = self._start, 0
        self._waited = self._window_waited = 0.0
        self._done_before, self._done, self._clips = done, done, 0
        self._skipped = self._window_skipped = 0
        self._earlier = 0.0  # seconds that the epoch took before this process
        self._go_on(sums or {})
        on_terminal = world.is_main and sys.stderr.isatty()
        self.bar = (
            tqdm(total=steps, initial=done, desc=f"epoch {epoch}", unit="step", leave=False) if on_terminal else None
        )

    def _go_on(self, sums: Mapping[str, Any]) -> None:
        """Begin with the sums of an epoch that was interrupted."""
        for name, (total, count) in sums.get("meters", {}).items():
            self.meters[name] = Meter(total, count)
        self._earlier, self._waited = sums.get("seconds", 0.0), sums.get("waited", 0.0)
        self._clips, self._skipped = sums.get("clips", 0), sums.get("skipped", 0)

    def sums(self) -> dict[str, Any]:
        """Return the sums that the means of the epoch come from, up to this step, in plain numbers."""
        return {
            "meters": {name: [meter.total, meter.count] for name, meter in self.meters.items()},
            "seconds": self._seconds,
            "waited": self._waited,
            "clips": self._clips,
            "skipped": self._skipped,
        }

    @property
    def _seconds(self) -> float:
        return self._earlier + max(time.perf_counter() - self._start, 1e-9)

    def data_ready(self) -> None:
        """Note that a batch has arrived, so that the time until now counts as waiting for data."""
        waited = time.perf_counter() - self._last
        self._waited += waited
        self._window_waited += waited

    def step(self, clips: int, metrics: dict[str, float]) -> None:
        """Note that an optimizer step is done, and write a progress line if it is time for one.

        Args:
            clips: The clips of all processes in this step.
            metrics: The metrics of the step by name, such as the loss.
        """
        now = time.perf_counter()
        self._last = now
        self._done += 1
        self._clips += clips
        self._window_clips += clips
        skipped = not math.isfinite(metrics["grad_norm"])
        self._skipped += skipped
        self._window_skipped += skipped
        for name, value in metrics.items():
            self.meters.setdefault(name, Meter()).add(value)
        if self.bar is not None:
            self.bar.update()
        if self._done % self.print_freq == 0 or self._done == self.steps:
            self._line(now, metrics)

    def _line(self, now: float, metrics: dict[str, float]) -> None:
        elapsed = max(now - self._window_start, 1e-9)
        recent = {name: meter.recent() for name, meter in self.meters.items()}
        row = {
            "epoch": self.epoch,
            "step": self._done,
            "global_step": self.epoch * self.steps + self._done,
            **{name: value for name, value in recent.items() if math.isfinite(value)},
            "clips_per_s": self._window_clips / elapsed,
            "wait": self._window_waited / elapsed,
            "memory_gb": memory_gb(self.world.device),
            "skipped_steps": self._window_skipped,
        }
        row["lr"] = metrics["lr"]
        per_step = (now - self._start) / max(self._done - self._done_before, 1)
        left = duration(per_step * (self.steps - self._done + (self.epochs - self.epoch - 1) * self.steps))
        self._window_start, self._window_clips, self._window_waited, self._window_skipped = now, 0, 0.0, 0
        if not self.world.is_main:
            return
        self.write(row)
        text = (
            f"loss {recent['loss']:.4f}, lr {row['lr']:.2e}, {row['clips_per_s']:.1f} clips/s, "
            f"waiting for data {100 * row['wait']:.0f} %, {row['memory_gb']:.2f} GB, {left} left"
        )
        if self.bar is not None:
            self.bar.set_postfix_str(text)
        else:
            logger.info("epoch %d [%d/%d] %s", self.epoch, self._done, self.steps, text)

    def close(self) -> dict[str, float]:
        """End the progress bar of the epoch.

        Returns:
            The means of the metrics over the epoch (NaN where no value was finite), the rate, the share of waiting, the
            memory and the number of skipped steps.
        """
        if self.bar is not None:
            self.bar.close()
        elapsed = self._seconds
        means = {name: meter.mean for name, meter in self.meters.items()}
        return {
            **means,
            "clips_per_s": self._clips / elapsed,
            "wait": self._waited / elapsed,
            "memory_gb": memory_gb(self.world.device),
            "skipped_steps": self._skipped,
        }


def sums_of_all(sums: Sequence[Mapping[str, Any]], replaced: int) -> dict[str, Any]:
    """Combine the sums of an epoch of all processes (`Progress.sums`) into the sums that every process goes on with.

    Each process goes on with the mean of the sums, so that the mean over any number of processes is right.

    Args:
        sums: An entry per process.
        replaced: Clips that were replaced in all processes.

    Returns:
        The sums for each process.
    """

    def mean(values: list[float]) -> float:
        return values[0] if len(values) == 1 else math.fsum(values) / len(values)

    names = list(dict.fromkeys(name for one in sums for name in one["meters"]))
    meters = {name: [mean([one["meters"].get(name, [0.0, 0.0])[i] for one in sums]) for i in (0, 1)] for name in names}
    times = {name: mean([one[name] for one in sums]) for name in ("seconds", "waited")}
    return {"meters": meters, **times, "clips": sums[0]["clips"], "skipped": sums[0]["skipped"], "replaced": replaced}


def table(title: str, rows: dict[str, dict[str, float]], scale: float = 100.0) -> str:
    """Format metrics as a table.

    Args:
        title: The heading of the first column.
        rows: For each row, by its name, the metrics by the names of their columns. A metric that a row lacks stays
            blank.
        scale: The factor that metrics are multiplied by [100: percent].

    Returns:
        The lines of the table. Columns are in the order in which they first appear.
    """
    columns = list(dict.fromkeys(column for metrics in rows.values() for column in metrics))
    width = max(len(name) for name in [title, *rows])
    head = f"{title:<{width}}  " + "  ".join(f"{c:>9}" for c in columns)
    lines = [head, "-" * len(head)]
    for name, metrics in rows.items():
        cells = (f"{scale * metrics[c]:.2f}" if c in metrics else "" for c in columns)
        lines.append(f"{name:<{width}}  " + "  ".join(f"{cell:>9}" for cell in cells).rstrip())
    return "\n".join(lines)
