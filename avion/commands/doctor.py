"""Say what this machine can run, what it cannot run, and what to do about it.

Examples:
    python tools/doctor.py
    python tools/doctor.py --device cpu

The tool lists the versions of packages. Then it compares every backend of the selective scan and the mixer's C code,
outputs and gradients, with float64, and tries every decoder on a small video. Exit status: 0 if the main job can run
here, 1 if not, 2 after an error message of one line.
"""

import argparse
import importlib.metadata
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from avion.errors import called_names, exit_status
from avion.plugins import import_plugins

MINIMUM_PYTHON = (3, 10)
REQUIRED = ("torch", "torchvision", "timm", "open_clip_torch", "numpy")
# What each package is for.
OPTIONAL = {
    "triton": "the scan's kernels on a GPU",
    "mamba-ssm": "--scan-backend mamba_ssm, for comparison",
    "causal-conv1d": "--scan-backend mamba_ssm, for comparison",
    "av": "reading videos",
    "decord": "--decoder decord",
    "tensorboard": "--tensorboard",
    "wandb": "--wandb",
    "pyarrow": "tables of captions in Parquet files",
    "fsspec": "files on s3:// and in other remote places",
    "s3fs": "files on s3://",
    "submitit": "slurm/submit.py, tools/reproduce.py --submit",
    "gradio": "the page of tools/search_videos.py serve",
    "nbclient": "running notebooks/demo.ipynb",
    "ipykernel": "running notebooks/demo.ipynb",
    "onnx": "models as ONNX files",
    "onnxscript": "models as ONNX files",
    "onnxruntime": "running ONNX files",
    "playwright": "the tests of pages in a browser",
}
# The largest error of float32 against float64, relative to the values of the scan.
TOLERANCE = 1e-3
WORST_LEVELS = 12  # of 255, where colours change from pixel to pixel: the plain path repeats samples of chroma


class Report:
    """Prints findings as they come, and remembers what keeps the main job from running."""

    def __init__(self):
        self.problems: list[str] = []

    def line(self, name: str, text: str) -> None:
        """Print a finding."""
        print(f"  {name:<17} {text}", flush=True)

    def problem(self, name: str, text: str) -> None:
        """Print a finding that keeps the main job from running, and remember it."""
        self.line(name, text)
        self.problems.append(f"{name}: {text}")


def installed_version(package: str) -> str | None:
    """Return the version of an installed package; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """Return the first line that a program prints; None where the program is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else None


def versions(report: Report) -> None:
    """Print the versions of Python, packages and programs."""
    print("versions")
    python = platform.python_version()
    if sys.version_info < MINIMUM_PYTHON:
        report.problem("python", f"{python}: too old, 3.10 or newer is needed; PYTHON=/path/to/python3 make ...")
    else:
        report.line("python", python)
    for package in REQUIRED:
        version = installed_version(package)
        if version is None:
            report.problem(package, "not installed: pip install -r requirements.txt")
        else:
            report.line(package, version)
    for package in OPTIONAL:
        report.line(
            package, installed_version(package) or called_names(f"not installed (optional: {OPTIONAL[package]})")
        )
    report.line("ffmpeg", _output("ffmpeg", "-version") or "no such program (not needed: the decoders bring theirs)")


def devices(report: Report, wanted: str) -> str:
    """Print the processors; return the device on which the scan is tried."""
    import torch

    print("device")
    report.line("CPU", f"{torch.get_num_threads()} threads for PyTorch, {platform.machine()}")
    report.line("CUDA", torch.version.cuda or "not in this build of PyTorch")
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    report.line("driver", driver or "none found (nvidia-smi)")
    if not torch.cuda.is_available():
        if wanted == "cuda":
            report.problem("GPU", "PyTorch sees none; check the driver, and that torch is a CUDA build")
        else:
            report.line("GPU", "none: the main job runs on the CPU")
        return "cpu"
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        report.line(f"GPU {index}", f"{card.name}, {card.total_memory / 2**30:.0f} GiB, sm_{card.major}{card.minor}")
    return "cpu" if wanted == "cpu" else "cuda"


