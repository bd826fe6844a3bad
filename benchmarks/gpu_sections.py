"""The sections of `gpu_report.py`, each run in a process of its own: `python benchmarks/gpu_sections.py NAME …`.

A section writes what it has found so far to its JSON file, again and again, so that a section that is stopped leaves
it. A missing package is one line, and an error is the last line of the section; neither affects the sections after it.
"""

import argparse
import datetime
import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from avion.errors import UserError

ROOT = Path(__file__).resolve().parents[1]

# The packages without which a part of the project does not run, by the names under which they are imported.
PACKAGES = {
    "torch": "torch", "triton": "triton", "torchvision": "torchvision", "timm": "timm", "numpy": "numpy",
    "av": "av", "decord": "decord", "open_clip": "open_clip_torch", "ftfy": "ftfy", "regex": "regex",
    "safetensors": "safetensors", "huggingface_hub": "huggingface_hub", "yaml": "pyyaml", "PIL": "pillow",
    "matplotlib": "matplotlib", "tqdm": "tqdm", "pytest": "pytest", "mamba_ssm": "mamba-ssm",
    "causal_conv1d": "causal-conv1d",
}  # fmt: skip


class Section:
    """What a section has found: `status` (running, ok, wrong, missing, failed), a line, Markdown, numbers."""

    def __init__(self, path: Path, device: str, toy: bool):
        self.path, self.device, self.toy = path, device, toy
        self.found: dict[str, Any] = {"status": "running", "line": "", "markdown": "", "data": {}}

    def tell(self, *, status: str = "running", line: str = "", markdown: str = "", **data: Any) -> None:
        """Write the findings to the file; data are added to the earlier data."""
        self.found |= {
            "status": status,
            "line": line or self.found["line"],
            "markdown": markdown or self.found["markdown"],
        }
        self.found["data"] |= data
        draft = self.path.with_suffix(".part")
        draft.write_text(json.dumps(self.found, indent=1), encoding="utf-8")
        draft.replace(self.path)


# ---- the sections ----------------------------------------------------------------------------------------


def device(section: Section) -> None:
    """Find versions, what is missing, and the properties of the device."""
    missing = [package for name, package in PACKAGES.items() if importlib.util.find_spec(name) is None]
    line = "missing: " + ", ".join(missing) if missing else "every package is there"
    section.tell(line=line, missing=missing)
    import torch

    from benchmarks.measure import where

    if section.device == "cuda" and not torch.cuda.is_available():
        raise UserError("PyTorch sees no GPU here; --dry-run tries the report on a CPU, at toy sizes")
    lines = [where(section.device), f"Python {sys.version.split()[0]}; {line}."]
    data: dict[str, Any] = {"where": lines[0], "python": sys.version.split()[0]}
    if section.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        data |= {
            "name": properties.name,
            "memory_gb": properties.total_memory / 1e9,
            "multiprocessors": properties.multi_processor_count,
            "capability": list(torch.cuda.get_device_capability()),
        }
        lines.append(
            f"{properties.name}: {properties.multi_processor_count} multiprocessors, "
            f"{properties.total_memory / 1e9:.0f} GB, compute capability {properties.major}.{properties.minor}."
        )
        lines.append(_nvidia_smi())
    lines.append("torch.compile needs a C compiler: " + (_compiler() or "none was found."))
    section.tell(status="ok", line=line, markdown="\n\n".join(filter(None, lines)), **data)


def _nvidia_smi() -> str:
    fields = "driver_version,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu,utilization.gpu"
    try:
        found = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return f"nvidia-smi ({fields}): {found.stdout.strip()}"


def _compiler() -> str | None:
    return next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)


