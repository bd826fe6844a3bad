"""The report on runs written by hand: every cell that it should have, and a word on every run that is in no table."""

import html.parser
import json
import os
import re
import statistics

import numpy as np
import pytest

from avion.commands.make_tables import main
from avion.errors import UserError
from avion.reproduce import figure
from avion.reproduce.recipe import load_recipes
from avion.reproduce.render import html_table, markdown_table, to_html, to_markdown
from avion.reproduce.report import Known, build
from avion.reproduce.results import read_runs
from avion.reproduce.spread import beyond, given, signed, spread_of
from avion.reproduce.tables import Cell, Column, Group, Table, lines_of
from tests.reproduce.runs import accuracies, retrieval, write_run

RECIPES = {recipe.key: recipe for recipe in load_recipes()}


def report(*roots) -> str:
    """The Markdown."""
    runs = read_runs(roots, RECIPES)
    return to_markdown(build(runs, Known(list(RECIPES.values()), [])), "Report")


def rows_of(markdown: str, section: str) -> list[list[str]]:
    """The cells of all table rows under a heading."""
    part = re.split(r"^#+ ", markdown, flags=re.MULTILINE)
    (content,) = (text for text in part if text.startswith(section))
    lines = [line for line in content.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


# ---- figures ---------------------------------------------------------------------------------


def test_cells_of_a_full_run(tmp_path):
    write_run(tmp_path / "a", "table8_row6", [retrieval(4, 30.25, 22.35, 26.3, 30.9, 27.5, 29.714)], epochs=5)
    rows = rows_of(report(tmp_path), "Table 8")
    assert rows[0] == ["model", "measured", "paper", "released", "difference", "runs"]
    # Rows without runs stay, so that the table is the paper's.
    titles = {
        "4 TimeSformer, vanilla",
        "5 TimeSformer, Frozen",
        "6 TimeMamba, vanilla",
        "7 TimeMamba, Frozen",
        "8 TimeMamba, Frozen, space-time",
    }
    assert {row[0] for row in rows} >= titles
    mamba = [row for row in rows if row[0] == "6 TimeMamba, vanilla"]
    assert mamba[0] == ["6 TimeMamba, vanilla", "26.30", "26.2", "26.2", "+0.10", "1 (seed 0)"]
    assert mamba[1] == ["6 TimeMamba, vanilla", "29.71", "29.2", "29.2", "+0.51 ▲", "1 (seed 0)"]
    best = next(row for row in rows if row[0] == "7 TimeMamba, Frozen")
    assert best[1:] == ["–", "**26.8**", "**26.8**", "–", ""]  # of the paper; a single measured figure beats nobody
    directions = rows[[row[0] for row in rows].index("**6 TimeMamba, vanilla**") :]
    assert directions[3] == ["measured", "30.25", "22.35", "26.30", "30.90", "27.50", "29.71"]
    assert directions[4] == ["difference", "−0.05", "+0.25", "+0.10", "0.00", "0.00", "+0.51 ▲"]


@pytest.mark.parametrize(
    ("measured", "shown"),
    [(26.7, "+0.50"), (25.7, "−0.50"), (26.71, "+0.51 ▲"), (25.69, "−0.51 ▼"), (26.2, "0.00"), (26.704, "+0.50")],
)
def test_mark_at_and_beyond_the_tolerance(tmp_path, measured, shown):
    row = retrieval(4, 30.3, 22.1, measured, 30.9, 27.5, 29.2)
    write_run(tmp_path / "a", "table8_row6", [row], epochs=5)
    text = report(tmp_path)
    assert next(r for r in rows_of(text, "Table 8") if r[0].startswith("6"))[-2] == shown
    assert "tolerance that the recipe states, 0.5 percentage points" in text


def test_spread_of_three_seeds(tmp_path):
    """26.0, 26.3, 26.6: mean 26.3, sample variance (0.09 + 0 + 0.09) / 2, its root 0.3."""
    for seed, value in enumerate((26.0, 26.3, 26.6)):
        row = retrieval(4, 30, 22, value, 30, 27, 29 + seed)
        write_run(tmp_path / f"seed{seed}", "table8_row6", [row], epochs=5, seed=seed)
    rows = [row for row in rows_of(report(tmp_path), "Table 8") if row[0] == "6 TimeMamba, vanilla"]
    assert rows[0] == ["6 TimeMamba, vanilla", "26.30 ± 0.30", "26.2", "26.2", "+0.10", "3 (seeds 0, 1, 2)"]
    assert (rows[1][1], rows[1][4]) == ("30.00 ± 1.00", "+0.80 ▲")


def test_temporal_modules_are_compared_seed_by_seed(tmp_path):
    """Differences 1.0 and 2.0 of the seeds in common: 1.5 ± 0.71; seed 7 of one model alone is not in it."""
    values = {4: {0: 25.0, 1: 26.0}, 6: {0: 26.0, 1: 28.0, 7: 90.0}}
    for row, seeds in values.items():
        for seed, value in seeds.items():
            figures = [retrieval(4, 30, 22, value, 30, 27, 29)]
            write_run(tmp_path / f"{row}{seed}", f"table8_row{row}", figures, epochs=5, seed=seed)
    rows = rows_of(report(tmp_path), "TimeMamba minus TimeSformer")
    row = next(row for row in rows if row[0] == "mAP, mean of both directions")
    assert row[3:] == ["+1.50 ± 0.71", "*+0.70*", "2 (seeds 0, 1)"]
    assert row[1] == "25.50 ± 0.71"


def test_released_weights_stand_apart(tmp_path):
    """Held against what was released with them; trained ones against the paper."""
    row = retrieval(99, 50.3, 40.3, 45.3, 62.4, 59.2, 60.9)
    write_run(tmp_path / "t", "table9_row6_retrieval", [row], epochs=100)
    row = retrieval(None, 52.4, 45.4, 48.9, 65.9, 63.3, 64.6, checkpoint="released.pt")
    write_run(tmp_path / "r", "table9_row6_retrieval", [row], evaluated="released")
    rows = [r for r in rows_of(report(tmp_path), "Table 9: retrieval") if r[0] == "6 TimeMamba"]
    assert rows[0][1:] == ["trained", "45.30", "**45.3**", "**48.9**", "0.00", "1 (seed 0)"]
    assert rows[1][1:] == ["released", "**48.90**", "**45.3**", "**48.9**", "0.00", "1 (seed 0)"]


def test_egoschema_by_frames_and_what_is_not_measured_yet(tmp_path):
    rows = accuracies({16: 20.0, 128: 29.2}) + accuracies({16: 31.9})  # run again: the later line counts
    write_run(tmp_path / "a", "table10_row6", rows)
    text = report(tmp_path)
    table = rows_of(text, "Table 10")
    mamba = table[[row[0] for row in table].index("**6 TimeMamba**") :]
    assert mamba[1] == ["16", "**31.90**", "31.9", "–", "0.00", "1 (seed 0)"]
    assert mamba[2] == ["128", "29.20", "33.4", "–", "−4.20", "1 (seed 0)"]
    assert mamba[3][0] == "8192" and mamba[3][1] == "–" and mamba[3][-2:] == ["–", ""]
    assert "not measured yet at 8192 frames" in text


def test_accuracies_of_another_sampling_are_in_no_table(tmp_path):
    """Lines of earlier versions do not name it: their `prefix` repeated the last frame of short videos."""
    old = [{k: v for k, v in row.items() if k != "sampling"} for row in accuracies({16: 20.0, 8192: 25.0})]
    write_run(tmp_path / "a", "table10_row6", [*accuracies({16: 31.9}), *old, *accuracies({128: 9.9}, "prefix-hold")])
    text = report(tmp_path)
    table = rows_of(text, "Table 10")
    mamba = table[[row[0] for row in table].index("**6 TimeMamba**") :]
    assert [row[1] for row in mamba[1:4]] == ["31.90", "–", "–"]
    found = "3 evaluations are not of --sampling prefix (found: an earlier version's, prefix-hold) and are passed over"
    assert found in text and "not measured yet at 128, 8192 frames" in text

    write_run(tmp_path / "b" / "uniform", "table10_row6_uniform", old[:1])  # which has not changed
    write_run(tmp_path / "b" / "prefix", "table10_row6", old)
    text = report(tmp_path / "b")
    assert "2 evaluations are not of --sampling prefix (found: an earlier version's); run it again" in text
    table = rows_of(text, "Table 10")
    assert [row for row in table if row[-1] == "1 (seed 0)"] == [["16", "20.00", "–", "**38.7**", "–", "1 (seed 0)"]]


def test_demo_runs_are_apart_and_compared_with_nothing(tmp_path):
    write_run(tmp_path / "full", "table8_row6", [retrieval(4, 30, 22, 26.3, 30, 27, 29)], epochs=5)
    write_run(tmp_path / "demo", "table8_row6", [retrieval(7, 90, 80, 85, 70, 60, 65)], epochs=8, scale="demo")
    text = report(tmp_path)
    full, demo = text.split("## Demo dataset, scaled-down models: not comparable with the paper")
    assert "26.30" in full and "85.00" not in full
    demo, runs = demo.split("## Runs")
    assert "85.00" in demo and "26.30" not in demo
    row = next(line for line in demo.splitlines() if line.startswith("| 6 TimeMamba"))
    assert row == "| 6 TimeMamba, vanilla | 85.00 | *26.2* | *26.2* | 1 (seed 0) |"
    assert "paper, real data" in demo and "| difference |" not in demo and not re.search("[▲▼]", demo)
    assert "demo" in runs


def test_numbers():
    assert [signed(v) for v in (0.004, -0.004, 1.005, -12.3)] == ["0.00", "0.00", "+1.00", "−12.30"]
    assert [given(v) for v in (26.0, 38.52, 38.7, 44)] == ["26.0", "38.52", "38.7", "44.0"]
    assert [beyond(d, 0.3) for d in (0.1 + 0.2, 0.31, -0.31, -0.3)] == ["", "above", "below", ""]


def test_spread_is_the_sample_deviation(rng):
    values = rng.random(5).tolist()
    spread = spread_of(values)
    assert spread.mean == pytest.approx(np.mean(values)) and spread.sd == pytest.approx(np.std(values, ddof=1))
    assert spread_of([1.0]).sd is None and spread.n == 5


# ---- which runs count ------------------------------------------------------------------------


def test_the_last_evaluation_counts_and_the_best_is_named_apart(tmp_path):
    rows = [retrieval(1, 30, 22, 28.0, 30, 27, 29), retrieval(4, 30, 22, 26.0, 30, 27, 29)]
    write_run(tmp_path / "a", "table8_row6", rows, epochs=5)
    text = report(tmp_path)
    assert next(r for r in rows_of(text, "Table 8") if r[0].startswith("6"))[1] == "26.00"
    assert rows_of(text, "Runs")[2][1:] == ["table8_row6", "full", "trained", "0", "5", "2", "28.00"]


GOOD = retrieval(4, 30, 22, 26, 30, 27, 29)
BAD = {
    "unfinished": ([retrieval(2, 30, 22, 26, 30, 27, 29)], {"epochs": 5}, "unfinished: evaluated after 3 of 5 epochs"),
    "of the recipe's epochs": ([retrieval(3, 30, 22, 26, 30, 27, 29)], {}, "evaluated after 4 of 5 epochs"),
    "unknown recipe": ([GOOD], {"recipe": "table8_row99"}, "no recipe is called 'table8_row99'"),
    "nothing in it": ([], {"epochs": 5}, "eval_log.txt: no evaluation in it"),
    "not a fraction": ([GOOD | {"avg_map": 26.0}], {"epochs": 5}, "avg_map is 26.0"),
    "not finite": ([GOOD | {"txt_map": float("nan")}], {"epochs": 5}, "txt_map is nan"),
    "missing": ([{k: v for k, v in GOOD.items() if k != "vis_map"}], {"epochs": 5}, "vis_map is missing"),
    "seed": ([GOOD], {"epochs": 5, "seed": "one"}, "seed is 'one'"),
    "weights": ([GOOD], {"evaluated": "borrowed"}, "evaluated is 'borrowed'"),
    "scale": ([GOOD], {"scale": "../../etc/passwd.yaml"}, "scale is '../../etc/passwd.yaml'"),
    "unknown scale": ([GOOD], {"scale": "elsewhere"}, "--scale elsewhere: no such scale"),
    "epoch": ([GOOD | {"epoch": True}], {"epochs": 5}, "epoch is True"),
    "released without evaluation": ([GOOD], {"evaluated": "released"}, "no evaluation of released weights"),
}


@pytest.mark.parametrize("name", BAD)
def test_unusable_runs_are_named_with_the_reason(tmp_path, name):
    rows, record, reason = BAD[name]
    write_run(tmp_path / "bad", **{"recipe": "table8_row6", "rows": rows, **record})
    write_run(tmp_path / "good", "table8_row4", [GOOD], epochs=5)
    runs = read_runs([tmp_path], RECIPES)
    assert [r.recipe.key for r in runs.results] == ["table8_row4"]
    (problem,) = runs.problems
    assert problem.path == tmp_path / "bad" and reason in problem.reason and "\n" not in problem.reason
    assert "In no table" in report(tmp_path) and "bad" in report(tmp_path)


def test_folders_that_are_no_runs(tmp_path):
    write_run(tmp_path / "good", "table8_row4", [GOOD], epochs=5)
    (write_run(tmp_path / "marked", "table8_row5", []) / "eval_log.txt").unlink()
    (write_run(tmp_path / "other", "table8_row6", [GOOD]) / "recipe.json").unlink()
    (write_run(tmp_path / "torn", "table8_row7", [GOOD]) / "recipe.json").write_text('{"recipe": ')
    reasons = {p.path.name: p.reason for p in read_runs([tmp_path, tmp_path / "good"], RECIPES).problems}
    assert reasons == {
        "marked": "eval_log.txt: missing; the run was not evaluated yet",
        "other": "not a run of a recipe: it has no recipe.json",
        "torn": "recipe.json: not valid JSON",
    }


def test_damaged_line_is_noted_and_the_run_still_counts(tmp_path):
    folder = write_run(tmp_path / "a", "table8_row6", [GOOD], epochs=5)
    (folder / "eval_log.txt").write_text('{"vis_map": 0.3, "tx\n' + json.dumps(GOOD) + "\n")
    (folder / "log.txt").write_text('{"epoch": 4}\n')
    (result,) = read_runs([tmp_path], RECIPES).results
    assert result.notes == ("eval_log.txt: line 1 is damaged and passed over",)
    assert "line 1 is damaged" in report(tmp_path)


def test_unreadable_clips_are_noted(tmp_path):
    write_run(tmp_path / "a", "table8_row6", [GOOD | {"unreadable": 3}], epochs=5)
    assert "3 clips could not be read and are in no figure" in report(tmp_path)


def test_log_says_how_far_an_unfinished_run_came(tmp_path):
    folder = write_run(tmp_path / "a", "table9_row6_retrieval", [retrieval(4, 30, 22, 26, 30, 27, 29)], epochs=100)
    (folder / "log.txt").write_text("".join(f'{{"epoch": {e}}}\n' for e in range(8)))
    assert (
        read_runs([tmp_path], RECIPES).problems[0].reason == "unfinished: evaluated after 5 (trained: 8) of 100 epochs"
    )


def test_of_two_runs_of_one_seed_the_later_one_counts(tmp_path):
    old = write_run(tmp_path / "z", "table8_row6", [retrieval(4, 30, 22, 25, 30, 27, 29)], epochs=5)
    write_run(tmp_path / "a", "table8_row6", [GOOD], epochs=5)
    os.utime(old / "eval_log.txt", (1, 1))
    runs = read_runs([tmp_path], RECIPES)
    assert [r.figures["avg_map"] for r in runs.results] == [26.0]
    assert runs.problems[0].path == old and "the same recipe, seed and weights as" in runs.problems[0].reason


def test_bad_input_costs_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for root, found in (("nowhere", "no such folder"), ("empty", "no run here")):
        assert main([str(tmp_path / root), "--output", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert found in error and error.count("\n") == 1
    with pytest.raises(UserError):
        read_runs([tmp_path / "nowhere"], RECIPES)
    with pytest.raises(UserError, match=r"^s3://bucket/runs: is an address.*copy recipe.json.* here"):
        read_runs(["s3://bucket/runs"], RECIPES)
    write_run(tmp_path / "a", "table8_row6", [GOOD], epochs=5)
    (tmp_path / "file").write_text("")
    assert main([str(tmp_path / "a"), "--output", str(tmp_path / "file" / "x")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


# ---- pages -----------------------------------------------------------------------------------


class Checker(html.parser.HTMLParser):
    """Every tag closed in order; no scripts, nothing loaded; the texts of the cells, row by row."""

    VOID = {"meta", "img", "source", "br"}

    def __init__(self):
        super().__init__()
        self.open, self.rows, self.seen, self.cell = [], [], set(), None

    def handle_starttag(self, tag, attributes):
        self.seen.add(tag)
        assert tag not in ("script", "link", "iframe")
        for name, value in attributes:
            assert not name.startswith("on")
            if name in ("src", "srcset", "href"):
                assert value.startswith("data:")
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def check(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    return checker


def test_page_is_whole_and_says_what_the_markdown_says(tmp_path):
    write_run(tmp_path / "runs" / "a", "table8_row6", [retrieval(4, 30, 22, 26.9, 30, 27, 29)], epochs=5)
    write_run(tmp_path / "runs" / "b", "figure5_row6", accuracies({16: 31.0, 32: 32.5}))
    write_run(tmp_path / "runs" / "c", "figure5_row4", accuracies({16: 30.0}, "uniform"), scale="demo")
    assert main([str(tmp_path / "runs"), "--output", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "tables.html").read_text(encoding="utf-8")
    checker = check(page)
    assert ["6 TimeMamba, vanilla", "26.90", "26.2", "26.2", "+0.70▲", "1 (seed 0)"] in checker.rows
    assert {"style", "picture", "source", "img", "tbody"} <= checker.seen and "url(" not in page
    for name in ("figure5.png", "figure5_demo.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
        assert f"]({name})" in (tmp_path / "out" / "tables.md").read_text(encoding="utf-8")
    assert "prefers-color-scheme: dark" in page and "@media print" in page


def test_hostile_names_stay_text(tmp_path):
    name = 'a <script>alert("x")|`b`*c*[d](e)'
    write_run(tmp_path / name, "table8_row6", [GOOD], epochs=5)
    runs = read_runs([tmp_path], RECIPES)
    sections = build(runs, Known(list(RECIPES.values()), []))
    page = to_html(sections, "<b>&</b>")
    assert any(row[0].endswith(name) for row in check(page).rows if row)
    row = next(line for line in to_markdown(sections, "t").splitlines() if "script" in line)
    assert r"a \<script\>alert(" in row and r"\|\`b\`\*c\*\[d\](e)" in row


def test_table_slots_and_marks():
    rows = [[Cell("a"), Cell("1.00", "± 0.10", mark="below")], [Cell("b"), Cell("2.00", bold=True)]]
    table = Table([Column("name", numeric=False), Column("x", over="many")], [Group("", rows)])
    assert markdown_table(table).splitlines() == [
        "| name | many x |",
        "|:-|-:|",
        "| a | 1.00 ± 0.10 ▼ |",
        "| b | **2.00** |",
    ]
    page = html_table(table)
    check(page)
    assert page.count('class="spread"') == page.count('class="mark"') == 3  # the header too: numbers line up
    assert "below by more than the tolerance" in page


# ---- the figure ------------------------------------------------------------------------------


def test_what_the_plot_shows(tmp_path, rng):
    values = {
        seed: {n: float(v) for n, v in zip((16, 64, 256), rng.uniform(20, 40, 3), strict=True)} for seed in (0, 1)
    }
    for seed, row in values.items():
        write_run(tmp_path / f"{seed}", "figure5_row6", accuracies(row), seed=seed)
    results = read_runs([tmp_path], RECIPES).results
    lines = lines_of([r for r in RECIPES.values() if r.figure == 5], [], results)
    measured, published = figure.measured_curves(lines), figure.published_curves(lines)
    (curve,) = measured
    assert curve.frames == [16, 64, 256] and curve.name == "TimeMamba"
    for i, n in enumerate(curve.frames):
        pair = [values[seed][n] for seed in (0, 1)]
        assert curve.accuracy[i] == pytest.approx(statistics.fmean(pair))
        assert curve.spread[i] == pytest.approx(statistics.stdev(pair))
    assert {c.name: dict(zip(c.frames, c.accuracy, strict=True)) for c in published} == {
        "TimeSformer": {16: 33.6, 128: 32.9, 8192: 38.1},
        "TimeMamba": {16: 31.9, 128: 33.4, 8192: 38.7},
    }
    drawn = figure.draw(measured, published, demo=False)
    (axes,) = drawn.axes
    assert axes.get_xscale() == "log" and axes.xaxis.get_transform().base == 2
    shown = [line.get_xydata() for line in axes.lines]
    assert any(len(data) == 3 and np.allclose(data[:, 1], curve.accuracy) for data in shown)
    assert {text.get_text() for text in axes.get_legend().get_texts()} == {
        "TimeSformer, paper",
        "TimeMamba, paper",
        "TimeMamba",
    }
    left, right = figure.draw(measured, published, demo=True).axes
    assert [line.get_ydata()[0] for line in left.lines if line.get_label() == "guessing"] == [20.0]
    assert "guessing" not in [line.get_label() for line in right.lines]
    flat = [figure.Curve("flat", figure.GREY, [8, 16], [20.0, 22.5])]
    low, high = figure.draw(flat, published, demo=True).axes[0].get_ylim()
    assert high - low == pytest.approx(15.0) and (low + high) / 2 == pytest.approx(21.25)
    extreme = [figure.Curve("extreme", figure.GREY, [8, 16], [0.0, 100.0])]
    assert figure.draw(extreme, [], demo=False).axes[0].get_ylim() == (0, 100)
    once, again = (figure.image(figure.draw(measured, published, demo=False), "svg") for _ in range(2))
    assert once == again
