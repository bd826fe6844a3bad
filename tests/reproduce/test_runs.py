"""Every recipe, shrunk, from the command line to its figures: trained, from weights, on several processes, again."""

import importlib
import json
import shutil
import signal
import sys
from pathlib import Path

import pytest

from avion.commands.reproduce import main
from avion.engine.trainer import Trainer
from avion.engine.zeroshot import evaluate
from avion.errors import UserError
from avion.reproduce import launch
from avion.reproduce.launch import RELEASED, TRAINED, run_child
from avion.reproduce.recipe import load_recipes, scaled

RECIPES = {recipe.key: recipe for recipe in load_recipes()}
NAMES = {
    "zero-shot retrieval": ["vis_map", "txt_map", "avg_map", "vis_ndcg", "txt_ndcg", "avg_ndcg"],
    "retrieval": ["vis_map", "txt_map", "avg_map", "vis_ndcg", "txt_ndcg", "avg_ndcg"],
    "actions": ["verb_top1", "noun_top1", "action_top1", "action_top5"],
    "egoschema": ["accuracy"],
}
EVALUATIONS = ("egoschema", "zero-shot benchmarks")  # they train nothing


def metrics(recipe, row):
    """The metrics of a row of eval_log.txt, by name; each benchmark has its own."""
    return {n: v for n, v in row.items() if isinstance(v, float) and n in NAMES.get(recipe.task, row)}


def in_this_process(words):
    """In the place of a child process, which would spend its time on imports."""
    script = next(word for word in words if word.startswith("main_") or "/main_" in word)
    module = importlib.import_module(Path(script).stem)
    return module.main(list(words)[list(words).index(script) + 1 :])


