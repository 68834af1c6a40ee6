"""Which folders have kernels, which declare cases for them, and which kernels no case covers: read from sources."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.cross_compile.records import Outcome
from kernels.cross_compile import TARGETS
from kernels.registry import PACKAGES


def folders() -> dict[str, tuple[str, Path]]:
    """Every optimization's folder by name, sorted: the package that it is in, and its path."""
    found = {}
    for package in PACKAGES:
        root = Path(importlib.import_module(package).__file__).parent
        found |= {init.parent.name: (package, init.parent) for init in root.glob("*/__init__.py")}
    return dict(sorted(found.items()))


def declaring() -> dict[str, str]:
    """The module with the cases, by optimization."""
    return {
        name: f"{package}.{name}.cross_compile"
        for name, (package, folder) in folders().items()
        if (folder / "cross_compile.py").is_file()
    }


def kernels_of(package: str, folder: Path) -> list[str]:
    """Module and name of every Triton kernel in a folder: each jitted function that no other jitted function there uses."""
    jitted: dict[str, ast.FunctionDef] = {}
    for path in sorted(folder.rglob("*.py")):
        module = ".".join((package, folder.name, *path.relative_to(folder).with_suffix("").parts)).removesuffix(".__init__")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        defined = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and is_jitted(node)]
        jitted |= {f"{module}.{node.name}": node for node in defined}
    used = {name for node in jitted.values() for name in _names_in(node) if name != node.name}
    return sorted(name for name in jitted if name.rpartition(".")[2] not in used)


def is_jitted(function: ast.FunctionDef) -> bool:
    """Whether it is decorated with triton.jit, by whatever name Triton was imported, called or not."""
    decorators = [item.func if isinstance(item, ast.Call) else item for item in function.decorator_list]
    return any(ast.unparse(item).rpartition(".")[2] == "jit" for item in decorators)


def _names_in(function: ast.FunctionDef) -> set[str]:
    nodes = [node for statement in function.body for node in ast.walk(statement)]
    return {node.id for node in nodes if isinstance(node, ast.Name)} | {
        node.attr for node in nodes if isinstance(node, ast.Attribute)
    }


def uncovered(outcomes: Iterable[Outcome], names: Sequence[str] = ()) -> list[str]:
    """In words, every Triton kernel of the named folders, or of all, that some target has no case for."""
    have = {(outcome.kernel, outcome.target) for outcome in outcomes}
    found = []
    for name, (package, folder) in folders().items():
        for kernel in kernels_of(package, folder) if not names or name in names else ():
            missing = [target for target in TARGETS if (kernel, target) not in have]
            if missing:
                where = Path(package) / name / "cross_compile.py"
                found.append(f"{kernel}: {where} has no case of it for {', '.join(missing)}")
    return found
