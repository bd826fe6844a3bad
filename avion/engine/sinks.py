"""Writes the metrics of a run: always into files of JSON lines, and on request to TensorBoard and Weights & Biases.

    row of                    file          TensorBoard and W&B
    a progress line           steps.txt     train/{key}, alpha/{block}
    an epoch                  log.txt       epoch/{key} of train_{key}, test/{key} of test_{key}
    an evaluation             eval_log.txt  (its metrics are the test_* of the epoch)

The x axis is the number of optimizer steps since the beginning of the training (`global_step`). Only rank 0 has sinks.
"""

import contextlib
import importlib
import logging
import secrets
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from avion.errors import UserError
from avion.files import write_text
from avion.json_lines import append_json, read_json_lines
from avion.reading import open_file

from .distributed import World
from .options import RunOptions
from .run_files import EPOCHS, EVALUATIONS, LOGS, PROGRESS

logger = logging.getLogger(__name__)

_WANDB_FLAGS = ("wandb_project", "wandb_name", "wandb_mode")
_WANDB_ID = "wandb_id.txt"
# Seconds after which TensorBoard sees a metric at the latest.
_FLUSH_S = 30


class Sink(Protocol):
    """Takes scalars by name at a global step. A sink that raises any exception is broken and gets no more scalars."""

    flag: str

    def write(self, step: int, scalars: dict[str, float]) -> None: ...

    def close(self, failed: bool) -> None: ...


