"""The table "Zero-shot, beyond the paper": what runs measured, beside what LaViLa and others published."""

import json

import pytest

from avion.reproduce.launch import Run
from avion.reproduce.prerequisites import missing
from avion.reproduce.recipe import load_recipes, load_references, scaled
from avion.reproduce.report import make_report

# From LaViLa's paper, typed in once more: MIR mAP and nDCG, Charades-Ego, EGTEA, EgoMCQ.
PUBLISHED = {
    "EgoVLP": (23.3, 27.9, 25.2, 17.6, 57.2), "LaViLa TSF-B": (30.9, 32.0, 26.8, 28.9, 59.9),
    "LaViLa TSF-L": (36.1, 34.6, 28.9, 34.1, 63.1), "AVION ViT-B": (27.4,),
}  # fmt: skip
KEYS = ("ek100_mir.avg_map", "ek100_mir.avg_ndcg", "charades_ego.map", "egtea.mean_class", "egomcq.intra")
ROWS = [
    {"dataset": "egtea", "mean_class": 0.9, "unreadable": 0},
    {"dataset": "egtea", "mean_class": 0.2345, "unreadable": 2},
    {"dataset": "ek100_mir", "avg_map": 0.2631, "avg_ndcg": 0.285, "unreadable": 0},
    {"dataset": "egomcq", "intra": 0.5, "inter": 0.75, "unreadable": 0},
]  # fmt: skip


def write(folder, key="zeroshot_row6", rows=ROWS, **more):
    folder.mkdir(parents=True)
    (folder / "recipe.json").write_text(json.dumps({"recipe": key, **more}))
    (folder / "eval_log.txt").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_references_are_the_published_ones():
    found = {r.name: r.paper for r in load_references() if r.table == "zeroshot"}
    assert found == {name: dict(zip(KEYS, values, strict=False)) for name, values in PUBLISHED.items()}


def test_the_latest_line_of_each_benchmark_counts(tmp_path):
    write(tmp_path / "runs/zeroshot_row6")
    write(tmp_path / "runs/released", evaluated="released", key="zeroshot_row4", rows=ROWS[:2])
    runs, _ = make_report([tmp_path / "runs"], tmp_path / "out")
    assert not runs.problems
    text = (tmp_path / "out/tables.md").read_text()
    section = text[text.index("Zero-shot, beyond the paper") :]
    rows = {}
    for line in section.splitlines():
        if line.startswith("| **"):
            group = line.strip("| ").replace("*", "")
        elif line.startswith("| ") and "EGTEA" in locals().get("group", ""):
            cells = [cell.strip(" *") for cell in line.strip("|").split("|")]
            rows.setdefault(cells[0], cells)
    assert rows["LaViLa TSF-L"][3] == "34.1" and "23.45" in rows["6 TimeMamba, vanilla"][2]
    assert "26.31" in section and "27.4" in section and "50.00" in section and "+0.11" in section
    assert "egtea: 2 clips could not be read" in section
    assert "not measured yet: ek100\\_cls" in section or "not measured yet: ek100_cls" in section


@pytest.mark.parametrize("row", [{"dataset": "egtea"}, {"dataset": "egtea", "mean_class": 17.6}])
def test_damaged_metrics_are_in_no_table(tmp_path, row):
    write(tmp_path / "runs/zeroshot_row6", rows=[row])
    runs, _ = make_report([tmp_path / "runs"], tmp_path / "out")
    assert len(runs.problems) == 1 and "egtea: expected mean_class" in runs.problems[0].reason


def test_a_run_is_finished_when_every_benchmark_was_evaluated(tmp_path):
    (recipe,) = load_recipes(table="zeroshot", row=6)
    run = Run(scaled(recipe, output_root=tmp_path))
    assert not run.finished()
    rows = [{"dataset": name} for name in recipe.flags["dataset"]]
    for count in (4, 5):
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / "eval_log.txt").write_text("".join(json.dumps(row) + "\n" for row in rows[:count]))
        assert run.finished() == (count == 5)


def test_what_is_missing_names_flags_and_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (recipe,) = load_recipes(table="zeroshot", row=4)
    found = "\n".join(map(str, missing(recipe, "cpu", here=False)))
    kinds = {"ek100": "root annotations", "egtea": "root split classes", "charades": "root split classes"}
    kinds["egomcq"] = "root questions"
    for flag in (f"--{name}-{kind}" for name, words in kinds.items() for kind in words.split()):
        assert f"({flag})" in found
    demo = scaled(recipe, "demo", tmp_path)
    assert [str(m) for m in missing(demo, "cpu", here=False)] == []
