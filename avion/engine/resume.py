"""What a run goes on from: the checkpoint of its own folder, or the one that it begins from."""

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path

from avion.errors import UserError
from avion.weights import Checkpoint

from .options import TrainingOptions
from .run_files import BEST, DAMAGED, LATEST, checkpoints

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """What a run goes on from.

    Attributes:
        path: The checkpoint, None where the run begins with its initial weights.
        own: Whether it is a checkpoint of this run, from its own folder.
        began_from: The checkpoint that the run began from at first, empty where there was none.
        best: The best value so far of the metric that decides which model is best, as checkpoint_best.pt has it.
        is_older: Whether there is no latest checkpoint, and an older one took its place.
    """

    path: str | None = None
    own: bool = False
    began_from: str = ""
    best: float = float("-inf")
    is_older: bool = False


# What a run goes on from, with the checkpoint where it had to be opened to find this out. No file is opened twice.
Found = tuple[Start, Checkpoint | None]


def find_start(options: TrainingOptions) -> Found:
    """Find what a run goes on from, or what `--evaluate` evaluates. Only process 0 looks.

    A checkpoint in `--output-dir` is of this run, and the run goes on from it, if the run began from the same
    `--resume`: the same command, given again, never starts over. Where the latest checkpoint is damaged, the run goes
    on from the one before.

    Args:
        options: The options of the run.

    Returns:
        What the run goes on from; and the checkpoint, verified, or None where it has not been opened yet.

    Raises:
        UserError: The folder holds another run, or only damaged checkpoints.
    """
    found = checkpoints(options.output_dir)
    if options.evaluate:
        return _to_evaluate(options, found), None
    if not found:
        return Start(options.resume or None, began_from=options.resume), None
    named = next((path for path in found if options.resume and _same(path, options.resume)), None)
    if named is not None and named.name != LATEST:
        return _named(options, named, found)
    checkpoint = _newest(found)
    start = _go_on(found, checkpoint, _began_from(checkpoint))
    if named is None and options.resume:
        if not _same(start.began_from, options.resume):
            began = f"from {start.began_from}" if start.began_from else "without --resume"
            raise UserError(
                f"--resume {options.resume}: {start.path} is there already, of a run that began {began}; leave "
                "--resume out to go on with that run, or give another --output-dir to begin a new one"
            )
        logger.info(
            "%s is newer than --resume %s, from which this run began: going on from it", start.path, options.resume
        )
    return start, checkpoint


def _to_evaluate(options: TrainingOptions, found: list[Path]) -> Start:
    """What `--evaluate` evaluates: `--resume`, or the latest checkpoint of the folder. Nothing else takes its place."""
    if options.resume:
        if found and options.was_given("output_dir") and not any(_same(path, options.resume) for path in found):
            logger.info("evaluating --resume %s and not %s", options.resume, found[0])
        return Start(options.resume)
    if found and found[0].name != LATEST:
        logger.warning("%s is missing: evaluating %s", found[0].with_name(LATEST), found[0])
    return Start(str(found[0])) if found else Start()


def _named(options: TrainingOptions, named: Path, found: list[Path]) -> Found:
    """Where `--resume` names an older checkpoint of the run's own folder: back to it, but only once."""
    newest = _newest(found) if found[0].name == LATEST else None
    if newest is not None and _same(_began_from(newest), options.resume):
        logger.info("%s is newer than --resume %s, from which it began: going on from it", newest.path, options.resume)
        return _go_on(found, newest, _began_from(newest)), newest
    logger.warning("going back to %s: later checkpoints in its folder will be replaced", named)
    # Where the latest checkpoint is damaged, the newest one can be the one that is named.
    checkpoint = newest if newest is not None and newest.path == str(named) else Checkpoint.open(named)
    return replace(_go_on(found, checkpoint, options.resume), is_older=False), checkpoint


def _newest(found: list[Path]) -> Checkpoint:
    """Open the newest checkpoint of a run's own folder that is whole.

    A damaged latest one is set aside under another name, so that it does not become the previous one.
    """
    problems: list[str] = []
    for path in found:
        try:
            checkpoint = Checkpoint.open(path)
        except UserError as e:
            problems.append(str(e))
            continue
        if problems:
            aside = _set_aside(found[0])
            logger.warning("%s; %sgoing on from %s, which is older", "; ".join(problems), aside, path)
        elif path.name != LATEST:
            logger.warning("%s is missing: going on from %s", path.with_name(LATEST), path)
        return checkpoint
    raise UserError(
        f"{problems[0]}; no other checkpoint in {found[0].parent} is whole: remove checkpoint*.pt there to start anew, "
        "or give another --output-dir"
    )


def _began_from(checkpoint: Checkpoint) -> str:
    return checkpoint.training.began_from if checkpoint.training is not None else ""


def _go_on(found: list[Path], checkpoint: Checkpoint, began_from: str) -> Start:
    """Make the start of a run that goes on from a checkpoint of its own folder."""
    is_older = Path(checkpoint.path).name != LATEST
    return Start(checkpoint.path, True, began_from, _best_of(found, checkpoint), is_older)


def _set_aside(path: Path) -> str:
    """Give a damaged latest checkpoint another name; words for the log."""
    if path.name != LATEST:
        return ""
    os.replace(path, path.with_name(DAMAGED))
    return f"it is now {path.with_name(DAMAGED)}; "


def _best_of(found: list[Path], opened: Checkpoint) -> float:
    """Return the best value that checkpoint_best.pt holds, so that a worse model never takes its place.

    `opened` is the checkpoint that the run goes on from, which may be this file.
    """
    for path in found:
        if path.name == BEST:
            try:
                best = opened if opened.path == str(path) else Checkpoint.open(path, verify=False)
                state = best.training
            except UserError as e:
                logger.warning("%s; the next best model takes its place", e)
                break
            if state is not None and state.best is not None:
                return state.best
    return float("-inf")


def _same(one: str | Path, other: str | Path) -> bool:
    """Whether two words mean the same file. Addresses of the hub are compared as texts."""
    if not str(one) or not str(other):
        return str(one) == str(other)
    return str(one) == str(other) or os.path.realpath(one) == os.path.realpath(other)
