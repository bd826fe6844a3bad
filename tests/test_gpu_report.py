"""The report that one command makes on a GPU, tried on the CPU: what it runs, what it says, what it survives."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_peer, gpu_report, gpu_sections
from benchmarks.gpu_verdicts import Verdict, verdicts

ROOT = Path(gpu_report.ROOT)
COMMAND = [sys.executable, str(ROOT / "benchmarks" / "gpu_report.py")]


def section_of(tmp_path) -> gpu_sections.Section:
    return gpu_sections.Section(tmp_path / "found.json", "cpu", toy=True)


def found_by(tmp_path, name: str, *words: str) -> dict:
    """A section in this process."""
    path = tmp_path / "found.json"
    gpu_sections.main([name, "--json", str(path), "--device", "cpu", "--toy", *(["--set", *words] if words else [])])
    return json.loads(path.read_text())


# ---- the whole of it ---------------------------------------------------------------------------------------


@pytest.mark.timeout(900)
def test_a_dry_run_writes_both_files_with_every_section_that_was_asked_for(tmp_path):
    pytest.importorskip("triton")
    out = tmp_path / "report"
    words = ["--output", str(out), "--minutes", "12", "--dry-run", "--sections", "scan", "step"]
    done = subprocess.run([*COMMAND, *words], capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((out / "report.json").read_text())
    assert [(s["name"], s["status"]) for s in report["sections"]] == [("device", "ok"), ("scan", "ok"), ("step", "ok")]
    device, scan, step = (s["data"] for s in report["sections"])
    assert f"torch {torch.__version__}" in device["where"]
    assert {(r["backend"], r["what"]) for r in scan["records"]} == {
        (backend, what) for backend in ("triton", "torch") for what in ("forward", "both")
    }
    assert [r["name"] for r in step["records"]] == ["ID4", "ID6, triton"]
    # auto's choice is the faster one, in the report and in the cache; a dry run leaves the user's cache alone.
    times = {r["backend"]: r["ms"] for r in scan["records"] if r["what"] == "both"}
    assert scan["choices"] == {"T<4, D=4, N=16, bfloat16": min(times, key=times.__getitem__)}
    (kept,) = (out / "plans").glob("backends*.json")
    assert json.loads(kept.read_text())["T<4, D=4, N=16, bfloat16"]["milliseconds"] == times
    text = (out / "report.md").read_text()
    assert "dry run" in text.splitlines()[0] and "at most 2.5 x the floor: 2 x 3" in text
    assert f"auto takes {min(times, key=times.__getitem__)} at T<4" in text


def test_without_a_gpu_it_says_so_in_a_line(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    done = subprocess.run([*COMMAND, "--output", str(tmp_path)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "PyTorch sees no GPU here; --dry-run tries the report on a CPU" in line


@pytest.mark.parametrize(
    "words, told",
    [(["--minutes", "0"], "--minutes 0"), (["--minutes", "nan"], "--minutes nan"), (["--sections", "scna"], "'scna'")],
)
def test_bad_flags_are_refused(words, told, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        gpu_report.main(["--output", str(tmp_path), *words])
    assert error.value.code == 2 and told in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_a_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        gpu_report.main(["--output", str(tmp_path / "file" / "inside"), "--dry-run"])
    assert "Not a directory; give a folder that can be written" in capsys.readouterr().err


def test_interrupted_it_leaves_what_it_knew_and_no_process(tmp_path):
    words = ["--output", str(tmp_path), "--dry-run", "--minutes", "8", "--sections", "pretraining"]
    process = subprocess.Popen([*COMMAND, *words], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("device: ok")
    until = time.monotonic() + 60
    while not (tmp_path / "sections" / "pretraining.json").exists() and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
    text = (tmp_path / "report.md").read_text()
    assert "was interrupted" in text and "## Device and versions" in text
    assert not processes_with(str(tmp_path / "sections" / "pretraining.json"))


def processes_with(word: str) -> list[str]:
    lines = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True).stdout.splitlines()
    return [line for line in lines if word in line and " ps " not in line]


# ---- limits ------------------------------------------------------------------------------------------------


def test_a_section_that_hangs_is_stopped_with_all_it_started(tmp_path):
    marker = f"sleep 54{os.getpid()}"
    with gpu_report.group(["sh", "-c", f"trap '' TERM; {marker} & {marker}"], tmp_path / "log", dict(os.environ)):
        until = time.monotonic() + 20
        while len(processes_with(marker)) < 3 and time.monotonic() < until:
            time.sleep(0.05)
        assert len(processes_with(marker)) == 3
    until = time.monotonic() + 20  # those that nobody waits for die a moment after their SIGKILL
    while processes_with(marker) and time.monotonic() < until:
        time.sleep(0.05)
    assert not processes_with(marker)


def test_a_section_at_its_limit_is_cut_off_and_has_told_what_it_knew(tmp_path):
    plan = gpu_report.Plan("pretraining", "…", 1, ("pretraining",))
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = gpu_report.run_section(plan, tmp_path, 0.5, env, dry_run=True)
    assert found["status"] == "cut off" and found["line"].startswith("stopped at its limit of 0 s")
    # One that had told more.
    fake = tmp_path / "fake.py"
    told = {"status": "running", "line": "3 of 9 done", "markdown": "| table |", "data": {"done": 3}}
    write = f"pathlib.Path({str(tmp_path / 'x.json')!r}).write_text({json.dumps(told)!r})"
    fake.write_text(f"import pathlib, time\n{write}\ntime.sleep(1000)\n")
    (tmp_path / "benchmarks").mkdir()
    fake.rename(tmp_path / "benchmarks" / "gpu_sections.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_report, "ROOT", tmp_path)
        found = gpu_report.run_section(gpu_report.Plan("x", "…", 1, ("x",)), tmp_path, 2, env, dry_run=True)
    assert found == {**told, "status": "cut off", "line": "stopped at its limit of 2 s. 3 of 9 done"}


def test_a_section_that_dies_without_a_word_is_a_failure(tmp_path):
    plan = gpu_report.Plan("x", "…", 1, ("no such section",))
    found = gpu_report.run_section(plan, tmp_path, 60, dict(os.environ), dry_run=True)
    assert found["status"] == "failed" and "ended with status 2" in found["line"]


def test_what_there_was_no_time_for_is_listed(tmp_path, monkeypatch):
    def section(plan, *_):
        time.sleep(1.2)
        return {"status": "ok", "line": "", "markdown": "", "data": {}}

    monkeypatch.setattr(gpu_report, "run_section", section)
    monkeypatch.setattr(gpu_report, "RESERVE_S", 59 - 5)
    assert gpu_report.main(["--output", str(tmp_path), "--dry-run", "--minutes", "1"]) == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert [s["name"] for s in report["sections"]] == [plan.name for plan in gpu_report.PLANS]
    assert report["sections"][-1]["status"] == "not run" and report["sections"][0]["status"] == "ok"


# ---- sections ------------------------------------------------------------------------------------------------


def test_a_missing_package_is_a_line(tmp_path, monkeypatch):
    def section(_):
        raise ModuleNotFoundError("No module named 'yaml'", name="yaml")

    monkeypatch.setitem(gpu_sections.SECTIONS, "tests", section)
    found = found_by(tmp_path, "tests")
    assert (found["status"], found["line"]) == ("missing", "the package pyyaml is not installed: pip install pyyaml")


def test_an_error_is_a_line_and_what_was_known_stays(tmp_path, monkeypatch, capsys):
    def section(to):
        to.tell(line="half of it", markdown="| table |", done=1)
        raise ValueError("first line\nsecond line")

    monkeypatch.setitem(gpu_sections.SECTIONS, "tests", section)
    found = found_by(tmp_path, "tests")
    assert (found["status"], found["line"]) == ("failed", "ValueError: first line")
    assert found["markdown"] == "| table |" and found["data"] == {"done": 1}
    assert "second line" in capsys.readouterr().err


def test_a_wrong_kernel_and_one_that_raises_are_named(tmp_path, monkeypatch):
    from tests.gpu import kernels

    def raises():
        raise RuntimeError("illegal memory access")

    three = [
        kernels.Check("right", 1e-3, lambda: (1e-4, "output")),
        kernels.Check("wrong", 1e-3, lambda: (float("nan"), "gradient of A")),
        kernels.Check("raises", 1e-3, raises),
    ]
    monkeypatch.setattr(kernels, "checks", lambda *_, **__: iter(three))
    found = found_by(tmp_path, "kernels")
    assert found["status"] == "wrong" and found["line"] == "WRONG: wrong, raises"
    assert "RuntimeError: illegal memory access" in found["markdown"] and "gradient of A" in found["markdown"]


def test_the_tests_verdict_is_pytests(tmp_path):
    (tmp_path / "test_it.py").write_text("def test_right(): pass\n\ndef test_wrong(): assert False\n")
    found = found_by(tmp_path, "tests", f"paths={tmp_path / 'test_it.py'}")
    assert found["status"] == "wrong" and "1 failed, 1 passed" in found["line"]
    assert "FAILED" in found["markdown"] and "test_wrong" in found["markdown"]


# ---- verdicts, by hand ---------------------------------------------------------------------------------------


def scan_record(T: int, backend: str, ms: float, floor: float = 1.0, what: str = "both", R: int = 8) -> dict:
    return {"R": R, "T": T, "what": what, "backend": backend, "ms": ms, "floor_ms": floor}


def section(name: str, status: str = "ok", line: str = "", **data) -> dict:
    return {"name": name, "status": status, "line": line, "data": data}


def by_goal(*sections: dict) -> dict[str, Verdict]:
    return {verdict.goal: verdict for verdict in verdicts(list(sections))}


def test_speeds_beside_mamba_ssm_and_the_floor():
    records = [
        scan_record(4, "triton", 2.0),
        scan_record(4, "mamba_ssm", 21.0),
        scan_record(4, "torch", 9.0),
        scan_record(4, "triton", 50.0, what="forward"),
        scan_record(16, "triton", 2.6),
        scan_record(16, "mamba_ssm", 12.9),
    ]
    long = [scan_record(256, "triton", 3.0, 2.0), scan_record(256, "mamba_ssm", 3.0, 2.0)]
    long += [scan_record(784, "triton", 3.0, 2.0), scan_record(784, "mamba_ssm", 2.9, 2.0)]
    found = by_goal(section("scan", records=records), section("long", records=long))
    short = found["forward + backward at least 10 x mamba-ssm's speed at T = 4"]
    assert short.met is True and short.found == "8 x 4 10.5 x"
    assert found["forward + backward at least 5 x mamba-ssm's speed at T = 16"].met is False
    assert found["forward + backward at least 1 x mamba-ssm's speed at T >= 256"].met is False
    floor = found["forward + backward at most 2.5 x the floor"]
    assert floor.met is False and floor.found == "8 x 4 2.00 x; 8 x 16 2.60 x; 8 x 256 1.50 x; 8 x 784 1.50 x"


def test_the_peer_that_was_built_later_is_compared_with_its_own_round():
    first = section("scan", records=[scan_record(4, "triton", 2.0)])
    peer = section("peer", records=[scan_record(4, "triton", 2.2), scan_record(4, "mamba_ssm", 33.0)])
    assert by_goal(first)["forward + backward at least 10 x mamba-ssm's speed at T = 4"].met is None
    assert by_goal(first, peer)["forward + backward at least 10 x mamba-ssm's speed at T = 4"].found == "8 x 4 15.0 x"


@pytest.mark.parametrize("ratio, met", [(1.10, True), (1.11, False)])
def test_the_step_beside_id4(ratio, met):
    records = [
        {"row": "ID4", "backend": None, "to_id4": 1.0, "ms": 100.0},
        {"row": "ID6", "backend": "mamba_ssm", "to_id4": 3.0, "ms": 300.0},
        {"row": "ID6", "backend": "triton", "to_id4": ratio, "ms": 100 * ratio},
    ]
    (verdict,) = (v for v in verdicts([section("step", records=records)]) if "ID6" in v.goal)
    assert verdict.met is met and verdict.found.startswith(f"{ratio:.2f} x")


def test_what_is_wrong_is_missed_even_where_time_was_up():
    found = by_goal(section("kernels", "cut off", "stopped", wrong=["scan"]), section("tests", "missing", "no pytest"))
    assert found["kernels within their bounds of float64"].met is False
    assert found["tests/ops and tests/gpu"] == Verdict("tests/ops and tests/gpu", "no pytest", None)
    assert found["the demo's pretraining as on the CPU"].met is None
    assert str(found["tests/ops and tests/gpu"]) == "not measured: tests/ops and tests/gpu: no pytest"


# ---- the peer ------------------------------------------------------------------------------------------------


def test_nvcc_is_told_of_one_architecture_alone():
    words = [
        "-c",
        "scan.cu",
        "-gencode",
        "arch=compute_70,code=sm_70",
        "-gencode=arch=compute_80,code=sm_80",
        "--generate-code=arch=compute_90,code=[sm_90,compute_90]",
        "-arch=sm_75",
        "-O3",
        "--threads",
        "4",
    ]
    kept = ["-c", "scan.cu", "-O3", "--threads", "4", "-gencode", "arch=compute_90,code=sm_90"]
    assert gpu_peer.for_one_architecture(words, "90") == kept
    assert gpu_peer.for_one_architecture(["--version"], "90") == ["--version"]


def test_the_versions_are_those_that_are_pinned():
    found = gpu_peer.pinned(ROOT / "requirements-cuda.txt")
    assert [word.split("==")[0] for word in found] == ["causal-conv1d", "mamba-ssm"] and all("==" in w for w in found)


def with_nvcc(folder: Path) -> dict[str, str]:
    """An environment with an nvcc that does nothing."""
    nvcc = folder / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.symlink_to("/usr/bin/true")
    return {**os.environ, "CUDA_HOME": str(folder / "cuda")}


def test_without_nvcc_or_an_index_the_report_goes_on(tmp_path):
    nowhere = {**os.environ, "CUDA_HOME": str(tmp_path), "PATH": str(tmp_path)}
    with gpu_peer.Build(tmp_path / "peer", tmp_path / "log", nowhere) as build:
        build.begin({"capability": [9, 0]})
        assert build.news() == "mamba-ssm is not built: nvcc was not found (set CUDA_HOME)." and not build.is_pending()
    with gpu_peer.Build(tmp_path / "peer", tmp_path / "log", {**with_nvcc(tmp_path), "PIP_NO_INDEX": "1"}) as build:
        build.begin({"capability": [9, 0]})
        until = time.monotonic() + 60
        while not (line := build.news()) and time.monotonic() < until:
            time.sleep(0.1)
    assert "mamba-ssm could not be built: ERROR: No matching distribution" in line and not build.is_built
    assert build.news() == ""
    wrapped = (tmp_path / "peer" / "bin" / "nvcc").read_text()
    assert f"'{tmp_path / 'cuda/bin/nvcc'}'" in wrapped and "'90'" in wrapped


def test_once_the_peer_is_built_it_is_measured_before_what_is_left(tmp_path, monkeypatch):
    order, paths = [], []

    def section(plan, folder, seconds, env, dry_run):
        order.append(plan.name)
        paths.append(env.get("PYTHONPATH", ""))
        return {"status": "ok", "line": "", "markdown": "", "data": {"capability": [9, 0]}}

    def news(build):
        if len(order) < 2 or build.is_built:
            return ""
        build.is_built = True
        return "built."

    monkeypatch.setattr(gpu_report, "run_section", section)
    monkeypatch.setattr(gpu_peer.Build, "begin", lambda self, device: None)
    monkeypatch.setattr(gpu_peer.Build, "news", news)
    words = ["--output", str(tmp_path), "--dry-run", "--build-peer", "--sections", "scan", "step"]
    assert gpu_report.main(words) == 0
    assert order == ["device", "scan", "peer", "step"]
    assert str(tmp_path / "peer") not in paths[1] and paths[2].startswith(str(tmp_path / "peer"))
    assert "built." in (tmp_path / "report.md").read_text()


def test_a_build_that_is_not_done_in_time_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_peer, "pinned", lambda path: [])
    monkeypatch.setattr(gpu_peer.sys, "executable", "/bin/sleep")
    started = []
    right = subprocess.Popen

    def popen(command, **options):
        started.append(right(["sleep", "1000"], start_new_session=options["start_new_session"]))
        return started[0]

    monkeypatch.setattr(gpu_peer.subprocess, "Popen", popen)
    with gpu_peer.Build(tmp_path / "peer", tmp_path / "log", with_nvcc(tmp_path)) as build:
        build.begin({"capability": [9, 0]})
        assert build.is_pending() and build.news() == ""
    assert started[0].poll() is not None
