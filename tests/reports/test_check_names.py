"""The report knows every check that the gate can make, found in the gate's source: raw outcomes hold names alone."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

import pytest

from abtest import dropout, evidence, examiner, gate, limits, preflight, run, structure, units, update
from abtest.report.checks import FAMILIES, NAMED, NUMBERS, is_known, part_of, rank
from abtest.verdict import PARTS

MODULES = (preflight, gate, structure, dropout, update, evidence, examiner, units, run)
PART = {preflight: 1, structure: 5, dropout: 5}  # where all checks of a module belong to one
MAKERS = ("Check", "_check", "Finding")
ANY = "\\0"  # what a name's varying piece stands as
PLACE = {part: index for index, part in enumerate((*sorted(PARTS.keys() - {0}), 0))}  # "other" comes last


def names_in(module) -> list[str]:
    """What the module calls its checks: the first argument of all that makes one, varying pieces as ANY."""
    calls = [node for node in ast.walk(ast.parse(Path(module.__file__).read_text("utf-8"))) if isinstance(node, ast.Call)]
    made = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id in MAKERS and call.args]
    names = [_name(call.args[0]) for call in made]
    return [name for name in names if name != ANY]  # a name handed through


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return node.value
    pieces = node.values if isinstance(node, ast.JoinedStr) else [node]
    return "".join(piece.value if isinstance(piece, ast.Constant) else ANY for piece in pieces)


def entries(name: str) -> set[str]:
    """The names in the report's tables that a name in the source may become."""
    pattern = re.compile(".*".join(re.escape(piece) for piece in name.split(ANY)))
    known = {entry for entry in (*NUMBERS, *NAMED) if pattern.fullmatch(entry)}
    return known | ({name} if ANY in name and is_known(name) else set())


def missing(module) -> list[str]:
    return [name for name in names_in(module) if not entries(name)]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_check_has_a_place_in_the_report(module) -> None:
    assert not missing(module)
    for name in names_in(module):
        parts = {part_of(entry) for entry in entries(name)}
        assert parts == {PART[module]} if module in PART else len(parts) == 1, name


def test_the_places_are_those_of_checks_that_exist() -> None:
    """Nothing is listed that no source makes, so that a name that changed leaves no entry behind."""
    made = {entry for module in MODULES for name in names_in(module) for entry in entries(name)}
    assert made >= {*NUMBERS, *NAMED}
    assert all(any(name.startswith(start) and name.endswith(end) for name in made) for start, end, _ in FAMILIES)


def test_a_check_without_a_place_is_found(tmp_path) -> None:
    @dataclasses.dataclass
    class Module:
        __file__: str

    source = tmp_path / "new.py"
    source.write_text('def checks(n):\n    return [Check("weights move", 1), Finding(f"{n} new ones", True), Check(n, 1)]\n')
    assert names_in(Module(str(source))) == ["weights move", f"{ANY} new ones"]
    assert missing(Module(str(source))) == [f"{ANY} new ones"]
    assert not is_known("3 new ones") and part_of("3 new ones") == 0


def test_every_number_has_a_limit_that_exists() -> None:
    assert all(isinstance(getattr(limits, limit), float) for _, limit in NUMBERS.values())


def test_checks_are_sorted_as_the_gate_makes_them() -> None:
    names = [*NAMED, *NUMBERS, "20 repeats have the same bits", "same seed in both arms"]
    assert [PLACE[part_of(name)] for name in sorted(names, key=rank)] == sorted(PLACE[part_of(name)] for name in names)
