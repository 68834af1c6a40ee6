"""The page on what kernels compile to: rendered from its record alone, by the same command as the rest."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import synthetic_gates as gates
import synthetic_records as synthetic
from markdown_it import MarkdownIt
from rendered import tables

from bench import records as device_records
from bench.cross_compile import records
from bench.cross_compile.records import Count, Outcome
from bench.report import differences, render
from loop.errors import UserError

PAGE = Path("cross_compile") / "README.md"
WEIRD = 'a|b\n<script> `c` "d" $x_1$ \\ ](http://e) 漢字 **f** __g__'
LIMITS = {"registers": 64, "spill_bytes": 0, "shared_bytes": 101_376, "narrow_accesses": None}
MEASURED = {"registers": 40, "spill_bytes": 0, "shared_bytes": 98_304, "narrow_accesses": 1, "accesses": 6}
MMA = Count("mma.sync", "ptx", r"^mma\.sync", 32, 1, None)
PASSED = Outcome(
    "matmul", "kernels.matmul.kernel._kernel", "bf16", "sm_121a", {"p_x": "*bf16", "BLOCK": "64"}, LIMITS, MEASURED, (MMA,),
    "sm_121a", {"triton": "3.7.1", "ptxas": "13.1.80"}, git_sha="0" * 40, git_dirty=False,
)  # fmt: skip


def variant(**changed) -> Outcome:
    return dataclasses.replace(PASSED, **changed)


def rendered(reports: Path, *outcomes: Outcome) -> str:
    records.write(reports / "data", outcomes)
    render(reports / "data", reports)
    return (reports / PAGE).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"measured": MEASURED | {"registers": 65}}, "65 registers a thread, more than 64"),
        ({"measured": MEASURED | {"spill_bytes": 8}}, "8 bytes of stack and local memory a thread, more than 0"),
        ({"measured": MEASURED | {"shared_bytes": 101_377}}, "101,377 bytes of shared memory a block, more than 101,376"),
        ({"limits": LIMITS | {"narrow_accesses": 0}}, "1 loads and stores of less than 16 bytes a thread, more than 0"),
        ({"limits": LIMITS | {"narrow_accesses": 9}, "measured": MEASURED | {"accesses": 0}}, "no load or store"),
        ({"instructions": (dataclasses.replace(MMA, found=0),)}, "mma.sync 0 times, not at least 1"),
        ({"instructions": (dataclasses.replace(MMA, least=0, most=0),)}, "mma.sync 32 times, not none"),
        ({"instructions": (dataclasses.replace(MMA, least=8, most=16),)}, "mma.sync 32 times, not 8 to 16"),
        ({"compiled_for": "sm_120a"}, "the code is for sm_120a"),
        ({"measured": None, "error": "ptxas fatal"}, "does not compile: ptxas fatal"),
    ],
)
def test_a_verdict_comes_from_the_numbers_beside_their_limits(tmp_path, changed, fault):
    assert PASSED.passed and PASSED.faults == ()
    outcome = variant(**changed)
    (found,) = outcome.faults
    assert fault in found and not outcome.passed
    text = rendered(tmp_path, outcome)
    assert "> **0 of 1 compile to what their folders expect.**" in text and text.count(f"**{found}**") == 1


def test_the_page_shows_each_kernel_and_target(tmp_path):
    skipped = variant(
        case="fp8", kernel="fp8.cu: product", measured=None, instructions=(), skipped="nvcc is not installed here"
    )
    text = rendered(tmp_path, PASSED, variant(target="sm_80", compiled_for="sm_80"), skipped)
    assert "> **2 of 3 compile to what their folders expect.**\n>\n> 1 were not compiled here." in text
    overview, details = tables(text)
    assert overview[1] == ["matmul", "2", "2", "2", "2 of 3", "40", "98,304 B"]
    cells = ["40 (64)", "0 (0)", "98,304 (101,376)", "5 of 6", "mma.sync 32 (at least 1)", "as expected"]
    assert details[1][3:] == ["–"] * 5 + ["not compiled: nvcc is not installed here"]
    assert details[2:] == [["_kernel", "bf16", target, *cells] for target in ("sm_80", "sm_121a")]
    assert "shows nothing about speed" in text and "- ptxas 13.1.80: sm_80, sm_121a" in text and f"`{'0' * 40}`" in text
    assert "uncommitted" not in text
    assert "uncommitted" in rendered(tmp_path, variant(git_dirty=True))


def test_names_and_words_that_need_escapes(tmp_path):
    odd = variant(
        optimization=WEIRD, kernel=WEIRD, case=WEIRD, launch={WEIRD: WEIRD}, compilers={WEIRD: WEIRD}, git_sha=WEIRD,
        instructions=(Count(WEIRD, "sass", WEIRD, 0, 1, 1),), compiled_for=WEIRD,
    )  # fmt: skip
    text = rendered(tmp_path, odd, variant(optimization=WEIRD, measured=None, error=WEIRD))
    assert "<script>" not in MarkdownIt("commonmark").enable("table").render(text)
    for rows in tables(text):
        assert {len(row) for row in rows} == {len(rows[0])}


def test_one_command_renders_and_checks_it_with_the_rest(tmp_path):
    data = tmp_path / "data"
    device_records.append(data / "example-gpu-x1" / "run.jsonl", synthetic.record())
    text = rendered(tmp_path, PASSED)
    index = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "](cross_compile/README.md)" in index and len(gates.table(index, "device")) == 2  # the record is no device
    assert differences(data, tmp_path) == []
    (tmp_path / PAGE).write_text(text.replace("40 (64)", "39 (64)"), encoding="utf-8")
    assert differences(data, tmp_path) == [f"{PAGE} (differs)"]
    records.path(data).unlink()
    render(data, tmp_path)
    assert not (tmp_path / PAGE).exists()
    assert "cross_compile" not in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_a_record_is_replaced_whole_and_reads_back(tmp_path):
    two = variant(target="sm_80", compiled_for="sm_80", error=None)
    records.write(tmp_path, [PASSED, two])
    assert records.load(tmp_path) == [two, PASSED]
    records.write(tmp_path, [PASSED])
    assert records.load(tmp_path) == [PASSED]
    with pytest.raises(ValueError, match="one of measured, error and skipped"):
        records.write(tmp_path, [two, variant(measured=None)])
    assert records.load(tmp_path) == [PASSED]
    assert [path.name for path in records.path(tmp_path).parent.iterdir()] == ["records.jsonl"]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"target": "sm_75"}, "target is 'sm_75', not one of sm_80"),
        ({"limits": {"registers": 64}}, "no key 'spill_bytes'"),
        ({"measured": MEASURED | {"registers": 40.5}}, "registers is 40.5, not a whole number"),
        ({"error": "and a result"}, "one of measured, error and skipped"),
        ({"instructions": [{"name": "x"}]}, "no key 'code'"),
        ({"git_dirty": "no"}, "git_dirty is 'no', not true or false"),
        ({"extra": 1}, "unknown key 'extra'"),
    ],
)
def test_a_line_that_is_no_outcome_is_named(tmp_path, changed, words):
    file = records.write(tmp_path / "data", [PASSED])
    row = json.loads(file.read_text(encoding="utf-8")) | changed
    file.write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        render(tmp_path / "data", tmp_path)
    assert f"{file}:1: not a valid record: " in str(caught.value) and words in str(caught.value)
    assert not (tmp_path / PAGE).exists()
