"""Index the packets of a dataset's videos, so that training reads only the packets that a clip needs.

Example:
    python tools/index_videos.py datasets/Ego4D/videos_288px_15sec/ --workers 16

The tool writes ROOT/packets.index, which training uses without a flag. Videos may be chunked or whole. Files that are
indexed and have not changed keep their entries, so the same command continues after an interruption and updates an
index. Files that cannot be indexed are listed; they are read as without an index. Exit status: 0 the index is complete,
2 it could not be written.
"""

import argparse
from collections.abc import Sequence

from tqdm import tqdm

from avion.data.video import INDEX_NAME, index_videos
from avion.data.video.index_file import is_index
from avion.engine.args import ToolParser
from avion.errors import exit_status, say
from avion.numbers import WORKERS
from avion.targets import check_target

_LISTED = 20  # files that are named; the others are counted


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    parser = ToolParser(prog="tools/index_videos.py", doc=__doc__)
    parser.add_argument("root", help="folder that holds the videos")
    parser.add_argument(
        "files", nargs="*", help="names of the videos to index, below ROOT; without names, all videos are indexed"
    )
    parser.add_argument("--index", metavar="FILE", help=f"index file that is written [ROOT/{INDEX_NAME}]")
    parser.add_argument(
        "-j",
        "--workers",
        type=WORKERS,
        default=0,
        metavar="N",
        help="number of processes; 0: index in this process [0]",
    )
    parser.add_argument("--debug", action="store_true", help="show the Python traceback of an error")
    return parser


def run(args: argparse.Namespace) -> int:
    """Do what the flags ask for; return the exit status."""
    if args.index and not is_index(args.index):
        check_target(args.index, "--index")
    with tqdm(unit="file", disable=None, dynamic_ncols=True) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        made = index_videos(args.root, args.files or None, index=args.index, workers=args.workers, progress=progress)
    for name, reason in sorted(made.plain.items())[:_LISTED]:
        name = name.encode("utf-8", "backslashreplace").decode()  # file names may be of other encodings
        say(f"without index  {name}: {reason}")
    if len(made.plain) > _LISTED:
        say(f"without index  ... and {len(made.plain) - _LISTED} more")
    say(
        f"{made.path}: {made.files - len(made.plain)} of {made.files} files, {made.frames} frames"
        f" ({made.reused} entries stood before)"
    )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these command-line words (None: `sys.argv`); returns the exit status."""
    args = build_parser().parse_args(argv)
    return exit_status("tools/index_videos.py", lambda: run(args), debug=args.debug)
