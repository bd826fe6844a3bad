"""Make the paper's tables and Fig. 5 from runs of recipes, with the measured metrics beside the paper's.

Example:
    python tools/make_tables.py runs --output runs/tables

The tool writes tables.html (one page that loads nothing), tables.md and, where runs of Fig. 5 are found, figure5.png
and figure5_demo.png (of runs on the demo dataset) into --output. RUNS are folders, searched with all their subfolders.
Runs that are unfinished or damaged are named in the report and on the screen. docs/tables.md says how to read the
report.
"""

from collections.abc import Sequence
from pathlib import Path

from avion.engine.args import ToolParser
from avion.errors import exit_status, say
from avion.reproduce.report import make_report
from avion.targets import check_target, check_target_folder


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these command-line words (None: `sys.argv`); returns the exit status."""
    parser = ToolParser(prog="tools/make_tables.py", doc=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="folders that hold runs of recipes")
    parser.add_argument(
        "--output", default="runs/tables", metavar="DIR", help="folder that the report is written to [%(default)s]"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the report of an earlier call in --output")
    parser.add_argument("--debug", action="store_true", help="show the Python traceback of an error")
    args = parser.parse_args(argv)

    def body() -> None:
        check_target_folder(args.output, "--output")
        for name in ("tables.md", "tables.html"):
            check_target(Path(args.output) / name, "--output", overwrite=args.overwrite)
        runs, files = make_report(args.runs, args.output)
        for problem in runs.problems:
            say(f"in no table: {problem.path}: {problem.reason}", to_stderr=True)
        say(f"runs in the tables: {len(runs.results)}; written: {', '.join(map(str, files))}")

    return exit_status("tools/make_tables.py", body, debug=args.debug)
