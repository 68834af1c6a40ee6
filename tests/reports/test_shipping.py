"""What ships, and the file that says so."""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib

import pytest
import synthetic_records as synthetic
from hypothesis import given, settings
from hypothesis import strategies as st

from abtest.verdict import Level
from bench.report import summary_json
from bench.report.devices import select
from bench.report.shipping import decide, quoted, timing_floor, to_toml

LOSSLESS = [level for level in Level if level.lossless]


def single(name, ratio=None, level=Level.ROUNDING, width=0.02, **changes):
    return synthetic.record(name, level, perf=None if ratio is None else synthetic.perf(ratio, width), **changes)


def combination(ratio, *names, level=Level.ROUNDING, width=0.02, arm="all"):
    return single(arm, ratio, level, width, role="combination", optimizations=names)


def test_the_combination_ships_when_it_is_the_fastest():
    shipping = decide([single("a", 1.1), single("b", 0.99), combination(1.2, "a", "b"), single("c", 1.05)])
    assert shipping.enable == ("a", "b") and shipping.basis.arm == "all"
    assert shipping.not_enabled == {
        "c": "ROUNDING and 1.05x [1.03, 1.07], but all is faster and they were not measured together"
    }
    assert shipping.reasons["b"] == "part of all, measured together"


def searched(ratio, *names, level=Level.ROUNDING):
    return combination(ratio, *names, level=level, arm="search")


def test_the_answer_of_a_search_goes_before_what_was_measured_earlier():
    shipping = decide([single("a", 1.4), single("b", 1.1), combination(1.5, "a", "b", "c"), searched(1.3, "a", "b")])
    assert shipping.enable == ("a", "b") and shipping.basis.arm == "search"
    words = "but the search timed sets of what passed in turn and found a faster one"
    assert shipping.reasons["all"] == f"ROUNDING and 1.50x [1.48, 1.52], {words}"
    assert shipping.reasons["a"] == "part of search, measured together"
    assert shipping.not_enabled == {"c": "measured only within all, which does not ship"}


def test_what_was_measured_after_a_search_competes_with_it():
    assert decide([searched(1.3, "a", "b"), single("c", 1.4)]).enable == ("c",)
    assert decide([searched(1.3, "a", "b"), single("c", 1.2)]).enable == ("a", "b")


@pytest.mark.parametrize(
    "answer", [searched(None, "a", "b", level=Level.FAILED), searched(1.01, "a", "b"), searched(0.9, "a", "b")]
)
def test_a_search_whose_answer_may_not_ship_leaves_the_choice_as_it_was(answer):
    assert decide([single("a", 1.1), combination(1.5, "a", "b"), answer]).basis.arm == "all"


def test_a_search_that_was_not_among_all_goes_before_nobody():
    partial = combination(1.3, "a", "b", arm="partial_search")
    assert decide([combination(1.5, "a", "c"), partial]).enable == ("a", "c")


def test_the_best_single_one_ships_when_the_combination_is_slower():
    shipping = decide([single("a", 1.1), single("b", 1.3), combination(1.25, "a", "b")])
    assert shipping.enable == ("b",)
    assert shipping.not_enabled == {
        "a": "ROUNDING and 1.10x [1.08, 1.12], but b is faster and they were not measured together"
    }


@pytest.mark.parametrize("level", [level for level in Level if not level.lossless])
def test_a_combination_with_a_member_that_did_not_pass_stays_off(level):
    shipping = decide([single("a", 1.1), single("b", level=level), combination(1.5, "a", "b")])
    assert shipping.enable == ("a",)
    assert shipping.not_enabled["b"].startswith(f"{level.value}: ")
    assert shipping.reasons["all"] == f"ROUNDING, but b alone is {level.value}"


@pytest.mark.parametrize("level", [level.value for level in Level] + [None])
def test_what_passed_as_a_whole_and_not_by_its_op_stays_off(level):
    op = {"level": level, "reason": "mean ratio 60.6 (limit 1.1) in d x", "workloads": {}}
    arms = [single("a", 1.1), single("b", 1.3, micro=op), combination(1.5, "a", "b"), single("c", 0.9, micro=op)]
    shipping = decide(arms)
    if level not in ("APPROX", "FAILED", "INVALID"):
        assert shipping.enable == ("a", "b")
        return
    assert shipping.enable == ("a",)
    assert shipping.not_enabled["b"] == f"ROUNDING as a whole, but its op is {level}: mean ratio 60.6 (limit 1.1) in d x"
    assert shipping.not_enabled["c"] == shipping.not_enabled["b"]  # and not "lossless but slower"
    assert shipping.reasons["all"] == f"ROUNDING, but b alone is {level}"


