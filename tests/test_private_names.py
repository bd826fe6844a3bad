"""Tests look at behaviour: they read no private name of this project."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OWN = ("avion", "benchmarks", "tools")
SOURCES = [path for folder in OWN for path in sorted((ROOT / folder).rglob("*.py"))]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
OF_NAMED_TUPLES = {"_asdict", "_fields", "_make", "_replace"}

# What the tests of a file may read, each with the reason.
ALLOWED = {
    ("tests/avion_script.py", "_avion_factory"): "the script stands in for AVION's, which has factories of its own",
    ("tests/commands/test_console.py", "_names"): "the names are set once per process, and tests share a process",
    ("tests/data/test_decoding.py", "_context"): "only the codec knows how many frames it has decoded",
    ("tests/data/test_demo.py", "_fingerprint"): "a later version of the generator cannot be had otherwise",
    ("tests/data/test_demo.py", "_plan"): "the dataset of full size takes minutes to make",
    ("tests/data/test_demo_ek100.py", "_plan"): "the dataset of full size takes minutes to make",
    ("tests/data/test_demo_ek100.py", "_timestamp"): "no clip of the dataset begins after an hour",
    ("tests/data/test_windows.py", "_decode"): "only the store knows how many frames it has decoded",
    ("tests/data/video/test_hostile_indexes.py", "_RECORD"): "damaged indexes are made byte by byte",
    ("tests/data/video/test_index.py", "_index"): "whether an index is used shows in nothing but the reads",
    ("tests/data/video/test_index.py", "_open"): "whether an index is used shows in nothing but the reads",
    ("tests/data/video/test_index.py", "_reads_the_same"): "no demultiplexer at hand disagrees with itself",
    ("tests/data/video/test_prepare_video.py", "_range_of"): "no encoder at hand loses the range",
    ("tests/data/video/test_prepare_video.py", "_raw"): "the command of ffmpeg is compared word by word",
    ("tests/data/video/test_prepare_video.py", "_turned"): "no encoder at hand turns pictures the wrong way",
    ("tests/data/video/test_remote.py", "_open"): "which part of a remote video is read shows in the reader alone",
    ("tests/data/video/test_remote.py", "_path"): "a damaged entry of the cache is made in the cache's file",
    (
        "tests/data/video/test_reported_files.py",
        "_decoded_order",
    ): "whether frames were decoded shows in no result",
    ("tests/engine/test_signals.py", "_Run"): "a signal must arrive at one moment of an evaluation",
    (
        "tests/engine/kill_points.py",
        "_WatchedFile",
    ): "a process is killed at each call of the file that is being written",
    ("tests/search/test_page.py", "_card"): "the page shows its cards in a browser only",
    ("tests/search/test_page.py", "_restrict"): "the page's server is tested without its page",
    ("tests/engine/test_watch.py", "_GRACE_S"): "connections and time limits cannot be made to fail from outside",
    ("tests/engine/test_watch.py", "_accept"): "connections and time limits cannot be made to fail from outside",
    ("tests/engine/test_watch.py", "_is_there"): "connections and time limits cannot be made to fail from outside",
    ("tests/engine/test_watch.py", "_links"): "connections and time limits cannot be made to fail from outside",
    ("tests/engine/test_watch.py", "_listen"): "connections and time limits cannot be made to fail from outside",
    ("tests/engine/test_workers.py", "_ErrorsAsSamples"): "an error in a worker is made by hand",
}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in OF_NAMED_TUPLES | {"_"}


def defined(tree: ast.AST) -> Iterator[str]:
    """Private functions, classes, variables and attributes that a module defines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and is_private(node.name):
            yield node.name
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and is_private(node.id):
            yield node.id
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_private(node.attr):
            yield node.attr


def is_itself(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def read(tree: ast.AST, private: set[str]) -> Iterator[tuple[int, str]]:
    """Lines and private names that a test imports, reads of an object other than itself, or names in a text."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in OWN:
            yield from ((node.lineno, alias.name) for alias in node.names if is_private(alias.name))
        if isinstance(node, ast.Attribute) and node.attr in private and not is_itself(node.value):
            yield node.lineno, node.attr
        if isinstance(node, ast.Call):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            texts = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            if function in ("setattr", "getattr", "delattr", "hasattr"):
                yield from ((node.lineno, t.split(".")[-1]) for t in texts if t.split(".")[-1] in private)


PRIVATE = {name for path in SOURCES for name in defined(ast.parse(path.read_text(encoding="utf-8")))}


def found_in(path: Path) -> set[tuple[int, str]]:
    return set(read(ast.parse(path.read_text(encoding="utf-8")), PRIVATE))


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_test_reads_no_private_name(path):
    name = str(path.relative_to(ROOT))
    wrong = sorted(f"{name}:{line}: {word}" for line, word in found_in(path) if (name, word) not in ALLOWED)
    assert not wrong, "private names; look at behaviour, or make the name public:\n" + "\n".join(wrong)


def test_every_exception_is_still_needed():
    used = {(str(path.relative_to(ROOT)), word) for path in TESTS for _, word in found_in(path)}
    assert set(ALLOWED) <= used


SAMPLE = """
from avion.engine.run import _hidden
from torch import _dynamo
import avion.ops.tuning as tuning
tuning._chosen.clear()
monkeypatch.setattr(tuning, "_milliseconds", None)
monkeypatch.setattr("avion.ops.tuning._chosen", None)
record._replace(a=1), self._chosen, torch._dynamo
"""


def test_imports_attributes_and_texts_are_found():
    found = sorted(read(ast.parse(SAMPLE), {"_chosen", "_milliseconds"}))
    assert found == [(2, "_hidden"), (5, "_chosen"), (6, "_milliseconds"), (7, "_chosen")]
