"""`--import MODULE`: a model and a mixer of one's own, through every entry point and tool that builds a model."""

import contextlib
import importlib
import io
import itertools
import re
import sys

import pytest
import torch

import main_egoschema
import main_finetune_classification
import main_finetune_retrieval
import main_pretrain
import main_zeroshot
from avion.commands import (
    convert_checkpoint,
    demo,
    doctor,
    extract_features,
    plot_run,
    reproduce,
    search_videos,
    submit,
)
from avion.commands.table import programs
from avion.engine.args import build_parser
from avion.engine.options.search import IndexOptions, SearchOptions, ServeOptions
from avion.engine.submit import ENTRY_POINTS, SubmitOptions
from avion.errors import UserError
from avion.models import __main__ as models
from avion.models import create_model, list_models, model_from_checkpoint
from avion.plugins import import_plugins
from tests.engine.egoschema.case import write_egoschema
from tests.engine.zeroshot.case import write_benchmarks
from tests.models.registered import registered_for_a_while

SOURCE = '''
import torch
from torch import nn
from avion.models import register_mixer, register_model
from avion.models.registry import ModelConfig

class Mean(nn.Module):
    """(R, T, D) -> the same: a frame and the mean of all frames."""

    def __init__(self, dim):
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def forward(self, x):
        return self.linear(x + x.mean(1, keepdim=True))

register_mixer("mean", lambda config: Mean(config.embed_dim))
small = dict(img_size=32, embed_dim=32, depth=2, num_heads=2, text_width=32, text_heads=2, text_layers=1)
register_model(ModelConfig("MEAN_TINY", "divided", mixer="mean", **small, project_embed_dim=16))
'''
_numbers = itertools.count()
SIZES = "--model MEAN_TINY --context-length 12 --vocab-size 49408".split()


@pytest.fixture
def plugin(tmp_path):
    """Makes the module under a name that was not imported before; nothing stays registered after a program."""
    made = []

    def make(source=SOURCE):
        name = f"mean_plugin_{next(_numbers)}"
        (tmp_path / f"{name}.py").write_text(source)
        made.append(name)
        return name

    path = list(sys.path)
    yield make
    sys.path[:] = path
    for name in made:
        sys.modules.pop(name, None)


@pytest.fixture
def call(plugin, tmp_path, monkeypatch):
    """Runs a program with `--import`, as in a process of its own; its status."""
    monkeypatch.chdir(tmp_path)

    def run(main, *words, flag="--import"):
        with registered_for_a_while():
            return main([flag, plugin(), *map(str, words)])

    return run


@pytest.fixture
def checkpoint(call, tiny_flags, tmp_path):
    """A model of the plug-in, pretrained by `main_pretrain.py`."""
    assert call(main_pretrain.main, *without(tiny_flags, "--model"), *SIZES, "--output-dir", "pre") == 0
    return tmp_path / "pre/checkpoint.pt"


def without(flags, *names):
    """Flags without some of them and their values."""
    left, skip = [], False
    for word in flags:
        skip = word in names or (skip and not word.startswith("--"))
        if not skip:
            left.append(word)
    return left


def test_every_entry_point_takes_a_model_of_ones_own(checkpoint, call, mir_flags, tiny_actions, tmp_path, capsys):
    frames = without(mir_flags, "--model", "--model-args")
    assert call(main_finetune_retrieval.main, *frames, "--pretrain-model", checkpoint, "--output-dir", "mir") == 0
    flags = [*without(tiny_actions.flags, "--pretrain-model"), "--pretrain-model", checkpoint]
    assert call(main_finetune_classification.main, *flags, "--output-dir", "cls") == 0
    data = write_egoschema(tmp_path / "egoschema")
    flags = [*without(data.flags, "--pretrain-model"), "--pretrain-model", checkpoint, "--frames", "4"]
    assert call(main_egoschema.main, *flags, "--output-dir", "ego", flag="--plugins") == 0
    for folder in ("mir", "cls"):
        weights = torch.load(tmp_path / folder / "checkpoint.pt", weights_only=False)["state_dict"]
        assert any(".time_mixer.linear." in name for name in weights)
    assert (tmp_path / "ego/eval_log.txt").read_text()


