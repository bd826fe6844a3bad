"""Every flag that names something to be written, given a name that must not be written: refused before work begins.

    python -m tests.endurance.targets [--short] [--only TEXT]

The flags are those of the list below; `test_every_flag_that_names_a_file_is_in_the_list` goes through the parsers.
"""

import contextlib
import io
import os
import time
from collections.abc import Callable
from pathlib import Path

from avion.commands import (
    build_relevancy,
    convert_checkpoint,
    export_model,
    files,
    finetune_classification,
    finetune_retrieval,
    index_videos,
    make_demo_data,
    make_submission,
    make_tables,
    plot_run,
    prepare_videos,
    pretrain,
)
from tests.endurance import frame

_FIXTURE = str(frame.ROOT / "tests" / "fixtures" / "classifier_pandas2.2.pt")
_PRETRAINED = str(frame.ROOT / "tests" / "fixtures" / "ID6_checkpoint.pt")
_SECONDS = 10.0  # of computing time, imports included: the work itself would take longer, or end otherwise
Main = Callable[[list[str]], int]


def _run(*words: str) -> Callable[[str, Path], list[str]]:
    return lambda target, folder: [*words, target, "--output-dir", str(folder / "run")]


# By program and flag: its main, the ending of the name, and the words of a call with this target.
FILES: dict[str, tuple[Main, str, Callable[[str, Path], list[str]]]] = {
    "pretrain --similarity-filename": (
        pretrain.main, ".npy",
        lambda target, folder: _run(*frame.tiny_flags(), "--similarity-filename")(target, folder),
    ),
    "finetune-retrieval --similarity-filename": (
        finetune_retrieval.main, ".npy", _run("--pretrain-model", _PRETRAINED, "--similarity-filename"),
    ),
    "finetune-classification --pickle-filename": (
        finetune_classification.main, ".pkl", _run("--pretrain-model", _FIXTURE, "--pickle-filename")
    ),
    "finetune-classification --submission": (
        finetune_classification.main, ".zip", _run("--pretrain-model", _FIXTURE, "--submission")
    ),
    "relevancy --output": (build_relevancy.main, ".pkl", lambda target, _: ["a.csv", "b.csv", "--output", target]),
    "convert target": (convert_checkpoint.main, ".pt", lambda target, _: ["a.pt", target]),
    "export target": (export_model.main, ".pt2", lambda target, _: ["a.pt", target]),
    "submission actions": (make_submission.main, ".zip", lambda target, _: ["actions", "a.pkl", target]),
    "submission retrieval": (
        make_submission.main, ".zip", lambda target, _: ["retrieval", "a.npy", "a.csv", "b.csv", target]
    ),
    "plot --output": (plot_run.main, ".png", lambda target, _: ["none", "--output", target]),
    "demo-data --contact-sheet": (make_demo_data.main, ".png", lambda target, _: ["--contact-sheet", target]),
    "index-videos --index": (index_videos.main, ".index", lambda target, _: ["none", "--index", target]),
}  # fmt: skip


def _source(folder: Path) -> str:
    """A folder that seems to hold a video, so that nothing but the target is wrong."""
    (folder / "a.mp4").write_text("precious")
    return str(folder)


FOLDERS: dict[str, tuple[Main, Callable[[str, Path], list[str]]]] = {
    "pretrain --output-dir": (pretrain.main, lambda target, _: [*frame.tiny_flags(), "--output-dir", target]),
    "tables --output": (make_tables.main, lambda target, _: ["none", "--output", target]),
    "files --copy": (files.main, lambda target, _: ["--copy", target]),
    "prepare TARGET": (prepare_videos.main, lambda target, folder: [_source(folder), target, "--layout", "whole"]),
}
# Kinds of targets: what stands there, and whether --overwrite may replace it.
BAD_FILES = (
    "an existing file",
    "a device",
    "a named pipe",
    "a folder",
    "a long name",
    "below a file",
    "a link to a file",
)
OWN = ("its own checkpoint", "its own log")
BAD_FOLDERS = ("an existing file", "a device", "a named pipe", "a long name", "below a file")


