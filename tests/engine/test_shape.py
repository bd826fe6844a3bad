"""The shape of the engine's code, read from its source: options keep their types, objects are whole once made."""

import ast
import importlib
import pkgutil

import pytest

import avion.engine
from avion.engine.args import Options
from tests.layering import ROOT

SOURCES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "avion" / "engine").rglob("*.py"))
}


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def loose_options(source: str) -> list[str]:
    """Parameters that stand for options and have no type, or any type."""
    found = []
    for function in functions(ast.parse(source)):
        for argument in [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]:
            annotation = None if argument.annotation is None else ast.unparse(argument.annotation)
            if argument.arg in ("args", "options", "flags") and annotation in (None, "Any"):
                found.append(f"{function.name}({argument.arg})")
    return found


def late_attributes(source: str) -> list[str]:
    """Attributes of `self` that a method other than `__init__` is the first to assign."""
    found = []
    for cls in [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)]:
        declared = {n.target.id for n in cls.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
        declared |= {t.id for n in cls.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
        assigned = {f.name: _assigned(f) for f in cls.body if isinstance(f, ast.FunctionDef)}
        whole = declared | assigned.pop("__init__", set())
        found += [f"{cls.name}.{name} in {m}" for m, names in assigned.items() for name in sorted(names - whole)]
    return found


def _assigned(function: ast.FunctionDef) -> set[str]:
    return {
        node.attr
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }


def smuggled(source: str) -> list[str]:
    """Attributes that are put onto something else than `self`, and types that pose as options."""
    tree, found = ast.parse(source), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("object.__setattr__", "setattr"):
            found.append(ast.unparse(node))
        if isinstance(node, ast.Name | ast.Attribute) and ast.unparse(node).endswith("SimpleNamespace"):
            found.append(ast.unparse(node))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            owner = ast.unparse(node.value)
            if owner in ("args", "options", "self.args", "self.options"):
                found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("path", SOURCES)
def test_options_keep_their_types(path):
    assert loose_options(SOURCES[path]) == []
    assert smuggled(SOURCES[path]) == []


@pytest.mark.parametrize("path", SOURCES)
def test_objects_are_whole_once_they_are_made(path):
    assert late_attributes(SOURCES[path]) == []


def test_faults_are_seen():
    assert loose_options("def f(args: Any, *, options): ...\ndef g(options: RunOptions): ...") == [
        "f(args)",
        "f(options)",
    ]
    source = "class A:\n  c: int\n  d = 1\n  def __init__(self):\n    self.a, self.b = 1, 2\n"
    assert late_attributes(source + "  def f(self):\n    self.a = self.c = self.d = 3\n") == []
    assert late_attributes(source + "  def f(self):\n    (self.a, self.e), self.f = x\n") == ["A.e in f", "A.f in f"]
    assert smuggled("options.root = 1\nobject.__setattr__(o, 'given', 2)\nSimpleNamespace(a=1)\nself.x = 1") == [
        "options.root",
        "object.__setattr__(o, 'given', 2)",
        "SimpleNamespace",
    ]


def every_options_class() -> list[type]:
    for module in pkgutil.walk_packages(avion.engine.__path__, "avion.engine."):
        importlib.import_module(module.name)
    classes, waiting = [], [Options]
    while waiting:
        cls = waiting.pop()
        classes.append(cls)
        waiting += cls.__subclasses__()
    return classes


def test_all_options_are_frozen():
    classes = every_options_class()
    names = {cls.__name__ for cls in classes}
    assert {"VideoOptions", "PretrainOptions", "EgoSchemaOptions", "FeatureOptions", "SubmitOptions"} <= names
    assert [cls for cls in classes if not cls.__dataclass_params__.frozen] == []
