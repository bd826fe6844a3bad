"""The Triton kernels through the real compiler, for a GPU that need not be there, and how their code is counted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from benchmarks import instructions, machine_code

pytestmark = pytest.mark.timeout(1800)  # compiling takes a minute of one core, on a busy machine ten
CASES = ("training", "few", "ragged", "convolution")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def counts(tmp_path_factory) -> list[dict]:
    """Of every kernel, with the plan that is guessed; of long rows, those of a single one. In a process of its own:
    with TRITON_INTERPRET there is no compiler."""
    folder = tmp_path_factory.mktemp("instructions")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(folder)}
    command = [sys.executable, "benchmarks/instructions.py", "--guess-only", "--cases", *CASES]
    command += ["--json", str(folder / "counts.json")]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]
    return json.loads((folder / "counts.json").read_text())


def of(counts: list[dict], case: str, kernel: str) -> list[dict]:
    found = [c for c in counts if c["case"].startswith(case) and c["kernel"] == kernel]
    assert found, f"{case}: {kernel} was not compiled"
    return found


def test_every_kernel_compiles_for_an_h100(counts):
    for case in CASES[:-1]:
        of(counts, case, "forward_kernel"), of(counts, case, "backward_kernel")
        assert any("second" in c["case"] for c in of(counts, case, "backward_kernel"))
    for kernel in ("part_kernel", "join_kernel"):
        assert len(of(counts, "few", kernel)) == 2  # of the state and of its adjoint
    of(counts, "convolution", "forward_kernel"), of(counts, "convolution", "backward_kernel")


# Instructions per step, state and channel of a thread; the floors are 4 and 12.
@pytest.mark.parametrize(
    ("case", "kernel", "most"),
    [
        ("training", "forward_kernel", 8),
        ("training", "backward_kernel", 30),
        ("few", "backward_kernel", 40),
        ("few", "forward_kernel", 14),
    ],
)
def test_kernels_stay_within_their_instructions(counts, case, kernel, most):
    for count in of(counts, case, kernel):
        assert count["total"] <= most, count
        assert count["classes"]["shuffles"] <= (3 if kernel == "backward_kernel" else 0), count
        if case == "training":
            assert count["local_bytes"] == 0, count
        assert count["classes"]["spills"] < 0.01, count  # an address kept over a part of 96 steps may be


CODE = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA `(.L_x_3) ;
.L_x_0:
        /*0020*/                   LDG.E.64 R2, desc[UR4][R2.64] ;
        /*0030*/                   SHF.L.U32 R4, R2, 0x10, RZ ;
        /*0040*/                   LOP3.LUT R5, R2, 0xffff0000, RZ, 0xc0, !PT ;
.L_x_1:
        /*0050*/                   MUFU.EX2 R6, R4 ;
        /*0060*/                   SHF.L.U32 R7, R2, 0x2, RZ ;
        /*0070*/               @P1 BRA `(.L_x_1) ;
        /*0080*/                   SHFL.IDX PT, R9, R2, R9, 0x1f ;
        /*0090*/                   STL [R1], R9 ;
        /*00a0*/              @!P2 BRA `(.L_x_0) ;
.L_x_3:
        /*00b0*/                   EXIT ;
.L_x_2:
        /*00c0*/                   BRA `(.L_x_2);
        /*00d0*/                   NOP;
.L_x_4:
"""


def test_loops_and_classes_are_read_from_the_machine_code():
    texts, labels = machine_code.parse(CODE)
    assert len(texts) == 12 and texts[-1] == "EXIT"
    loops = machine_code.find_loops(texts, labels)
    assert loops == [machine_code.Loop(2, 11, 0), machine_code.Loop(5, 8, 1)]
    launch = machine_code.Launch("kernel", {}, 1, 1, 8, 0, texts, loops)
    assert [launch.is_innermost(loop) for loop in loops] == [False, True]
    outer, inner, once = (machine_code.count_by_class(launch.own(loop)) for loop in (*loops, None))
    assert outer == {"loads": 1, "conversions": 2, "shuffles": 1, "spills": 1, "integer, address, control": 1}
    assert inner == {"MUFU": 1, "integer, address, control": 2}
    assert once == {"loads": 1, "integer, address, control": 2}


def test_counts_are_per_step_state_and_channel_by_hand():
    """An inner loop over chunks of 4 steps within one over rows of 7, 2 states, 2 channels to a thread."""
    texts, labels = machine_code.parse(CODE)
    loops = machine_code.find_loops(texts, labels)
    constants = {"n": 2, "chunk": 4, "block_d": 64}
    launch = machine_code.Launch("forward_kernel", constants, 1, 1, 8, 0, texts, loops)
    found = instructions.count("ragged, second direction", "", launch, processors=2, clock=1.0)
    assert found.classes["MUFU"] == pytest.approx(1 / (4 * 2 * 2))
    assert found.classes["conversions"] == pytest.approx(2 / (7 * 2 * 2))
    assert found.total == pytest.approx(3 / 16 + 6 / 28) and found.once == 3
    # 300 rows of 7 steps, 100 channels and 2 states; 8 instructions of 32 lanes per nanosecond; 8 cycles of the
    # exponentials' unit, which bound it.
    pace = 300 * 7 * 100 * 2 / 32 / 8e6
    assert found.ms == pytest.approx(pace * 8 / 16)
    assert found.floor_ms == pytest.approx(pace * 8 * 6 / 7)


def test_interpreted_kernels_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert instructions.main(["--guess-only", "--cases", "training"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == "error: TRITON_INTERPRET is set, so that Triton interprets its kernels; unset it to compile them"
