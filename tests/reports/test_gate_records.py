"""Records of the gate and of the sensitivity run: strict, and safe when a process dies while it writes."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import synthetic_gates as gates
from hypothesis import given, settings
from hypothesis import strategies as st

from abtest.report import append_gate, render
from abtest.report import records as gate_records
from abtest.report.page import gate_page
from abtest.report.records import Gated, from_json, to_json
from abtest.verdict import Check, Level, Verdict
from loop.errors import UserError

SLUG = gates.SLUG
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)


def test_a_record_survives_the_file(tmp_path):
    rows = ({"module": "m", "phase": "forward", "same_bits": False, "relative": math.inf, "beside": 0.5},)
    checks = (Check("a", math.inf, 1.0, False, "x", 2, "step 0"), Check("b", None, None, True))
    odd = gates.gate_record(
        "odd", Level.FAILED, losses=(1.0, math.inf), trace=rows, census={}, planted="scaled:first:0.01",
        verdict=Verdict(Level.FAILED, "x", checks), notes=("one\u2028two\x85three\r\nfour",),
    )  # fmt: skip
    append_gate(tmp_path, SLUG, gates.gate_record())
    append_gate(tmp_path, SLUG, odd)
    assert gate_records.read(gate_records.path(tmp_path, SLUG)) == [gates.gate_record(), odd]


def test_not_a_number_is_one_again(tmp_path):
    trace = tuple(row | {"relative": math.nan} for row in gates.trace()[:1])
    checks = (Check("a", math.nan, 1.0, False),)
    record = gates.gate_record(losses=(math.nan, 1.0), trace=trace, verdict=Verdict(Level.FAILED, "x", checks))
    again = from_json(to_json(record))
    assert math.isnan(again.losses[0]) and math.isnan(again.trace[0]["relative"])
    assert math.isnan(again.verdict.checks[0].value)
    assert "NaN" not in to_json(record) and to_json(again) == to_json(record)


def test_a_torn_line_is_named_and_swallows_nothing(tmp_path):
    append_gate(tmp_path, SLUG, gates.gate_record("first"))
    path = gate_records.path(tmp_path, SLUG)
    path.write_bytes(path.read_bytes() + to_json(gates.gate_record("torn")).encode()[:300])
    append_gate(tmp_path, SLUG, gates.gate_record("after"))
    with pytest.raises(UserError, match=rf"{SLUG}\.jsonl:2: not a valid record"):
        render(tmp_path, tmp_path / "out")
    assert from_json(path.read_bytes().split(b"\n")[2].decode()).name == "after"
    assert not (tmp_path / "out").exists()


def without(name: str) -> str:
    return json.dumps({key: value for key, value in json.loads(to_json(gates.gate_record())).items() if key != name})


GOOD = to_json(gates.gate_record())


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("[1]", "not an object"),
        ('{"run_id": ', "Expecting value"),
        (without("claim"), "no key 'claim'"),
        (GOOD.replace('"claim"', '"claims"'), "no key 'claim'"),
        (GOOD[:-1] + ', "speed": 3}', "unknown key 'speed'"),
        (GOOD.replace('"schema": 1', '"schema": 2'), "schema 2"),
        (GOOD.replace('"same_bits": true', '"same_bits": 1'), "true or false"),
        (GOOD.replace('"phase": "backward"', '"phase": "sideways"'), "sideways"),
        (GOOD.replace('"relative": 0.0,', '"relative": null,'), "relative is None, not a number"),
        (GOOD.replace('"relative": 0.0, ', ""), "no key 'relative'"),
        (GOOD.replace('"level": "FAILED"', '"level": "GREAT"'), "GREAT"),
        (GOOD.replace('"aten::silu": 4', '"aten::silu": 4.5'), "count of aten::silu"),
        (GOOD.replace('"part": 5', '"part": 7'), "part is 7"),
        (GOOD.replace('"state": "step 29"', '"state": 29'), "state is 29"),
        (GOOD.replace("2026-01-02T03:04:05Z", "yesterday"), "yesterday"),
        (GOOD.replace('"total": 190.0', '"total": [190]'), "seconds of total"),
    ],
)  # fmt: skip
def test_what_is_no_gate_record_is_named_with_its_line(tmp_path, line, words):
    assert line != GOOD
    path = gate_records.path(tmp_path, SLUG)
    path.parent.mkdir(parents=True)
    path.write_text("\n" + line + "\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        gate_records.load(tmp_path)
    assert str(caught.value).startswith(f"{path}:2: not a valid record") and words in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([item.name for item in dataclasses.fields(gate_records.GateRecord)]), JSON_VALUES)
def test_a_damaged_field_is_refused_or_can_be_shown(name, value):
    fields = json.loads(GOOD)
    fields[name] = value
    try:
        record = from_json(json.dumps(fields))
    except (ValueError, TypeError, KeyError, OverflowError):
        return
    assert to_json(from_json(to_json(record))) == to_json(record)
    assert gate_page(Gated(SLUG, record, 0)).startswith("<!--")


def test_a_record_of_another_device_is_refused(tmp_path):
    append_gate(tmp_path, "other-gpu", gates.gate_record())
    with pytest.raises(UserError, match=r"belongs in example-gpu-x1\.jsonl"):
        render(tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"kind": "hero"}, ValueError, "hero"),
        ({"split": "train"}, ValueError, "train"),
        ({"caught": 1}, ValueError, "caught is 1"),
        ({"caught_by": "loss"}, ValueError, "caught_by"),
        ({"seed": 1.5}, ValueError, "seed"),
        ({"values": {"loss": None}}, ValueError, "loss is None"),
        ({"extra": 1}, ValueError, "unknown key 'extra'"),
    ],
)
def test_what_could_not_be_read_again_is_not_written(tmp_path, changes, error, words):
    gates.measured(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(error, match=words):
        gates.measured(tmp_path, [gates.line(), gates.line() | changes])
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("name", "old", "new", "words"),
    [
        (f"{SLUG}.jsonl", '"magnitude": 0.01', '"magnitude": "big"', ":1: "),
        (f"{SLUG}.jsonl", '"modelled_on"', '"modeled_on"', ":1: not a valid record: no key 'modelled_on'"),
        (f"{SLUG}.sweep.jsonl", '"scale": 0.0005', '"scale": {}', ":1: not a valid record: scale is {}"),
        (f"{SLUG}.facts.json", '"limits"', '"limit"', ":1: not a valid record: no key 'limits'"),
        (f"{SLUG}.facts.json", '"device_slug": "example-gpu-x1"', '"device_slug": "b"', "of device 'b'"),
        (f"{SLUG}.facts.json", "\n", "\n{}\n", ":2: not a valid record: no key 'run_id'"),
    ],
)
def test_a_broken_outcome_is_named_with_its_line(tmp_path, name, old, new, words):
    data = gates.measured(tmp_path)
    path = data / "gate" / name
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        render(data, tmp_path)
    assert str(caught.value).startswith(str(path)) and words in str(caught.value) and "\n" not in str(caught.value)


def test_one_run_replaces_the_last(tmp_path):
    gates.measured(tmp_path)
    data = gates.measured(tmp_path, [gates.line("only")], sweep=[])
    render(data, tmp_path)
    readme = (tmp_path / "gate" / "README.md").read_text(encoding="utf-8")
    assert "`only`" in readme and "`scaled`" not in readme and "Smallest scale error" not in readme
    assert sorted(path.name for path in (data / "gate").iterdir()) == [
        f"{SLUG}.facts.json", f"{SLUG}.jsonl", f"{SLUG}.sweep.jsonl"
    ]  # fmt: skip