def kernels(section: Section) -> None:
    """Compare every kernel with float64, without pytest."""
    os.environ["AVION_TUNE"] = "0"  # measuring every plan of every shape would take most of the time
    import torch

    from benchmarks.measure import markdown_table
    from tests.gpu import kernels as checks

    torch.manual_seed(0)
    rows, wrong = [], []
    for check in checks.checks(section.device, "triton", toy=section.toy):
        try:
            error, tensor = check.run()
        except Exception as e:
            if isinstance(e, ModuleNotFoundError):
                raise
            traceback.print_exc()
            error, tensor = float("inf"), _one_line(e)
        if not error <= check.tolerance:
            wrong.append(check.name)
        rows.append([check.name, f"{error:.1e}", f"{check.tolerance:.0e}", tensor])
        verdict = f"WRONG: {', '.join(wrong)}" if wrong else f"all {len(rows)} checks within their bounds so far"
        table = markdown_table(["check", "largest error", "bound", "in"], rows)
        section.tell(line=verdict, markdown=table, wrong=wrong, done=len(rows))
    section.tell(status="wrong" if wrong else "ok", line=verdict.removesuffix(" so far"))


def scan(section: Section, shapes: str, backends: str = "triton torch mamba_ssm") -> None:
    """Run bench_scan, shape by shape; the choices of `auto` follow."""
    import torch

    from avion.ops.selective_scan import available_backends
    from benchmarks import bench_scan
    from benchmarks.measure import measure_ceilings

    torch.manual_seed(0)
    runnable = [b for b in backends.split() if b in available_backends(section.device)]
    words = ["--toy"] if section.toy else ["--rounds", "11", "--device", section.device]
    words += ["--shapes", *(["2x3"] if section.toy else shapes.split())]
    args = bench_scan.arguments([*words, "--backends", *runnable])
    section.tell(line="measuring what the device does of bytes, instructions and exponentials")
    ceilings = measure_ceilings(args.device, toy=args.toy)
    records: list[dict] = []
    setting = f"D = {args.dim}, N = {args.states}, bf16, both directions and the gate; measured ceilings: {ceilings}"
    section.tell(ceilings=ceilings._asdict())
    for shape in args.shapes:
        records += bench_scan.measure(shape, args, ceilings)
        wrong = sorted({f"{r['backend']} at T = {r['T']}" for r in records if not bench_scan.is_right(r)})
        chosen, line = _follow(section, records, args)
        right = f"WRONG: {', '.join(wrong)}" if wrong else f"all within {bench_scan.TOLERANCE} of float64"
        text = "\n\n".join([setting, f"{right}. {line}", bench_scan.table(records)])
        section.tell(line=f"{right}. {line}", markdown=text, records=records, choices=chosen, wrong=wrong)
        if section.device == "cuda":
            torch.cuda.empty_cache()
    section.tell(status="wrong" if wrong else "ok")


def _follow(section: Section, records: list[dict], args: argparse.Namespace) -> tuple[dict[str, str], str]:
    """Save the fastest right backend of each class of shapes, which `auto` takes from now on, and say so."""
    import torch

    from avion.ops import choices
    from benchmarks.bench_scan import is_right

    times: dict[str, dict[str, float]] = {}
    for r in records:
        if r["what"] == "both" and r["error"] is not None and is_right(r):
            key = choices.shape_class(r["T"], args.dim, args.states, torch.bfloat16)
            of_class = times.setdefault(key, {})
            of_class[r["backend"]] = of_class.get(r["backend"], 0.0) + r["ms"]
    today = str(datetime.date.today())
    found = {key: choices.Choice(min(ms, key=ms.__getitem__), ms, today) for key, ms in times.items()}
    name = torch.cuda.get_device_name() if section.device == "cuda" else "CPU, dry run"
    try:
        where = choices.store(name, found)
    except (OSError, UserError) as e:
        return {}, f"auto's choice could not be saved: {e}"
    listed = "; ".join(f"{choice.backend} at {key}" for key, choice in found.items())
    return {key: choice.backend for key, choice in found.items()}, f"auto takes {listed} from now on ({where})"


