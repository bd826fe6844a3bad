"""Curves of runs: which rows are read, what is drawn, what is refused."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from avion.commands import plot_run
from avion.errors import UserError


def progress(step, *, blocks=2, **more):
    row = {"epoch": 0, "step": step, "global_step": step, "loss": 9.0 / step, "grad_norm": 1.0, "lr": 1e-3 * step}
    row |= {"clips_per_s": 50.0, "wait": 0.25, "memory_gb": 1.0, "skipped_steps": 0}
    return row | ({"alpha": [0.1 * step * (b + 1) for b in range(blocks)]} if blocks else {}) | more


def epoch(step, **figures):
    return {"train_loss": 1.0, "epoch": step // 10 - 1, "global_step": step, **figures}


def write_run(folder, steps, epochs=()):
    folder.mkdir(parents=True)
    for name, rows in (("steps.txt", steps), ("log.txt", epochs)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


MIR = {"test_avg_map": 0.25, "test_vis_map": 0.3, "test_avg_ndcg": 0.5}


def axes_by_title(folders):
    runs = [plot_run.read_run(f, n) for f, n in zip(folders, plot_run.short_names(folders), strict=True)]
    figure = plot_run.draw(runs)
    return {axes.get_title(loc="left"): axes for axes in figure.axes if axes.get_title(loc="left")}, figure


def data(line):
    return [tuple(point) for point in line.get_xydata()]


# --- reading ---------------------------------------------------------------------------------


def test_lines_of_a_resumed_run_take_the_place_of_those_before(tmp_path):
    steps = [progress(s) for s in (2, 4, 6, 8)] + [progress(s, loss=1.0) for s in (6, 8, 10)]
    rows = plot_run.read_log(write_run(tmp_path / "a", steps) / "steps.txt")
    assert [r["global_step"] for r in rows] == [2, 4, 6, 8, 10]
    assert [r["loss"] for r in rows] == [4.5, 2.25, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("cut", [1, 10, -1], ids=["a character", "half", "all but the line's end"])
def test_a_last_line_that_is_being_written_is_left_out(cut, tmp_path):
    path = write_run(tmp_path / "a", [progress(2), progress(4)]) / "steps.txt"
    path.write_text(path.read_text() + json.dumps(progress(6))[:cut])
    assert [r["global_step"] for r in plot_run.read_log(path)] == [2, 4]


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"epoch": 0, "st', "no JSON object"),
        ("[" * 100_000, "no JSON object"),
        ("[1, 2]", "no JSON object"),
        ('{"loss": 1.0}', "has no whole number `global_step`"),
        ('{"global_step": 2.5}', "has no whole number `global_step`"),
        ('{"global_step": 4, "loss": "low"}', "loss must be a number, found 'low'"),
        ('{"global_step": 4, "loss": [1.0]}', "loss must be a number, found"),
        ('{"global_step": 4, "loss": true}', "loss must be a number, found True"),
        ('{"global_step": 4, "loss": 1' + "0" * 400 + "}", "loss must be a number, found"),
        ('{"global_step": 4, "alpha": [0.5, null]}', "alpha must be a number, found"),
    ],
)
@pytest.mark.parametrize("file", ["steps.txt", "log.txt"])
def test_a_malformed_line_names_file_and_line(file, line, message, tmp_path, capsys):
    folder = write_run(tmp_path / "a", [progress(2)], [epoch(2)])
    (folder / file).write_text(f"{json.dumps(progress(2))}\n{line}\n{json.dumps(progress(6))}\n")
    assert plot_run.main([str(folder), "--output", str(tmp_path / "x.png")]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"tools/plot_run.py: error: {folder / file} line 2: {message}")
    assert not (tmp_path / "x.png").exists()


def test_runs_are_named_by_as_much_of_their_path_as_it_takes(tmp_path):
    folders = [tmp_path / name for name in ("id6/seed0", "id6/seed1", "id4/seed0")]
    assert plot_run.short_names(folders[:2]) == ["seed0", "seed1"]
    assert plot_run.short_names(folders) == ["id6/seed0", "id6/seed1", "id4/seed0"]
    with pytest.raises(UserError, match="named twice"):
        plot_run.short_names([folders[0], tmp_path / "id4/../id6/seed0"])


# --- drawing ---------------------------------------------------------------------------------


def test_one_run_shows_its_figures(tmp_path):
    steps = [progress(s) for s in (5, 10, 15, 20)]
    folder = write_run(tmp_path / "id6", steps, [epoch(10), epoch(20, **MIR)])
    found, figure = axes_by_title([folder])
    assert set(found) == {
        "training loss",
        "learning rate",
        "gradient norm, before clipping",
        "speed, all processes",
        "waiting for data",
        "time gates",
        "evaluation: mAP, mean of V2T and T2V",
        "evaluation: nDCG, mean of V2T and T2V",
    }
    assert data(found["training loss"].lines[0]) == [(5, 1.8), (10, 0.9), (15, 0.6), (20, 0.45)]
    assert data(found["waiting for data"].lines[0])[0] == (5, 25.0)
    gates = found["time gates"]
    assert [data(line)[-1] for line in gates.lines] == [(20, 2.0), (20, 4.0)]
    assert [text.get_text() for text in gates.get_legend().get_texts()] == ["0", "1"]
    assert data(found["evaluation: mAP, mean of V2T and T2V"].lines[0]) == [(20, 25.0)]
    assert figure.get_suptitle() == "id6" and not figure.legends


def test_a_run_without_gates_and_evaluations_leaves_their_panels_out(tmp_path):
    found, _ = axes_by_title([write_run(tmp_path / "a", [progress(5, blocks=0)])])
    assert set(found) == {
        "training loss",
        "learning rate",
        "gradient norm, before clipping",
        "speed, all processes",
        "waiting for data",
    }


def test_several_runs_lie_over_each_other(tmp_path):
    folders = [
        write_run(tmp_path / "a", [progress(5), progress(10)], [epoch(10, **MIR)]),
        write_run(tmp_path / "b", [progress(5, blocks=0), progress(10, blocks=0)]),
        write_run(tmp_path / "c", [progress(5, blocks=12, skipped_steps=2)]),
    ]
    found, figure = axes_by_title(folders)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b", "c"]
    loss = found["training loss"].lines
    assert len({line.get_color() for line in loss}) == 3
    assert [line.get_color() for line in legend.get_lines()] == [line.get_color() for line in loss]
    assert data(loss[2]) == [(5, 1.8)] and loss[2].get_marker() == "o"  # a line of one point would not be seen
    assert {"time gates: a", "time gates: c", "skipped steps so far"} <= found.keys() and "time gates: b" not in found
    assert found["time gates: a"].get_ylim() == found["time gates: c"].get_ylim()
    assert len(found["time gates: c"].lines) == 12 and found["time gates: c"].get_legend() is None
    assert len([axes for axes in figure.axes if axes.get_ylabel() == "block"]) == 1


def test_skipped_steps_add_up(tmp_path):
    steps = [progress(s, skipped_steps=n) for s, n in ((5, 1), (10, 0), (15, 3))]
    found, _ = axes_by_title([write_run(tmp_path / "a", steps)])
    assert data(found["skipped steps so far"].lines[0]) == [(5, 1), (10, 1), (15, 4)]


def test_more_runs_than_colours_differ_in_their_lines(tmp_path):
    folders = [
        write_run(tmp_path / str(i), [progress(5, loss=1.0 + i), progress(10)])
        for i in range(len(plot_run.COLOURS) + 1)
    ]
    found, _ = axes_by_title(folders)
    looks = [(line.get_color(), line.get_linestyle()) for line in found["training loss"].lines]
    assert len(set(looks)) == len(folders)


def test_long_curves_are_smoothed_and_the_raw_one_shows_through(tmp_path, rng):
    noise = rng.normal(size=400)
    steps = [progress(s + 1, loss=float(noise[s])) for s in range(400)]
    found, _ = axes_by_title([write_run(tmp_path / "a", steps)])
    raw, smooth = (line.get_ydata() for line in found["training loss"].lines)
    np.testing.assert_array_equal(raw, noise)
    by_hand = [np.mean(noise[max(i - 5, 0) : i + 6]) for i in range(400)]
    np.testing.assert_allclose(smooth, by_hand, rtol=0, atol=1e-12)
    assert len(found["learning rate"].lines) == 1


def test_a_figure_that_is_not_finite_is_a_gap(tmp_path):
    found, _ = axes_by_title([write_run(tmp_path / "a", [progress(5), progress(10, loss=math.nan), progress(15)])])
    assert data(found["training loss"].lines[0]) == [(5, 1.8), (15, 0.6)]


def test_losses_of_different_kinds_have_a_panel_each(tmp_path):
    kinds = {"clip": {"clip_acc": 12.5}, "long": {"clip_acc": 25.0}, "margin": {"max_margin_loss": 0.2}}
    kinds |= {"actions": {"acc1": 0.5}, "own": {"focal": 0.1}}
    folders = [
        write_run(tmp_path / name, [progress(s, **more) for s in (5, 10)], [epoch(10, **MIR)])
        for name, more in kinds.items()
    ]
    found, figure = axes_by_title(folders)
    losses = {title: axes for title, axes in found.items() if title.startswith("training loss")}
    assert {title: len(axes.lines) for title, axes in losses.items()} == {
        "training loss, contrastive": 2,
        "training loss, max-margin": 1,
        "training loss, cross entropy": 1,
        "training loss: own": 1,
    }
    # A run has the colour of the legend in the panel of its loss too.
    colours = {text.get_text(): line.get_color() for text, line in zip(*legend_of(figure), strict=True)}
    (margin,) = losses["training loss, max-margin"].lines
    assert margin.get_color() == colours["margin"]
    assert len(found["learning rate"].lines) == 5


def legend_of(figure):
    (legend,) = figure.legends
    return legend.get_texts(), legend.get_lines()


def test_runs_of_one_own_loss_need_no_name_in_the_title(tmp_path):
    folders = [write_run(tmp_path / name, [progress(5, focal=0.1)]) for name in "ab"]
    found, _ = axes_by_title(folders)
    assert len(found["training loss"].lines) == 2


def test_curves_of_one_kind_have_one_width_and_equal_ones_take_turns(tmp_path):
    """Equal learning rates lie on each other: their dashes leave each other room, one dash in three each."""
    folders = [
        write_run(tmp_path / n, [progress(s, loss=k / s) for s in (5, 10)], [epoch(10, **MIR)])
        for k, n in enumerate(("a", "b", "c"), start=1)
    ]
    folders.append(write_run(tmp_path / "d", [progress(s, lr=1.0) for s in (5, 10)]))
    found, _ = axes_by_title(folders)
    for title, axes in found.items():
        assert len({line.get_linewidth() for line in axes.lines if line.get_linestyle() != "None"}) == 1, title
    rates = found["learning rate"].lines
    length = plot_run.DASH * rates[0].get_linewidth()
    drawn = [np.array(line._dash_pattern[1] or []) for line in rates]  # matplotlib has no public name for it
    assert all(np.allclose(pattern, [length, 2 * length]) for pattern in drawn[:3]) and not len(drawn[3])
    np.testing.assert_allclose([line._dash_pattern[0] for line in rates[:3]], [0, length, 2 * length])
    assert {line.get_linestyle() for line in found["training loss"].lines} == {"-"}


def test_axes_end_at_what_can_be(tmp_path):
    """Percentages at 0 and 100, steps at the last one, whole things at whole numbers."""
    steps = [progress(s, wait=w, skipped_steps=1) for s, w in ((1, 0.1), (2, 0.9995), (3, 0.4))]
    rows = [epoch(2, test_avg_map=0.001, test_avg_ndcg=0.4), epoch(3, test_avg_map=0.999, test_avg_ndcg=0.6)]
    found, _ = axes_by_title([write_run(tmp_path / "a", steps, rows)])
    assert found["evaluation: mAP, mean of V2T and T2V"].get_ylim() == (0, 100)
    low, high = found["evaluation: nDCG, mean of V2T and T2V"].get_ylim()
    assert 30 < low < 40 and 60 < high < 70
    assert found["waiting for data"].get_ylim() == (0, 100)
    for title, axes in found.items():
        assert axes.get_xlim() == (0, 3), title
        shown = [x for x in axes.get_xticks() if 0 <= x <= 3]
        assert shown == [0, 1, 2, 3], title
    skipped = found["skipped steps so far"]
    assert all(y == int(y) for y in skipped.get_yticks()) and skipped.get_ylim()[0] == 0


def test_a_panel_of_some_runs_ends_at_their_last_step(tmp_path):
    folders = [
        write_run(tmp_path / "a", [progress(s, clip_acc=1.0) for s in (5, 1000)]),
        write_run(tmp_path / "b", [progress(s, acc1=1.0) for s in (5, 20)]),
    ]
    found, _ = axes_by_title(folders)
    assert found["training loss, cross entropy"].get_xlim() == (0, 20) == found["time gates: b"].get_xlim()
    assert found["training loss, contrastive"].get_xlim() == (0, 1000) == found["learning rate"].get_xlim()


def test_a_loss_may_be_negative(tmp_path):
    found, _ = axes_by_title([write_run(tmp_path / "a", [progress(5, loss=-1.0), progress(10, loss=2.0)])])
    assert found["training loss"].get_ylim()[0] < -1


def test_figures_of_an_unknown_task_get_a_panel_each(tmp_path):
    folder = write_run(tmp_path / "a", [progress(5)], [epoch(5, test_wer=0.125)])
    found, _ = axes_by_title([folder])
    assert data(found["evaluation: wer"].lines[0]) == [(5, 0.125)]


# --- the tool --------------------------------------------------------------------------------


def test_a_notebooks_backend_stays(tmp_path, monkeypatch):
    """In a notebook, pyplot draws below the cells; the tool takes that away from nobody."""
    import matplotlib.pyplot as plt

    before = plt.get_backend()
    plt.switch_backend("svg")
    try:
        assert plot_run.main([str(write_run(tmp_path / "a", [progress(5)])), "--output", str(tmp_path / "a.png")]) == 0
        assert plt.get_backend() == "svg" and plt.get_fignums() == []
    finally:
        plt.switch_backend(before)


def test_the_picture_is_a_png(tmp_path, capsys):
    folders = [write_run(tmp_path / name, [progress(s) for s in (5, 10)], [epoch(10, **MIR)]) for name in "abc"]
    target = tmp_path / "curves.png"
    assert plot_run.main([*map(str, folders), "--output", str(target)]) == 0
    assert capsys.readouterr().out == f"{target}\n"
    with Image.open(target) as image:
        assert image.format == "PNG" and min(image.size) > 600
        assert np.asarray(image.convert("L")).std() > 5


@pytest.mark.parametrize(
    "folders, names",
    [(["s3://b/x/id6", "s3://b/x/id7/"], ["id6", "id7"]), (["s3://b/id6", "other/id6"], ["b/id6", "other/id6"])],
)
def test_names_of_runs_in_remote_places(folders, names):
    assert plot_run.short_names(folders) == names


def test_a_run_in_a_remote_place(tmp_path):
    pytest.importorskip("fsspec")
    write_run(tmp_path / "a", [progress(5), progress(10)], [epoch(10, **MIR)])
    there, here = plot_run.read_run(f"file://{tmp_path}/a", "a"), plot_run.read_run(tmp_path / "a", "a")
    assert there == here and len(there.steps) == 2 and len(there.epochs) == 1
    with pytest.raises(UserError, match=r"file://.*/none/steps.txt: cannot be read \(No such file"):
        plot_run.read_run(f"file://{tmp_path}/none", "none")


@pytest.mark.parametrize(
    "run, output, message",
    [
        ("nothing", "x.png", "nothing: no such folder"),
        ("empty", "x.png", "steps.txt: cannot be read (No such file or directory)"),
        ("begun", "x.png", "steps.txt: holds no progress line yet"),
        ("good", "x.jpg", "x.jpg: a name that ends with .png is required"),
        ("good", "no/folder/x.png", "x.png: cannot be written (No such file or directory)"),
    ],
)
def test_mistakes_are_one_line(run, output, message, tmp_path, capsys):
    write_run(tmp_path / "good", [progress(5)])
    write_run(tmp_path / "begun", [])
    (tmp_path / "empty").mkdir()
    assert plot_run.main([str(tmp_path / run), "--output", str(tmp_path / output)]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert message in error
