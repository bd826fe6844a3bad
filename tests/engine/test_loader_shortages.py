"""A full /dev/shm and too many open files: one line that names cause and cure, soon, in a process of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from avion.engine.loader import read
from avion.engine.workers import shortage
from avion.errors import UserError

ROOT = Path(__file__).parents[2]

CODE = """
import resource, sys
sys.path.insert(0, {root!r})
import torch
from torch.utils.data import Dataset
from avion.engine.loader import batches_of, build_loader, read
from avion.errors import UserError

class Clips(Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, i):
        return {{"index": i, "video": torch.zeros(3, 16, 112, 112, dtype=torch.uint8)}}

if {files}:
    resource.setrlimit(resource.RLIMIT_NOFILE, ({files}, {files}))
try:
    batches = batches_of(build_loader(Clips(), [[k % 40, 0] for k in range(100)], workers=2,
                                device=torch.device("cpu"), large_samples=False))
    held = [read(batches) for _ in range(100)]
    print("read", len(held))
except UserError as error:
    print("told", error)
"""


def outcome(files: int = 0, before: tuple[str, ...] = ()) -> str:
    """What the process prints; it has a minute."""
    command = [*before, sys.executable, "-c", CODE.format(root=str(ROOT), files=files)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("files", [30, 44, 64])
def test_too_many_open_files(files):
    found = outcome(files)
    assert found.startswith("told too many files are open") and "ulimit -n" in found and "\n" not in found


def test_enough_of_both():
    assert outcome() == "read 100"


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs a mount of its own")
def test_a_full_dev_shm():
    mounted = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=6m tmpfs /dev/shm && exec "$@"', "sh")
    if subprocess.run([*mounted, "true"], capture_output=True).returncode != 0:
        pytest.skip("this machine allows no mount")
    found = outcome(before=mounted)
    assert found.startswith("told /dev/shm is full") and "--batch-size" in found and "\n" not in found


def test_other_errors_are_no_shortages():
    assert shortage("CUDA out of memory") is None and shortage("no such file", 2) is None
    assert "/dev/shm" in shortage("DataLoader worker is killed by signal: Bus error.")
    assert "ulimit" in shortage("received 0 items of ancdata")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "DataLoader worker (pid 27294) is killed by signal: Killed. ",
            "a data-loading process (pid 27294) was ended by SIGKILL (Killed); lower --workers if memory ran out",
        ),
        (
            "DataLoader worker (pid 7) exited unexpectedly with exit code 3. Details are lost due to multiprocessing.",
            "a data-loading process (pid 7) ended with exit code 3; lower --workers if memory ran out",
        ),
        (
            "DataLoader worker (pid(s) 7, 8) exited unexpectedly",
            "a data-loading process (pid 7) died; lower --workers if memory ran out",
        ),
    ],
)
def test_a_worker_that_died_before_it_was_watched(text, line):
    """The texts are PyTorch's, of torch/csrc/DataLoader.cpp and torch/utils/data/dataloader.py."""

    def batches():
        raise RuntimeError(text)
        yield

    with pytest.raises(UserError) as error:
        read(batches())
    assert str(error.value) == line