class TensorBoard:
    """Event files in {output_dir}/tensorboard.

    Args:
        options: `--output-dir`.
        flags: Not used.
        done: Optimizer steps of the run so far; points of later steps in the folder are hidden.
    """

    flag = "--tensorboard"

    def __init__(self, options: RunOptions, flags: Mapping[str, Any], done: int):
        _package("tensorboard", self.flag)
        from torch.utils.tensorboard import SummaryWriter  # needs the package

        folder = Path(options.output_dir) / "tensorboard"
        try:
            self._writer = SummaryWriter(folder, purge_step=done + 1, flush_secs=_FLUSH_S)
        except OSError as e:
            raise UserError(f"{folder}: cannot be written ({e.strerror}); change --output-dir") from e

    def write(self, step: int, scalars: dict[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self, failed: bool) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of wandb. A resumed training finds the id of the run in {output_dir}/wandb_id.txt and goes on in it.

    Args:
        options: The flags about wandb, and `--output-dir`.
        flags: All flags, as the configuration of the run.
        done: Optimizer steps of the run so far.
    """

    flag = "--wandb"

    def __init__(self, options: RunOptions, flags: Mapping[str, Any], done: int):
        wandb = _package("wandb", self.flag)
        logging.getLogger("wandb").propagate = False  # wandb keeps a log of its own
        folder = Path(options.output_dir)
        known = folder / _WANDB_ID
        if done == 0 or not known.exists():
            write_text(known, secrets.token_hex(4))
        try:
            self._run = wandb.init(
                project=options.wandb_project,
                name=options.wandb_name or folder.resolve().name,
                mode=options.wandb_mode,
                id=known.read_text(encoding="utf-8").strip(),
                resume="allow",
                dir=str(folder),
                config=dict(flags),
                settings=wandb.Settings(console="off"),
            )
        except Exception as e:  # the package has many kinds of errors
            raise UserError(
                f"--wandb: the run could not be started ({_line(e)}); log in with `wandb login`, or use "
                "--wandb-mode offline and `wandb sync` later"
            ) from e

    def write(self, step: int, scalars: dict[str, float]) -> None:
        # Steps that a resumed run repeats are there already; wandb keeps the first metrics.
        if step >= self._run.step:
            self._run.log(scalars, step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


SINKS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def check_flags(options: RunOptions) -> None:
    """Refuse a sink whose package is missing, and flags that would have no effect.

    Args:
        options: The flags of the run.

    Raises:
        UserError: A package is missing, or a flag has no effect.
    """
    for name in SINKS:
        if not getattr(options, name):
            continue
        if options.evaluate:
            raise UserError(
                f"--{name}: follows a training, and --evaluate trains nothing; its metrics go to eval_log.txt"
            )
        _package(name, f"--{name}")
    idle = sorted(set(_WANDB_FLAGS) & options.given())
    if idle and not options.wandb:
        raise UserError(f"--{idle[0].replace('_', '-')}: has no effect without --wandb; give both or neither")


_PACKAGES = {
    "tensorboard": lambda: importlib.import_module("tensorboard"),
    "wandb": lambda: importlib.import_module("wandb"),
}


def _package(name: str, flag: str) -> ModuleType:
    """Import an optional package. Raises UserError where it is missing."""
    try:
        module = _PACKAGES[name]()
        if (
            module.__file__ is None
        ):  # a mere folder of that name in the working directory, such as the one that the sink writes
            raise ImportError(f"No module named {name!r}")
    except ImportError as e:
        raise UserError(f"{flag}: {_line(e)}; install it with: pip install {name}") from e
    return module


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


class RunLog:
    """The metrics of a run, on rank 0. A file that cannot be written ends the run; any other sink is only given up."""

    def __init__(self, folder: Path, sinks: Sequence[Sink] = ()):
        self.folder, self.sinks = folder, list(sinks)
        self._failure: UserError | None = None

    def open(self, options: RunOptions, flags: Mapping[str, Any], done: int) -> None:
        """Repair the files of a run that was killed, and open the sinks that the flags ask for.

        Args:
            options: The flags of the run.
            flags: All flags as the checkpoints store them.
            done: Optimizer steps of the run so far.

        Raises:
            UserError: A file cannot be written, or a sink cannot be opened.
        """
        for name in LOGS:
            drop_unfinished_line(self.folder / name)
        for name, sink in SINKS.items():
            if getattr(options, name):
                self.sinks.append(sink(options, flags, done))

    def progress(self, row: dict[str, Any]) -> None:
        """Take the row of a progress line. `check` raises the errors of this method.

        Args:
            row: `global_step`, metrics, and `alpha` of a model with time gates.
        """
        try:
            self._append(PROGRESS, row)
        except UserError as e:
            self._failure = self._failure or e
        scalars = {k: v for k, v in row.items() if k not in ("epoch", "step", "global_step", "alpha")}
        alpha = {f"alpha/{i:02d}": value for i, value in enumerate(row.get("alpha", []))}
        self._send(row["global_step"], {f"train/{k}": v for k, v in scalars.items()} | alpha)

    def check(self) -> None:
        """Raise the error that `progress` met. This is called where all processes can learn of the error."""
        if self._failure is not None:
            raise self._failure

    def epoch(self, row: dict[str, Any]) -> None:
        """Take a line of log.txt: the metrics train_* and test_*, `epoch` and `global_step`."""
        self.check()
        self._append(EPOCHS, row)
        renamed = {k.replace("train_", "epoch/", 1).replace("test_", "test/", 1): v for k, v in row.items()}
        scalars = {k: v for k, v in renamed.items() if k.startswith(("epoch/", "test/")) and k != "epoch/alpha"}
        self._send(row["global_step"], scalars)

    def evaluation(self, row: dict[str, Any]) -> None:
        """Take a line of eval_log.txt."""
        self._append(EVALUATIONS, row)

    def lengths(self) -> dict[str, list[int]]:
        """Return the lengths of log.txt and eval_log.txt in bytes, each with the checksum of its content."""
        found = {}
        for name in (EPOCHS, EVALUATIONS):
            content = self._content(name)
            found[name] = [len(content), zlib.crc32(content)]
        return found

    def since(self, lengths: Mapping[str, Any], name: str, epoch: int) -> dict[str, Any] | None:
        """Return the last line of an epoch that was written to a log after `lengths` returned.

        Earlier lines are of earlier runs in the folder, or of a state of this run to which it went back. A file whose
        beginning has changed has no such line.

        Args:
            lengths: What `lengths` returned.
            name: The name of the log.
            epoch: The number of the epoch.

        Returns:
            The line; None where there is none.

        Raises:
            UserError: The file cannot be read.
        """
        try:
            length, checksum = (int(number) for number in lengths.get(name, ()))
        except (TypeError, ValueError):
            return None
        if zlib.crc32(self._content(name)[:length]) != checksum:
            return None
        rows = read_json_lines(self.folder / name, after=length).objects
        return next((row for row in reversed(rows) if row.get("epoch") == epoch), None)

    def _content(self, name: str) -> bytes:
        path = self.folder / name
        try:
            with open_file(path) as file:
                return file.read()
        except FileNotFoundError:
            return b""
        except OSError as e:
            raise UserError(f"{path}: cannot be read ({e.strerror}); change --output-dir") from e

    def close(self, failed: bool = False) -> None:
        """Close all sinks; `failed` says that the run ends with an error."""
        for sink in self.sinks:
            try:
                sink.close(failed)
            except Exception as e:  # an error of a foreign package; the training is over and safe
                logger.warning("%s could not be closed (%s); its last metrics may be missing", sink.flag, _line(e))
        self.sinks = []

    def _append(self, name: str, row: dict[str, Any]) -> None:
        path = self.folder / name
        try:
            append_json(path, row)
        except OSError as e:
            raise UserError(f"{path}: cannot be written ({e.strerror}); free space or change --output-dir") from e

    def _send(self, step: int, scalars: dict[str, float]) -> None:
        for sink in list(self.sinks):
            try:
                sink.write(step, scalars)
            except Exception as e:  # an error of a foreign package: days of training are worth more than its curves
                logger.warning("%s failed (%s) and gets no more metrics; the run goes on", sink.flag, _line(e))
                self.sinks.remove(sink)


def drop_unfinished_line(path: Path) -> None:
    """Cut off the unfinished last line of a killed run, so that the next line does not become a part of it.

    Args:
        path: The log; a file that does not exist has no such line.

    Raises:
        UserError: The file cannot be written.
    """
    try:
        with open_file(path) as file:
            content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            logger.info("%s: an unfinished last line is cut off", path)
            with open(path, "rb+") as file:
                file.truncate(whole)
    except FileNotFoundError:
        return
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e.strerror}); change --output-dir") from e


@contextlib.contextmanager
def opened(options: RunOptions, flags: Mapping[str, Any], world: World, done: int) -> Iterator[RunLog]:
    """Open the log of a run until the block is left, even by an error.

    Args:
        options: The flags of the run.
        flags: All flags as the checkpoints store them.
        world: The processes of the run.
        done: Optimizer steps of the run so far.

    Yields:
        The log.

    Raises:
        UserError: A file cannot be written, or a sink cannot be opened.
    """
    log = RunLog(Path(options.output_dir))
    try:
        with world.together("opening the sinks"):
            if world.is_main:
                log.open(options, flags, done)
        yield log
    except BaseException:
        log.close(failed=True)
        raise
    log.close()
