"""Reads the imports of the project from its source; what `test_layering.py` checks."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# A room may import itself, the rooms named here, and the leaves. `avion.utils` is in nobody's list.
LEAVES = frozenset({"avion", "avion.errors", "avion.files", "avion.json_lines", "avion.constants", "avion.numbers"})
_MIDDLE = ("avion.models", "avion.data", "avion.losses", "avion.optim", "avion.evaluation")
_ALLOWED: dict[str, frozenset[str]] = {
    **{leaf: frozenset() for leaf in LEAVES - {"avion.files", "avion.json_lines"}},
    "avion.files": frozenset({"avion.errors"}),
    "avion.json_lines": frozenset({"avion.errors", "avion.files"}),
    "avion.ops": LEAVES,
    **{room: LEAVES | {"avion.ops"} for room in _MIDDLE},
    "avion.engine": LEAVES | {"avion.ops", *_MIDDLE},
    "avion.reproduce": LEAVES | {"avion.ops", "avion.engine", *_MIDDLE},
    "avion.utils": LEAVES | {"avion.ops", "avion.engine", *_MIDDLE},
}
# Their names have to be literals, or there is nothing to read here.
_IMPORT_CALLS = ("importlib.import_module", "import_module", "__import__")
_ENTRY_POINTS = LEAVES | {"avion.ops", "avion.engine", *_MIDDLE}


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
        if not _may_import(module, name)
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
    if importer.startswith("main_"):
        return imported in _ENTRY_POINTS
    if importer == "tools":  # the demo runs the main job
        return imported in _ENTRY_POINTS | {"avion.reproduce"} or imported.startswith("main_")
    return imported in _ALLOWED[importer]
