"""A disk that is full while a run writes: one line, no partial file, and the last checkpoint whole."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from avion.weights import Checkpoint
from tests.endurance import frame


@contextlib.contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    """A file system of this size, where this is root's machine."""
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(words, capture_output=True).returncode:
        raise frame.Skipped("only root may mount a small file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def check(done: subprocess.CompletedProcess, folder: Path, reason: str) -> None:
    """The run ended with the documented line, and what is left is whole."""
    line = frame.error_line(done)
    assert f"cannot be written ({reason}); free space or change --output-dir" in line, line
    assert not [name for name in os.listdir(folder) if name.endswith(".partial")], os.listdir(folder)
    for path in folder.glob("checkpoint*.pt"):
        Checkpoint.open(path)


def full_disk(trial: frame.Trial) -> None:
    """A disk with room for the logs and one to three checkpoints of 16 MB, and some part of the next one."""
    with small_disk(trial.folder / "disk", int(trial.rng.integers(1000, 60000))) as disk:
        done = frame.run(
            frame.command([*frame.tiny_flags(), "--epochs", "4", "--output-dir", disk, "--save-steps", "1"])
        )
        check(done, disk, "No space left on device")


def size_limit(trial: frame.Trial) -> None:
    """A limit on the size of files, below that of a checkpoint. It is the same for everybody, not for root alone."""
    folder = trial.folder / "run"
    words = frame.command([*frame.tiny_flags(), "--output-dir", folder])
    limited = ["prlimit", f"--fsize={int(trial.rng.integers(200, 4000)) * 1024}", *words]
    check(frame.run(limited), folder, "File too large")


if __name__ == "__main__":
    frame.main(__doc__, {"a full disk": (full_disk, 20, 1), "a limit on sizes": (size_limit, 10, 1)})
