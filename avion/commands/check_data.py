"""Check that the videos of some annotations exist, are long enough and can be decoded.

Examples:
    python tools/check_data.py ego4d_train.pkl --root datasets/Ego4D/videos_320px_15sec/ --workers 8
    python tools/check_data.py EPIC_100_retrieval_test.csv --root datasets/EK100/EK100_320p_15sec/ --decode all

Every file that a clip needs is opened once. The tool lists files that are missing, are too short, cannot be decoded, or
cannot be read because the operating system refuses (unreadable), each with the number of clips that need it. Exit
status: 0 no file was listed, 1 some files were listed, 2 the annotations or the root cannot be read.
"""

import argparse
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from avion.data.captions import Columns, read_narrations
from avion.data.ek100 import is_ek100_file, read_ek100_retrieval
from avion.data.narrations import NarrationTable
from avion.data.video import LAYOUTS, TOLERANCE_S, VideoError, VideoStore, open_video
from avion.engine.args import ToolParser
from avion.errors import UserError, exit_status, say
from avion.numbers import WORKERS, whole
from avion.processes import pool

BATCH = 64  # frames decoded at a time


@dataclass(frozen=True)
class Need:
    """A file that clips need.

    Attributes:
        seconds: The seconds that the file must hold, counted from its own beginning.
        clips: The number of clips that need the file.
    """

    path: str
    seconds: float
    clips: int
    whole_length: float | None  # seconds that it must hold because a later chunk of the video exists


@dataclass(frozen=True)
class Finding:
    kind: str  # "missing", "short", "undecodable" or "unreadable"
    path: str
    clips: int
    detail: str


def read_annotations(paths: Sequence[str], columns: Sequence[str] = ()) -> NarrationTable:
    """Read one EPIC-KITCHENS CSV, or one or several Ego4D pickles and files of captions.

    Args:
        paths: The files.
        columns: The names of the columns of caption files, as name=column.

    Returns:
        The clips.

    Raises:
        UserError: A file cannot be read, or a CSV of EPIC-KITCHENS is not alone.
    """
    ek100 = [path for path in paths if is_ek100_file(path)]
    if ek100 and len(paths) > 1:
        raise UserError(f"{ek100[0]}: a CSV of EPIC-KITCHENS-100 is given alone")
    return read_ek100_retrieval(ek100[0]) if ek100 else read_narrations(paths, Columns.parse(columns))


def with_ends(table: NarrationTable, store: VideoStore) -> NarrationTable:
    """Give the clips that go on to the end of their video the time of this end; their start, where the video cannot be
    read.
    """

    @functools.cache
    def length(video: int) -> float:
        try:
            return store.length_of(table.videos[video])
        except VideoError:
            return 0.0

    (open_ends,) = np.nonzero(np.isinf(table.end))
    for i in open_ends:
        table.end[i] = max(length(int(table.video[i])), table.start[i])
    return table