def steps(section: Section, rows: str, clips: str, frames: str, checkpointing: str = "") -> None:
    """Run bench_train_step: ID4 and others."""
    import torch

    from avion.ops.selective_scan import available_backends
    from benchmarks import bench_train_step

    torch.manual_seed(0)
    runnable = [b for b in ("triton", "mamba_ssm") if b in available_backends(section.device)]
    words = ["--toy"] if section.toy else ["--clips", clips, "--rounds", "7", "--device", section.device]
    words += ["--frames", frames, "--rows", *rows.split(), "--backends", *(runnable or ["torch"])]
    args = bench_train_step.arguments([*words, *(["--grad-checkpointing"] if checkpointing else [])])
    records, setting = bench_train_step.measure(args)
    shown = ", ".join(f"{r['name']} {r['to_id4']:.2f} x ID4" for r in records if r.get("to_id4") and r["row"] != "ID4")
    section.tell(
        status="ok",
        line=shown or "measured",
        markdown=f"{setting}\n\n{bench_train_step.table(records)}",
        records=records,
        clips=args.clips,
        frames=args.frames,
    )


def pretraining(section: Section) -> None:
    """Run the demo's pretraining in every mode, and compare the losses with the CPU's."""
    import torch

    from benchmarks.measure import markdown_table
    from tests.gpu import pretraining as room

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        of_cpu = room.losses("fp32", "cpu", Path(folder) / "cpu")
    rows, wrong = [["CPU, fp32", *_few(of_cpu), ""]], []
    for mode in room.MODES:
        if section.toy and "compiled" in mode:  # on a CPU this needs a C++ compiler and a minute
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                losses = room.losses(mode, section.device, Path(folder))
                fault = room.far_off(mode, losses, of_cpu)
            except Exception as e:
                traceback.print_exc()
                losses, fault = [], _one_line(e)
        if fault:
            wrong.append(mode)
        rows.append([mode, *_few(losses), fault or "as the CPU's"])
        line = f"WRONG: {', '.join(wrong)}" if wrong else f"{len(rows) - 1} modes train as the CPU does"
        table = markdown_table(["mode", "first loss", "fifth", "last", "verdict"], rows)
        section.tell(line=line, markdown=table, wrong=wrong)
    section.tell(status="wrong" if wrong else "ok")


def _few(losses: list[float]) -> list[str]:
    return [f"{losses[i]:.4f}" if losses else "–" for i in (0, 4, -1)]


def tests(section: Section, paths: str) -> None:
    """Run pytest, where it is installed."""
    import pytest  # noqa: F401  the missing package is named, not the failed command

    log = section.path.with_suffix(".pytest.txt")
    with log.open("w", encoding="utf-8") as out:
        command = [sys.executable, "-m", "pytest", "-q", "-x" if section.toy else "--maxfail=20", *paths.split()]
        # Without the project's pytest options, which need further packages.
        options = ["-p", "no:cacheprovider", "-o", "addopts=", "-ra"]
        done = subprocess.run([*command, *options], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    telling = [line for line in lines if line.startswith(("FAILED", "ERROR", "SKIPPED"))]
    last = lines[-1].strip("= ") if lines else "pytest printed nothing"
    body = "\n".join(["```", *telling[:60], last, "```"])
    section.tell(status="ok" if done.returncode == 0 else "wrong", line=last, markdown=body, rc=done.returncode)


SECTIONS: dict[str, Callable[..., None]] = {
    "device": device,
    "kernels": kernels,
    "scan": scan,
    "steps": steps,
    "pretraining": pretraining,
    "tests": tests,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SECTIONS)
    parser.add_argument("--json", type=Path, required=True, help="what the section writes")
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--toy", action="store_true", help="toy sizes")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="the section's own options")
    args = parser.parse_args(argv)
    section = Section(args.json, args.device, args.toy)
    section.tell()
    run = functools.partial(SECTIONS[args.name], section, **dict(o.split("=", 1) for o in args.set))
    try:
        run()
    except ModuleNotFoundError as e:
        package = PACKAGES.get((e.name or "").split(".")[0], e.name)
        section.tell(status="missing", line=f"the package {package} is not installed: pip install {package}")
    except BaseException as e:
        traceback.print_exc()
        section.tell(status="failed", line=_one_line(e))
        return 1
    return 0


def _one_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    if isinstance(error, UserError):
        return text[0]
    return f"{type(error).__name__}: {text[0] if text else 'no message'}"[:300]


if __name__ == "__main__":
    sys.exit(main())