@pytest.fixture
def reproduce(small, questions, monkeypatch):
    """The tool, at the small scale; `commands`: what it ran."""
    commands = []

    def run(words):
        commands.append(list(words))
        return in_this_process(words)

    monkeypatch.setattr(launch, "run_child", run)
    monkeypatch.setattr(evaluate, "ensure_demo_dataset", lambda _: questions)  # in the place of the whole demo dataset

    def tool(runs, recipe, *words):
        common = ["--recipe", recipe.key, "--scale", small.scale, "--runs", str(runs), "--device", "cpu"]
        return main([*common, *words])

    tool.commands = commands
    return tool


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One folder of runs for all tests of this process: who needs a pretrained model finds it or makes it."""
    return tmp_path_factory.mktemp("runs")


def rows(folder):
    return [json.loads(line) for line in (folder / "eval_log.txt").read_text().splitlines()]


@pytest.mark.parametrize("key", RECIPES)
def test_every_recipe_runs_trained_and_from_weights(key, reproduce, runs, small, capsys):
    recipe = RECIPES[key]
    assert reproduce(runs, recipe, "--run", "--with-prerequisites") == 0
    folder = runs / key
    assert json.loads((folder / "recipe.json").read_text()) == {
        "recipe": key,
        "scale": "demo",
        "seed": 0,
        "evaluated": TRAINED,
        **(
            {"checkpoint": str(folder / "checkpoint.pt"), "epochs": 1}
            if recipe.task not in EVALUATIONS
            else {"checkpoint": str(runs / recipe.starts_from / "checkpoint.pt")}
        ),
    }
    trained = rows(folder)
    for row in trained:
        found = metrics(recipe, row)
        assert found.keys() >= set(NAMES.get(recipe.task, [])) and found
        assert all(0 <= value <= 1 for value in found.values())
    if recipe.task == "zero-shot benchmarks":
        assert [row["dataset"] for row in trained] == scaled(recipe, small.scale).args().dataset
    if recipe.task == "egoschema":
        assert {row["frames"] for row in trained} == set(scaled(recipe, small.scale).args().frames)

    # The same again is no run, and changes nothing.
    before = len(reproduce.commands)
    assert reproduce(runs, recipe, "--run", "--with-prerequisites") == 0
    assert len(reproduce.commands) == before and rows(folder) == trained

    # The same figures from the weights alone, in a folder of their own.
    source = runs / (recipe.starts_from if recipe.task in EVALUATIONS else key) / "checkpoint.pt"
    assert reproduce(runs, recipe, "--from-released", "--checkpoint", str(source), "--run") == 0
    released = rows(folder / "released")
    record = json.loads((folder / "released/recipe.json").read_text())
    assert record == {
        "recipe": key,
        "scale": "demo",
        "seed": 0,
        "evaluated": RELEASED,
        "checkpoint": str(source),
    }
    assert len(released) == len(trained) and not any("epoch" in row for row in released)
    for one, other in zip(released, trained, strict=True):
        assert metrics(recipe, one) == pytest.approx(metrics(recipe, other))
    assert rows(folder) == trained
    capsys.readouterr()


def test_rows_are_different_models(reproduce, runs):
    from avion.models import model_from_checkpoint

    kinds = set()
    for row in (4, 5, 6, 7, 8):
        assert reproduce(runs, RECIPES[f"table8_row{row}"], "--run") == 0
        config = model_from_checkpoint(runs / f"table8_row{row}/checkpoint.pt").config
        assert (config.name, config.embed_dim) == (RECIPES[f"table8_row{row}"].model, 32)
        kinds.add((config.mixer, config.residual))
    assert len(kinds) == 5


def test_a_seed_is_a_run_of_its_own_with_its_own_chain(reproduce, tmp_path):
    recipe = RECIPES["table10_row6_uniform"]
    words = ("--seed", "1", "2", "--run", "--with-prerequisites")
    assert reproduce(tmp_path, recipe, *words) == 0
    for seed in (1, 2):
        assert json.loads((tmp_path / f"{recipe.key}/seed{seed}/recipe.json").read_text())["seed"] == seed
        parent = tmp_path / f"table8_row6/seed{seed}"
        assert json.loads((parent / "recipe.json").read_text())["checkpoint"] == str(parent / "checkpoint.pt")
    mains = [Path(next(w for w in c if w.endswith(".py"))).name for c in reproduce.commands]
    assert mains.count("main_pretrain.py") == 2 and mains[0] == "main_pretrain.py"
    losses = [json.loads((tmp_path / f"table8_row6/seed{s}/log.txt").read_text())["train_loss"] for s in (1, 2)]
    assert losses[0] != losses[1]


def test_nothing_is_started_where_something_is_missing(reproduce, tmp_path, capsys):
    assert reproduce(tmp_path, RECIPES["table9_row6_actions"], "--run") == 2
    said = capsys.readouterr()
    assert f"weights {tmp_path}/table8_row6/checkpoint.pt, after the last epoch of Table 8, row 6" in said.out
    assert "--table 8 --row 6 --run" in said.out and "main_finetune_classification.py" in said.out
    assert "nothing was started: 1 thing missing" in said.err and said.err.count("\n") == 1
    assert reproduce.commands == [] and list(tmp_path.iterdir()) == []


def test_an_unfinished_parent_is_no_parent(reproduce, tmp_path):
    parent = RECIPES["table8_row6"]
    assert reproduce(tmp_path, parent, "--run") == 0
    shutil.copytree(tmp_path / "table8_row6", tmp_path / "copy")
    log = tmp_path / "table8_row6/eval_log.txt"
    log.unlink()
    assert reproduce(tmp_path, RECIPES["table9_row6_retrieval"], "--run") == 2
    # Started by hand, without recipe.json, but finished: taken.
    shutil.copy(tmp_path / "copy/eval_log.txt", log)
    (tmp_path / "table8_row6/recipe.json").unlink()
    assert reproduce(tmp_path, RECIPES["table9_row6_retrieval"], "--run") == 0
    assert reproduce(tmp_path, parent, "--mark") == 0
    assert json.loads((tmp_path / "table8_row6/recipe.json").read_text())["recipe"] == "table8_row6"


def test_an_unfinished_run_goes_on(reproduce, tmp_path, monkeypatch):
    recipe, words = RECIPES["table8_row4"], ("--run", "--", "--epochs", "2")
    real, calls = Trainer.evaluate, []

    def evaluate(self, epoch):
        calls.append(epoch)
        if len(calls) == 2:
            raise UserError("the power failed")
        return real(self, epoch)

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    assert reproduce(tmp_path, recipe, *words) == 2
    assert [row["epoch"] for row in rows(tmp_path / "table8_row4")] == [0]
    assert reproduce(tmp_path, recipe, *words) == 0
    assert calls == [0, 1, 1] and len(reproduce.commands) == 2
    assert [row["epoch"] for row in rows(tmp_path / "table8_row4")] == [0, 1]
    assert reproduce(tmp_path, recipe, *words) == 0 and len(reproduce.commands) == 2


def test_again_puts_the_earlier_run_aside(reproduce, tmp_path):
    recipe = RECIPES["table8_row4"]
    assert reproduce(tmp_path, recipe, "--run") == 0
    first = (tmp_path / "table8_row4/log.txt").read_bytes()
    assert reproduce(tmp_path, recipe, "--run", "--again") == 0
    aside = tmp_path / "table8_row4/before1"
    assert (aside / "log.txt.old").read_bytes() == first and not (aside / "recipe.json").exists()
    assert len(reproduce.commands) == 2 and len(rows(tmp_path / "table8_row4")) == 1


def test_a_folder_of_another_run_is_refused(reproduce, tmp_path, capsys):
    recipe = RECIPES["table8_row4"]
    assert reproduce(tmp_path, recipe, "--run") == 0
    capsys.readouterr()
    assert reproduce(tmp_path, recipe, "--run", "--", "--epochs", "2") == 2
    assert "holds another run (epochs 1, not 2); give another folder with --runs" in capsys.readouterr().err
    (tmp_path / "table8_row4/recipe.json").write_text("{")
    assert reproduce(tmp_path, recipe, "--run") == 2
    assert "recipe.json: cannot be read" in capsys.readouterr().err


def test_a_failed_run_ends_the_plan_with_its_status(reproduce, tmp_path, monkeypatch):
    statuses = iter((0, 7, 0))
    commands = []
    monkeypatch.setattr(launch, "run_child", lambda words: commands.append(words) or next(statuses))
    status = main(["--table", "8", "--scale", "demo", "--device", "cpu", "--runs", str(tmp_path), "--run"])
    assert status == 7 and len(commands) == 2


def test_more_flags_reach_the_command(reproduce, tmp_path):
    recipe = RECIPES["table8_row4"]
    assert reproduce(tmp_path, recipe, "--run", "--", "--epochs", "2", "--save-steps", "1") == 0
    assert [row["epoch"] for row in rows(tmp_path / "table8_row4")] == [0, 1]
    assert json.loads((tmp_path / "table8_row4/recipe.json").read_text())["epochs"] == 2


def test_a_real_child_process_and_two_of_them(small, tmp_path):
    """torchrun, the script, recipe.json; the same loss as in one process, since the batch is global."""
    recipe = RECIPES["table8_row6"]
    words = ["--table", "8", "--row", "6", "--scale", small.scale, "--device", "cpu", "--run"]
    for count in (1, 2):
        assert main([*words, "--runs", str(tmp_path / str(count)), "--gpus", str(count)]) == 0
    logs = [json.loads((tmp_path / f"{n}/{recipe.key}/log.txt").read_text()) for n in (1, 2)]
    assert logs[0]["train_loss"] == pytest.approx(logs[1]["train_loss"], rel=1e-4)


def test_status_of_a_child():
    assert run_child([sys.executable, "-c", "import sys; sys.exit(5)"]) == 5
    assert run_child([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]) == 128 + 9


def test_a_signal_is_handed_on():
    code = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(9))\n"
        "os.kill(os.getppid(), signal.SIGUSR1)\n"
        "time.sleep(60)\n"
    )
    before = signal.getsignal(signal.SIGUSR1)
    assert run_child([sys.executable, "-c", code]) == 9
    assert signal.getsignal(signal.SIGUSR1) is before
