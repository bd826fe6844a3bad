"""Build the relevancy pickle of a retrieval split from its CSVs, or compare an existing one with the CSVs.

Examples:
    python tools/build_relevancy.py EPIC_100_retrieval_train.csv EPIC_100_retrieval_train_sentence.csv \\
        --output relevancy/caption_relevancy_EPIC_100_retrieval_train.pkl
    python tools/build_relevancy.py CLIPS.csv SENTENCES.csv --check FILE.pkl

The relevancy is 1/2 if the verb classes are equal, plus 1/2 times the intersection over union of the noun classes. A
sentence has the classes of the clip with its narration id. The tool writes a numpy array of float64, clips x
sentences, in the order of the CSVs. Exit status: 0 success, 1 --check found differences, 2 a file cannot be
read or written.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from avion.data.ek100 import load_relevancy, read_ek100_retrieval, read_sentences
from avion.data.relevancy import (
    clip_classes,
    differences,
    relevancy_blocks,
    sentence_classes,
    write_relevancy,
)
from avion.engine.args import ToolParser
from avion.errors import exit_status, say
from avion.targets import check_target

# Files of float32 are within 1e-7 of the exact values; two different relevancies are more than 1e-3 apart.
TOLERANCE = 1e-4
LISTED = 10


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    parser = ToolParser(prog="tools/build_relevancy.py", doc=__doc__)
    parser.add_argument("clips", metavar="CLIPS.csv", help="CSV of a split's clips, with their verb and noun classes")
    parser.add_argument(
        "sentences", metavar="SENTENCES.csv", help="CSV of the same split's sentences, with their narration ids"
    )
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--output", metavar="FILE.pkl", help="pickle file that the relevancies are written to")
    task.add_argument("--check", metavar="FILE.pkl", help="existing pickle file that is compared with the CSVs")
    parser.add_argument("--overwrite", "--force", action="store_true", help="replace an existing --output")
    parser.add_argument("--debug", action="store_true", help="show the Python traceback of an error")
    return parser


def run(args: argparse.Namespace) -> int:
    """Do what the flags ask for; return the exit status."""
    if args.output:
        check_target(args.output, "--output", overwrite=args.overwrite, inputs=[args.clips, args.sentences])
    clips = read_ek100_retrieval(args.clips)
    ids, _ = read_sentences(args.sentences)
    classes = clip_classes(clips, args.clips)
    spoken = sentence_classes(clips, classes, ids, args.clips, args.sentences)
    blocks, size = relevancy_blocks(classes, spoken), f"{len(clips)} clips x {len(ids)} sentences"
    if args.output:
        write_relevancy(args.output, blocks, (len(clips), len(ids)))
        say(f"{args.output}: {size}, float64, {Path(args.output).stat().st_size / 1e6:.0f} MB")
        return 0
    found = load_relevancy(args.check, len(clips), len(ids))
    count, first = differences(found, blocks, TOLERANCE, LISTED)
    for clip, sentence, computed in first:
        say(
            f"clip {clip} ({clips.narration_ids[clip]}), sentence {sentence} ({ids[sentence]}): "
            f"{found[clip, sentence]:.6g} in the file, {computed:.6g} computed"
        )
    say(f"{args.check}: {count} of {found.size} cells differ by more than {TOLERANCE:g} ({size})")
    return 1 if count else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these command-line words (None: `sys.argv`); returns the exit status."""
    args = build_parser().parse_args(argv)
    return exit_status("tools/build_relevancy.py", lambda: run(args), debug=args.debug)
