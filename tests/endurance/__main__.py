"""Run every script of this folder, one after the other: python -m tests.endurance [--short] [--seed N] [NAME ...]"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def scripts() -> list[str]:
    """The names of the scripts: the files here that call `frame.main`."""
    begins = re.compile(r'^if __name__ == "__main__":\n    frame\.main\(', re.MULTILINE)
    return sorted(p.stem for p in FOLDER.glob("*.py") if begins.search(p.read_text(encoding="utf-8")))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.endurance", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="the scripts to run [all]")
    parser.add_argument("--short", action="store_true", help="few tries of each trial")
    parser.add_argument("--seed", type=int, help="repeat the random choices of an earlier run")
    args = parser.parse_args()
    if unknown := sorted(set(args.names) - set(scripts())):
        parser.error(f"there is no {unknown[0]}; there are {', '.join(scripts())}")
    words = ["--short"] * args.short + ([] if args.seed is None else ["--seed", str(args.seed)])
    failed = []
    for name in args.names or scripts():
        print(f"== {name}", flush=True)
        if subprocess.run([sys.executable, "-m", f"tests.endurance.{name}", *words], cwd=FOLDER.parents[1]).returncode:
            failed.append(name)
    print(f"did not hold: {', '.join(failed)}" if failed else "everything held")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