def test_members_without_a_record_of_their_own_are_named():
    shipping = decide([single("a", 1.1), combination(None, "a", "b", level=Level.FAILED)])
    assert shipping.enable == ("a",)
    assert shipping.not_enabled == {"b": "measured only within all, which does not ship"}


def test_a_gain_inside_its_interval_is_none():
    shipping = decide([single("a", 1.003, width=0.01), single("b", 0.8), single("c", math.nan)])
    assert shipping.enable == () and shipping.basis is None
    assert shipping.not_enabled["a"] == "lossless but no measurable gain: ratio 1.003x [0.993, 1.013]"
    assert shipping.not_enabled["b"] == "lossless but slower: ratio 0.80x [0.78, 0.82]"
    assert shipping.not_enabled["c"].startswith("lossless but no measurable gain")


def test_what_was_not_timed_or_not_run_stays_off_with_its_reason():
    arms = [single("a", untimed="the interpreter is not timed"), single("b", level=Level.NOT_RUN, optimizations=())]
    assert decide(arms).not_enabled == {
        "a": "not timed here: the interpreter is not timed",
        "b": "NOT_RUN: largest loss difference 2.1 sigma, limit 6",
    }


def test_peers_and_the_reference_never_ship():
    assert decide([synthetic.reference(), single("peer", 3.0, role="peer", optimizations=("x",))]).enable == ()


@pytest.mark.parametrize("level", [Level.INVALID, Level.FAILED])
def test_nothing_ships_beside_a_reference_that_can_not_be_trusted(level):
    shipping = decide([synthetic.record("stock", level, role="reference"), single("a", 1.5)])
    assert shipping.enable == () and shipping.not_enabled["a"].startswith(f"the reference itself is {level.value}")


def repeat(ratio, width=0.0):
    """The reference timed against itself."""
    return single("stock again", ratio, Level.BITWISE, width=width, role="repeat", optimizations=())


@pytest.mark.parametrize(
    ("ratio", "width", "floor"),
    [
        (None, 0, 1.0),
        (1.0, 0, 1.0),
        (1.04, 0, 1.04),
        (0.8, 0, 1.25),
        (1.0, 0.05, 1 / 0.95),
        (1.04, 0.02, 1.06),
        (0.8, 0.3, 2.0),
    ],
)
def test_the_floor_is_how_far_equal_arms_can_come_out_apart(ratio, width, floor):
    assert timing_floor([synthetic.reference(), repeat(ratio, width), single("a", 9.0)]) == pytest.approx(floor)


def test_without_a_repeat_the_floor_is_one():
    assert timing_floor([synthetic.reference(), single("a", 9.0)]) == 1.0


@pytest.mark.parametrize("again", [1.04, 1 / 1.04], ids=["repeat faster", "repeat slower"])
def test_a_gain_no_larger_than_the_reference_shows_against_itself_does_not_ship(again):
    arms = [single("a", 1.05, width=0.02), single("b", 1.07, width=0.02)]
    assert decide([synthetic.reference(), *arms]).not_enabled.keys() == {"a"}  # both gains would be real
    shipping = decide([synthetic.reference(), repeat(again), *arms])
    assert shipping.enable == ("b",) and shipping.basis.arm == "b"
    assert shipping.not_enabled == {
        "a": "lossless but no measurable gain: ratio 1.05x [1.03, 1.07]; the reference against itself reaches 1.040"
    }
    assert decide([synthetic.reference(), repeat(again), arms[0]]).enable == ()


def test_a_repeat_that_is_near_one_by_luck_excuses_nothing():
    """Seen on an H200: a repeat of 1.002 [0.905, 1.088] beside an optimizer of the update, 1.035 [1.006, 1.073] of a
    micro-step, which has no update in it."""
    shipping = decide([synthetic.reference(), repeat(1.0, width=0.09), single("a", 1.04, width=0.03)])
    assert shipping.enable == ()
    assert shipping.not_enabled["a"].endswith("ratio 1.04x [1.01, 1.07]; the reference against itself reaches 1.099")


