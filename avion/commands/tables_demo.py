"""Run all recipes of the paper's tables, scaled down, on the demo dataset, and report on the results.

The tool pretrains every row, fine-tunes on both tasks and runs EgoSchema, --jobs runs at a time. Finished runs are not
run again, so the same command continues after an interruption. The report (tables.html, tables.md, figure5_demo.png)
is in --output-dir.
"""

import argparse
import logging
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from avion.engine.args import ToolParser
from avion.errors import INTERRUPTED, exit_status, say
from avion.numbers import SEED, whole

logger = logging.getLogger(__name__)
NAME = "tools/tables_demo.py"


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    parser = ToolParser(prog="tools/tables_demo.py", doc=__doc__)
    parser.add_argument(
        "--output-dir", default="runs/tables_demo", metavar="DIR", help="folder of runs and report [%(default)s]"
    )
    parser.add_argument(
        "--root", default="datasets/demo", metavar="DIR", help="folder of the demo dataset [%(default)s]"
    )
    parser.add_argument(
        "--seeds", type=SEED, nargs="+", default=[0], metavar="N", help="seeds; every recipe runs once per seed [0]"
    )
    parser.add_argument(
        "--jobs",
        type=whole(1, 1024),
        default=2,
        metavar="N",
        help="number of runs at a time, one core each [%(default)s]",
    )
    parser.add_argument(
        "--short", action="store_true", help="train each recipe for one epoch on 64 clips, to see that everything works"
    )
    parser.add_argument("--debug", action="store_true", help="show the Python traceback of an error")
    return parser


def tables_demo(args: argparse.Namespace) -> None:
    """Run all recipes that are not done, and write the report."""
    from avion.data.demo import ensure_demo_dataset
    from avion.engine.console import duration
    from avion.reproduce.demo_chain import REMARK, Chain
    from avion.reproduce.jobs import run_jobs
    from avion.reproduce.report import make_report

    start = time.monotonic()
    paths, seeds = ensure_demo_dataset(args.root), sorted(set(args.seeds))
    chain = Chain(paths, Path(args.output_dir), seeds, args.short, tuple(args.plugins))
    jobs = chain.jobs()
    if args.short:
        chain.write_few_clips()
    run_jobs(jobs, slots=args.jobs, environment={"OMP_NUM_THREADS": "1"})
    runs, files = make_report([chain.runs], chain.output, [REMARK])
    for problem in runs.problems:
        logger.warning("in no table: %s: %s", problem.path, problem.reason)
    logger.info("%d runs in %s", len(runs.results), duration(time.monotonic() - start))
    say(*map(str, files))


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these command-line words (None: `sys.argv`); returns the exit status."""
    args = build_parser().parse_args(argv)

    from avion.engine.console import setup_logging
    from avion.engine.distributed import World
    from avion.reproduce.jobs import JobFailed

    setup_logging(World())
    before = signal.signal(signal.SIGTERM, _interrupt)

    def body() -> int:
        try:
            tables_demo(args)
        except JobFailed as e:
            say(f"{NAME}: {e}", to_stderr=True)
            return e.status
        except KeyboardInterrupt:
            say(f"{NAME}: interrupted; the same command goes on", to_stderr=True)
            return INTERRUPTED
        return 0

    try:
        return exit_status(NAME, body, debug=args.debug)
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
