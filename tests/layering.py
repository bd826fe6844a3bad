"""Reads the imports of the project from its source; what `test_layering.py` checks."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# A room may import itself, the rooms named here, and the leaves. `avion.utils` is in nobody's list.
_LEAVES = (
    "c_code", "constants", "elsewhere", "errors", "files", "folder_lock", "json_lines", "numbers", "pickle_scan",
    "plugins", "processes", "reading", "remote", "resources", "safe_pickle", "targets",
)  # fmt: skip
LEAVES = frozenset({"avion", *(f"avion.{name}" for name in _LEAVES)})
_MIDDLE = ("avion.models", "avion.data", "avion.losses", "avion.optim", "avion.evaluation")
# Leaves that raise UserError.
_TELLING = frozenset({"avion.files", "avion.folder_lock", "avion.plugins"})
_ALLOWED: dict[str, frozenset[str]] = {
    **{leaf: frozenset() for leaf in LEAVES},
    **{leaf: frozenset({"avion.errors"}) for leaf in _TELLING},
    "avion.c_code": frozenset({"avion.errors", "avion.files"}),
    "avion.remote": frozenset({"avion.errors", "avion.files"}),
    "avion.reading": frozenset({"avion.remote"}),
    "avion.resources": frozenset({"avion.errors", "avion.remote"}),
    "avion.__main__": frozenset({"avion.commands"}),
    "avion.json_lines": frozenset({"avion.errors", "avion.files", "avion.reading"}),
    "avion.safe_pickle": frozenset({"avion.errors", "avion.pickle_scan", "avion.reading"}),
    "avion.targets": frozenset({"avion.errors", "avion.files", "avion.json_lines", "avion.remote"}),
    "avion.ops": LEAVES,
    **{room: LEAVES | {"avion.ops"} for room in _MIDDLE},
    "avion.weights": LEAVES | {"avion.models"},
    "avion.features": LEAVES,  # reads what the engine wrote; for people's scripts
    "avion.engine": LEAVES | {"avion.ops", "avion.weights", "avion.features", *_MIDDLE},
    "avion.reproduce": LEAVES | {"avion.ops", "avion.engine", "avion.weights", *_MIDDLE},
    "avion.search": LEAVES | {"avion.ops", "avion.engine", "avion.weights", "avion.features", *_MIDDLE},
    "avion.commands": LEAVES
    | {"avion.ops", "avion.engine", "avion.weights", "avion.reproduce", "avion.search", "avion.features", *_MIDDLE},
    "avion.utils": LEAVES | {"avion.ops", "avion.engine", "avion.weights", *_MIDDLE},
}
# Import paths of people's scripts: these modules hand on, when they are asked, what lives on a floor above them.
_HANDED_ON = dict.fromkeys(("avion.models.__init__", "avion.models.model_clip", "avion.models.clip"), "avion.weights")
# Their names have to be literals, or there is nothing to read here.
_IMPORT_CALLS = ("importlib.import_module", "import_module", "__import__")


def project_sources() -> dict[str, str]:
    """Dotted module name -> source, of avion, tools and the mains. Packages keep `.__init__`."""
    files = [*(ROOT / "avion").rglob("*.py"), *(ROOT / "tools").rglob("*.py"), *ROOT.glob("main_*.py")]
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text(encoding="utf-8")
        for path in sorted(files)
    }


def violations(sources: dict[str, str]) -> list[str]:
    """One line "module:line imports name" for each import that points up or sideways."""
    return [
        f"{module}:{line} imports {name}"
        for module, source in sources.items()
        for line, name in imported_names(module, source)
        if not _may_import(module, name) and room_of(name) != _HANDED_ON.get(module)
    ]


def imported_names(module: str, source: str) -> list[tuple[int, str]]:
    """(line, absolute dotted name) of every import in a module, those inside functions too.

    `from a import b` counts as a.b, which may be a module or a name inside `a`.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # The last part of the module's name is the module itself (or __init__): one level up is ".".
            base = module.split(".")[: -node.level] if node.level else []
            prefix = ".".join(base + ([node.module] if node.module else []))
            found += [(node.lineno, f"{prefix}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in _IMPORT_CALLS and node.args:
            found.append((node.lineno, str(ast.literal_eval(node.args[0]))))
    return found


def room_of(name: str) -> str:
    """The room of a dotted name: "avion.models.vim.X" -> "avion.models", "tools.demo" -> "tools"."""
    parts = name.split(".")
    if parts[0] != "avion":
        return parts[0]
    room = ".".join(parts[:2])
    # `avion.__init__` and a plain name out of the package itself, such as avion.__version__.
    return room if room in _ALLOWED else "avion"


def _may_import(module: str, name: str) -> bool:
    importer, imported = room_of(module), room_of(name)
    inside = imported.startswith(("avion", "tools", "tests", "benchmarks", "main_"))
    if not inside or importer == imported:
        return True
    if importer.startswith("main_") or importer == "tools":  # they are three lines long
        return imported == "avion.commands"
    return imported in _ALLOWED[importer]


def circles(sources: dict[str, str]) -> list[list[str]]:
    """The groups of files that import each other in a circle, when they are loaded; imports inside functions and for
    type checkers alone do not count."""
    modules = {name.removesuffix(".__init__"): name for name in sources}
    graph = {
        name: {target for _, dotted in _imported_on_loading(name, source) if (target := _file_of(dotted, modules))}
        - {name}
        for name, source in sources.items()
    }
    reached = {name: _reachable(name, graph) for name in graph}
    found = {frozenset({other for other in reached[name] if name in reached[other]}) for name in graph}
    return sorted(sorted(group) for group in found if len(group) > 1)


def _imported_on_loading(module: str, source: str) -> list[tuple[int, str]]:
    tree = ast.parse(source)
    tree.body = [
        node
        for node in tree.body
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef))
        and not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    ]
    return imported_names(module, ast.unparse(tree))


def _file_of(dotted: str, modules: dict[str, str]) -> str | None:
    """The file that `dotted` lives in: the module of that name, or the one that holds a name of that kind."""
    parts = dotted.split(".")
    return modules.get(dotted) or modules.get(".".join(parts[:-1]))


def _reachable(start: str, graph: dict[str, set[str]]) -> set[str]:
    found: set[str] = set()
    waiting = [start]
    while waiting:
        for target in graph[waiting.pop()]:
            if target not in found:
                found.add(target)
                waiting.append(target)
    return found
