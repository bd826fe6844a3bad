"""Measures everything that needs a GPU, in one command and a few minutes, and writes a Markdown and a JSON file.

    python benchmarks/gpu_report.py --output DIR --minutes 8
    python benchmarks/gpu_report.py --output DIR --minutes 8 --build-peer      # builds mamba-ssm beside it, from source
    python benchmarks/gpu_report.py --output DIR --minutes 3 --dry-run         # shows on a CPU that it runs, at toy
    sizes

The most important sections come first: the device; the kernels against float64; the scan, an optimizer step and the
demo's pretraining at the paper's shapes; long sequences; the tests. Each section is a process group with its own time
limit, and both files in DIR are written anew after each section, so that a run that is cut off leaves what it has
measured. If the machine lacks a package, a line says so. From then on `auto` takes the backend that was the fastest
(`avion/ops/choices.py`); tuned plans are kept in the same cache and copied to DIR/plans.

The report needs PyTorch with Triton, timm and torchvision; with the other packages it measures more. The exit status is
0 if all sections ran and nothing was wrong, 1 if something was wrong, failed or was cut off, and 2 if there is no GPU.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from avion.errors import UserError
from avion.files import write_text
from benchmarks import gpu_peer
from benchmarks.gpu_verdicts import verdicts

ROOT = Path(__file__).resolve().parents[1]
MINUTES = 8  # the time for which the limits below are meant; they grow and shrink with --minutes
RESERVE_S = 5  # to write the last report


class Plan(NamedTuple):
    """A section: its name, its title, the seconds that it may take of MINUTES, and its words for `gpu_sections.py`."""

    name: str
    title: str
    seconds: int
    words: tuple[str, ...]


PLANS = (
    Plan("device", "Device and versions", 40, ("device",)),
    Plan("kernels", "Kernels against float64", 80, ("kernels",)),
    Plan("scan", "The scan at training's shapes", 110, ("scan", "shapes=12544x4 12544x16 12544x64")),
    Plan("step", "A training step, 64 clips of 4 frames", 80, ("steps", "rows=ID4 ID6", "clips=64", "frames=4")),
    Plan("pretraining", "The demo's pretraining", 100, ("pretraining",)),
    Plan("long", "The scan at long shapes", 90, ("scan", "shapes=196x256 196x1024 64x784 64x3136 196x8192")),
    Plan("steps", "Other rows", 70, ("steps", "rows=ID4 ID6 ID7 ID8", "clips=64", "frames=4")),
    Plan(
        "fine-tuning", "A training step, 16 clips of 16 frames, activation checkpointing", 60,
        ("steps", "rows=ID4 ID6", "clips=16", "frames=16", "checkpointing=yes"),
    ),
    Plan("tests", "tests/ops and tests/gpu", 200, ("tests", "paths=tests/ops tests/gpu")),
)  # fmt: skip
# This section runs once mamba-ssm is built, before the sections that are left then.
PEER = Plan(
    "peer",
    "Beside the mamba-ssm that was built",
    120,
    ("scan", "shapes=12544x4 12544x16 196x256 196x1024 64x3136", "backends=triton mamba_ssm"),
)
TOY_TESTS = "paths=tests/gpu tests/ops/test_choices.py"


class Report:
    """What has been measured so far, and the two files."""

    def __init__(self, folder: Path, dry_run: bool):
        self.folder, self.dry_run = folder, dry_run
        self.sections: list[dict[str, Any]] = []
        self.started = time.strftime("%Y-%m-%d %H:%M:%S")
        self.notes: list[str] = []

    def add(self, plan: Plan, found: dict[str, Any], seconds: float) -> None:
        self.sections.append({"name": plan.name, "title": plan.title, "seconds": round(seconds, 1), **found})
        self.write()
        print(f"{plan.name}: {found['status']}, {seconds:.0f} s. {found['line']}", flush=True)

    def write(self) -> None:
        content = {
            "started": self.started,
            "dry_run": self.dry_run,
            "notes": self.notes,
            "sections": self.sections,
            "verdicts": [verdict._asdict() for verdict in verdicts(self.sections)],
        }
        write_text(self.folder / "report.json", json.dumps(content, indent=1), cure="change --output")
        write_text(self.folder / "report.md", self._markdown(), cure="change --output")

    def _markdown(self) -> str:
        title = "GPU report (a dry run on a CPU at toy sizes: its times say nothing)" if self.dry_run else "GPU report"
        parts = [f"# {title}", f"Begun {self.started}.", *self.notes, "## Verdicts"]
        if self.dry_run:
            parts.append("What is said of times is said of toys.")
        parts.append("\n".join(f"- {verdict}" for verdict in verdicts(self.sections)) or "None yet.")
        for section in self.sections:
            parts.append(f"## {section['title']}")
            parts.append(f"*{section['status']}, {section['seconds']:.0f} s.* {section['line']}")
            parts.append(section["markdown"])
        return "\n\n".join(filter(None, parts)) + "\n"

    def is_good(self) -> bool:
        return all(section["status"] == "ok" for section in self.sections)


# ---- running a section -------------------------------------------------------------------------------------


@contextlib.contextmanager
def group(command: list[str], log: Path, env: dict[str, str]) -> Iterator[subprocess.Popen]:
    """Run the command in a process group of its own, and end the whole group afterwards."""
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        for number, patience in ((signal.SIGTERM, 3), (signal.SIGKILL, 10)):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(patience)


def run_section(plan: Plan, folder: Path, seconds: float, env: dict[str, str], dry_run: bool) -> dict[str, Any]:
    """Return what the section has found, or had found when its time was up."""
    found_at, log = folder / f"{plan.name}.json", folder / f"{plan.name}.txt"
    found_at.unlink(missing_ok=True)
    name, *options = plan.words
    words = [name, "--json", str(found_at), "--device", "cpu" if dry_run else "cuda", *(["--toy"] if dry_run else [])]
    words += ["--set", *options]
    with group([sys.executable, str(ROOT / "benchmarks" / "gpu_sections.py"), *words], log, env) as process:
        try:
            process.wait(seconds)
            ended = f"ended with status {process.returncode}"
        except subprocess.TimeoutExpired:
            ended = ""
    try:
        found = json.loads(found_at.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = {"status": "running", "line": "", "markdown": "", "data": {}}
    if not ended:
        found |= {"status": "cut off", "line": f"stopped at its limit of {seconds:.0f} s. {found['line']}".strip()}
    elif found["status"] == "running":  # it was killed, by a signal or for memory
        found |= {"status": "failed", "line": f"{ended} (see {log}). {found['line']}".strip()}
    return found


def environment(args: argparse.Namespace) -> dict[str, str]:
    env = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    if args.dry_run:  # its choices and plans must not be kept
        env |= {"TRITON_INTERPRET": "1", "XDG_CACHE_HOME": str(args.output / "cache"), "OMP_NUM_THREADS": "1"}
    return env


def keep_plans(folder: Path, env: dict[str, str]) -> None:
    """Copy the files of the cache beside the report."""
    cache = Path(env.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "avion"
    for path in cache.glob("*.json"):
        (folder / "plans").mkdir(exist_ok=True)
        shutil.copy(path, folder / "plans" / path.name)


# ---- all of them -----------------------------------------------------------------------------------------------


def run_all(args: argparse.Namespace, report: Report) -> int:
    deadline, scale = time.monotonic() + 60 * args.minutes - RESERVE_S, args.minutes / MINUTES
    folder, env = args.output / "sections", environment(args)
    waiting = [plan for plan in PLANS if not args.sections or plan.name in args.sections or plan.name == "device"]
    peer = gpu_peer.Build(args.output / "peer", folder / "peer-build.txt", env) if args.build_peer else None
    with peer or contextlib.nullcontext():
        while waiting or (peer and peer.is_pending()):
            if peer and (line := peer.news()):
                report.notes.append(line)
                if peer.is_built:
                    env |= {"PYTHONPATH": os.pathsep.join(filter(None, [str(peer.target), env.get("PYTHONPATH")]))}
                    waiting.insert(0, PEER)
            left = deadline - time.monotonic()
            if left < 3:
                break
            if not waiting:
                time.sleep(1)
                continue
            plan = waiting.pop(0)
            if args.dry_run and plan.name == "tests":
                plan = plan._replace(words=("tests", TOY_TESTS))
            start = time.monotonic()
            # The first section reads PyTorch from a disk that may be slow.
            limit = max(plan.seconds * scale, 60) if plan.name == "device" else plan.seconds * scale
            found = run_section(plan, folder, min(left, limit), env, args.dry_run)
            keep_plans(args.output, env)
            report.add(plan, found, time.monotonic() - start)
            if plan.name == "device" and found["status"] in ("failed", "missing"):
                print(f"gpu_report.py: {found['line']}", file=sys.stderr)
                return 2
            if plan.name == "device" and peer:
                peer.begin(found["data"])
        if peer and peer.is_pending():
            report.notes.append("mamba-ssm was still being built when time ran out.")
    for plan in waiting:
        report.add(plan, {"status": "not run", "line": "time was up", "markdown": "", "data": {}}, 0)
    report.write()
    return 0 if report.is_good() else 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the folder for report.md and report.json")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for everything; limits grow and shrink with it")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, at toy sizes")
    parser.add_argument(
        "--build-peer",
        action="store_true",
        help="build mamba-ssm and causal-conv1d from the package index's source, for this GPU alone, in the background",
    )
    parser.add_argument(
        "--sections", nargs="*", choices=[plan.name for plan in PLANS], help="only these (and the device)"
    )
    args = parser.parse_args(argv)
    if not 0.2 <= args.minutes <= 24 * 60:  # NaN is neither of them
        parser.error(f"--minutes {args.minutes:g}: give 0.2 to 1440, best 8")
    args.output = args.output.absolute()
    try:
        (args.output / "sections").mkdir(parents=True, exist_ok=True)
    except OSError as e:
        parser.error(f"--output {args.output}: {e.strerror}; give a folder that can be written")
    report = Report(args.output, args.dry_run)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        return run_all(args, report)
    except UserError as e:
        print(f"gpu_report.py: {e}", file=sys.stderr)
        return 2
    except OSError as e:
        print(f"gpu_report.py: {e.filename or args.output}: {e.strerror or e}; free space", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        report.notes.append("The report was interrupted: what follows is what was known then.")
        report.write()
        return 130
    finally:
        print(f"{args.output / 'report.md'}", flush=True)


def _interrupt(number, frame) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
