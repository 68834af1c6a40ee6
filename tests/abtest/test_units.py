"""One unit of the sensitivity run through the whole gate, and how a run of many is planned and summed up."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter

import pytest
import torch
from tiny import CONFIG

from abtest.catalogue import cases, catalogue, find, packing
from abtest.catalogue.patching import around_micro_step
from abtest.catalogue.planted import Planted
from abtest.limits import RHO
from abtest.sensitivity import SCALES, SWEPT, Command, holdout, pieces_of, places, plan, summary, sweep_cases
from abtest.settings import GateConfig
from abtest.units import Unit, caught_by, run_unit, worst_values
from abtest.verdict import Check, Level, Verdict
from loop.config import DataConfig
from loop.errors import UserError
from loop.run import Run

KEYS = {
    "kind", "name", "family", "layer", "magnitude", "seed", "equivalent", "caught", "caught_by", "split", "method", "level",
    "reason", "modelled_on", "unit", "values",
}  # fmt: skip
GATE = GateConfig(steps=6, replicas=2, probes=4, repeats=2)
BENIGN = ("loss_by_logsumexp:all:0", "linear_split_k:all:0")
EQUIVALENT = "attention_leak:first:0.0001"  # a ten-thousandth of the boundaries is none of them
SCALED, SKIPS, CRASHES = "lora_scale_off:last:0.05", "returns_reference:all:0", "crashes_later:all:1"
HAS_NONE = "state_leak:first:1"  # the model has no delta layers
SWEEP = "down_projection_off:last:0.05"

pytestmark = pytest.mark.usefixtures("one_thread")


def crashes_later(run: Run, layer: str, magnitude: float) -> None:
    """An index out of range at the third micro-step."""
    calls = itertools.count()

    def change(original, *arguments):
        return original(*arguments) if next(calls) < 2 else [original][1]

    around_micro_step(run, change)


PLANTED = Planted(
    "crashes_later", "tests", "mutant", "a kernel that fails", "tests", crashes_later, ("all",), (1.0,), "times"
)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory) -> tuple[dict[str, dict], list[dict]]:
    """Lines by the case's id, and the sweep's."""
    config = dataclasses.replace(CONFIG, model="qwen3-shallow-tiny", steps=GATE.steps, data=DataConfig(pack_length=128))
    mutants = (SCALED, EQUIVALENT, SKIPS, CRASHES, HAS_NONE)
    unit = Unit(config, GATE, ("static_lora",), "holdout", BENIGN, mutants, (SWEEP, HAS_NONE))
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(packing, "PLANTED", (*packing.PLANTED, PLANTED))
        lines, sweep = run_unit(unit, tmp_path_factory.mktemp("unit") / "own")
    torch.set_num_threads(before)
    return {f"{line['name']}:{line['layer']}:{line['magnitude']:g}": line for line in lines}, sweep


def test_every_case_that_fits_has_a_line_of_the_documented_keys(outcome) -> None:
    lines, sweep = outcome
    assert list(lines) == [*BENIGN, SCALED, EQUIVALENT, SKIPS, CRASHES]
    assert all(set(line) == KEYS for line in lines.values())
    assert json.loads(json.dumps(lines)) == lines
    for case, line in lines.items():
        kind = "benign" if case in BENIGN else "mutant"
        assert (line["kind"], line["split"], line["method"], line["seed"]) == (kind, "holdout", "lora", 0)
        assert Level(line["level"]).lossless is not line["caught"] and line["reason"] and line["modelled_on"]
        assert bool(line["caught_by"]) is line["caught"]
    assert [set(line) for line in sweep] == [{"where", "method", "seed", "scale", "caught", "caught_by"}]
    assert sweep[0]["where"] == "down_projection_off, last" and sweep[0]["scale"] == 0.05 and sweep[0]["caught"]


def test_honest_rewrites_pass(outcome) -> None:
    for case in BENIGN:
        line = outcome[0][case]
        assert (line["level"], line["caught_by"], line["equivalent"]) == ("ROUNDING", [], False)
        assert 0 < line["values"]["gradient error ratio, worst parameter"] <= RHO


def test_a_defect_is_caught_by_the_checks_it_fails(outcome) -> None:
    line = outcome[0][SCALED]
    assert line["level"] == "FAILED" and not line["equivalent"]
    assert {"gradient scale error", "gradient error ratio, worst parameter"} <= set(line["caught_by"])
    assert line["values"]["gradient scale error"] > 0.003


def test_a_defect_that_changes_no_bit_is_equivalent(outcome) -> None:
    assert outcome[0][EQUIVALENT]["equivalent"]
    assert outcome[0][EQUIVALENT]["values"]["loss, worst step (sigma)"] == 0


def test_work_thrown_away_is_equivalent_and_still_caught(outcome) -> None:
    line = outcome[0][SKIPS]
    assert line["equivalent"] and line["caught"] and line["level"] == "INVALID"
    assert line["caught_by"] == ["the candidate did work of its own"]


def test_a_defect_that_crashes_is_caught(outcome) -> None:
    line = outcome[0][CRASHES]
    assert (line["caught"], line["caught_by"], line["equivalent"]) == (True, ["runs to the end"], False)
    assert "IndexError" in line["reason"] and line["level"] == "FAILED"


def test_the_failed_checks_are_named_once_in_order() -> None:
    checks = (
        Check("b", 2.0, 1.0, False, state="one"), Check("a", 0.5, 1.0, True), Check("b", 3.0, 1.0, False, state="two"),
        Check("c", float("nan"), 1.0, False), Check("c", 9.0, 1.0, False), Check("d", None, None, False),
    )  # fmt: skip
    assert caught_by(Verdict(Level.FAILED, "", checks)) == ["b", "c", "d"]
    assert caught_by(Verdict(Level.ROUNDING, "", checks)) == []
    worst = worst_values(Verdict(Level.FAILED, "", checks))
    assert list(worst) == ["b", "a", "c"] and worst["b"] == 3.0 and worst["c"] != worst["c"]


# Planning.

CPU = torch.device("cpu")


def planned(**changes) -> list[Unit]:
    return plan(dataclasses.replace(Command(device="cpu", dtype="float32"), **changes), CPU)


def everything(method: str, kind: str) -> set[str]:
    return {case.id for p in catalogue().values() if p.kind == kind and method in p.methods for case in cases(p)}


@pytest.mark.parametrize("every_method", [False, True])
@pytest.mark.parametrize("seeds", [4, 5, 8])
def test_calibration_and_holdout_share_no_mutant_and_no_seed(every_method: bool, seeds: int) -> None:
    units = planned(seeds=seeds, every_method=every_method)
    sides = [[unit for unit in units if unit.split == split] for split in ("calibration", "holdout")]
    own_seeds = [{unit.config.seed for unit in side} for side in sides]
    mutants = [{find(case).planted.name for unit in side for case in unit.mutants} for side in sides]
    assert own_seeds[0] | own_seeds[1] == set(range(seeds)) and not own_seeds[0] & own_seeds[1]
    assert not mutants[0] & mutants[1] and abs(len(mutants[0]) - len(mutants[1])) <= 1
    for side in sides:
        assert {unit.config.method for unit in side} == {"lora", "full"}
    assert all(unit.settings.seed == unit.config.seed for unit in units)  # other probes, too


def test_every_case_comes_once_for_every_method() -> None:
    units = planned(every_method=True)
    for method in ("lora", "full"):
        found = Counter(case for unit in units if unit.config.method == method for case in unit.mutants)
        assert set(found) == everything(method, "mutant") and set(found.values()) == {1}


def test_every_case_comes_once_in_one_method_or_the_other() -> None:
    units = planned()
    found = Counter(case for unit in units for case in unit.mutants)
    assert set(found) == everything("lora", "mutant") | everything("full", "mutant") and set(found.values()) == {1}
    for unit in units:
        assert all(unit.config.method in find(case).planted.methods for case in unit.mutants)


@pytest.mark.parametrize("every_method", [False, True])
def test_other_seeds_are_planned_like_the_first_ones(every_method: bool) -> None:
    plain, later = planned(every_method=every_method), planned(every_method=every_method, first_seed=11)
    assert [unit.config.seed for unit in later] == [unit.config.seed + 11 for unit in plain]
    moved = [
        dataclasses.replace(
            unit,
            config=dataclasses.replace(unit.config, seed=unit.config.seed - 11),
            settings=dataclasses.replace(unit.settings, seed=unit.settings.seed - 11),
        )
        for unit in later
    ]
    assert moved == plain
    with pytest.raises(UserError, match="--first-seed -1"):
        planned(first_seed=-1)


@pytest.mark.parametrize("pieces", [2, 5])
def test_pieces_share_out_all_cases_and_nothing_else_changes(pieces: int) -> None:
    whole, cut = planned(), planned(pieces=pieces)
    assert len(cut) == pieces * len(whole)
    for index, unit in enumerate(whole):
        own = cut[pieces * index : pieces * (index + 1)]
        for kind in ("benign", "mutants", "swept"):
            dealt = [getattr(piece, kind) for piece in own]
            assert Counter(case for hand in dealt for case in hand) == Counter(getattr(unit, kind))
        assert all(dataclasses.replace(p, benign=unit.benign, mutants=unit.mutants, swept=unit.swept) == unit for p in own)
        sizes = [len(p.benign) + len(p.mutants) + len(p.swept) for p in own]
        assert max(sizes) - min(sizes) <= 1


def test_there_are_no_empty_pieces() -> None:
    unit = dataclasses.replace(planned()[0], benign=BENIGN, mutants=(SCALED,), swept=())
    assert [(p.benign, p.mutants) for p in pieces_of(unit, 9)] == [(BENIGN[:1], ()), (BENIGN[1:], ()), ((), (SCALED,))]
    assert pieces_of(unit, 1) == [unit]
    with pytest.raises(UserError, match="--pieces 0"):
        planned(pieces=0)


def test_neither_method_has_all_the_small_magnitudes() -> None:
    small = Counter()
    for unit in planned():
        for case in map(find, unit.mutants):
            if set(case.planted.methods) == {"lora", "full"} and case.magnitude == case.planted.magnitudes[0]:
                small[unit.config.method] += 1
    assert 0.4 < small["lora"] / small.total() < 0.6


def test_the_work_is_spread_evenly() -> None:
    for every_method in (False, True):
        units = planned(every_method=every_method)
        for method, split in itertools.product(("lora", "full"), ("calibration", "holdout")):
            sizes = [len(u.mutants) for u in units if (u.config.method, u.split) == (method, split)]
            assert max(sizes) - min(sizes) <= 1


def test_every_seed_has_every_honest_rewrite_that_has_an_effect() -> None:
    for unit in planned():
        assert set(unit.benign) == everything(unit.config.method, "benign") and len(unit.benign) == len(set(unit.benign))
    assert len(places(Command(every_method=True))) == 16 and len(places(Command())) == 8


def test_the_sweep_is_of_mutants_that_there_are() -> None:
    for method in ("lora", "full"):
        swept = [find(case) for case in sweep_cases(method)]
        assert swept and {case.magnitude for case in swept} == set(SCALES)
        assert all(case.planted.unit == "relative scale" and method in case.planted.methods for case in swept)
    assert {find(case).planted.name for case in sweep_cases("lora")} == set(SWEPT)
    for method in ("lora", "full"):
        seeds = [unit.config.seed for unit in planned() if unit.swept and unit.config.method == method]
        assert len(seeds) == 2 and seeds[0] < 4 <= seeds[1]  # once in each half
    assert not any(unit.swept for unit in planned(sweep=False))


def test_a_part_of_the_catalogue_can_be_asked_for() -> None:
    units = planned(only=("packing", "loss_by_logsumexp"))
    assert {find(case).planted.family for unit in units for case in unit.mutants} == {"packing"}
    assert {case for unit in units for case in unit.benign} == {"loss_by_logsumexp:all:0"}
    assert not any(unit.swept for unit in units)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"only": ("nothing",)}, "--only nothing"),
        ({"seeds": 2}, "--seeds 2"),
        ({"seeds": 1, "every_method": True}, "--seeds 1"),
        ({"methods": ("lora", "qlora")}, "--methods qlora"),
        ({"methods": ()}, "--methods"),
    ],
)
def test_a_plan_that_proves_nothing_is_refused(changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        planned(**changes)


def test_holdout_is_every_second_name() -> None:
    assert holdout(["d", "a", "c", "b"]) == {"b", "d"} and holdout(["a"]) == set()


def line(kind: str, split: str, caught: bool, equivalent: bool = False, name: str = "x") -> dict:
    return {
        "kind": kind, "split": split, "caught": caught, "equivalent": equivalent, "name": name, "layer": "first",
        "magnitude": 0.01, "method": "lora", "seed": 3,
    }  # fmt: skip


def test_a_summary_counts_what_is_not_equivalent() -> None:
    lines = [
        line("mutant", "calibration", True), line("mutant", "calibration", False, name="missed"),
        line("mutant", "calibration", False, equivalent=True), line("mutant", "holdout", True),
        line("mutant", "holdout", True, equivalent=True), line("benign", "calibration", False),
        line("benign", "holdout", True, name="honest"),
    ]  # fmt: skip
    assert summary(lines) == {
        "calibration": {"mutants": 2, "caught": 1},
        "holdout": {"mutants": 1, "caught": 1},
        "benign": 2,
        "false_alarms": ["honest (lora, seed 3)"],
        "survivors": ["missed:first:0.01 (lora)"],
    }
    assert summary([])["benign"] == 0 and summary([])["holdout"] == {"mutants": 0, "caught": 0}
