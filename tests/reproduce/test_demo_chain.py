"""The chain of `make tables-demo`, without running it: its jobs, and that a folder of other settings is refused."""

import csv
import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from avion.commands.tables_demo import main
from avion.data.demo import DemoPaths
from avion.engine.args import parse
from avion.engine.predictions import portable_pickle
from avion.errors import UserError
from avion.reproduce.demo_chain import Chain
from avion.reproduce.recipe import ENTRY_POINTS, load_recipes
from avion.safe_pickle import load_pickle
from tests.reproduce.runs import retrieval, write_run


def chain(tmp_path, **more) -> Chain:
    return Chain(DemoPaths(tmp_path / "data"), tmp_path / "out", **more)


def parsed(words):
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    name = Path(words[script]).name
    return parse(ENTRY_POINTS[name], words[script + 1 :], name, "")


@pytest.mark.parametrize("short", [False, True])
def test_every_recipe_is_a_job_that_its_parser_takes(tmp_path, short):
    jobs = {job.name: job for job in chain(tmp_path, short=short).jobs()}
    recipes = {recipe.key: recipe for recipe in load_recipes()}
    assert {f"{key}/seed0" for key in recipes} == {name for name in jobs if not name.startswith("longer_")}
    for name, job in jobs.items():
        args = parsed(job.words)
        assert args.dataset == "demo" or args.demo_root == str(tmp_path / "data")
        assert args.workers == 0 and args.device == "cpu" and getattr(args, "seed", 0) == 0
        if hasattr(args, "epochs"):
            assert args.epochs == 1 if short else args.epochs > 1
        source = getattr(args, "pretrain_model", "") or getattr(args, "resume", "")
        assert bool(source) == bool(job.after), name
    # Both models are treated alike but for what they are.
    for key in recipes:
        if "row4" in key:
            own, other = (vars(parsed(jobs[f"{k}/seed0"].words)) for k in (key, key.replace("row4", "row6")))
            for args in (own, other):
                args |= {
                    name: re.sub("row[46]", "row", str(args.get(name))) for name in ("output_dir", "pretrain_model")
                }
                args.pop("model")
            assert own == other


def test_jobs_start_from_those_before_them(tmp_path):
    names: list[str] = []
    for job in chain(tmp_path, seeds=(0, 3)).jobs():
        assert set(job.after) <= set(names), "a job stands before one that it needs"
        names.append(job.name)
        if "table9" in job.name:
            assert job.after == (re.sub(r"table9_(row\d)_\w+", r"table8_\1", job.name),)
        if re.search("table10|figure5", job.name):
            (before,) = job.after
            assert before.startswith("longer_table8_row") and before.endswith(job.name[-1])
            assert f"longer/{before.removeprefix('longer_')}/checkpoint.pt" in " ".join(job.words)
    assert len(names) == len(set(names)) and names[0].startswith("table8_row") and len(names) % 2 == 0


def test_done_runs_are_known_and_marked_ones_begin(tmp_path):
    own = chain(tmp_path)
    job = next(j for j in own.jobs() if j.name == "table8_row5/seed0")
    assert not job.done
    epochs = parsed(job.words).epochs
    folder, row = own.runs / job.name, retrieval(epochs - 1, 1, 2, 3, 4, 5, 6)
    record = {"seed": 0, "scale": "demo", "epochs": epochs, "checkpoint": str(folder / "checkpoint.pt")}
    write_run(folder, "table8_row5", [row], **record)
    assert next(j for j in own.jobs() if j.name == job.name).done
    write_run(folder, "table8_row5", [dict(row, epoch=epochs - 2)], **record)
    assert not next(j for j in own.jobs() if j.name == job.name).done


def test_a_folder_of_other_settings_is_refused(tmp_path):
    own = chain(tmp_path)
    jobs = own.jobs()
    jobs[0].begin()
    assert json.loads((own.output / "jobs.json").read_text()) == {jobs[0].name: list(jobs[0].words)}
    assert json.loads((own.runs / jobs[0].name / "recipe.json").read_text())["scale"] == "demo"
    own.jobs()  # the same once more
    with pytest.raises(UserError, match="of other settings; remove .* or give another --output-dir$") as error:
        dataclasses.replace(own, short=True).jobs()
    assert "\n" not in str(error.value)
    (own.output / "jobs.json").write_text("{")
    with pytest.raises(UserError, match="jobs.json: cannot be read"):
        own.jobs()


def test_bad_flags_cost_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--jobs", "0", "--output-dir", str(tmp_path)])
    assert exit.value.code == 2
    assert re.fullmatch(r"tools/tables_demo.py: error: argument --jobs: found '0'.*\n", capsys.readouterr().err)


def test_a_few_clips(tmp_path):
    """Files with the first 64 rows of each."""
    own = chain(tmp_path, short=True)
    paths = own.paths
    for path in (paths.train_pickle, paths.train_csv, paths.train_relevancy):
        path.parent.mkdir(parents=True, exist_ok=True)
    narrations = [("v", i, i + 1, f"#C C does {i}") for i in range(80)]
    relevancy = np.arange(80 * 3, dtype=float).reshape(80, 3)
    paths.train_pickle.write_bytes(portable_pickle(narrations))
    paths.train_relevancy.write_bytes(portable_pickle(relevancy))
    paths.train_csv.write_text("id,narration\n" + "".join(f'{i},"a, {i}"\n' for i in range(80)))
    paths.train_sentences.write_text("id,narration\n0,a\n1,b\n2,c\n")
    own.write_few_clips()
    few = own.output / "few"
    assert load_pickle(str(few / "ego4d_train.pkl"), "x") == narrations[:64]
    assert np.array_equal(load_pickle(str(few / "relevancy.pkl"), "x"), relevancy[:64])
    with open(few / paths.train_csv.name, newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [["id", "narration"], *([str(i), f"a, {i}"] for i in range(64))]
    assert (few / paths.train_sentences.name).read_text().split() == ["id,narration", "0,a", "1,b", "2,c"]
