"""avion.files: what is written is there whole or not at all, whatever the disk and the process do."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from avion.errors import UserError
from avion.files import (
    PARTIAL,
    append_lines,
    partial_file,
    partial_name,
    remove_partial_files,
    write_text,
    written_whole,
)

# Writes 4 MB with the library named in argv[1] where a file may have 1 MB: PyTorch's zip writer, NumPy and safetensors
# each report the failed write in another way.
TOO_LARGE = """
import resource, sys
import numpy as np, torch
from safetensors.torch import save_file
from avion.errors import UserError
from avion.files import partial_file, written_whole
if sys.argv[3] == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
values = torch.arange(1 << 20, dtype=torch.float32)
try:
    if sys.argv[1] == "safetensors":
        with partial_file(sys.argv[2]) as partial:
            save_file({"x": values}, partial)
    else:
        with written_whole(sys.argv[2], flag="--file", cure="give another one") as file:
            torch.save({"x": values}, file) if sys.argv[1] == "torch" else np.savez(file, x=values.numpy())
except UserError as e:
    print(e)
"""


@pytest.fixture(params=["limit", "full disk"])
def too_small(request, tmp_path):
    """A folder where 4 MB cannot be written: by a limit on file sizes, and, as root, a full file system."""
    if request.param == "limit":
        yield tmp_path, "limit", "File too large"
        return
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = os.geteuid() == 0 and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("only root may mount a small file system")
    yield folder, "disk", "No space left on device"
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("library", ["torch", "numpy", "safetensors"])
def test_a_full_disk_is_one_line_and_leaves_the_old_file_alone(too_small, library):
    folder, how, reason = too_small
    target = folder / "file"
    target.write_bytes(b"old")
    done = subprocess.run(
        [sys.executable, "-c", TOO_LARGE, library, str(target), how], capture_output=True, text=True, timeout=120
    )
    flag, cure = ("", "change --output-dir") if library == "safetensors" else ("--file ", "give another one")
    assert done.stdout == f"{flag}{target}: cannot be written ({reason}); free space or {cure}\n", done.stderr
    assert target.read_bytes() == b"old" and os.listdir(folder) == ["file"]


@pytest.mark.parametrize("error", [ValueError("of the caller"), KeyboardInterrupt()])
def test_another_exception_passes_and_leaves_no_partial_file(tmp_path, error):
    for context in (written_whole, partial_file):
        with pytest.raises(type(error)) as caught, context(tmp_path / "file") as target:
            (target if context is partial_file else Path(target.name)).write_bytes(b"half")
            raise error
        assert caught.value is error and os.listdir(tmp_path) == []


def test_readers_see_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "file"
    write_text(path, "old")
    with written_whole(path) as file:
        file.write(b"new, and longer")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new, and longer" and os.listdir(tmp_path) == ["file"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def test_two_writers_of_one_file_use_names_of_their_own(tmp_path):
    path = tmp_path / "file"
    with written_whole(path) as first, written_whole(path) as second:
        first.write(b"first")
        second.write(b"second")
    assert path.read_bytes() == b"first" and os.listdir(tmp_path) == ["file"]


def test_libraries_can_write_and_seek(tmp_path):
    values = np.arange(5.0)
    with written_whole(tmp_path / "a.npz") as file:
        np.savez(file, x=values)
    with written_whole(tmp_path / "b.pt") as file:
        torch.save({"x": torch.from_numpy(values)}, file)
    with partial_file(tmp_path / "c.safetensors") as partial:
        save_file({"x": torch.from_numpy(values)}, partial)
    assert np.array_equal(np.load(tmp_path / "a.npz")["x"], values)
    assert torch.load(tmp_path / "b.pt", weights_only=True)["x"].tolist() == values.tolist()
    assert sorted(os.listdir(tmp_path)) == ["a.npz", "b.pt", "c.safetensors"]


@pytest.mark.parametrize(
    "name, reason",
    [("folder", "it is a folder"), ("missing/file", "No such file or directory"), ("x" * 256, "File name too long")],
)
def test_a_target_that_cannot_be(tmp_path, name, reason):
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=rf"{name}: cannot be written \({reason}\)"):
        write_text(tmp_path / name, "text")
    assert os.listdir(tmp_path) == ["folder"]


def test_the_longest_name_has_a_partial_name(tmp_path):
    target = tmp_path / ("ä" * 127)  # 254 bytes
    write_text(target, "text")
    assert target.read_text() == "text" and len(os.fsencode(partial_name(target).name)) <= 255


def test_a_killed_process_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    code = (
        "import sys, time; from avion.files import written_whole\n"
        "with written_whole(sys.argv[1]) as f:\n    f.write(b'x' * 100000); print(flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert path.read_text() == "old"
    assert [name for name in os.listdir(tmp_path) if not name.endswith(PARTIAL)] == ["file"]


def test_what_killed_processes_left_is_deleted_by_name(tmp_path):
    parts = [partial_name(tmp_path / name).name for name in ("checkpoint.pt", "checkpoint_best.pt", "notes.txt")]
    parts += [f"checkpoint.pt{PARTIAL}", f"film{PARTIAL}"]
    for name in [*parts, "checkpoint.pt"]:
        (tmp_path / name).write_text("half")
    remove_partial_files(tmp_path, "checkpoint*.pt", "wandb_id.txt")
    assert sorted(os.listdir(tmp_path)) == sorted([parts[2], f"film{PARTIAL}", "checkpoint.pt"])


def test_appended_lines_are_never_glued_onto_a_torn_one(tmp_path):
    path = tmp_path / "log.txt"
    append_lines(path, ['{"epoch": 0}'])
    with open(path, "a") as file:
        file.write('{"epo')  # the process was killed here
    append_lines(path, ['{"epoch": 1}', '{"epoch": 2}'])
    assert path.read_text() == '{"epoch": 0}\n{"epo\n{"epoch": 1}\n{"epoch": 2}\n'


def test_lines_of_several_processes_stay_whole(tmp_path):
    path = tmp_path / "log.txt"
    code = (
        "import sys; from avion.files import append_lines\n"
        "for i in range(50): append_lines(sys.argv[1], [sys.argv[2] * 3000])"
    )
    workers = [subprocess.Popen([sys.executable, "-c", code, str(path), letter]) for letter in "ab"]
    deadline = time.monotonic() + 120
    assert [w.wait(max(1, deadline - time.monotonic())) for w in workers] == [0, 0]
    lines = path.read_text().split("\n")
    assert sorted(lines) == sorted([""] + ["a" * 3000] * 50 + ["b" * 3000] * 50)


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value
