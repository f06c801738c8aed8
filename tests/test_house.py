"""The house keeps its rules: what imports what, one name for one thing, and who may name a weight type."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from long_tests import LONGEST, PROCESSES, SHARING, UNTRACED

ROOT = Path(__file__).parents[1]
FOLDERS = {"q6k_kernels": ROOT / "kernels" / "q6k_kernels", "q6k_convert": ROOT / "q6k_convert"}
ORDER = [
    *(
        f"q6k_kernels.{room}"
        for room in (
            *("errors", "text", "formats", "gguf", "jit", "bundle", "cuda", "ops", "tokenizer"),
            *("weights", "models", "generate", "export", "cpp", "plugin"),
        )
    ),
    "q6k_kernels",
    *(f"q6k_convert.{room}" for room in ("errors", "text", "hub", "convert", "verify", "machine", "run", "cli")),
    "q6k_convert.__main__",
]
"""Rooms from the ground up: each may import those before it, and itself. A package imports what it hands on."""
WITHOUT_TORCH = (
    *(f"q6k_kernels.formats.{module}" for module in ("types", "ggml", "blocks", "planes")),
    *(f"q6k_kernels.{room}" for room in ("gguf", "jit", "bundle")),
)
MOST_LINES = 340


def module_of(path: Path, package: str) -> str:
    parts = (package, *path.relative_to(FOLDERS[package]).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def sources() -> dict[str, tuple[Path, ast.Module]]:
    """Every module of the two packages: its file and its tree."""
    return {
        module_of(path, package): (path, ast.parse(path.read_text(encoding="utf-8")))
        for package, folder in FOLDERS.items()
        for path in sorted(folder.rglob("*.py"))
    }


def room_of(module: str) -> str:
    """The room that a module is in: the package at the top, or the sub-package or module below it."""
    if module == "q6k_convert":
        return "q6k_convert.errors"  # its version, which every room may ask for
    return ".".join(module.split(".")[:2])


def statements(tree: ast.Module, *, at_import: bool = False) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements; with `at_import` those alone that run when the module is imported."""
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        if at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if at_import and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        todo += ast.iter_child_nodes(node)


def imports(module: str, *, at_import: bool = False) -> Iterator[tuple[str, str]]:
    """Modules that a module imports, and the name it takes of each, or nothing."""
    for node in statements(sources()[module][1], at_import=at_import):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, ""
        elif node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield (whole, "") if whole in sources() else (node.module, alias.name)


def ours(module: str) -> bool:
    return module in sources()


def public(package: str) -> list[str] | None:
    """The names in a package's `__all__`."""
    for node in sources()[package][1].body:
        if isinstance(node, ast.Assign) and any(ast.unparse(target) == "__all__" for target in node.targets):
            return list(ast.literal_eval(node.value))
    return None


def test_imports_point_down() -> None:
    wrong = [
        f"{module} imports {found} {name}"
        for module in sources()
        for found, name in imports(module)
        if module not in FOLDERS and ours(found) and ORDER.index(room_of(found)) > ORDER.index(room_of(module))
    ]
    assert not wrong, "\n".join(wrong)


def test_every_room_is_in_the_order() -> None:
    assert {room_of(module) for module in sources()} == set(ORDER) - {"q6k_convert"}


def test_a_package_is_entered_by_its_doors() -> None:
    """From outside a package only the modules and names are imported that its `__init__` lists."""
    wrong = []
    for module in sources():
        for found, name in imports(module):
            if not ours(found) or found.count(".") == 0 or room_of(found) == room_of(module):
                continue
            package = room_of(found)
            if (doors := public(package)) is None:
                if (sources()[package][0]).name == "__init__.py":
                    wrong.append(f"{package} has no __all__")
                continue
            door = found.removeprefix(package).lstrip(".").split(".")[0] or name
            if door not in doors:
                wrong.append(f"{module} imports {found} {name}: {package}'s doors are {', '.join(doors)}")
    assert not wrong, "\n".join(wrong)


def test_no_private_name_is_imported() -> None:
    wrong = [
        f"{module} imports {found} {name}"
        for module in sources()
        for found, name in imports(module)
        if ours(found) and name.startswith("_") and not name.startswith("__")
    ]
    assert not wrong, "\n".join(wrong)


def test_there_is_no_circle() -> None:
    """Of modules that import each other, while they are imported or later; a package's own functions come later."""
    done, under_way = set[str](), list[str]()

    def visit(module: str) -> None:
        if module in under_way:
            pytest.fail(" -> ".join([*under_way[under_way.index(module) :], module]))
        if module in done:
            return
        under_way.append(module)
        for found, _ in imports(module, at_import=module in FOLDERS):
            if ours(found) and found != module:
                visit(found)
        under_way.pop()
        done.add(module)

    for module in sources():
        visit(module)


def test_rooms_below_the_operations_import_no_torch() -> None:
    def needs(module: str, seen: frozenset[str] = frozenset()) -> str | None:
        for found, _ in imports(module, at_import=True):
            if found.split(".")[0] == "torch":
                return f"{module} -> torch"
            if ours(found) and found not in seen and (way := needs(found, seen | {module})):
                return f"{module} -> {way}"
        return None

    for module in sources():
        if module.startswith(WITHOUT_TORCH):
            assert needs(module) is None, needs(module)


def test_one_name_for_one_thing() -> None:
    """No two modules, and no two public classes, of a package have the same name."""
    Named = defaultdict[tuple[str, str], list[str]]
    modules, classes = Named(list), Named(list)
    for module, (path, tree) in sources().items():
        package = module.split(".")[0]
        if path.name not in ("__init__.py", "__main__.py"):
            modules[package, path.stem].append(module)
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                classes[package, node.name].append(module)
    twice = {name: where for named in (modules, classes) for name, where in named.items() if len(where) > 1}
    assert not twice, twice


def test_formats_alone_name_weight_types() -> None:
    """Others ask the row; ExecuTorch's classes are of one type each."""
    from q6k_kernels.formats.types import PACKED_TYPES, WEIGHT_TYPES

    names = {*WEIGHT_TYPES, *PACKED_TYPES}
    wrong = []
    for module, (_, tree) in sources().items():
        if module.startswith(("q6k_kernels.formats.", "q6k_kernels.export.executorch")):
            continue
        constants = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and node.value in names)
        wrong += [f"{module}:{node.lineno} names {node.value}" for node in constants]
    assert not wrong, "\n".join(wrong)


def test_rooms_are_small() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for folder in (*FOLDERS.values(), ROOT / "scripts", ROOT / "tests")
        for path in folder.rglob("*")
        if path.suffix in (".py", ".cuh", ".cpp", ".h", ".c")
        for lines in (len(path.read_text(encoding="utf-8").splitlines()),)
        if lines > (500 if folder.name == "tests" else MOST_LINES)
    }
    assert not long, long


def test_long_tests_are_there() -> None:
    """What is said of a file or test that has another name by now would no longer be done."""
    texts = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py")}
    tests = set(re.findall(r"^def (test_\w+)", "\n".join(texts.values()), re.MULTILINE))
    assert sorted((SHARING | LONGEST | PROCESSES) - texts.keys()) == []
    assert sorted(UNTRACED - texts.keys() - tests) == []