def _target(kind: str, suffix: str, folder: Path) -> Path:
    target = folder / f"target{suffix}"
    if kind in ("an existing file", "a link to a file"):
        target.write_text("precious")
        if kind == "a link to a file":
            (folder / f"link{suffix}").symlink_to(target)
            return folder / f"link{suffix}"
    elif kind == "a device":  # with the ending that the flag wants
        target.symlink_to("/dev/full")
    elif kind == "a named pipe":
        os.mkfifo(target)
    elif kind == "a folder":
        target.mkdir()
    elif kind == "a long name":
        return folder / ("x" * (256 - len(suffix)) + suffix)
    elif kind == "below a file":
        (folder / "file").write_text("precious")
        return folder / "file" / target.name
    elif kind in OWN:
        (folder / "run").mkdir()
        name = "checkpoint.pt" if kind == OWN[0] else "log.txt"
        (folder / "run" / name).write_text("precious")
        return folder / "run" / name
    return target


def _refused(main: Main, words: list[str], folder: Path) -> str:
    """The one line with which a program refuses its work; nothing in the folder has changed."""
    before = _contents(folder)
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        status, told = -1, io.StringIO()
        with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
            try:
                status = main(words)
            except SystemExit as e:
                status = int(e.code or 0)
        os.write(write_end, f"{status} {time.process_time():.1f}\n{told.getvalue()}"[:60_000].encode())
        os._exit(0)
    os.close(write_end)
    with open(read_end, encoding="utf-8") as pipe:
        head, _, text = pipe.read().partition("\n")
    os.waitpid(child, 0)
    lines = [line for line in text.splitlines() if ": error: " in line]
    assert head.split()[:1] == ["2"] and len(lines) == 1 and "Traceback" not in text, f"{head}: {text[-1500:]}"
    assert float(head.split()[1]) < _SECONDS, head
    assert _contents(folder) == before, "something was written"
    return lines[0]


def _contents(folder: Path) -> dict[str, str]:
    """What stands in a folder, without the empty folder of a run and its log."""
    kept = [p for p in folder.rglob("*") if p.name not in ("run", "train.log", "run.lock") and not p.is_dir()]
    return {str(p): p.read_text() if p.is_file() else "no file" for p in kept}


def file_trial(name: str, kind: str) -> Callable[[frame.Trial], None]:
    main, suffix, call = FILES[name]

    def refuse(trial: frame.Trial) -> None:
        target = _target(kind, suffix, trial.folder)
        line = _refused(main, call(str(target), trial.folder), trial.folder)
        assert target.name[:50] in line, line
        if "--index" in name or "convert" in name:
            return
        # What is no regular file, or the run's own, is not replaced either.
        if kind not in ("an existing file", "a link to a file"):
            words = [*call(str(target), trial.folder), "--overwrite"]
            assert _refused(main, words, trial.folder) == line

    return refuse


def folder_trial(name: str, kind: str) -> Callable[[frame.Trial], None]:
    main, call = FOLDERS[name]

    def refuse(trial: frame.Trial) -> None:
        target = _target(kind, "", trial.folder)
        line = _refused(main, call(str(target), trial.folder), trial.folder)
        assert target.name[:50] in line or str(target.parent) in line, line

    return refuse


def trials() -> frame.Trials:
    found: dict[str, tuple[Callable[[frame.Trial], None], int, int]] = {}
    for name in FILES:
        kinds = (*BAD_FILES, *OWN) if FILES[name][1] == ".pkl" and name.startswith("finetune") else BAD_FILES
        for kind in kinds:
            found[f"{name}: {kind}"] = (file_trial(name, kind), 1, int(len(found) % 6 == 1))
    for name in FOLDERS:
        for kind in BAD_FOLDERS:
            found[f"{name}: {kind}"] = (folder_trial(name, kind), 1, int(len(found) % 6 == 1))
    return found


if __name__ == "__main__":
    frame.main(__doc__, trials())