def test_the_floor_itself_is_not_exceeded_by_reaching_it():
    at, above = single("a", 1.25, width=0.125), single("a", 1.25, width=0.124)
    assert at.perf.ratio_low == 1.125
    assert decide([synthetic.reference(), repeat(1.125), at]).enable == ()
    assert decide([synthetic.reference(), repeat(1.125), above]).enable == ("a",)


def test_a_slower_arm_is_called_slower_beside_any_floor():
    reason = decide([synthetic.reference(), repeat(1.04), single("a", 0.8)]).not_enabled["a"]
    assert reason == "lossless but slower: ratio 0.80x [0.78, 0.82]; the reference against itself reaches 1.040"


ARMS = st.builds(
    lambda number, level, ratio, width, timed: single(
        f"o{number}", ratio if timed and level.lossless else None, level, width
    ),
    st.integers(0, 4), st.sampled_from(Level), st.floats(0.5, 2), st.floats(0, 0.3), st.booleans(),
)  # fmt: skip
GROUPS = st.builds(
    lambda numbers, ratio: combination(ratio, *(f"o{number}" for number in sorted(numbers))),
    st.sets(st.integers(0, 5), min_size=2), st.floats(0.5, 2),
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.lists(ARMS, max_size=5, unique_by=lambda record: record.arm), st.lists(GROUPS, max_size=1))
def test_only_what_passed_together_ships_and_all_else_has_a_reason(singles, groups):
    current = [synthetic.reference(), *singles, *groups]
    shipping = decide(current)
    passed = {
        record.optimizations for record in current
        if record.verdict.level.lossless and record.perf and record.perf.ratio_low > 1 and record.role != "reference"
    }  # fmt: skip
    assert shipping.enable == () or shipping.enable in passed
    assert not any({record.arm} & set(shipping.enable) for record in singles if not record.verdict.level.lossless)
    everything = {name for record in current for name in record.optimizations}
    assert set(shipping.enable) | set(shipping.not_enabled) == everything
    assert not set(shipping.enable) & set(shipping.not_enabled) and all(shipping.not_enabled.values())
    (written,) = tomllib.loads(to_toml(select("slug", current), [shipping]))["setting"]
    assert written["enable"] == list(shipping.enable) and written["not_enabled"] == shipping.not_enabled


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_any_text_is_a_toml_string(text):
    assert tomllib.loads(f"{quoted(text)} = {quoted(text)}") == {text.encode("utf-8", "replace").decode(): text}


def test_the_file_has_the_documented_keys():
    current = synthetic.full_run()
    values = tomllib.loads(to_toml(select("example-gpu-x1", current), [decide(current)]))
    (setting,) = values.pop("setting")
    assert setting.pop("not_enabled").keys() == {
        record.arm for record in current if record.role == "optimization"
    } - {"silu_mul", "static_lora"}  # fmt: skip
    assert values == {"schema": 2, "device_slug": "example-gpu-x1", "device": "Example GPU X1"}
    assert setting == {
        "model": "qwen3.5-tiny", "method": "lora", "rank": 16, "pack_length": 512, "dtype": "bfloat16",
        "run_id": "20260102-030405-ab12", "enable": ["silu_mul", "static_lora"],
    }  # fmt: skip


def test_the_summary_is_one_line_of_strict_json():
    broken = dataclasses.replace(synthetic.record("broken"), perf=synthetic.perf(math.nan, mfu=math.inf))
    text = summary_json([*synthetic.full_run(), broken])
    assert "\n" not in text
    document = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert document["shipping"] == ["silu_mul", "static_lora"] and document["report"] == "reports/example-gpu-x1/README.md"
    assert document["run_id"] == "20260102-030405-ab12" and document["model"] == "qwen3.5-tiny"
    arms = {arm["arm"]: arm for arm in document["arms"]}
    assert len(arms) == 14 and {arm["level"] for arm in arms.values()} == {level.value for level in Level}
    assert arms["silu_mul"]["ratio_low"] == 1.04 and arms["silu_mul"]["untimed"] is None
    assert arms["gated_only"]["ratio"] is None and arms["gated_only"]["untimed"] == "Triton's interpreter is not timed"
    assert arms["broken"]["ratio"] is None and arms["broken"]["mfu"] is None


def test_the_summary_is_of_the_newest_run():
    old = synthetic.record("old", run_id="old", finished_at="2026-01-02T03:04:04Z")
    assert [arm["arm"] for arm in json.loads(summary_json([synthetic.record(), old]))["arms"]] == ["silu_mul"]
    with pytest.raises(ValueError, match="at least one record"):
        summary_json([])