def _scan(case: dict, backend: str, dtype) -> list:
    """Return the output and the gradients of one scan, in float64."""
    import torch

    from avion.ops.selective_scan import selective_scan

    inputs = {name: tensor.to(dtype).requires_grad_() for name, tensor in case.items() if name != "weight"}
    y = selective_scan(**inputs, backend=backend)
    gradients = torch.autograd.grad(y, list(inputs.values()), case["weight"].to(dtype))
    return [tensor.double() for tensor in (y.detach(), *gradients)]


def _mixer(case: dict, backend: str, dtype) -> list:
    """Return the output and the gradients of a whole mixer, convolutions and gate included, in float64."""
    import torch

    from avion.models.vim import BiMambaMixer

    torch.manual_seed(0)
    mixer = BiMambaMixer(case["u"].shape[-1], case["A"].shape[1], scan_backend=backend).to(case["u"].device, dtype)
    h = case["u"].to(dtype).requires_grad_()
    y = mixer(h)
    gradients = torch.autograd.grad(y, [h, *mixer.parameters()], case["weight"].to(dtype))
    return [tensor.double() for tensor in (y.detach(), *gradients)]


def _results(case: dict, backend: str, dtype) -> list:
    return [*_scan(case, backend, dtype), *_mixer(case, backend, dtype)]


def _random_case(device: str) -> dict:
    import torch

    rows, steps, channels, states = 6, 37, 40, 16
    shapes = {
        "u": (rows, steps, channels),
        "delta": (rows, steps, channels),
        "A": (channels, states),
        "B": (rows, steps, states),
        "C": (rows, steps, states),
        "D": (channels,),
        "delta_bias": (channels,),
        "weight": (rows, steps, channels),
    }
    case = {name: torch.randn(shape, device=device) for name, shape in shapes.items()}
    return case | {"A": -case["A"].abs() - 0.1}


def _largest_error(found: list, expected: list) -> float:
    """Return the largest error of a tensor, relative to the tensor's largest number."""
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected, strict=True))


def backends(report: Report, device: str) -> None:
    """Compare every backend of the selective scan with the reference."""
    import torch

    from avion.errors import UserError
    from avion.ops.selective_scan import backend_names, resolve_backend

    print(f"selective scan, alone and in the mixer, on {device}")
    case = _random_case(device)
    expected = _results(case, "reference", torch.float64)
    auto = resolve_backend("auto", device)
    for name in backend_names():
        try:
            resolve_backend(name, device)
        except UserError as error:
            report.line(name, f"cannot run: {str(error).split(': ', 1)[1]}")
            continue
        try:
            found = _results(case, name, torch.float32)
        except Exception as error:  # a broken kernel may raise anything; it is a finding, and the report goes on
            text = f"fails: {str(error).splitlines()[0]}; give another one as --scan-backend"
            (report.problem if name == auto else report.line)(name, text)
            continue
        worst = _largest_error(found, expected)
        text = f"largest relative error {worst:.0e} against float64" + (", what `auto` takes" if name == auto else "")
        if worst <= TOLERANCE:
            report.line(name, f"works, {text}")
        else:
            text = f"WRONG, {text}; do not use it: give another one as --scan-backend, and report this"
            (report.problem if name == auto else report.line)(name, text)


def mixer_in_c(report: Report) -> None:
    """Compare the C code, which `auto` takes for short rows on a CPU, with PyTorch's operators in float64."""
    import torch

    from avion.ops.mixer.c_functions import native

    print("mixer of short rows on a CPU")
    if native().library is None:
        report.line("C code", f"not used, PyTorch's operators are: {native().reason}")
        return
    case = {name: t[:, :4] if t.ndim == 3 else t for name, t in _random_case("cpu").items()}
    found, expected = _mixer(case, "auto", torch.float32), _mixer(case, "torch", torch.float64)
    worst = _largest_error(found, expected)
    text = f"largest relative error {worst:.0e} against float64"
    _say_of_c(report, "C code", text, native().problem, worst <= TOLERANCE)


