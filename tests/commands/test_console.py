"""The command `avion`: its table, its names in messages, and what it says to words that it does not know."""

import importlib
import subprocess
import sys

import pytest

from avion import errors
from avion.commands import console, files
from avion.commands.table import programs
from avion.engine.submit import ENTRY_POINTS, command_of, entry_point_of, program_words
from avion.errors import UserError, call_programs, called_names
from tests.layering import ROOT

NAMES = {"tools/plot_run.py": "avion plot", "main_egoschema.py": "avion egoschema"}


@pytest.fixture(autouse=True)
def names_as_before():
    before = dict(errors._names)
    yield
    call_programs(before)


def test_every_entry_point_and_every_tool_is_in_the_table():
    files_of_a_clone = {path.name for path in ROOT.glob("main_*.py")}
    files_of_a_clone |= {f"{f}/{path.name}" for f in ("tools", "slurm") for path in (ROOT / f).glob("*.py")}
    assert {program.file for program in programs()} - {""} == files_of_a_clone
    assert len({program.name for program in programs()}) == len(programs())


def test_the_entry_points_that_can_be_submitted_have_their_names():
    named = {program.file: program.name for program in programs()}
    assert {file: command_of(file) for file in ENTRY_POINTS}.items() <= named.items()
    assert entry_point_of("./main_pretrain.py") == entry_point_of("pretrain") == "main_pretrain.py"
    assert entry_point_of("finetune-retrieval") == "main_finetune_retrieval.py"
    with pytest.raises(UserError, match="main_pretrain.py, .* egoschema"):
        entry_point_of("retrieval")


@pytest.mark.parametrize("program", programs(), ids=lambda program: program.name)
def test_each_has_a_main_and_a_line(program):
    assert callable(importlib.import_module(program.module).main)
    assert program.summary and len(program.summary) < 80 and not program.summary.endswith(".")
    assert program.file == "" or (ROOT / program.file).is_file()
    assert any(line.split(maxsplit=1) == [program.name, program.summary] for line in console.listing().splitlines())


def test_help_lists_all(capsys):
    assert console.main(["--help"]) == console.main([]) == 0
    assert capsys.readouterr().out == 2 * (console.listing() + "\n")
    assert console.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("avion-timemamba ")


@pytest.mark.parametrize(
    ("word", "cure"),
    [("plots", "did you mean plot"), ("plot_run", "did you mean plot"), ("xyzzy", "avion --help lists all commands")],
)
def test_an_unknown_command_is_one_line(word, cure, capsys):
    assert console.main([word]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"avion: error: there is no command {word!r}: {cure}") and said.count("\n") == 1


@pytest.mark.parametrize("word", ["plot", "tools/plot_run.py"])
def test_a_program_names_itself_as_it_was_called(word, capsys, tmp_path):
    assert console.main([word, str(tmp_path / "gone"), "--output", str(tmp_path / "a.png")]) == 2
    assert capsys.readouterr().err.startswith("avion plot: error: ")
    with pytest.raises(SystemExit) as end:
        console.main([word, "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert (
        shown.startswith("usage: avion plot ") and "\n    avion plot runs/id6 " in shown and "plot_run.py" not in shown
    )


def test_an_entry_point_too(capsys):
    assert console.main(["pretrain", "--batchsize", "4"]) == 2
    assert capsys.readouterr().err.startswith("avion pretrain: error: unknown flag --batchsize: did you mean")
    assert console.main(["egoschema", "--config", str(ROOT / "recipes/demo_pretrain.yaml")]) == 2


@pytest.mark.parametrize(
    ("text", "called"),
    [
        ("run python tools/plot_run.py RUN", "run avion plot RUN"),
        ("tools/plot_run.py draws it", "avion plot draws it"),
        ("torchrun --nproc_per_node=8 main_egoschema.py X", "torchrun --nproc_per_node=8 -m avion egoschema X"),
        ("/home/me/tools/plot_run.py", "/home/me/tools/plot_run.py"),
        ("my_main_egoschema.py", "my_main_egoschema.py"),
        ("main_egoschema.pyx", "main_egoschema.pyx"),
    ],
)
def test_names_in_messages(text, called):
    call_programs(NAMES)
    assert called_names(text) == called
    call_programs({})
    assert called_names(text) == text


@pytest.mark.parametrize("part", ["index", "search", "serve"])
def test_parts_of_a_tool_are_commands_of_their_own(part, capsys, tmp_path):
    """`avion index` is `tools/search_videos.py index`, in its messages too; `search-videos` and `index-videos` stay."""
    status = console.main([part, *(["no such folder"] if part == "index" else []), "--index", str(tmp_path / "gone")])
    said = capsys.readouterr().err
    assert status == 2 and said.count("\n") == 1 and said.startswith(f"avion {part}: error: ")
    assert "search_videos" not in said and "search-videos" not in said
    with pytest.raises(SystemExit) as end:
        console.main([part, "--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0 and shown.startswith(f"usage: avion {part} ")
    assert console.main(["search-videos", part, "--index", str(tmp_path / "gone")]) == 2
    assert find_module(part) == find_module("search-videos") != find_module("index-videos")


def find_module(command):
    return console.find(command).module


def test_the_files_are_copied_and_nothing_is_overwritten(tmp_path, capsys):
    assert files.main([]) == 0
    assert capsys.readouterr().out.split() == [str(ROOT / "recipes"), str(ROOT / "slurm")]
    assert files.main(["--copy", str(tmp_path / "mine")]) == 0
    for name in ("recipes/table8_row6.yaml", "recipes/scales/demo.yaml", "slurm/pretrain.sbatch", "slurm/common.sh"):
        assert (tmp_path / "mine" / name).read_bytes() == (ROOT / name).read_bytes()
    assert not (tmp_path / "mine/slurm/submit.py").exists()
    assert files.main(["--copy", str(tmp_path / "mine")]) == 0  # the same content is no obstacle
    (tmp_path / "mine/slurm/common.sh").write_text("mine")
    capsys.readouterr()
    assert files.main(["--copy", str(tmp_path / "mine")]) == 2
    assert "common.sh is there with another content; --overwrite" in capsys.readouterr().err
    assert (tmp_path / "mine/slurm/common.sh").read_text() == "mine"
    assert files.main(["--copy", str(tmp_path / "mine"), "--force"]) == 0
    assert (tmp_path / "mine/slurm/common.sh").read_bytes() == (ROOT / "slurm/common.sh").read_bytes()


def test_commands_without_a_clone(monkeypatch):
    assert program_words("main_pretrain.py", ["--x"], 1)[0] == "python"
    monkeypatch.setattr("avion.engine.submit.checkout", lambda: None)
    assert program_words("main_finetune_retrieval.py", ["--x"]) == ["avion", "finetune-retrieval", "--x"]
    many = program_words("main_pretrain.py", [], 4)
    assert many == ["torchrun", "--standalone", "--nproc_per_node=4", "-m", "avion", "pretrain"]


@pytest.mark.parametrize("words", [["reproduce", "--list"], ["pretrain", "--help"], ["models"], ["--help"]])
def test_a_reader_that_leaves_early_is_no_error(words):
    """As `… | head -0`: the reading end is closed before anything is written."""
    child = subprocess.Popen(
        [sys.executable, "-m", "avion", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    )
    child.stdout.close()
    assert child.stderr.read() == b""
    assert child.wait() == 141
    child.stderr.close()
