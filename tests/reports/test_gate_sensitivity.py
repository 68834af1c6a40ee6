"""The report on the gate itself: rates, the detection matrix, survivors, margins."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import synthetic_gates as gates

from abtest.evidence import Evidence
from abtest.gate import judge
from abtest.gradients import Comparison
from abtest.limits import LOSS_SIGMA
from abtest.report import op_level, render, site
from abtest.report.checks import NUMBERS, limit_of, part_of
from abtest.report.intervals import at_most, interval
from abtest.states import OVERFIT
from kernels.contract import Exactness

SLUG = gates.SLUG


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Path:
    """A report of both kinds of data, rendered once; tests must not change it."""
    return gates.rendered(tmp_path_factory.mktemp("gate") / "reports")


def test_the_headline_counts_cases_that_change_something(full):
    readme = (full / "gate" / "README.md").read_text(encoding="utf-8")
    assert "> **Hold-out: 9 of 10 planted cases caught, 90.0 % (95 % interval 55.5 % to 99.7 %); 8 without" in readme
    assert "Honest rewrites flagged: 0 of 8; with 95 % confidence at most 31.2 %" in readme
    assert "A scale error of one projection is caught from 0.3 % on" in readme
    rates = {tuple(row[:2]): row[2:] for row in gates.table(readme, "split")[1:]}
    assert rates["hold-out", "lora"][:4] == ["10", "1", "8", "88.9 %"] and rates["hold-out", "full"][2] == "1"
    assert rates["both", "all"][6:] == ["5 of 6", "8", "0", "31.2 %"]


def test_the_matrix(full):
    readme = (full / "gate" / "README.md").read_text(encoding="utf-8")
    families = gates.table(readme, "cheats")
    assert families[0] == ["", "check", "cheats", "lora", "packing", "all"]
    assert families[1] == ["1.1", gates.WIRE, "1", "", "", "1"]
    assert ["2.1", gates.RHO, "", "6", "3", "9"] in families
    assert [row[1:] for row in families[-3:]] == [
        ["any check of 2 to 5", "1", "6", "3", "10"], ["any check", "2", "6", "3", "11"], ["cases", "2", "6", "4", "12"]
    ]  # fmt: skip
    mutants = {row[0]: row[1:] for row in gates.table(readme, "2 gradient oracle")[1:]}
    assert mutants["leak"] == ["packing", "2 of 2", "", "2.1 ×2", "", "5.1 ×2"]
    assert mutants["quiet"] == ["packing", "1 of 2", "", "2.1 ×1", "", ""] and "nothing" not in mutants
    parts = {row[0]: row[1:] for row in gates.table(readme, "part of the gate")[1:]}
    assert parts["2 gradient oracle"] == ["9", "75.0 %", "6"] and parts["5 exact structure"][2] == "0"


def test_survivors_equivalents_and_margins_are_named(full):
    readme = (full / "gate" / "README.md").read_text(encoding="utf-8")
    assert gates.table(readme, "closest check")[1:] == [
        ["quiet", "first", "0.01", "lora", "0", "holdout", f"{gates.RHO}: 1.48 beside 1.5", "none yet"]
    ]
    assert "**none yet**" in readme
    assert gates.table(readme, "not lossless all the same")[1][0] == "nothing"
    margins = {row[1]: row[2:] for row in gates.table(readme, "of the limit")[1:]}
    assert margins[gates.RHO] == [
        "1.5", "1.15", "summed_backwards, lora, seed 3", "1.35", "summed_backwards, lora, seed 7", "90.0 %"
    ]  # fmt: skip
    assert ["quiet", "packing", "bug behind quiet", "first", "0.01, 0.1"] in gates.table(readme, "modelled on")
    assert [row[:3] for row in gates.table(readme, "caught from")[1:]] == [
        ["lora_scaled, first", "lora", "0.1 %"], ["lora_scaled, last", "lora", "0.3 %"]
    ]  # fmt: skip
    assert "`RHO` | 1.5" in readme and "](example-gpu-x1/broken.qwen3.5-tiny.lora.md)" in readme


def test_a_survivors_op_level_test_is_the_catalogues(tmp_path, monkeypatch):
    monkeypatch.setattr(site, "op_level_tests", lambda: {"quiet": "tests/kernels/test_op.py::test_quiet"})
    data = gates.measured(tmp_path)
    render(data, tmp_path)
    readme = (tmp_path / "gate" / "README.md").read_text(encoding="utf-8")
    assert gates.table(readme, "closest check")[1][7] == "tests/kernels/test_op.py::test_quiet" and "none yet" not in readme


def test_op_level_tests_name_things_of_the_catalogue():
    from abtest.catalogue import catalogue

    found = op_level.op_level_tests()
    assert isinstance(found, dict) and set(found) <= set(catalogue())


def test_false_alarms_are_named_and_values_may_be_no_numbers(tmp_path):
    alarm = gates.benign("honest", seed=3) | {"caught": True, "caught_by": [gates.RHO], "level": "FAILED", "reason": "1|2"}
    alarm |= {"values": {gates.RHO: math.nan, gates.LOSS: math.inf}}
    data = gates.measured(tmp_path, [*gates.outcome(), alarm])
    render(data, tmp_path)
    readme = (tmp_path / "gate" / "README.md").read_text(encoding="utf-8")
    assert ["honest", "lora", "3", "holdout", "FAILED", "1|2"] in gates.table(readme, "reason")
    margins = {row[1]: row[2:] for row in gates.table(readme, "of the limit")[1:]}
    assert margins[gates.RHO][3:5] == ["nan", "honest, lora, seed 3"] and margins[gates.RHO][5] == "inf %"
    assert "flagged: 1 of 9" in readme


def test_an_outcome_without_facts_or_defects_still_has_a_report(tmp_path):
    data = gates.measured(tmp_path, [gates.benign()], sweep=[])
    (data / "gate" / f"{SLUG}.facts.json").unlink()
    (data / "gate" / f"{SLUG}.sweep.jsonl").unlink()
    assert render(data, tmp_path) == [Path("gate/README.md")]
    readme = (tmp_path / "gate" / "README.md").read_text(encoding="utf-8")
    assert "No defect on hold-out" in readme and "left no facts" in readme


def test_intervals_are_clopper_and_pearsons():
    for hits, cases, low, high in (
        (95, 100, 0.8872, 0.9836),
        (0, 10, 0.0, 0.3085),
        (10, 10, 0.6915, 1.0),
        (1, 2, 0.0126, 0.9874),
    ):
        assert interval(hits, cases) == pytest.approx((low, high), abs=5e-5)
    assert at_most(0, 104) == pytest.approx(1 - 0.05 ** (1 / 104)) and round(100 * at_most(0, 104), 1) == 2.8
    assert at_most(1, 104) == pytest.approx(0.0448, abs=5e-5) and interval(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="3 of 2"):
        interval(3, 2)


def arm(**changes) -> Evidence:
    """What an arm reports, as far as the gate reads it."""
    states = ("step 0", OVERFIT)
    build = {
        "weights": "w", "frozen": "f", "elements": {"p": 4}, "data": {"content_hash": "c"}, "seed": 0, "enabled": ["x"],
        "changed": ["p"],
    }  # fmt: skip
    run = {key: ["a", "b"] for key in ("gradients", "state", "rng", "lr", "batch", "supervised", "rested")}
    run |= {"loss": [2.0, 1.0], "moved": [1.0, 1.0], "still": [], "replays": [1, 1]}
    gradients = {
        state: {"problems": [], "elements": 4, "fingerprints": ["1"], "packing_error": 0.0, "packing_error_name": "",
                "recurrence_error": (0.0, "")} for state in states
    }  # fmt: skip
    update = {"problems": [], "error": 0.0, "name": "", "limit": 1e-5}
    values = {
        "build": build, "free_run": run, "gradients": gradients, "findings": [], "update": update,
        "work": {"operators": {"a": 1}}, "tripwire": {"red": True, "detail": ""},
    }  # fmt: skip
    return Evidence(**(values | changes))


def test_checks_are_filed_as_the_gate_files_them():
    """The tables by name agree with the checks that the gate makes: part, limit, and which have a number at all."""
    from abtest import limits
    from abtest.update import UPDATE

    findings = [{"name": gates.APART, "passed": False, "detail": ""}]
    comparison = Comparison(9.0, "p", 9.0, 9.0, "p", 9.0, "p", 0.1, 1.0, 9.0, "q")
    verdict = judge(
        Exactness.ROUNDING, arm(findings=findings), arm(), arm(findings=findings), ("x",), (1.0, 1.0),
        {"step 0": comparison, OVERFIT: comparison},
    )  # fmt: skip
    known = {name: value for name, value in vars(limits).items() if name.isupper()} | {"UPDATE": UPDATE}
    assert {check.name: part_of(check.name) for check in verdict.checks} == {c.name: c.part for c in verdict.checks}
    limited = {check.name: check.limit for check in verdict.checks if check.limit is not None}
    assert limited.pop("share of parameters with a gradient") == known["SHARE"]  # a least value, not a most
    assert {name: limit_of(name, known) for name in NUMBERS} == limited
    assert limit_of(gates.LOSS, {gates.LOSS: 5.0, "LOSS_SIGMA": LOSS_SIGMA}) == 5.0
