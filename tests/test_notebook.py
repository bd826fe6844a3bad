"""notebooks/demo.ipynb runs from top to bottom in a kernel, and what its cells assert holds."""

import copy
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "notebooks/demo.ipynb"
LIMIT = 240  # seconds for a cell; the longest takes half a minute on an idle machine


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def execute(notebook, folder):
    """A copy of the notebook with its outputs; raises CellExecutionError at the first cell that fails."""
    done = copy.deepcopy(notebook)
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(done, timeout=LIMIT, kernel_name="python3", resources=resources).execute()
    return done


def said(cell) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def pictures(cell) -> int:
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


@pytest.mark.timeout(900)
def test_it_runs_from_top_to_bottom(notebook, tmp_path, monkeypatch):
    """Train, plot, classify, search: each leaves what its text promises."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    done = execute(notebook, tmp_path)
    cells = [cell for cell in done.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    printed = "\n".join(map(said, cells))
    mean_ap = re.search(r"^loss: ([\d.]+) at first, ([\d.]+) at the end; mAP: (\d+) %$", printed, re.MULTILINE)
    assert float(mean_ap[2]) < float(mean_ap[1]) and 45 < int(mean_ap[3]) <= 100
    assert "epoch 11 evaluation: V2T/T2V/avg mAP" in printed
    shares = re.findall(r"^right (?:pair of sentences|sentence): (\d+) %", printed, re.MULTILINE)
    assert len(shares) == 2 and int(shares[0]) > 20 and int(shares[1]) > 60
    assert re.search(r"^1  0\.\d{3}  0:00:\d\d\.\d - ", printed, re.MULTILINE)
    assert sum(map(pictures, cells)) == 4
    work = tmp_path / "demo_notebook"
    assert {"dataset", "run", "index", "curves.png"} <= {path.name for path in work.iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == ["demo_notebook"]


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ("assert status == 1", "AssertionError"),
        ("avion('pretrain', '--no-such-flag')", "AssertionError: avion pretrain ended with status 2"),
        ("1 / 0", "ZeroDivisionError"),
    ],
)
def test_a_cell_that_fails_is_seen(notebook, wrong, error, tmp_path):
    """The notebook's own beginning, and then a cell that is wrong."""
    short = copy.deepcopy(notebook)
    first = next(cell for cell in short.cells if cell.cell_type == "code")
    short.cells = [first, nbformat.v4.new_code_cell(f"status = 0\n{wrong}")]
    with pytest.raises(CellExecutionError, match=error.split(":")[0]) as raised:
        execute(short, tmp_path)
    assert error in re.sub(r"\x1b\[[\d;]*m", "", str(raised.value))


def test_it_is_stored_small_and_without_outputs(notebook):
    nbformat.validate(notebook)
    assert NOTEBOOK.stat().st_size < 200_000
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert str(ROOT) not in text and notebook.metadata.kernelspec.name == "python3"


def test_every_part_is_introduced_and_results_are_asserted(notebook):
    """Before every cell of code stands a cell of text, and each part asserts what came of it."""
    for before, cell in zip([None, *notebook.cells], notebook.cells, strict=False):
        if cell.cell_type == "code":
            assert before is not None and before.cell_type == "markdown" and len(before.source.split()) > 15
    parts: dict[str, str] = {}
    for cell in notebook.cells:
        if title := re.match(r"## (.+)", cell.source):
            parts[title[1]] = ""
        elif cell.cell_type == "code":
            parts[list(parts)[-1]] += cell.source + "\n"
    assert list(parts) == [
        "Commands",
        "The videos",
        "Train",
        "Plot",
        "Classify without training",
        "Search",
        "What next",
    ]
    for part in ("Commands", "The videos", "Plot", "Classify without training", "Search"):
        assert re.search(r"^ *assert ", parts[part], re.MULTILINE), part
    assert 'avion(\n    "pretrain"' in parts["Train"]  # the function asserts its status
