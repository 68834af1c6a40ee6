"""Finished units of a sensitivity run outlive a run that was cut, and nothing else is taken for them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from abtest import sensitivity, unit_store
from abtest.sensitivity import run_units
from abtest.settings import GateConfig
from abtest.unit_store import UnitStore, identity
from abtest.units import Unit
from loop.config import Config

UNITS = [Unit(Config(seed=seed), GateConfig(), (), "holdout", ("a",), ("b",), ()) for seed in range(3)]
OUTCOME = ([{"kind": "mutant", "caught": True, "equivalent": False}], [{"where": "x"}])


def test_what_was_put_comes_back_and_only_for_the_same_unit(tmp_path: Path) -> None:
    store = UnitStore(tmp_path, "this code")
    assert store.get(UNITS[0]) is None
    store.put(UNITS[0], OUTCOME)
    assert store.get(UNITS[0]) == OUTCOME
    others = (UNITS[1], dataclasses.replace(UNITS[0], mutants=("c",)), dataclasses.replace(UNITS[0], carrier=("x",)))
    assert [store.get(unit) for unit in others] == [None, None, None]
    assert UnitStore(tmp_path, "other code").get(UNITS[0]) is None
    store.clear(UNITS)
    assert store.get(UNITS[0]) is None


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"lines": 3, "sweep": []}', '{"lines": []}'])
def test_a_damaged_file_counts_as_not_there(damage: str, tmp_path: Path) -> None:
    store = UnitStore(tmp_path, "this code")
    store.put(UNITS[0], OUTCOME)
    store.path(UNITS[0]).write_text(damage, encoding="utf-8")
    assert store.get(UNITS[0]) is None


def test_the_identity_follows_the_sources_and_the_versions(tmp_path: Path, monkeypatch) -> None:
    environment = {"device_slug": "cpu", "versions": {"torch": "2.13.0"}, "git_sha": "a"}
    assert identity(environment) == identity(environment | {"git_sha": "b"})  # a commit of a page alone changes nothing
    assert identity(environment) != identity(environment | {"versions": {"torch": "2.11.0"}})
    monkeypatch.setattr(unit_store, "ROOT", tmp_path)
    (tmp_path / "abtest").mkdir()
    (tmp_path / "abtest" / "gate.py").write_text("x = 1\n")
    before = identity(environment)
    (tmp_path / "abtest" / "gate.py").write_text("x = 2\n")
    assert identity(environment) != before


def test_a_run_goes_on_from_the_units_that_are_there(tmp_path: Path, monkeypatch, capsys) -> None:
    store = UnitStore(tmp_path, "this code")
    for unit in UNITS:
        store.put(unit, OUTCOME)
    monkeypatch.setattr(sensitivity, "run_unit", lambda unit, folder: pytest.fail("nothing is left to run"))
    lines, sweep = run_units(UNITS, 2, store)
    assert (lines, sweep) == (3 * OUTCOME[0], 3 * OUTCOME[1])
    assert "3 of 3 units were finished by an earlier run" in capsys.readouterr().err