def _say_of_c(report: Report, name: str, text: str, problem: str, works: bool) -> None:
    """Report on C code: how far it is from what it should give, and why it could not be kept (empty: it is)."""
    if problem:
        text += f"; every process compiles it, because it cannot be kept: {problem}"
    if works:
        report.line(name, f"works, {text}")
    else:
        report.problem(name, f"WRONG, {text}; set AVION_NATIVE=0, and report this with the version of the compiler")


def _write_video(path: Path) -> None:
    import av
    import numpy as np

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(10))
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for level in range(0, 250, 25):
            picture = av.VideoFrame.from_ndarray(np.full((48, 64, 3), level, dtype=np.uint8), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def decoders(report: Report) -> None:
    """Try every video decoder on a small video."""
    from avion.data.video import DECODERS, open_video
    from avion.errors import UserError

    print("video decoders")
    working = 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "grey.mp4"
        if installed_version("av") is None:
            report.problem(
                "decoders", "av is not installed, so that none can be tried: pip install -r requirements.txt"
            )
            return
        _write_video(path)
        for name in DECODERS:
            try:
                frames = open_video(path, name).get_frames([9, 0, 4])
            except UserError as error:
                report.line(name, f"cannot run: {error}")
                continue
            found = [round(float(frame.mean())) for frame in frames]
            if all(abs(a - b) <= 4 for a, b in zip(found, (225, 0, 100), strict=True)):
                working += 1
                report.line(name, "works, returns the frames that were asked for")
            else:
                report.line(name, f"WRONG frames (brightness {found}, due 225, 0, 100): give another one as --decoder")
    if working == 0:
        report.problem("decoders", "none works: pip install -r requirements.txt")


def scaling_in_c(report: Report) -> None:
    """Compare the C code that cuts and scales pictures with the plain path."""
    import av
    import numpy as np

    from avion.c_code import native
    from avion.data.video import Scaling
    from avion.data.video.picture import Converter, scale_rgb
    from avion.data.video.scaler import SCALE

    name, found = "scaling in C", native(SCALE)
    if found.library is None:
        report.line(name, f"not used, libswscale is: {found.reason}")
        return
    y, x = np.mgrid[0:144, 0:256]
    waves = [100 * np.sin(x / across) * np.cos(y / down) for across, down in ((37, 23), (29, 51), (61, 33))]
    pixels = (128 + np.stack(waves, axis=-1)).astype(np.uint8)
    picture = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv420p")
    converter, scaling = Converter((144, 256), 0), Scaling((7, 30, 120, 200), (112, 112))
    out = np.empty((3, 112, 112), dtype=np.uint8)
    converter.scaled(picture, scaling, out)
    worst = int(np.abs(out.astype(int) - scale_rgb(converter.rgb(picture)[None], scaling)[0]).max())
    text = f"largest difference {worst} of 255 levels from the plain path"
    _say_of_c(report, name, text, found.problem, worst <= WORST_LEVELS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these command-line words (None: `sys.argv`); returns the exit status."""
    return exit_status("tools/doctor.py", lambda: examine(argv))


def examine(argv: Sequence[str] | None) -> int:
    """Print the report; return 1 if the main job cannot run here."""
    above, _, below = __doc__.partition("\n\n")  # as the other tools', whose parser needs packages that may be missing
    parser = argparse.ArgumentParser(
        prog=called_names("tools/doctor.py"),
        description=above,
        epilog=below,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--device",
        default="auto",
        choices=["auto", "cpu", "cuda"],
        help="device on which the scan is tried; auto: a GPU (cuda) where there is one [auto]",
    )
    parser.add_argument(
        "--import",
        dest="plugins",
        action="append",
        default=[],
        metavar="MODULE",
        help="module, or path of a .py file, to import first, which registers models and mixers (repeatable)",
    )
    args = parser.parse_args(argv)
    import_plugins(args.plugins)
    report = Report()
    versions(report)
    if not report.problems:  # else the imports below would fail
        device = devices(report, args.device)
        backends(report, device)
        mixer_in_c(report)
        decoders(report)
        if installed_version("av") is not None:
            scaling_in_c(report)
    print()
    if report.problems:
        print("The main job cannot run here:")
        for problem in report.problems:
            print(f"  {problem}")
        return 1
    print("The main job can run here.")
    return 0
