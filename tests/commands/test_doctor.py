"""tools/doctor.py on this machine, and on machines on which something is broken."""

import importlib.metadata
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from avion import c_code
from avion.c_code import Native
from avion.commands import doctor as tool
from avion.data.video import VideoError
from avion.data.video.scaler import SCALE, Scaler
from avion.ops.mixer import c_functions
from avion.ops.selective_scan import dispatch
from tests.test_packaging import PROJECT, Requirement

ROOT = Path(__file__).parents[2]


@pytest.fixture
def doctor(monkeypatch):
    # The interpreter would make the Triton kernels run on a CPU: slowly, and not what a user sees.
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return tool


def lines(capsys) -> dict[str, str]:
    """What was said of each thing."""
    printed = capsys.readouterr().out.splitlines()
    return {line.split()[0]: line.split(maxsplit=1)[1] for line in printed if line.startswith("  ")}


def test_this_machine(doctor, capsys):
    assert doctor.main(["--device", "cpu"]) == 0
    said = lines(capsys)
    assert said["torch"].startswith("works") and "what `auto` takes" in said["torch"]
    assert said["reference"].startswith("works") and said["pyav"].startswith("works")
    assert "cannot run: its kernels are for GPUs" in said["triton"]
    assert said["timm"][0].isdigit()


def test_the_mixer_in_c(doctor, capsys, monkeypatch):
    library = c_functions.native().library
    if library is None:
        pytest.skip(c_functions.native().reason)
    assert doctor.main(["--device", "cpu"]) == 0
    assert lines(capsys)["C"].split()[:2] == ["code", "works,"]
    monkeypatch.setattr(c_functions, "native", lambda: Native(library, problem="the disk is full"))
    assert doctor.main(["--device", "cpu"]) == 0
    assert "every process compiles it, because it cannot be kept: the disk is full" in capsys.readouterr().out
    call = c_functions.call
    monkeypatch.setattr(c_functions, "call", lambda name, *a: 0 if name == "gate" else call(name, *a))
    assert doctor.main(["--device", "cpu"]) == 1
    assert "C code: WRONG, largest relative error" in capsys.readouterr().out.splitlines()[-1]
    monkeypatch.setattr(c_functions, "native", lambda: Native(None, "there is no compiler"))
    assert doctor.main(["--device", "cpu"]) == 0
    assert "not used, PyTorch's operators are: there is no compiler" in capsys.readouterr().out


def test_scaling_in_c(doctor, capsys, monkeypatch):
    native = c_code.native
    found = native(SCALE)
    if found.library is None:
        pytest.skip(found.reason)

    def say(of_scaling: Native) -> None:
        monkeypatch.setattr(c_code, "native", lambda code: of_scaling if code is SCALE else native(code))

    assert doctor.main(["--device", "cpu"]) == 0
    assert lines(capsys)["scaling"].split()[:3] == ["in", "C", "works,"]
    say(replace(found, problem="the disk is full"))
    assert doctor.main(["--device", "cpu"]) == 0
    assert "every process compiles it, because it cannot be kept: the disk is full" in capsys.readouterr().out
    monkeypatch.setattr(Scaler, "__call__", lambda self, picture, out: out.fill(99))
    assert doctor.main(["--device", "cpu"]) == 1
    assert "scaling in C: WRONG, largest difference" in capsys.readouterr().out.splitlines()[-1]
    say(Native(None, "there is no compiler"))
    assert doctor.main(["--device", "cpu"]) == 0
    assert "not used, libswscale is: there is no compiler" in capsys.readouterr().out


def test_every_optional_package_is_listed_with_what_it_is_for(doctor, capsys, monkeypatch):
    extras = PROJECT["optional-dependencies"]
    optional = {Requirement(line).name for name, lines in extras.items() if name != "dev" for line in lines}
    assert optional - {"eva-decord"} <= set(doctor.OPTIONAL)  # which provides the module decord
    assert {"gradio", "playwright", "fsspec", "s3fs", "onnx", "onnxruntime"} <= set(doctor.OPTIONAL)
    installed = doctor.installed_version
    monkeypatch.setattr(doctor, "installed_version", lambda p: None if p in optional else installed(p))
    assert doctor.main(["--device", "cpu"]) == 0
    said = lines(capsys)
    assert said["gradio"] == "not installed (optional: the page of tools/search_videos.py serve)"
    assert said["s3fs"] == "not installed (optional: files on s3://)"


def test_a_wrong_backend_is_a_problem_where_auto_takes_it(doctor, capsys, monkeypatch):
    def wrong(*arguments):
        return dispatch.selective_scan_reference(*arguments) * 1.01

    monkeypatch.setitem(dispatch.BACKENDS, "torch", dispatch.Backend(wrong))
    assert doctor.main(["--device", "cpu"]) == 1
    printed = capsys.readouterr().out
    assert "WRONG, largest relative error 1e-02" in printed
    assert printed.rstrip().splitlines()[-1].startswith("  torch: WRONG")


def test_a_backend_that_throws_is_named(doctor, capsys, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("no kernel image\nsecond line")

    monkeypatch.setitem(dispatch.BACKENDS, "broken", dispatch.Backend(broken))
    assert doctor.main(["--device", "cpu"]) == 0  # `auto` takes another one
    assert "fails: no kernel image; give another one as --scan-backend" in lines(capsys)["broken"]


def test_missing_packages_decoders_and_gpu(doctor, capsys, monkeypatch):
    version = importlib.metadata.version

    def without_timm(package):
        if package == "timm":
            raise importlib.metadata.PackageNotFoundError(package)
        return version(package)

    with monkeypatch.context() as patched:
        patched.setattr(importlib.metadata, "version", without_timm)
        assert doctor.main([]) == 1
    assert lines(capsys)["timm:"] == "not installed: pip install -r requirements.txt"

    def refuse(path, decoder):
        raise VideoError(path, f"{decoder} is not installed")

    monkeypatch.setattr("avion.data.video.open_video", refuse)
    assert doctor.main(["--device", "cpu"]) == 1
    assert "decoders: none works" in capsys.readouterr().out
    if not torch.cuda.is_available():
        assert doctor.main(["--device", "cuda"]) == 1
        assert "GPU: PyTorch sees none" in capsys.readouterr().out