def test_tools_take_it(checkpoint, call, tmp_path, capsys):
    assert call(convert_checkpoint.main, checkpoint, "converted.safetensors") == 0
    (tmp_path / "list.txt").write_text("egoschema/videos/video-0.mp4\n")
    write_egoschema(tmp_path / "egoschema")
    words = ["--checkpoint", "converted.safetensors", "--videos", "list.txt", "--output-dir", "features"]
    assert call(extract_features.main, *words, "--workers", "0", "--device", "cpu") == 0
    capsys.readouterr()
    assert call(models.main, checkpoint) == 0 and "MEAN_TINY" in capsys.readouterr().out
    assert call(models.main, "MEAN*") == 0 and "MEAN_TINY" in capsys.readouterr().out
    assert call(plot_run.main, "pre", "--output", "curves.png") == 0


def test_zero_shot_benchmarks_take_it(checkpoint, call, tmp_path, capsys):
    data = write_benchmarks(tmp_path / "benchmarks")
    words = [
        *data.flags,
        "--dataset",
        "retrieval",
        "egomcq",
        "--resume",
        checkpoint,
        "--device",
        "cpu",
        "--workers",
        "0",
    ]
    assert call(main_zeroshot.main, *words, "--output-dir", "zeroshot") == 0
    assert len((tmp_path / "zeroshot/eval_log.txt").read_text().splitlines()) == 2


def test_search_takes_it(checkpoint, plugin, tmp_path, monkeypatch, capsys):
    """The parts of the tool take the flag behind their names; a search without the module says what to import."""
    monkeypatch.chdir(tmp_path)
    write_egoschema(tmp_path / "egoschema")

    def search(part, *words, imported=True):
        with registered_for_a_while():
            more = ["--import", plugin()] if imported else []
            return search_videos.main([part, *words, "--device", "cpu", *more])

    words = ["egoschema/videos", "--checkpoint", str(checkpoint), "--workers", "0"]
    assert search("index", *words) == 0
    assert search("search", "folds a cloth") == 0
    assert "video-0" in capsys.readouterr().out
    assert search("search", "folds a cloth", imported=False) == 2
    assert "--import MODULE" in capsys.readouterr().err


def test_a_checkpoint_of_an_unknown_model_says_what_to_import(checkpoint, call, tmp_path, capsys):
    capsys.readouterr()
    assert main_pretrain.main(["--model", "MEAN_TINY"]) == 2
    assert "unknown model 'MEAN_TINY'" in (said := capsys.readouterr().err) and "--import MODULE" in said
    for refused in (lambda: model_from_checkpoint(checkpoint), lambda: create_model("TIMEMAMBA_VITB16", mixer="mean")):
        with pytest.raises(UserError, match="--import MODULE"):
            refused()
    assert main_pretrain.main(["--model", "TIMEMAMBA_VITB16", "--model-args", "mixer=mean"]) == 2
    assert "--import MODULE" in capsys.readouterr().err


def test_the_yaml_key_does_the_same(call, plugin, tiny_flags, tmp_path):
    (tmp_path / "mine.yaml").write_text(f"plugins: [{plugin()}]\nmodel: MEAN_TINY\n")
    words = ["--config", "mine.yaml", *without(tiny_flags, "--model"), *SIZES[2:], "--output-dir", "out"]
    with registered_for_a_while():
        assert main_pretrain.main(words) == 0


def test_a_job_imports_what_the_submitter_imports(call, plugin, tmp_path, capsys):
    words = ["main_pretrain.py", "--dry-run", "--import", name := plugin(), "--", "--model", "MEAN_TINY"]
    with registered_for_a_while():
        assert submit.main(words) == 0
    assert f"main_pretrain.py --import {name} --model MEAN_TINY" in capsys.readouterr().out


def test_a_recipe_and_the_recipes_that_it_starts_from_import_it(call, capsys):
    assert call(reproduce.main, *"--table 9 --row 6 --task actions --with-prerequisites".split()) == 0
    assert capsys.readouterr().out.count("--plugins mean_plugin_") == 2


