"""A wheel that suffices: built, installed into an environment of its own, and used from an empty folder."""

import os
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from avion.commands.table import programs
from tests.layering import ROOT

# The command `avion` with a small demo dataset.
AVION = """
import functools, sys
import avion.data.demo as demo
size = demo.DemoSize(train_takes=3, val_takes=1, takes_per_video=4, labels=4, egoschema_scenes=1)
demo.ensure_demo_dataset = functools.partial(demo.ensure_demo_dataset, size=size, workers=2)
from avion.commands.console import main
sys.exit(main())
"""
PACKED = ("avion", "recipes", "slurm", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")


def run(command, folder: Path, **more) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    return subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True, timeout=280, **more
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of what is packed: building writes beside it."""
    source = tmp_path_factory.mktemp("source")
    for name in PACKED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    return source


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    built = run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", target, source], source)
    assert built.returncode == 0, built.stderr
    (file,) = target.glob("*.whl")
    return file


def environment(folder: Path, *what) -> tuple[Path, Path]:
    """An environment with the packages of this one, into which pip installs; itself and its site-packages.

    The editable installation of this environment is not taken over: it is a .pth file itself, and .pth files are not
    read in folders that come from one.
    """
    made = run([sys.executable, "-m", "venv", "--without-pip", folder], folder.parent)
    assert made.returncode == 0, made.stderr
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "packages.pth").write_text(str(Path(torch.__file__).parents[1]) + "\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", folder / "bin/python"]
    words = ["install", "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed"]
    done = run([*pip, *words, *what], folder.parent)
    assert done.returncode == 0, done.stderr
    return folder, site


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The folder of the programs of an environment that has the wheel, and the packages of this one."""
    folder, site = environment(tmp_path_factory.mktemp("environment") / "venv", wheel)
    where = run([folder / "bin/python", "-c", "import avion; print(avion.__file__)"], folder.parent)
    assert where.stdout.strip() == str(site / "avion/__init__.py")
    return folder / "bin"


def test_the_wheel_holds_recipes_and_batch_files_and_no_tests(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, suffixes in (("recipes", [".yaml"]), ("slurm", [".sbatch", ".sh"])):
        files = [path for path in (ROOT / folder).rglob("*") if path.suffix in suffixes]
        assert files and {f"avion/{path.relative_to(ROOT).as_posix()}" for path in files} <= names
    assert {
        "avion/py.typed",
        "avion/models/listing.json",
        "avion/ops/mixer/native.c",
        "avion/data/video/scale.c",
    } <= set(names)
    assert not [name for name in names if name.startswith(("tests", "tools")) or name.endswith("submit.sbatch")]
    assert "avion/slurm/submit.py" not in names


def test_every_command_says_what_it_is_for(installed, tmp_path):
    listed = run([installed / "avion", "--help"], tmp_path)
    assert listed.returncode == 0 and listed.stderr == ""

    def help_of(program):
        return program, run([installed / "avion", program.name, "--help"], tmp_path)

    with ThreadPoolExecutor(2) as threads:
        for program, shown in threads.map(help_of, programs()):
            assert f"  {program.name} " in listed.stdout
            assert shown.returncode == 0, (program.name, shown.stderr)
            assert "usage:" in shown.stdout and "tools/" not in shown.stdout.split("\n", 1)[0]
    assert list(tmp_path.iterdir()) == []


def test_the_demo_data_are_made_and_a_model_is_pretrained(installed, tmp_path):
    """From an empty folder, with a recipe out of the wheel; the run is drawn afterwards."""
    avion = [installed / "python", "-c", AVION]
    made = run([*avion, "demo-data", "--root", "data"], tmp_path)
    assert made.returncode == 0, made.stderr
    words = "--config recipes/demo_pretrain.yaml --root data --epochs 1 --eval-freq 1 --warmup-epochs 0 --batch-size 4"
    trained = run([*avion, "pretrain", *words.split(), "--workers", "0", "--output-dir", "run"], tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert "evaluation: V2T/T2V/avg mAP" in trained.stderr
    drawn = run([installed / "avion", "plot", "run", "--output", "curves.png"], tmp_path)
    assert drawn.returncode == 0 and (tmp_path / "curves.png").stat().st_size > 10_000


def test_two_processes_start_with_torchrun(installed, tmp_path):
    """`torchrun -m avion`: both processes parse the flags, and a mistake ends both with one line and status 2."""
    start = [installed / "python", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "avion"]
    done = run([*start, "pretrain", "--help"], tmp_path)
    assert done.returncode == 0 and done.stdout.count("usage: avion pretrain") == 2


def test_reproduce_shows_a_command_that_runs_without_a_clone(installed, tmp_path):
    shown = run([installed / "avion", "reproduce", "--table", "8", "--row", "7"], tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "torchrun --standalone --nproc_per_node=8 -m avion pretrain" in shown.stdout
    shown = run([installed / "avion", "reproduce", "--table", "8", "--row", "7", "--scale", "demo"], tmp_path)
    assert "\navion pretrain " in shown.stdout
    assert "avion reproduce" in run([installed / "avion", "reproduce", "--help"], tmp_path).stdout


def test_batch_files_are_copied_out(installed, tmp_path):
    done = run([installed / "avion", "files", "--copy", "."], tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "slurm/pretrain.sbatch").is_file() and (tmp_path / "recipes/scales/demo.yaml").is_file()


TYPED = """
from typing import assert_type

import torch

from avion.models import classifier_from_checkpoint, create_model, model_from_checkpoint
from avion.models.clip import CLIP, VideoClassifier

video, tokens = torch.zeros(1, 3, 4, 224, 224), torch.zeros(1, 77, dtype=torch.int64)
model = model_from_checkpoint("a.pt")
assert_type(model, CLIP)
assert_type(model.encode_text(tokens), torch.Tensor)
assert_type(create_model("TIMEMAMBA_VITB16").encode_image(video), torch.Tensor)
assert_type(classifier_from_checkpoint("a.pt"), VideoClassifier)
model.config.num_frames + 1
"""


def test_a_type_checker_sees_an_editable_installation(source, tmp_path):
    """And what the loaders return: `model.encode_text` completes, and a misspelling is found."""
    folder, _ = environment(tmp_path / "venv", "--editable", source)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/use.py").write_text(TYPED)
    (tmp_path / "mine/wrong.py").write_text(TYPED + "model.encode_txt(tokens)\nmodel.encode_text(7)\n")
    checker = [sys.executable, "-m", "pyrefly", "check", "--output-format", "min-text"]
    checker += ["--python-interpreter-path", folder / "bin/python"]
    good = run([*checker, "use.py"], tmp_path / "mine")
    assert good.returncode == 0, good.stdout
    wrong = run([*checker, "wrong.py"], tmp_path / "mine")
    found = [line for line in wrong.stdout.splitlines() if line.startswith("ERROR")]
    assert wrong.returncode == 1 and len(found) == 2, wrong.stdout
    assert "not-callable" in found[0] and "bad-argument-type" in found[1]
