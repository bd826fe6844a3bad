"""tools/export_model.py: a checkpoint in, a program that runs without this project out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from avion.commands import export_model as tool

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
HEADS = ["--model-args", "num_heads=4", "text_heads=4"]


@pytest.mark.parametrize(
    ("name", "style"),
    [("ID4", "openai"), ("ID6", "openai"), ("VIT", "openai_legacy"), ("LAVILA", "openai_legacy")],
)
def test_the_program_gives_what_upstream_computed(name, style, tmp_path, capsys):
    expected = torch.load(FIXTURES / f"{name}_expected.pt", weights_only=True)
    for tower, given, wanted in (("video", "video", "video_embed"), ("text", "tokens", "text_embed")):
        target = tmp_path / f"{tower}.pt2"
        words = [str(FIXTURES / f"{name}_checkpoint.pt"), str(target), "--tower", tower, *HEADS]
        assert tool.main(words) == 0
        said = capsys.readouterr().out.splitlines()
        assert len(said) == 3 and "-> " + tower in said[1] and "differs from the model by at most" in said[1]
        found = torch.export.load(target).module()(expected[given])
        unit = torch.nn.functional.normalize(found, dim=-1)
        torch.testing.assert_close(unit, expected[wanted], rtol=0, atol=1e-4)
    facts = json.loads((tmp_path / "video.pt2.json").read_text())
    assert facts["preprocessing"]["norm_style"] == style


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["missing.pt", "{tmp}/a.pt2"], "missing.pt: no such file"),
        (["{fixture}", "{tmp}/a.pt2"], "give text_heads="),
        (["{fixture}", "{tmp}/a.pt", *HEADS], "suffix '.pt', expected .pt2 or .onnx"),
        (["{fixture}", "{tmp}/a.onnx", *HEADS, "--format", "pt2"], "suffix '.onnx', expected .pt2"),
        (["{fixture}", "{tmp}/none/a.pt2", *HEADS], "does not exist"),
        (["{fixture}", "{tmp}/a.pt2", *HEADS, "--norm-style", "openai_legacy"], "give --norm-style openai"),
        (["{fixture}", "{tmp}/a.pt2", *HEADS, "depht=3"], "depht"),
    ],
)
def test_mistakes_are_one_line(words, says, tmp_path, capsys):
    words = [w.format(tmp=tmp_path, fixture=FIXTURES / "ID4_checkpoint.pt") for w in words]
    assert tool.main(words) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and says in captured.err and captured.out == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("existing", ["a.pt2", "a.pt2.json"])
def test_files_are_kept_unless_asked(existing, tmp_path, capsys):
    (tmp_path / existing).write_text("mine")
    words = [str(FIXTURES / "VIT_checkpoint.pt"), str(tmp_path / "a.pt2"), "--tower", "text", *HEADS]
    assert tool.main(words) == 2
    assert f"{existing}: exists already; give another name, or --overwrite" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == [existing] and (tmp_path / existing).read_text() == "mine"
    assert tool.main([*words, "--overwrite"]) == 0
    assert json.loads((tmp_path / "a.pt2.json").read_text())["tower"] == "text"


def test_the_checkpoint_is_never_replaced(tmp_path, capsys):
    source = tmp_path / "a.pt2"
    source.write_bytes((FIXTURES / "VIT_checkpoint.pt").read_bytes())
    assert tool.main([str(source), str(source), *HEADS, "--overwrite"]) == 2
    assert "is a file that is read" in capsys.readouterr().err
    assert source.read_bytes() == (FIXTURES / "VIT_checkpoint.pt").read_bytes()


def test_help_is_quick_and_names_both_formats():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", ROOT / "tools/export_model.py", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and ".pt2 or .onnx" in " ".join(done.stdout.split())
    assert " torch\n" not in done.stderr
