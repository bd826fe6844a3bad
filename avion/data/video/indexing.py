"""Building the packet index of a dataset: once per dataset, in parallel, so that training reads only what it needs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

INDEX_NAME = "packets.index"  # the file below a video root that readers look for


@dataclass(frozen=True)
class IndexSummary:
    """What `index_videos` did."""

    path: Path  # of the index file
    files: int  # in the index now
    reused: int  # of them, entries that stood before and are still right
    frames: int  # shown frames of all files together
    plain: dict[str, str]  # relative path -> why the file is read without the index (damaged, MPEG-TS, ...)


def index_videos(
    root: str | os.PathLike[str],
    paths: Iterable[str | os.PathLike[str]] | None = None,
    *,
    index: str | os.PathLike[str] | None = None,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> IndexSummary:
    """Index the videos below `root`, and write the index whole or not at all.

    Entries of an index that exists are kept where size and modification time of their file are unchanged. Work that a
    killed process had done is kept too (`{index}.journal`), so that the same call goes on.

    Args:
        root: Folder of the videos, in any layout.
        paths: The files to index, relative to `root` or below it; None: all video files below `root`. An index that
            exists keeps its entries of other files that still exist.
        index: The index file; None: `{root}/packets.index`, where readers look for it.
        workers: Processes; 0: this one.
        progress: Is called with (files done, files in all) after each file.

    Returns:
        A summary. A file that cannot be indexed is no error: it is listed in `plain` and read in the plain way.

    Raises:
        UserError: The root does not exist, a path lies outside it, or the index cannot be written.
    """
    raise NotImplementedError
