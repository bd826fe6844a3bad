"""The files of a run's folder: the names of its logs; its checkpoints, which of them exist, and how a new one becomes
the latest.

    steps.txt, log.txt, eval_log.txt    a JSON line per progress line, epoch and evaluation

    checkpoint.pt             the latest
    checkpoint_previous.pt    the one written before; with --keep-checkpoints above 2 also checkpoint_previous2.pt, ...
    checkpoint_best.pt        the one of the best evaluation
    checkpoint_damaged.pt     a latest one that could not be read when the run went on

Nothing heavy is imported here, because the options look into the folder too.
"""

import contextlib
import os
import re
from pathlib import Path

from avion.files import partial_name

LOGS = PROGRESS, EPOCHS, EVALUATIONS = "steps.txt", "log.txt", "eval_log.txt"
LATEST, BEST, DAMAGED = "checkpoint.pt", "checkpoint_best.pt", "checkpoint_damaged.pt"
_PREVIOUS = re.compile(r"checkpoint_previous([2-9]|[1-9][0-9]+)?\.pt")


def previous(number: int) -> str:
    """Return the name of the checkpoint that was written `number` times before the latest one, counted from 1."""
    return f"checkpoint_previous{number if number > 1 else ''}.pt"


def checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """List the checkpoints that a run left in its folder.

    Args:
        folder: The folder of the run.

    Returns:
        The paths, from the latest to the oldest, and the best one last.
    """
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    numbers = sorted(int(match[1] or 1) for match in map(_PREVIOUS.fullmatch, names) if match)
    return [Path(folder, name) for name in [LATEST, *map(previous, numbers), BEST] if name in names]


def make_room(folder: Path, keep: int) -> None:
    """Make the latest checkpoint a previous one, just before a new one is renamed to its name.

    At every moment each checkpoint is whole under some name. Where the file system knows hard links, there is always a
    latest one.

    Args:
        folder: The folder of the run.
        keep: How many checkpoints to keep beside the best one, with the new one.
    """
    latest, first = folder / LATEST, folder / previous(1)
    for path in checkpoints(folder):
        number = _PREVIOUS.fullmatch(path.name)
        if number and int(number[1] or 1) >= keep:
            path.unlink()
    if keep == 1 or not latest.exists() or (first.exists() and latest.samefile(first)):
        return
    for number in range(keep - 2, 0, -1):
        with contextlib.suppress(FileNotFoundError):
            os.replace(folder / previous(number), folder / previous(number + 1))
    link = partial_name(latest)
    try:
        os.link(latest, link)
    except OSError:  # a file system without hard links
        os.replace(latest, first)
    else:
        os.replace(link, first)
