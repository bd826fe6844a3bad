"""Run every script of this folder: python -m tests.endurance [--short] [--seed N] [--jobs N] [NAME ...]"""

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
# Of several scripts at a time these begin first, so that none of them is alone at the end.
LONGEST = ("targets", "lock", "stuck_workers", "dead_ranks")


def scripts() -> list[str]:
    """The names of the scripts: the files here that call `frame.main`."""
    begins = re.compile(r'^if __name__ == "__main__":\n    frame\.main\(', re.MULTILINE)
    return sorted(p.stem for p in FOLDER.glob("*.py") if begins.search(p.read_text(encoding="utf-8")))


def run(names: Sequence[str], words: Sequence[str], jobs: int) -> Iterator[tuple[str, int]]:
    """Run the scripts, `jobs` at a time; yield the name and the exit status of each that is done.

    Of several at a time, each prints what it has to say in one piece when it is done.
    """

    def one(name: str) -> tuple[str, int]:
        command = [sys.executable, "-m", f"tests.endurance.{name}", *words]
        if jobs == 1:
            print(f"== {name}", flush=True)
            return name, subprocess.run(command, cwd=FOLDER.parents[1]).returncode
        piped = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8", "errors": "replace"}
        done = subprocess.run(command, cwd=FOLDER.parents[1], **piped)
        print(f"== {name}\n{done.stdout}", end="", flush=True)
        return name, done.returncode

    if jobs == 1:
        yield from map(one, names)
        return
    with ThreadPoolExecutor(jobs) as pool:
        for ended in as_completed([pool.submit(one, name) for name in sorted(names, key=lambda n: n not in LONGEST)]):
            yield ended.result()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.endurance", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="the scripts to run [all]")
    parser.add_argument("--short", action="store_true", help="few tries of each trial")
    parser.add_argument("--seed", type=int, help="repeat the random choices of an earlier run")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="how many scripts run at a time [1]")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: give 1 or more")
    if unknown := sorted(set(args.names) - set(scripts())):
        parser.error(f"there is no {unknown[0]}; there are {', '.join(scripts())}")
    words = ["--short"] * args.short + ([] if args.seed is None else ["--seed", str(args.seed)])
    failed = sorted(name for name, status in run(args.names or scripts(), words, args.jobs) if status)
    print(f"did not hold: {', '.join(failed)}" if failed else "everything held")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
