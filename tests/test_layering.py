"""The shape of the house, checked from the source: who imports whom, sizes, what `avion.utils` is."""

import ast

import pytest

from tests import conftest
from tests.layering import ROOT, circles, imported_names, project_sources, violations

SOURCES = project_sources()
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 70


def test_imports_point_down_only():
    assert violations(SOURCES) == []


def test_no_files_import_each_other_in_a_circle():
    assert circles(SOURCES) == []


def test_a_circle_is_seen():
    sources = {"avion.a": "from .b import x", "avion.b": "import avion.c", "avion.c": "from avion.a import y"}
    assert circles(sources) == [["avion.a", "avion.b", "avion.c"]]
    later = sources | {"avion.c": "def f():\n    from avion.a import y"}
    assert circles(later) == []


def test_every_room_was_read():
    rooms = {module.split(".")[1] for module in SOURCES if module.startswith("avion.")}
    assert {"models", "weights", "ops", "data", "losses", "optim", "evaluation", "engine", "utils", "errors"} <= rooms


@pytest.mark.parametrize(
    ("module", "statement", "imported"),
    [
        ("avion.models.vim", "from avion.data import tokenizer", "avion.data.tokenizer"),
        ("avion.models.vim", "from ..data.tokenizer import tokenize", "avion.data.tokenizer.tokenize"),
        ("avion.models.__init__", "from ..engine import args", "avion.engine.args"),
        ("avion.data.ek100", "def read():\n    import avion.evaluation.ek100_mir", "avion.evaluation.ek100_mir"),
        ("avion.ops.selective_scan.torch_backend", "from ...models import vim", "avion.models.vim"),
        ("avion.errors", "import avion.constants", "avion.constants"),
        ("avion.engine.trainer", "from avion.utils import misc", "avion.utils.misc"),
        ("avion.engine.trainer", "import main_pretrain", "main_pretrain"),
        ("avion.data.demo", "import importlib\nimportlib.import_module('tools.demo')", "tools.demo"),
        ("avion.losses.losses", "from tests.layering import ROOT", "tests.layering.ROOT"),
        ("main_pretrain", "from avion.utils.misc import x", "avion.utils.misc.x"),
        ("avion.models.vim", "from avion.weights import Checkpoint", "avion.weights.Checkpoint"),
        ("avion.weights.zoo", "from avion.engine import state", "avion.engine.state"),
        ("tools.demo", "import benchmarks.bench", "benchmarks.bench"),
        ("tools.demo", "from avion.engine.args import ToolParser", "avion.engine.args.ToolParser"),
        ("avion.engine.trainer", "from avion.commands import pretrain", "avion.commands.pretrain"),
        ("avion.commands.demo", "import main_pretrain", "main_pretrain"),
    ],
)
def test_a_wrong_import_is_seen(module, statement, imported):
    assert [line.split(" imports ")[1] for line in violations({module: statement})] == [imported]


@pytest.mark.parametrize(
    ("module", "statement"),
    [
        ("avion.models.vim", "from avion.ops.selective_scan import selective_scan"),
        ("avion.models.timemamba", "from .vim import BiMambaMixer\nfrom . import registry"),
        ("avion.models.__init__", "from . import vim\nfrom .registry import create_model"),
        ("avion.ops.selective_scan.torch_backend", "import torch\nfrom ...errors import UserError"),
        ("avion.engine.tasks", "from avion import __version__\nfrom avion.evaluation import ek100_mir"),
        ("avion.utils.evaluation_ek100mir", "from avion.evaluation.ek100_mir import get_mAP"),
        ("tools.demo", "from avion.commands.demo import main"),
        ("main_pretrain", "from avion.commands.pretrain import main"),
        ("avion.commands.demo", "from .pretrain import main\nfrom avion.data.demo import ensure_demo_dataset"),
    ],
)
def test_a_right_import_is_allowed(module, statement):
    assert violations({module: statement}) == []


def test_evaluation_is_pure():
    """Arrays in, figures out: no files, no process group."""
    forbidden = ("torch.distributed", "pathlib", "pickle", "json", "csv", "logging")
    for module, source in SOURCES.items():
        if module.startswith("avion.evaluation."):
            names = [name for _, name in imported_names(module, source)]
            assert not [name for name in names if name.startswith(forbidden)], module
            assert "open(" not in source, module


@pytest.mark.parametrize("module", SOURCES)
def test_files_and_functions_are_of_a_readable_size(module):
    source = SOURCES[module]
    assert len(source.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, node.name


def test_old_paths_only_re_export():
    """Where a thing has a home of its own. AVION's other helpers live in avion.utils, and nothing here uses them."""
    modules = [module for module in SOURCES if module.startswith("avion.utils.evaluation_")]
    assert len(modules) == 2
    for module in modules:
        for statement in ast.parse(SOURCES[module]).body:
            docstring = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
            names = isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__"
            assert docstring or names or isinstance(statement, ast.ImportFrom), f"{module}:{statement.lineno}"


def skipped_formatting(source):
    """The lines with `# fmt: skip` that do not end a table of data (a literal of a module or a class, or the cases of a
    test)."""
    tables = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef):
            for statement in node.body:
                value = getattr(statement, "value", None)
                if isinstance(value, ast.Call) and ast.unparse(value.func) == "frozenset" and value.args:
                    value = value.args[0]
                if isinstance(value, ast.Dict | ast.List | ast.Tuple | ast.Set):
                    tables.add(statement.end_lineno)
        for decorator in getattr(node, "decorator_list", []):
            if "parametrize" in ast.unparse(decorator):
                tables.add(decorator.end_lineno)
    marker = "# fmt: " + "skip"
    return [n for n, line in enumerate(source.splitlines(), 1) if line.endswith(marker) and n not in tables]


def test_only_tables_of_data_are_formatted_by_hand():
    assert skipped_formatting("TABLE = {\n    1: 2,\n}  # fmt: skip\n") == []
    assert skipped_formatting("found = f(\n    1,\n)  # fmt: skip\n") == [3]
    rooms = [path for path in ROOT.iterdir() if path.is_dir() and path.name != ".venv"]  # which has 50,000 files
    paths = [*ROOT.glob("*.py"), *(path for room in rooms for path in room.rglob("*.py"))]
    assert len(paths) > 500
    for path in sorted(paths):
        assert skipped_formatting(path.read_text()) == [], path


def test_the_tests_that_run_first_exist():
    assert all((ROOT / name).is_file() for name in conftest.LONGEST)