def test_every_program_has_the_flag():
    for file in ENTRY_POINTS:
        assert "--import" in build_parser(ENTRY_POINTS[file], file, "")._option_string_actions
    for options in (SubmitOptions, IndexOptions, SearchOptions, ServeOptions):
        assert "--import" in build_parser(options, "", "")._option_string_actions
    for program in programs():
        if program.name != "torchrun":  # its words are torchrun's
            assert_help_names_the_flag(program)


# What stands before the flags of programs that run several others; torchrun's words are torchrun's.
BEFORE = {"search-videos": ["index"], "submit": ["main_pretrain.py"]}
EVERY = [program for program in programs() if program.name != "torchrun"]


@pytest.mark.parametrize("program", EVERY, ids=lambda program: program.name)
def test_every_program_imports_the_module(program, plugin, tmp_path, monkeypatch, capsys):
    """All commands of the table, of whatever kind: the module is run, and what it raises is told."""
    monkeypatch.chdir(tmp_path)
    name = plugin("raise RuntimeError('this module was run')\n")
    main = importlib.import_module(program.module).main
    try:
        status = main(program.argv([*BEFORE.get(program.name, []), "--import", name]))
    except SystemExit as e:
        status = e.code
    said = capsys.readouterr().err
    assert status == 2 and said.count("\n") == 1
    assert f"--import {name}: " in said and "line 1: RuntimeError: this module was run" in said


@pytest.mark.parametrize("program", [p for p in EVERY if p.module.startswith("avion.commands")], ids=lambda p: p.name)
def test_every_program_with_a_config_file_takes_the_key(program, plugin, tmp_path, monkeypatch, capsys):
    shown = io.StringIO()
    before = BEFORE.get(program.name, []) if program.name == "search-videos" else []
    main = importlib.import_module(program.module).main
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        main(program.argv([*before, "--help"]))
    if "--config" not in shown.getvalue():
        pytest.skip("takes no --config")
    monkeypatch.chdir(tmp_path)
    name = plugin("raise RuntimeError('this module was run')\n")
    (tmp_path / "mine.yaml").write_text(f"plugins: [{name}]\n")
    assert main(program.argv([*BEFORE.get(program.name, []), "--config", "mine.yaml"])) == 2
    said = capsys.readouterr().err
    assert "RuntimeError: this module was run" in said and said.count("\n") == 1


def assert_help_names_the_flag(program):
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
        raise SystemExit(importlib.import_module(program.module).main(program.argv(["--help"])))
    assert "--import" in shown.getvalue(), program.name


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1\ny = 1 / 0\n", r"mean_plugin_\d+.py line 2: ZeroDivisionError: division by zero"),
        ("import no_such_package_of_mine\n", r"line 1: ModuleNotFoundError: No module named 'no_such_package_of_mine'"),
        (SOURCE + SOURCE, "mixer 'mean' is already taken"),
    ],
)
@pytest.mark.parametrize("main", [main_pretrain.main, plot_run.main, demo.main, doctor.main])
def test_a_module_with_a_fault_is_one_line(source, message, main, plugin, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with registered_for_a_while():
        try:
            status = main(["--import", plugin(source)])
        except SystemExit as e:
            status = e.code
    said = capsys.readouterr().err
    assert status == 2 and said.count("\n") == 1
    assert re.search("error: --import mean_plugin_.*" + message, said)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module", "there is no module of this name in "),
        ("no/such/file.py", "there is no file .*no/such/file.py"),
        ("no module", "expected the name of a module"),
        ("os.no_such", "there is no module of this name|No module named 'os.no_such'"),
    ],
)
def test_what_is_no_module_is_one_line(name, message):
    with pytest.raises(UserError, match=f"^--import {name}: {message}"):
        import_plugins([name])


def test_a_file_is_imported_once_by_its_path(plugin, tmp_path):
    name = plugin()
    with registered_for_a_while():
        import_plugins([str(tmp_path / f"{name}.py"), str(tmp_path / "." / f"{name}.py")])
        assert "MEAN_TINY" in list_models()
    (tmp_path / "json.py").write_text("")
    with pytest.raises(UserError, match="a module 'json' has been imported from elsewhere; rename the file"):
        import_plugins([str(tmp_path / "json.py")])
