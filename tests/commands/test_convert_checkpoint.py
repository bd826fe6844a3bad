"""tools/convert_checkpoint.py: a foreign checkpoint in, one of ours out."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from avion.commands import convert_checkpoint as tool
from avion.models import model_from_checkpoint
from avion.weights import Checkpoint

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
HEADS = ["--model-args", "num_heads=4", "text_heads=4"]


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize(
    ("name", "style"),
    [("ID4", "openai"), ("ID6", "openai"), ("VIT", "openai_legacy"), ("LAVILA", "openai_legacy")],
)
def test_the_copy_gives_what_upstream_computed(tmp_path, capsys, name, style, suffix):
    target = tmp_path / f"out{suffix}"
    assert tool.main([str(FIXTURES / f"{name}_checkpoint.pt"), str(target), *HEADS]) == 0
    assert f"--norm-style {style}" in capsys.readouterr().out
    assert Checkpoint.open(target).facts.norm_style == style
    expected = torch.load(FIXTURES / f"{name}_expected.pt", weights_only=True)
    model = model_from_checkpoint(target).eval()  # nothing has to be told any more
    with torch.no_grad():
        video, text, _ = model(expected["video"], expected["tokens"])
    torch.testing.assert_close(video, expected["video_embed"], rtol=0, atol=1e-4)
    torch.testing.assert_close(text, expected["text_embed"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["missing.pt", "{tmp}/a.pt"], "missing.pt: no such file"),
        (["{fixture}", "{tmp}/a.pt"], "give text_heads="),
        (["{fixture}", "{tmp}/a.bin", *HEADS], "expected .pt, .pth or .safetensors"),
        (["{fixture}", "{tmp}/none/a.pt", *HEADS], "does not exist"),
        (["{fixture}", "{tmp}/a.pt", *HEADS, "--norm-style", "openai_legacy"], "give --norm-style openai"),
        (["{fixture}", "{fixture}", *HEADS], "is a file that is read"),
        (["{fixture}", "{tmp}/a.pt", *HEADS, "depht=3"], "depht"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, words, says):
    words = [w.format(tmp=tmp_path, fixture=FIXTURES / "ID4_checkpoint.pt") for w in words]
    assert tool.main(words) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and says in captured.err and captured.out == ""
    assert not list(tmp_path.iterdir())


def test_bare_weights_of_another_program_need_a_norm_style(tmp_path, capsys):
    weights = {f"layer.{i}": torch.ones(2) for i in range(3)}
    torch.save(weights, tmp_path / "a.pt")
    assert tool.main([str(tmp_path / "a.pt"), str(tmp_path / "b.pt")]) == 2
    assert "give --norm-style" in capsys.readouterr().err


def test_help_from_the_command_line():
    command = [sys.executable, str(ROOT / "tools" / "convert_checkpoint.py"), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "FIELD=VALUE" in shown.stdout and "timemamba.safetensors" in shown.stdout
