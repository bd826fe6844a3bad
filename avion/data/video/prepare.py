"""From a folder of raw videos to one that is quick to read: in parallel, resumable, each video whole or not there.

A video is written below `{target}/.prepare/partial`, compared with its source, noted in a journal, and then moved to
its place by one rename. A run that is killed at any moment has lost the videos that it was at; what a run finds that is
noted and not yet moved, it moves.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from avion.errors import UserError

from .indexing import IndexSummary, index_videos
from .prepare_manifest import State, Totals, totals, write_manifest
from .prepare_plan import Raw, Settings, make_plan
from .prepare_pool import prepare_all

__all__ = ["Report", "Settings", "prepare_videos", "share_out"]


@dataclass(frozen=True)
class Report:
    """What a run did. totals: of all videos of this shard, those that were complete before too. prepared: how many this
    run prepared. index: None while other shards have videos to prepare. seconds: wall clock."""

    totals: Totals
    prepared: int
    index: IndexSummary | None
    seconds: float


def share_out(cores: int, videos: int) -> tuple[int, int]:
    """(processes, threads of each): a process per core, or fewer with more threads where there are fewer videos."""
    processes = max(min(cores, videos), 1)
    return processes, max(cores // processes, 1)


def prepare_videos(
    source: str | os.PathLike,
    target: str | os.PathLike,
    settings: Settings,
    *,
    processes: int = 0,
    threads: int = 0,
    shard: tuple[int, int] = (0, 1),
    retry: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
    failed: Callable[[str, str], None] | None = None,
) -> Report:
    """Prepare the raw videos below `source` under `target`, those that an earlier run has not prepared.

    Args:
        source: A folder, searched with all folders in it, or one file.
        target: The folder that is filled; it may exist.
        settings: How; the same in every run on one target.
        processes: Videos at a time; 0: see `share_out`.
        threads: The threads of each decoder and encoder; 0: as many as the cores allow.
        shard: (I, N): of the videos in order of their names, every N-th from the I-th on.
        retry: Try those again that failed in an earlier run.
        progress: Is called with (bytes of raw videos done, in all, a few words) now and then.
        failed: Is called with (raw file, reason) when a video fails.

    Returns:
        What was done. Videos that failed are no error: they are listed in `totals.failed`.

    Raises:
        UserError: There are no videos, the target cannot be written, or was begun with other settings.
    """
    begin = time.monotonic()
    target = Path(os.path.abspath(target))
    plan = make_plan(source, target, settings)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    state = State(target, settings, shard)
    try:
        mine = plan.raws[shard[0] :: shard[1]]
        run = _Run(state, settings, retry, progress or (lambda *_: None), failed or (lambda *_: None))
        due = run.due(mine)
        auto = share_out(cores, len(due))
        processes = processes or (max(cores // threads, 1) if threads else auto[0])
        threads = threads or max(cores // processes, 1)
        run.prepare(due, processes, threads)
        entries = state.entries()
        refused = {path: State.failed(Raw(path, path, 0, 0), reason) for path, reason in plan.refused}
        wanted = {raw.name: entries[raw.name] for raw in plan.raws if raw.name in entries}
        index = None
        if len(wanted) == len(plan.raws):
            with state.finishing():
                write_manifest(target, {**wanted, **refused})
                run.progress(0, 0, "indexing")
                index = index_videos(target, workers=cores) if any("error" not in e for e in wanted.values()) else None
        ours = {raw.name: wanted[raw.name] for raw in mine} | (refused if shard[0] == 0 else {})
        return Report(totals(ours), run.prepared, index, time.monotonic() - begin)
    finally:
        state.close()


class _Run:
    def __init__(self, state: State, settings: Settings, retry: bool, progress: Callable, failed: Callable):
        self.state, self.settings, self.retry = state, settings, retry
        self.progress, self.failed = progress, failed
        self.prepared = 0
        self._entries = state.entries()

    def due(self, raws: list[Raw]) -> list[Raw]:
        """What is left to do of these. Finishes moves that were interrupted, and removes what killed runs left."""
        due = [raw for raw in raws if not self._settled(raw)]
        shutil.rmtree(self.state.partial, ignore_errors=True)
        self.state.partial.mkdir(parents=True, exist_ok=True)
        return sorted(due, key=lambda raw: -raw.size)  # a long one at the end would keep the other cores waiting

    def _settled(self, raw: Raw) -> bool:
        entry, final = self._entries.get(raw.name), self._final(raw.name)
        same = entry is not None and (entry["source_bytes"], entry["source_stamp"]) == (raw.size, raw.stamp)
        if entry is not None and "error" in entry:
            return same and not self.retry
        if entry is None:
            if os.path.lexists(final):
                self._fail(raw, f"{final} exists, and this preparation did not write it; move it away")
                return True
            return False
        if same and not os.path.lexists(final) and self.state.partial_of(entry).exists():
            self._move(entry, final)
        return same and _is_complete(final, entry, self.settings)

    def prepare(self, due: list[Raw], processes: int, threads: int) -> None:
        total, finished = sum(raw.size for raw in due), 0
        shares: dict[str, float] = {}
        news = prepare_all(due, self.settings, self.state.partial, processes, threads)
        try:
            self.progress(0, total, "")
            for item in news:
                if item.result is not None:
                    self._take(item.raw, item.result)
                elif item.reason is not None:
                    self._fail(item.raw, item.reason)
                shares[item.raw.name] = item.share * item.raw.size
                if item.share >= 1.0:
                    finished += int(shares.pop(item.raw.name))
                self.progress(finished + int(sum(shares.values())), total, "")
        finally:
            news.close()

    def _take(self, raw: Raw, result: dict) -> None:
        entry, final = self.state.done(result), self._final(raw.name)
        if raw.name not in self._entries and os.path.lexists(final):
            _remove(self.state.partial_of(entry))
            if raw.name not in self.state.entries():  # no other shard wrote it
                self._fail(raw, f"{final} has appeared, and this preparation did not write it; move it away")
            return
        self.state.add(entry)
        self._entries[raw.name] = entry
        self._move(entry, final)
        self.prepared += 1

    def _move(self, entry: dict, final: Path) -> None:
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            old = None
            if os.path.lexists(final):  # an earlier result for a raw video that has changed since
                old = self.state.partial / f"{entry['partial']}.old"
                os.rename(final, old)
            os.rename(self.state.partial_of(entry), final)
            if old is not None:
                _remove(old)
        except OSError as error:
            raise UserError(f"TARGET {final}: cannot be written ({error.strerror}); mend that, and go on") from error

    def _fail(self, raw: Raw, reason: str) -> None:
        entry = State.failed(raw, reason)
        self.state.add(entry)
        self._entries[raw.name] = entry
        self.failed(raw.path, reason)

    def _final(self, name: str) -> Path:
        return self.state.target / self.settings.target(name)


def _is_complete(final: Path, entry: dict, settings: Settings) -> bool:
    """Whether the files are there with the sizes that they had."""
    try:
        if not settings.chunked:
            return final.stat().st_size == entry["files"][0][2]
        found = {item.name: item.stat().st_size for item in os.scandir(final)}
    except OSError:
        return False
    return all(found.get(name) == size for name, _, size in entry["files"])


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
