"""Make the embedded demo dataset (docs/demo.md), or draw its contact sheet.

Examples:
    python tools/make_demo_data.py --root datasets/demo
    python tools/make_demo_data.py --contact-sheet docs/images/demo_contact_sheet.png

A dataset that this generator has already made with the same seed is left as it is.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from avion.engine.args import ToolParser
from avion.errors import exit_status, say
from avion.numbers import SEED
from avion.targets import check_here, check_target


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    parser = ToolParser(prog="tools/make_demo_data.py", doc=__doc__)
    parser.add_argument("--root", default="datasets/demo", help="folder of the dataset [%(default)s]")
    parser.add_argument("--seed", type=SEED, default=0, help="another seed films other videos [%(default)s]")
    parser.add_argument(
        "--contact-sheet", metavar="FILE", help="write a PNG with frames of every verb pair, and no dataset"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --contact-sheet")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these command-line words (None: `sys.argv`); returns the exit status."""
    given = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    def body() -> None:
        from avion.data.demo import ensure_demo_dataset
        from avion.data.demo.sheet import contact_sheet

        if given.contact_sheet:
            check_target(given.contact_sheet, "--contact-sheet", suffix=".png", overwrite=given.overwrite)
            contact_sheet(Path(given.contact_sheet), given.seed)
            say(str(given.contact_sheet))
        else:
            check_here(given.root, "--root")
            say(str(ensure_demo_dataset(given.root, seed=given.seed).root))

    return exit_status("tools/make_demo_data.py", body)
