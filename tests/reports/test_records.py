"""The record type: what it refuses, and that files of records survive what happens to files."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import synthetic_records as synthetic
from hypothesis import given, settings
from hypothesis import strategies as st

from abtest.verdict import Check, Level, Verdict
from bench import records
from bench.report.pages import arm_page
from loop.errors import UserError

TIMED = records.to_json(synthetic.record(perf=synthetic.perf()))
NOT_LOSSLESS = [level for level in Level if not level.lossless]
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)


@pytest.mark.parametrize("level", NOT_LOSSLESS)
def test_only_a_passed_gate_holds_a_time(level):
    with pytest.raises(ValueError, match="holds no time"):
        synthetic.record(level=level, perf=synthetic.perf())


@pytest.mark.parametrize("level", NOT_LOSSLESS)
def test_reading_refuses_a_time_on_a_failed_arm(tmp_path, level):
    fields = json.loads(records.to_json(synthetic.record(perf=synthetic.perf())))
    fields["verdict"]["level"] = level.value
    path = tmp_path / "run.jsonl"
    path.write_text(records.to_json(synthetic.record()) + "\n" + json.dumps(fields) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"run\.jsonl:2: .*holds no time"):
        records.read(path)


def test_lossless_needs_every_check_to_pass():
    checks = (Check("loss", 7.0, 6.0, passed=False),)
    with pytest.raises(ValueError, match="a check that did not pass"):
        synthetic.record(verdict=Verdict(Level.BITWISE, "said so", checks))


def test_a_time_and_a_reason_for_none_exclude_each_other():
    with pytest.raises(ValueError, match="both a time and a reason"):
        synthetic.record(perf=synthetic.perf(), untimed="not today")


RACE = records.Race("combination", ("silu_mul", "static_lora"), 1.9, 1.8, 2.0, 20)


def test_only_a_timed_peer_ran_a_race(tmp_path):
    record = synthetic.record("unsloth", role="peer", perf=synthetic.perf(), race=RACE)
    records.append(tmp_path / "run.jsonl", record)
    assert records.read(tmp_path / "run.jsonl") == [record]
    for changes in ({"role": "optimization", "perf": synthetic.perf()}, {"role": "peer"}):
        with pytest.raises(ValueError, match="which only a timed peer can have run"):
            synthetic.record("unsloth", race=RACE, **changes)


@pytest.mark.parametrize("times", [{}, {"peer_ms": 158.2, "own_ms": 94.3}])
def test_a_race_says_how_long_either_took_where_it_is_known(times):
    raced = dataclasses.replace(RACE, **times)
    record = synthetic.record("unsloth", role="peer", perf=synthetic.perf(), race=raced)
    fields = json.loads(records.to_json(record))
    for name in () if times else ("peer_ms", "own_ms"):  # as older records
        del fields["race"][name]
    assert records.from_json(json.dumps(fields)) == record
    page = arm_page(record, None, "a device", "r", 0, None, plotted=False)
    assert "1.90x [1.80, 2.00] as long, 20 blocks in turn" in page
    assert ("20 blocks in turn, 158.2 and 94.3 ms a micro-step" in page) is bool(times)


@pytest.mark.parametrize("change", [{"arm": None}, {"optimizations": "a"}, {"ratio": None}, {"ratio": "fast"}, {"more": 1}])
def test_half_a_race_is_none(change):
    fields = json.loads(records.to_json(synthetic.record("unsloth", role="peer", perf=synthetic.perf(), race=RACE)))
    fields["race"] |= change
    with pytest.raises((ValueError, TypeError)):
        records.from_json(json.dumps(fields))


def test_every_kind_of_record_survives_the_file(tmp_path):
    path = tmp_path / "folder" / "run.jsonl"
    written = synthetic.full_run()
    for record in written:
        records.append(path, record)
    read = records.read(path)
    assert [records.to_json(record) for record in read] == [records.to_json(record) for record in written]
    assert read[0] == written[0]
    diverges = next(record for record in read if record.arm == "diverges")
    assert math.isinf(diverges.losses[12]) and math.isnan(diverges.losses[13])


def test_line_separators_inside_strings_do_not_break_a_line(tmp_path):
    record = synthetic.record(notes=("one\u2028two\x85three\x0bfour\r\nfive",))
    records.append(tmp_path / "run.jsonl", record)
    assert records.read(tmp_path / "run.jsonl") == [record]


def test_non_finite_times_are_numbers_again(tmp_path):
    records.append(tmp_path / "run.jsonl", synthetic.record(perf=synthetic.perf(math.nan)))
    assert math.isnan(records.read(tmp_path / "run.jsonl")[0].perf.ratio)


def test_a_torn_line_is_named_and_swallows_nothing(tmp_path):
    path = tmp_path / "run.jsonl"
    records.append(path, synthetic.record("first"))
    path.write_bytes(path.read_bytes() + records.to_json(synthetic.record("torn")).encode()[:200])
    records.append(path, synthetic.record("after"))
    with pytest.raises(UserError, match=r"run\.jsonl:2: not a valid record"):
        records.read(path)
    lines = path.read_bytes().split(b"\n")
    assert records.from_json(lines[2].decode()).arm == "after"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"[1]", "not an object"),
        (b"\xff\xfe", "utf-8"),
        (b"{}", "no key 'run_id'"),
        (b"[" * 100_000, "not a valid record"),
        (records.to_json(synthetic.record()).replace('"passed": true', '"passed": "false"').encode(), "true or false"),
        (records.to_json(synthetic.record()).replace('"role": "optimization"', '"role": "hero"').encode(), "hero"),
        (records.to_json(synthetic.record()).replace('"limit": 6.0', '"limit": [6]').encode(), "not a number"),
        (TIMED.replace('"update_in_step": false', '"update_in_step": 1').encode(), "update_in_step"),
        (records.to_json(synthetic.record()).replace('"schema": 1', '"schema": 2').encode(), "schema 2"),
    ],
)
def test_what_is_no_record_is_named_with_its_line(tmp_path, line, words):
    path = tmp_path / "run.jsonl"
    path.write_bytes(b"\n" + line + b"\n")
    with pytest.raises(UserError) as caught:
        records.read(path)
    assert str(caught.value).startswith(f"{path}:2: not a valid record") and words in str(caught.value)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([item.name for item in dataclasses.fields(records.Record)]), JSON_VALUES)
def test_a_damaged_field_is_refused_or_harmless(name, value):
    """Whatever JSON stands in a field, reading raises one of the documented errors or gives a record that writes again."""
    fields = json.loads(records.to_json(synthetic.record(perf=synthetic.perf())))
    fields[name] = value
    try:
        record = records.from_json(json.dumps(fields))
    except (ValueError, TypeError, KeyError, OverflowError):
        return
    again = records.to_json(records.from_json(records.to_json(record)))
    assert again == records.to_json(record)
