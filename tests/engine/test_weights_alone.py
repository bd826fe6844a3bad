"""Training from a file of weights alone: a run of its own, from the first epoch on."""

import pytest

import main_pretrain
from avion.constants import NORM_STYLES
from avion.json_lines import read_json_lines
from avion.weights import model_from_checkpoint, save_weights


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt"])
def test_resume_of_weights_alone_begins_at_the_first_epoch(tiny_flags, tmp_path, name, capsys):
    first = tmp_path / "first"
    assert main_pretrain.main([*tiny_flags, "--output-dir", str(first)]) == 0
    model = model_from_checkpoint(first / "checkpoint.pt")
    save_weights(model, tmp_path / name, {"norm_style": "openai", **NORM_STYLES["openai"]._asdict()})
    again = tmp_path / "again"
    words = [*tiny_flags, "--resume", str(tmp_path / name), "--output-dir", str(again)]
    assert main_pretrain.main(words) == 0, capsys.readouterr().err
    epochs = [[row["epoch"] for row in read_json_lines(folder / "log.txt").objects] for folder in (first, again)]
    assert epochs[0] == epochs[1] and epochs[1][0] == 0
