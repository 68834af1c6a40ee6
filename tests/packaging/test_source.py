"""Rules that every source file of the packages keeps, and the name `kernels` does not get in transformers' way."""

from __future__ import annotations

import ast
import json
import subprocess
import sys

import pytest

FORBIDDEN_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec"}


def called(node: ast.Call) -> str:
    """The dotted name of what is called, as far as it is one: `torch.load`, `eval`, `.load`."""
    return ast.unparse(node.func)


def faults(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, what is wrong) for every use of code or object loading that a file must not have."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, f"imports {a.name}") for a in node.names if a.name.split(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FORBIDDEN_MODULES:
            found.append((node.lineno, f"imports from {node.module}"))
        elif isinstance(node, ast.ExceptHandler) and broad(node.type) and not reraises(node):
            found.append((node.lineno, "catches everything"))
        elif isinstance(node, ast.Call):
            found += [(node.lineno, fault) for fault in call_faults(node)]
    return found


def call_faults(node: ast.Call) -> list[str]:
    name, keywords = called(node), {keyword.arg: keyword.value for keyword in node.keywords}
    if name in FORBIDDEN_CALLS or name in {f"builtins.{call}" for call in FORBIDDEN_CALLS}:
        return [f"calls {name}"]
    if name == "torch.load" and getattr(keywords.get("weights_only"), "value", None) is not True:
        return ["torch.load without weights_only=True"]
    if getattr(keywords.get("allow_pickle"), "value", None) is True:
        return ["allow_pickle=True"]
    return []


def broad(caught: ast.expr | None) -> bool:
    return caught is None or (isinstance(caught, ast.Name) and caught.id in ("Exception", "BaseException"))


def reraises(handler: ast.ExceptHandler) -> bool:
    return any(isinstance(node, ast.Raise) and node.exc is None for node in ast.walk(handler))


def test_no_file_loads_code_or_pickles_or_swallows_errors(sources):
    assert len(sources) > 10
    found = [f"{path}:{line}: {fault}" for path, tree in sources.items() for line, fault in faults(tree)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "code",
    ["import pickle", "from dill import load", "eval('1')", "torch.load(p)", "torch.load(p, weights_only=False)",
     "numpy.load(p, allow_pickle=True)", "try:\n    f()\nexcept Exception:\n    pass", "try:\n    f()\nexcept:\n    pass"],
)  # fmt: skip
def test_the_scan_sees_what_it_looks_for(code):
    assert len(faults(ast.parse(code))) == 1


@pytest.mark.parametrize(
    "code", ["torch.load(p, weights_only=True)", "model.eval()", "try:\n    f()\nexcept OSError:\n    g()"]
)
def test_the_scan_lets_through_what_is_right(code):
    assert not faults(ast.parse(code))


def test_kernels_is_a_docstring_only(root):
    body = ast.parse((root / "kernels/__init__.py").read_text(encoding="utf-8")).body
    assert len(body) == 1 and isinstance(body[0], ast.Expr) and isinstance(body[0].value.value, str)


def test_transformers_imports_from_the_root(root):
    code = "import kernels, transformers; from transformers import LlamaForCausalLM; print(kernels.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(root / "kernels/__init__.py")


COMMANDS = (
    "abtest.run",
    "abtest.sanitize",
    "abtest.sensitivity",
    "bench.micro",
    "bench.profile.__main__",
    "bench.run",
    "bench.search.__main__",
    "loop.train",
)


IMPORT = """
import importlib, json, sys
found = {}
for command in sys.argv[1:]:
    before = "triton" in sys.modules
    importlib.import_module(command)
    from kernels import registry
    registry.discover()
    found[command] = before, "triton" in sys.modules
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def imported(root) -> dict[str, tuple[bool, bool]]:
    """Whether triton was there before a command was imported, and after: one command after the other in one process."""
    done = subprocess.run([sys.executable, "-c", IMPORT, *COMMANDS], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_can_still_say_that_triton_shall_interpret(command, imported):
    """Triton's own functions are made for compiling or for interpreting when triton is imported, and every command first has
    to look for a GPU. Optimizations are part of it: their folders are asked for before that."""
    before, after = imported[command]
    assert not after, f"{'a command before it' if before else command} imports triton"
