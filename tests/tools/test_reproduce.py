"""The command line of tools/reproduce.py; what it runs is tested in tests/reproduce/test_runs.py."""

from pathlib import Path

import pytest

from tools.reproduce import main


def test_a_row_shows_its_command_and_the_papers_figures(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["--table", "8", "--row", "7"]) == 0
    said = capsys.readouterr().out
    assert "--model=TIMEMAMBA_FROZEN_VITB16" in said and "--nproc_per_node=8" in said and "30.7/22.8/26.8" in said
    assert "missing:" in said and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "count"),
    [
        ("--table 8", 5), ("--table 9", 4), ("--table 9 --row 6", 2), ("--table 9 --row 6 --task actions", 1),
        ("--table 10", 4), ("--figure 5", 2), ("--table avion", 1), ("--recipe table8_row4 figure5_row6", 2),
        ("--table 8 --row 6 --seed 1 2 3", 3), ("--table 8 --from-released", 4), ("--table 9 --with-prerequisites", 6),
    ],
)  # fmt: skip
def test_what_is_asked_for_is_shown(words, count, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*words.split(), "--device", "cpu"]) == 0
    assert capsys.readouterr().out.count("  run in:") == count


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "give one of --table (8, 9, 10, avion), --figure (5) and --recipe"),
        ("--table 8 --figure 5", "give one of --table"),
        ("--table 8 --row 3", "no recipe for this row and task; there are --row 4 --task 'zero-shot retrieval'; "),
        ("--table 7", "no recipes for it; there are tables 10, 8, 9, avion and figure 5"),
        ("--recipe table8_row66", "unknown key 'table8_row66': did you mean table8_row6"),
        ("--table 8 --row 6 --checkpoint x.pt", "--checkpoint: goes with --from-released"),
        ("--table 8 --row 6 --gpus 3", "--gpus 3: the batch of 512 clips of table8_row6 does not divide"),
        ("--table 8 --row 6 --scale tiny", "--scale tiny: no such scale; there are full, demo"),
        ("--table 8 --row 8 --from-released", "no checkpoint of table8_row8 was released"),
        ("--table 8 --row 6 -- --epohcs 3", "unknown flag --epohcs: did you mean --epochs"),
    ],
)
def test_mistakes_cost_one_line(words, message, capsys):
    assert main(words.split()) == 2
    said = capsys.readouterr().err
    assert said.startswith("tools/reproduce.py: error: ") and message in said and said.count("\n") == 1


def test_run_refuses_and_lists_what_is_missing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["--table", "10", "--row", "6", "--run", "--device", "cpu"]) == 2
    said = capsys.readouterr()
    assert "questions.json" in said.out and "main_egoschema.py" in said.out and "nothing was started" in said.err
    assert list(tmp_path.iterdir()) == []


def test_the_documented_table_is_that_of_the_recipes(capsys):
    assert main(["--list"]) == 0
    table = capsys.readouterr().out
    assert table.count("\n") == 2 + 16
    assert table in (Path(__file__).parents[2] / "docs/recipes.md").read_text(encoding="utf-8")
