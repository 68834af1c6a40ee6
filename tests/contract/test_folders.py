"""Every optimization's folder has the same shape, and its README answers the same questions."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from kernels.registry import discover

OPTIMIZATIONS = discover()
ANSWERS = ("**Claim: ", "**Shapes and hardware", "**When not to use it", "Source", "`reports/`")


def folder_of(name: str) -> Path:
    for package in ("kernels", "negative_results"):
        folder = Path(importlib.import_module(package).__file__).parent / name
        if folder.is_dir():
            return folder
    raise AssertionError(f"{name} has no folder")


@pytest.mark.parametrize("name", OPTIMIZATIONS)
def test_the_readme_answers_what_a_reader_asks(name):
    optimization, text = OPTIMIZATIONS[name], (folder_of(name) / "README.md").read_text(encoding="utf-8")
    assert text.startswith(f"# {name}\n")
    assert [answer for answer in ANSWERS if answer not in text] == []
    assert f"**Claim: {optimization.exactness.name}.**" in text
    assert f"\n    python -m bench.run --arms {name}\n" in text
    timed_alone = f"\n    python -m bench.micro --optimization {name}\n" in text
    assert timed_alone is (optimization.op is not None)


@pytest.mark.parametrize("name", OPTIMIZATIONS)
def test_the_folder_has_the_files_that_its_kind_needs(name):
    optimization, files = OPTIMIZATIONS[name], {path.name for path in folder_of(name).glob("*.py")}
    wanted = {"__init__.py", "patch.py"} | ({"reference.py", "kernel.py"} if optimization.op is not None else set())
    assert wanted <= files
    assert optimization.source and optimization.why_exact and optimization.summary


@pytest.mark.parametrize("name", OPTIMIZATIONS)
def test_the_folder_can_move_without_an_edit(name):
    own = re.compile(rf"^\s*(from|import) (kernels|negative_results)\.{name}\b", re.MULTILINE)
    assert [path.name for path in folder_of(name).glob("*.py") if own.search(path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize("name", [name for name, optimization in OPTIMIZATIONS.items() if optimization.op is not None])
def test_every_workload_says_the_least_that_it_must_do(name):
    op = OPTIMIZATIONS[name].op
    names = [workload.name for workload in op.workloads]
    assert len(set(names)) == len(names)
    for workload in op.workloads:
        assert op.bytes_moved(workload) > 0 and op.flops(workload) >= 0
        assert all(isinstance(size, int) for size in workload.shape.values())
