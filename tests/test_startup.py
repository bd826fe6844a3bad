"""The command line is understood before anything heavy is imported: each program by itself, in its own process."""

import json
import os
import subprocess
import sys

import pytest

from avion.commands.table import programs
from tests.layering import ROOT

HEAVY = (
    "torch", "torchvision", "timm", "open_clip", "triton", "av", "decord", "matplotlib", "wandb", "tensorboard",
    "huggingface_hub", "safetensors", "transformers", "pandas", "scipy", "gradio", "PIL",
)  # fmt: skip
# Runs a program as `python FILE` or `python -m MODULE` does, and says what it has imported when it ends.
RUNNER = """
import contextlib, io, json, runpy, sys
how, program, *words = sys.argv[1:]
sys.argv = [program, *words]
status, output = None, io.StringIO()
try:
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        if how == "file":
            runpy.run_path(program, run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
except SystemExit as e:
    status = e.code
print(json.dumps({"status": status, "output": output.getvalue(), "modules": sorted(sys.modules)}))
"""
PROGRAMS = [
    *sorted(path.name for path in ROOT.glob("main_*.py")),
    *sorted(f"tools/{path.name}" for path in (ROOT / "tools").glob("*.py")),
    "slurm/submit.py",
]


def run(how, program, *words):
    result = subprocess.run(
        [sys.executable, "-c", RUNNER, how, program, *words],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def heavy(modules):
    return sorted(set(HEAVY) & set(modules))


def test_all_programs_are_found():
    named = {"main_pretrain.py", "main_egoschema.py", "main_zeroshot.py", "tools/reproduce.py", "tools/demo.py"}
    assert named <= set(PROGRAMS)


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_imports_nothing_heavy(program):
    ended = run("file", program, "--help")
    assert ended["status"] == 0 and "usage:" in ended["output"]
    assert heavy(ended["modules"]) == []


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_that_nobody_reads_is_no_error(program):
    """As `… --help | head -0`: the reading end is closed before anything is written."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb") as nobody_reads:
        ended = subprocess.run(
            [sys.executable, program, "--help"], cwd=ROOT, stdout=nobody_reads, stderr=subprocess.PIPE, timeout=120
        )
    assert (ended.returncode, ended.stderr) == (141, b"")


# torchrun is missing: its help is that of PyTorch's own parser.
COMMANDS = [(p.name, "--help") for p in programs() if p.name != "torchrun"]
SEARCHES = [("search-videos", word, "--help") for word in ("index", "search", "serve")]


@pytest.mark.parametrize("words", [("--help",), (), ("models", "TIME*"), *COMMANDS, *SEARCHES], ids=" ".join)
def test_the_command_avion_imports_nothing_heavy(words):
    ended = run("module", "avion", *words)
    assert ended["status"] == 0
    assert heavy(ended["modules"]) == []
    if words in [(), ("--help",)]:  # nor the options, nor NumPy: it is there at once
        assert {"numpy", "yaml", "tqdm"}.isdisjoint(ended["modules"])


@pytest.mark.parametrize("words", [("--help",), (), ("TIMEMAMBA*",)], ids=["help", "all", "pattern"])
def test_the_list_of_models_imports_nothing_heavy(words):
    ended = run("module", "avion.models", *words)
    assert ended["status"] == 0
    assert "TIMEMAMBA" in ended["output"]
    assert heavy(ended["modules"]) == []


@pytest.mark.parametrize("program", [name for name in PROGRAMS if name.startswith("main_")])
def test_a_misspelt_flag_is_refused_before_anything_heavy(program):
    ended = run("file", program, "--no-such-flag")
    assert ended["status"] == 2 and "unknown flag --no-such-flag" in ended["output"]
    assert heavy(ended["modules"]) == []


def test_the_runner_sees_what_is_imported(tmp_path):
    (tmp_path / "program.py").write_text("import sys\nimport torch\nsys.exit(3)\n")
    ended = run("file", str(tmp_path / "program.py"))
    assert ended["status"] == 3 and "torch" in heavy(ended["modules"])


def test_a_model_is_built_and_loaded_without_the_packages_of_runs(tmp_path):
    """Not wandb, which others import beside timm and open_clip, nor anything that only a run needs."""
    (tmp_path / "use.py").write_text(
        "from avion.models import create_model, model_from_checkpoint\n"
        "from avion.weights import save_weights\n"
        "create_model('TIMEMAMBA_VITT16', depth=1)\n"
        f"model_from_checkpoint({str(ROOT / 'tests/fixtures/ID6_checkpoint.pt')!r}, num_heads=4, text_heads=4)\n"
    )
    ended = run("file", str(tmp_path / "use.py"))
    assert ended["status"] is None
    assert {"wandb", "tensorboard", "submitit", "matplotlib", "pandas"}.isdisjoint(ended["modules"])


def test_no_program_imports_a_compiler_or_sharding_that_it_does_not_use(tmp_path):
    """PyTorch's compiler and sharded tensors take as long as the rest of PyTorch. Optimizers do import the compiler."""
    (tmp_path / "use.py").write_text(
        "import avion.engine.egoschema, avion.engine.zeroshot\n"
        "import avion.engine.run, avion.engine.tasks.pretrain\n"
        "from avion.models import create_model\n"
        "create_model('TIMEMAMBA_VITT16', depth=1)\n"
        "from avion.data.tokenizer import tokenize\n"
        "assert tokenize('opens a drawer').shape == (1, 77)\n"
    )
    ended = run("file", str(tmp_path / "use.py"))
    assert ended["status"] is None
    assert {"open_clip", "timm", "torchvision", "wandb"}.isdisjoint(ended["modules"])  # for the tokenizer alone
    assert {"torch._dynamo", "torch._inductor", "torch.distributed.fsdp", "sympy"}.isdisjoint(ended["modules"])
