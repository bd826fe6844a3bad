"""Turn raw videos into videos that training reads quickly.

Examples:
    python tools/prepare_videos.py raw/ videos/
    python tools/prepare_videos.py EPIC-KITCHENS/ EK100_288p_15sec/ --dataset ek100
    python tools/prepare_videos.py full_scale/ videos_288p_15sec/ --dataset ego4d --shard $SLURM_ARRAY_TASK_ID/64

The shorter side becomes --short-side pixels (smaller pictures keep their size), rotation is applied, sound is dropped,
and every frame keeps its time. Each result is compared with its source. Videos that cannot be prepared are listed with
the reason, and the others are prepared. The same command continues where a run was stopped. docs/data.md says more.
Exit status: 0 all videos are prepared, 1 some failed, 2 nothing could be done.
"""

import argparse
import dataclasses
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from avion.data.video.layout import LAYOUTS
from avion.data.video.prepare import Report, prepare_videos
from avion.data.video.prepare_encode import PRESETS, Encoding
from avion.data.video.prepare_plan import DATASETS, Settings, parse_shard
from avion.engine.args import ToolParser
from avion.errors import exit_status, printable, say
from avion.numbers import WORKERS, Number, whole
from avion.targets import check_here

_QUIET_EVERY_S = 30.0  # between lines of progress that go to a file


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    parser = ToolParser(prog="tools/prepare_videos.py", doc=__doc__)
    add = parser.add_argument
    add("source", metavar="SOURCE", help="folder of raw videos, or one file")
    add("target", metavar="TARGET", help="folder that the prepared videos are written to")
    add(
        "--dataset",
        default="folder",
        choices=DATASETS,
        help="dataset, by whose scheme the videos are named; folder: the names of SOURCE are kept",
    )
    add(
        "--layout",
        default="",
        choices=LAYOUTS,
        help="names of the prepared files; avion: {video}.mp4/{start}.mp4; vms: {video}/{number}.mp4; "
        "whole: {video}.mp4 [avion for ego4d and ek100, else whole]",
    )
    add("--chunk-length", type=whole(1, 86400), default=15, metavar="S", help="length of a video chunk in seconds [15]")
    add(
        "--short-side",
        type=whole(16, 4320),
        default=288,
        metavar="PIXELS",
        help="length of the shorter side of the pictures in pixels, an even number [288]",
    )
    add(
        "-j",
        "--processes",
        type=WORKERS,
        default=0,
        metavar="N",
        help="number of processes, each with a video at a time [cores / threads]",
    )
    add(
        "--threads",
        type=whole(0, 1024),
        default=0,
        metavar="N",
        help="threads of each decoder and encoder [cores / processes]",
    )
    add(
        "--shard",
        default="0/1",
        metavar="I/N",
        help="prepare only every N-th video, beginning with number I, counted from 0",
    )
    add("--retry", action="store_true", help="try again the videos that failed before")
    _add_encoding(parser)
    parser.add_argument("--debug", action="store_true", help="show the Python traceback of an error")
    return parser


def _add_encoding(parser: argparse.ArgumentParser) -> None:
    plain = Encoding()
    encoding = parser.add_argument_group("encoding", "docs/data.md says how the defaults were measured")
    add = encoding.add_argument
    add("--crf", type=Number(float, 0, 51), default=plain.crf, help=f"quality of x264, lower is better [{plain.crf:g}]")
    add(
        "--gop",
        type=whole(1, 1000),
        default=plain.gop,
        metavar="N",
        help=f"number of frames from keyframe to keyframe [{plain.gop}]",
    )
    add(
        "--bframes",
        type=whole(0, 16),
        default=plain.bframes,
        metavar="N",
        help=f"number of frames between two anchor frames; no other frame refers to them [{plain.bframes}]",
    )
    add(
        "--refs",
        type=whole(1, 16),
        default=plain.refs,
        metavar="N",
        help=f"number of anchor frames that a frame may refer to [{plain.refs}]",
    )
    add(
        "--cabac",
        action=argparse.BooleanOptionalAction,
        default=plain.cabac,
        help="use CABAC, with which files are smaller and slower to read",
    )
    add("--deblock", action=argparse.BooleanOptionalAction, default=plain.deblock, help="smooth the edges of blocks")
    add(
        "--preset",
        default=plain.preset,
        choices=PRESETS,
        metavar="NAME",
        help=f"preset of x264, which says how much time it takes to make files small [{plain.preset}]",
    )


class Progress:
    """A progress bar with the time that is left; where the output is not a terminal, a line now and then."""

    def __init__(self):
        self._bar: tqdm | None = None
        self._begin = self._told = time.monotonic()

    def __call__(self, done: int, total: int, words: str) -> None:
        if words:
            self.close()
            say(words, to_stderr=True)
        elif sys.stderr.isatty():
            self._bar = self._bar or tqdm(total=total, unit="B", unit_scale=True, desc="raw video", smoothing=0.05)
            self._bar.update(done - self._bar.n)
        elif time.monotonic() - self._told > _QUIET_EVERY_S and done:
            self._told = time.monotonic()
            left = (self._told - self._begin) * (total - done) / done
            say(f"{100 * done / total:.1f} % of {_bytes(total)}, {_time(left)} left", to_stderr=True)

    def failed(self, path: str, reason: str) -> None:
        """Print that a video failed, and why."""
        tqdm.write(printable(f"failed: {path}: {reason}") + "\n", file=sys.stderr, end="")

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def _time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def tell(report: Report, target: str, settings: Settings) -> None:
    """Print the closing lines."""
    sums = report.totals
    say(
        f"{sums.videos} videos, {_time(sums.seconds)} of {sums.frames} frames: {_bytes(sums.source_bytes)} of raw "
        f"video became {_bytes(sums.bytes)} in {sums.files} files; {report.prepared} of them prepared now, in "
        f"{_time(report.seconds)} ({_time(sums.cpu_seconds)} of CPU time for all)"
    )
    if sums.failed:
        say(f"{len(sums.failed)} failed; mend them and add --retry:")
        for name, reason in sums.failed.items():
            say(f"  {name}: {reason}")
    if report.index is not None:
        chunks = f" --video-chunk-length {settings.chunk_length}" if settings.chunked else ""
        say(f"manifest: {Path(target) / 'manifest.jsonl'}; index: {report.index.path}, {report.index.files} files")
        say(f"train with --root {target} --video-layout {settings.layout}{chunks}")
    else:
        print("the manifest and the index are written when the other shards are done (or by the same command again)")


def run(args: argparse.Namespace) -> int:
    """Do what the flags ask for; return the exit status."""
    check_here(args.target, "TARGET")
    encoding = Encoding(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Encoding)})
    settings = Settings(args.dataset, args.layout, args.chunk_length, args.short_side, encoding)
    signal.signal(signal.SIGTERM, _interrupt)
    progress = Progress()
    try:
        report = prepare_videos(
            args.source,
            args.target,
            settings,
            processes=args.processes,
            threads=args.threads,
            shard=parse_shard(args.shard),
            retry=args.retry,
            progress=progress,
            failed=progress.failed,
        )
    finally:
        progress.close()
    tell(report, args.target, settings)
    return 1 if report.totals.failed else 0


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these command-line words (None: `sys.argv`); returns the exit status."""
    args = build_parser().parse_args(argv)
    return exit_status("tools/prepare_videos.py", lambda: run(args), debug=args.debug)
