"""That the GPU benchmarks run, at toy size in Triton's interpreter, and that their floor is what it says."""

import importlib
import sys

import pytest
import torch

pytest.importorskip("triton")
from benchmarks import bench_scan, bench_train_step
from benchmarks.measure import Ceilings


def test_floor_by_hand():
    """3 rows, 2 steps, 5 channels, 4 states: 240 elements of two directions, of which half need an exponential."""
    shape = (3, 2, 5, 4)
    plenty = 1e30
    assert bench_scan.floor_ms(shape, Ceilings(plenty, plenty, 120.0, 1.0), False) == pytest.approx(1e3)
    assert bench_scan.floor_ms(shape, Ceilings(plenty, plenty, 120.0, 1.0), True) == pytest.approx(2e3)
    assert bench_scan.floor_ms(shape, Ceilings(plenty, 960.0, plenty, 1.0), False) == pytest.approx(1e3)
    assert bench_scan.floor_ms(shape, Ceilings(plenty, 960.0, plenty, 1.0), True) == pytest.approx(4e3)
    # Two bytes each: 6 tensors (3, 2, 5) and 4 of (3, 2, 4).
    assert bench_scan.floor_ms(shape, Ceilings(552.0, plenty, plenty, 1.0), False) == pytest.approx(1e3)


def test_a_wrong_backend_is_found_out(monkeypatch, capsys):
    right = bench_scan.gated_bidirectional_scan

    def slightly_wrong(ahead, behind, z, *, backend):
        out = right(ahead, behind, z, backend=backend)
        return out if backend == "reference" else out * 1.1

    monkeypatch.setattr(bench_scan, "gated_bidirectional_scan", slightly_wrong)
    monkeypatch.setattr(bench_scan, "TOY_SHAPES", ((3, 2),))
    assert bench_scan.main(["--toy", "--backends", "torch"]) == 1
    assert "NOT ALL" in capsys.readouterr().out


def test_the_scan_benchmark_runs_and_writes_its_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_scan, "TOY_SHAPES", ((2, 4), (1, 5)))
    assert bench_scan.main(["--toy", "--output", str(tmp_path / "results" / "scan.md")]) == 0
    text = (tmp_path / "results" / "scan.md").read_text()
    assert text in capsys.readouterr().out
    rows = [line for line in text.splitlines() if line.startswith(("| 2 × 4", "| 1 × 5"))]
    assert len(rows) == 8 and sum("| triton |" in row for row in rows) == 4
    assert f"torch {torch.__version__}" in text


def test_the_training_step_benchmark_runs_every_row(capsys):
    assert bench_train_step.main(["--toy", "--backends", "triton", "--rows", "ID4", "ID6"]) == 0
    assert bench_train_step.main(["--toy", "--backends", "torch", "--grad-checkpointing"]) == 0
    out = capsys.readouterr().out
    for name in ("ID4", "ID6, triton", "ID6, torch", "ID7, torch", "ID8, torch"):
        assert f"| {name} |" in out, name


def test_flops_of_a_clip_are_three_forward_passes(monkeypatch):
    """One projection of known size stands for the model: 2 · 10 · 6 multiply-adds of one clip, times two."""
    step = object.__new__(bench_train_step.Step)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(6, 10, bias=False)

        def forward(self, video, tokens):
            return self.linear(video)

    step.model, step.precision = Model(), bench_train_step.Precision("cpu", torch.float32)
    batch = {"video": torch.randn(7, 2, 6), "tokens": torch.zeros(7, 2)}
    assert step.flops_per_clip(batch) == 3 * 2 * (2 * 10 * 6)


@pytest.mark.parametrize("name", ["bench_loader", "bench_encoding"])
def test_a_file_that_is_no_video_is_one_line(name, tmp_path, monkeypatch, capsys):
    program = importlib.import_module(f"benchmarks.{name}")
    file = tmp_path / "notes.txt"
    file.write_text("no video")
    monkeypatch.setattr(sys, "argv", [name, "--videos", *[str(file)] * 3])
    with pytest.raises(SystemExit) as ended:
        program.main()
    assert ended.value.code == 2
    assert "notes.txt: is not a readable video" in capsys.readouterr().err.splitlines()[-1]