def chunks_needed(table: NarrationTable, store: VideoStore) -> Iterator[tuple[str, int, float, int]]:
    """Iterate over every chunk that a clip touches: (video, chunk, seconds needed of that chunk, clips)."""
    length = store.chunk_length if store.chunked else np.inf
    first = np.zeros(len(table), np.int64) if not store.chunked else (table.start // length).astype(np.int64)
    last = first if not store.chunked else np.maximum(np.ceil(table.end / length).astype(np.int64) - 1, first)
    touched = last - first + 1
    row = np.repeat(np.arange(len(table)), touched)
    chunk = first[row] + np.arange(len(row)) - np.repeat(np.cumsum(touched) - touched, touched)
    seconds = np.minimum(table.end[row] - (chunk * length if store.chunked else 0.0), length)
    key = np.stack([table.video[row].astype(np.int64), chunk], axis=1)
    unique, inverse, clips = np.unique(key, axis=0, return_inverse=True, return_counts=True)
    longest = np.zeros(len(unique))
    np.maximum.at(longest, inverse.reshape(-1), seconds)
    for (video, number), need, count in zip(unique.tolist(), longest.tolist(), clips.tolist(), strict=True):
        yield table.videos[video], number, need, count


def needs_of(table: NarrationTable, store: VideoStore) -> tuple[list[Need], list[Finding]]:
    """Find out which files clips need.

    Args:
        table: The clips.
        store: The videos.

    Returns:
        The files to open, and the findings that need no file to be opened: files that are missing, and clips that go on
            after the last chunk of their video.
    """
    needs, findings = [], []
    last_chunk = functools.lru_cache(maxsize=None)(store.last_chunk)
    for video, chunk, seconds, clips in chunks_needed(table, store):
        path = str(store.chunk_path(video, chunk))
        try:
            last, there = last_chunk(video), store.has_chunk(video, chunk)
        except VideoError as error:
            findings.append(Finding("unreadable", path, clips, error.reason))
            continue
        if last is not None and chunk > last:
            detail = f"the video ends before it, with {store.chunk_path(video, last).name}"
            if seconds > TOLERANCE_S:
                findings.append(Finding("short", path, clips, detail))
        elif not there:
            findings.append(Finding("missing", path, clips, ""))
        else:
            inner = store.chunked and chunk < last
            needs.append(Need(path, seconds, clips, float(store.chunk_length) if inner else None))
    return needs, findings


def check_file(need: Need, decode: str, decoder: str) -> Finding | None:
    """Open one file and, as `decode` says, decode none of it, its two ends or all of it."""
    try:
        with open_video(need.path, decoder) as reader:
            if decode == "ends":
                reader.get_frames(sorted({0, reader.num_frames - 1}))
            elif decode == "all":
                for first in range(0, reader.num_frames, BATCH):
                    reader.get_frames(range(first, min(first + BATCH, reader.num_frames)))
            length = reader.seconds_of(reader.num_frames)
    except VideoError as error:
        kind = "unreadable" if error.unreadable else "undecodable"
        return Finding(kind, need.path, need.clips, error.reason)
    due = need.whole_length or need.seconds
    if length < due - TOLERANCE_S:
        return Finding("short", need.path, need.clips, f"holds {length:.2f} s, {due:.2f} s are needed")
    return None


def check_files(needs: list[Need], decode: str, decoder: str, workers: int) -> Iterator[Finding]:
    """Check files in `workers` processes; iterate over what is wrong."""
    check = functools.partial(check_file, decode=decode, decoder=decoder)
    if workers == 0:
        yield from filter(None, map(check, needs))
        return
    with pool(workers) as processes:
        yield from filter(None, processes.map(check, needs, chunksize=8))


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    parser = ToolParser(prog="tools/check_data.py", doc=__doc__)
    parser.add_argument(
        "annotations", nargs="+", help="annotation files: Ego4D pickles and captions, or one EPIC-KITCHENS-100 CSV"
    )
    parser.add_argument(
        "--caption-columns",
        nargs="*",
        default=[],
        metavar="FIELD=COLUMN",
        help="names of the columns of caption files, such as video=clip_id",
    )
    parser.add_argument("--root", required=True, help="folder that holds the videos")
    parser.add_argument(
        "--video-chunk-length",
        type=whole(1, 86400, also=(-1,)),
        default=15,
        metavar="S",
        help="length of a video chunk in seconds [15]",
    )
    parser.add_argument(
        "--video-layout", default="auto", choices=("auto", *LAYOUTS), help="layout of the folder of the videos [auto]"
    )
    parser.add_argument("--decoder", default="auto", choices=("auto", "pyav", "decord"), help="video decoder [auto]")
    parser.add_argument(
        "--decode",
        default="ends",
        choices=("open", "ends", "all"),
        help="whether each file is only opened, decoded at its two ends, or decoded completely [ends]",
    )
    parser.add_argument(
        "-j",
        "--workers",
        type=WORKERS,
        default=0,
        metavar="N",
        help="number of processes; 0: check in this process [0]",
    )
    parser.add_argument("--debug", action="store_true", help="show the Python traceback of an error")
    return parser


def run(args: argparse.Namespace) -> int:
    """Do what the flags ask for; return the exit status."""
    table = read_annotations(args.annotations, args.caption_columns)
    store = VideoStore(args.root, chunk_length=args.video_chunk_length, layout=args.video_layout, decoder=args.decoder)
    table = with_ends(table, store)
    needs, known = needs_of(table, store)
    say(f"{len(table)} clips of {len(table.videos)} videos need {len(needs) + len(known)} files ({store.pattern})")
    counts: dict[str, int] = {}
    for group in (known, check_files(needs, args.decode, store.decoder, args.workers)):
        for finding in group:
            counts[finding.kind] = counts.get(finding.kind, 0) + 1
            detail = f": {finding.detail}" if finding.detail else ""
            say(f"{finding.kind}  {finding.path}  ({finding.clips} clips){detail}")
    print(", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())) or "all is well")
    return 1 if counts else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these command-line words (None: `sys.argv`); returns the exit status."""
    args = build_parser().parse_args(argv)
    return exit_status("tools/check_data.py", lambda: run(args), debug=args.debug)
