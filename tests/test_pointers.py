"""Comments and docstrings point to what exists: the files and the dotted names that they mention are there."""

import ast
import io
import re
import tokenize
from functools import cache
from pathlib import PurePosixPath

import pytest

from tests.layering import ROOT

FOLDERS = ("avion", "tools", "benchmarks", "slurm", "recipes", "docs", "tests", ".ci")
# foo.py, docs/x.md; a name with a placeholder (bench_*.py, {video}.yaml, FILE.md) is no pointer.
FILE = re.compile(r"(?<![\w./*{}<>:-])(?!FILE\.)((?:[\w-]+/)*[\w-]+\.(?:py|md|yaml|sbatch|sh|toml))(?![\w*{}])(?!\.\w)")
FOLDER = re.compile(r"`((?:avion|tests|tools|benchmarks|docs|recipes|slurm)/[\w/-]*)`")
DOTTED = re.compile(r"(?<![\w./])((?:avion|tools|tests|benchmarks)(?:\.\w+)+)(?!\w|\.\w|/)")


@cache
def sources() -> dict[str, str]:
    """The project's own Python files, by their path in the repository."""
    found = [*ROOT.glob("main_*.py")]
    for folder in ("avion", "tools", "benchmarks", "slurm"):
        found += (ROOT / folder).rglob("*.py")
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in sorted(found)}


@cache
def files() -> frozenset[str]:
    """All files of the repository that a comment may point to."""
    found = {path.name for path in ROOT.iterdir() if path.is_file()}
    for folder in FOLDERS:
        paths = (ROOT / folder).rglob("*")
        found |= {p.relative_to(ROOT).as_posix() for p in paths if p.is_file() and p.suffix != ".pyc"}
    return frozenset(found)


def prose(source: str) -> list[tuple[int, str]]:
    """(line, text) of every run of comments and every docstring of a source; a text may take several lines."""
    found: list[tuple[int, str]] = []
    last = -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            text = token.string.lstrip("#").strip()
            if token.start[0] == last + 1 and found:
                line, before = found.pop()
                text = f"{before} {text}"
            else:
                line = token.start[0]
            found.append((line, text))
            last = token.start[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False)
            if text is not None:
                found.append((node.body[0].lineno, text))
    return found


def dead_pointers(path: str, source: str) -> list[str]:
    """`line: pointer` for each file and each dotted name in the prose of a source that does not exist."""
    found = []
    for line, text in prose(source):
        for name in FILE.findall(text):
            if not file_exists(name, path):
                found.append(f"{line}: {name}")
        found += [f"{line}: {name}" for name in FOLDER.findall(text) if not (ROOT / name).exists()]
        found += [f"{line}: {name}" for name in DOTTED.findall(text) if not name_exists(name)]
    return found


def file_exists(name: str, path: str) -> bool:
    """A name is a path from the repository's root, from the folder of the file that mentions it, or its last part."""
    beside = (PurePosixPath(path).parent / name).as_posix()
    return name in files() or beside in files() or any(known.endswith(f"/{name}") for known in files())


def name_exists(dotted: str) -> bool:
    """Whether `avion.a.b.C.d` is a module, a name of a module, or a name of a class of a module."""
    parts = dotted.split(".")
    if (ROOT / "/".join(parts)).is_dir():
        return True
    for size in range(len(parts), 0, -1):
        for file in (ROOT.joinpath(*parts[:size]).with_suffix(".py"), ROOT.joinpath(*parts[:size], "__init__.py")):
            if file.is_file():
                return _has(ast.parse(file.read_text(encoding="utf-8")).body, parts[size:])
    return False


def _has(body: list[ast.stmt], names: list[str]) -> bool:
    if not names:
        return True
    first, *rest = names
    for statement in body:
        inside = list(ast.walk(statement))
        if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if statement.name == first:
                return _has(statement.body, rest)
            if statement.name != "__getattr__":
                continue
        names_here = {n.id for n in inside if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        names_here |= {(n.asname or n.name).split(".")[0] for n in inside if isinstance(n, ast.alias)}
        # Names that a module hands on when it is asked stand in it as texts: in __all__ or in a table.
        names_here |= {n.value for n in inside if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        # self.name = … and the annotated fields of a class count as names of the class.
        names_here |= {n.attr for n in inside if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
        if first in names_here:
            return True
    return False


@pytest.mark.parametrize("path", sources())
def test_comments_and_docstrings_point_to_what_exists(path):
    assert dead_pointers(path, sources()[path]) == []


def test_the_pointers_of_the_project_are_seen():
    texts = [text for source in sources().values() for _, text in prose(source)]
    assert sum(len(FILE.findall(text)) for text in texts) >= 30
    assert sum(len(DOTTED.findall(text)) for text in texts) >= 20


@pytest.mark.parametrize(
    ("source", "pointer"),
    [
        ('"""See gone.py."""', "gone.py"),
        ('"""As\n\n`docs/gone.md` says."""', "docs/gone.md"),
        ("x = 1  # docs/gone.md#heading", "docs/gone.md"),
        ("# See\n# `avion.models.gone`.", "avion.models.gone"),
        ("# avion.models.registry.gone makes it", "avion.models.registry.gone"),
        ('def f():\n    """`avion.weights.checkpoint.Checkpoint.gone`"""', "avion.weights.checkpoint.Checkpoint.gone"),
        ("# `tests/gone` holds it", "tests/gone"),
        ("# recipes/gone.yaml", "recipes/gone.yaml"),
    ],
)
def test_a_dead_pointer_is_seen(source, pointer):
    assert [found.split(": ")[1] for found in dead_pointers("avion/errors.py", source)] == [pointer]


@pytest.mark.parametrize(
    "text",
    [
        "errors.py", "avion/errors.py", "docs/models.md#rows", "`tests/models`", "`avion.errors`",
        "avion.errors.UserError", "avion.weights.checkpoint.Checkpoint.open", "`avion.models.create_model`",
        "bench_*.py", "x.yaml.gz", "{name}.py", "https://host/gone.py", "FILE.yaml", "avion.models. Then", "recipes/",
    ],
)  # fmt: skip
def test_what_exists_or_is_no_pointer_is_left_alone(text):
    assert dead_pointers("avion/errors.py", f"# {text}") == []


def test_a_file_is_found_beside_the_one_that_mentions_it():
    assert file_exists("dispatch.py", "avion/ops/causal_conv/dispatch.py")
    assert not file_exists("patch.py", "avion/ops/causal_conv/dispatch.py")
