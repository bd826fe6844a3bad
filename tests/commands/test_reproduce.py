"""The command line of tools/reproduce.py; what it runs is tested in tests/reproduce/test_runs.py."""

import json
import re
from pathlib import Path

import pytest

from avion.commands.reproduce import main
from avion.engine.args import parse
from avion.engine.options import PretrainOptions
from avion.reproduce.prerequisites import Missing
from avion.reproduce.recipe import RECIPES, load_recipe


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
        ("", "give one of --table (8, 9, 10, avion, zeroshot), --figure (5) and --recipe"),
        ("--table 8 --figure 5", "give one of --table"),
        ("--table 8 --row 3", "no recipe for this row and task; there are --row 4 --task 'zero-shot retrieval'; "),
        ("--table 7", "no recipes for it; there are tables 10, 8, 9, avion, zeroshot and figure 5"),
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
    assert table.count("\n") == 2 + 21
    assert table in (Path(__file__).parents[2] / "docs/recipes.md").read_text(encoding="utf-8")


# ---- SLURM -----------------------------------------------------------------------------------


@pytest.fixture
def jobs(monkeypatch, tmp_path):
    """What would be submitted: (entry point, words, options); ids count up from 101. Data are taken to be there."""
    sent = []

    def submit(entry_point, words, options):
        sent.append((entry_point, list(words), options))
        return str(100 + len(sent))

    monkeypatch.setattr("avion.commands.reproduce.submit", submit)
    monkeypatch.setattr("avion.reproduce.plan.missing", lambda *args, **options: [])
    monkeypatch.chdir(tmp_path)
    return sent


def test_a_chain_is_submitted_in_order(jobs, tmp_path, capsys):
    words = "--table 9 --row 6 --submit --with-prerequisites --partition gpu --timeout 720".split()
    assert main(words) == 0
    assert [entry for entry, *_ in jobs] == [
        "main_pretrain.py",
        "main_finetune_classification.py",
        "main_finetune_retrieval.py",
    ]
    assert [options.dependency for *_, options in jobs] == ["", "afterok:101", "afterok:101"]
    assert all((o.partition, o.timeout, o.ngpus, o.nodes) == ("gpu", 720, 8, 1) for *_, o in jobs)
    assert "--pretrain-model=runs/table8_row6/checkpoint.pt" in jobs[1][1]
    assert "table9_row6_actions: submitted as job 102" in capsys.readouterr().out
    record = json.loads((tmp_path / "runs/table9_row6_actions/recipe.json").read_text())
    assert record["recipe"] == "table9_row6_actions"


@pytest.mark.parametrize(
    ("words", "per_node", "batch", "update_freq"),
    [
        ("--nodes 2", 8, 32, 1), ("--nodes 2 --ngpus 8", 8, 32, 1), ("--nodes 2 --gpus 8", 4, 64, 1),
        ("--gpus 4", 4, 64, 2), ("--ngpus 2", 2, 64, 4),
        ("--ngpus 0 --tasks-per-node 2 --device cpu", 2, 64, 4), ("--nodes 4 --gpus 4", 1, 64, 2),
    ],
)  # fmt: skip
def test_jobs_keep_the_global_batch(words, per_node, batch, update_freq, jobs):
    assert main(["--table", "8", "--row", "6", "--submit", *words.split()]) == 0
    ((entry, flags, options),) = jobs
    args = parse(PretrainOptions, flags, entry, "")
    assert (options.processes, args.batch_size, args.update_freq) == (per_node, batch, update_freq)
    assert options.nodes * options.processes * args.batch_size * args.update_freq == 512
    assert (options.ngpus == 0) == ("cpu" in words) == (args.device == "cpu")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--submit --nodes 3",
            "--nodes 3 with 8 processes each: --gpus 24: the batch of 512 clips of table8_row6",
        ),
        ("--submit --nodes 3 --gpus 8", "--nodes 3: 8 processes do not divide among them"),
        ("--submit --partion gpu", "unknown flag --partion: did you mean --partition"),
        ("--partition gpu", "unknown flag --partition: see --help"),
    ],
)
def test_mistakes_in_jobs_cost_one_line(words, message, jobs, capsys):
    assert main(["--table", "8", "--row", "6", *words.split()]) == 2
    said = capsys.readouterr().err
    assert said.startswith("tools/reproduce.py: error: ") and message in said and said.count("\n") == 1
    assert jobs == []


def test_a_dry_run_shows_the_jobs_and_leaves_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("avion.reproduce.plan.missing", lambda *args, **options: [])
    monkeypatch.chdir(tmp_path)
    words = "--table 9 --row 4 --task actions --submit --with-prerequisites --dry-run --account me"
    assert main(words.split()) == 0
    said = capsys.readouterr().out
    assert len(re.findall("^srun --nodes=1 --ntasks-per-node=8 python .*main_", said, re.MULTILINE)) == 2
    assert "afterok:(job of table8_row4)" in said and "me" in said
    assert list(tmp_path.iterdir()) == []


def test_two_nodes_have_a_command_and_hours_of_their_own(monkeypatch, tmp_path, capsys):
    """Twice the processes, half of the hours; the data are not here, and a dry run says so without refusing."""
    monkeypatch.chdir(tmp_path)
    words = ["--table", "8", "--row", "6", "--submit", "--nodes", "2"]
    assert main([*words, "--dry-run"]) == 0
    captured = capsys.readouterr()
    assert "srun --nodes=2 --ntasks-per-node=8 python" in captured.out and "--batch-size=32" in captured.out
    assert "not seen from this machine: " in captured.err and "ego4d_train.pkl" in captured.err
    assert main(words) == 2
    captured = capsys.readouterr()
    assert "--data-on-nodes" in captured.err.splitlines()[-1]
    started = "torchrun --nnodes=2 --rdzv_backend=c10d --rdzv_id=1 --rdzv_endpoint=HOST:29500 --nproc_per_node=8"
    assert started in captured.out
    whole = load_recipe(RECIPES / "table8_row6.yaml").hours
    assert f"at least {whole / 2:.2g} hours with 16 processes" in captured.out
    assert list(tmp_path.iterdir()) == []


def test_files_that_only_the_nodes_see_are_no_obstacle_on_request(jobs, monkeypatch, capsys):
    lack = [Missing("folder videos (--root)", "link it")]
    monkeypatch.setattr("avion.reproduce.plan.missing", lambda *args, **options: lack)
    words = ["--table", "8", "--row", "6", "--submit"]
    assert main(words) == 2 and jobs == []
    assert main([*words, "--data-on-nodes"]) == 0 and len(jobs) == 1
    assert "not seen from this machine: folder videos (--root): link it" in capsys.readouterr().err
