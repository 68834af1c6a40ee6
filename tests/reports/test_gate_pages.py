"""A gated arm's page says what its record holds."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import synthetic_gates as gates
import synthetic_records as synthetic
from rendered import tables

from abtest.report import append_gate, render
from abtest.report.page import file_name, gate_page
from abtest.report.records import Gated

SLUG = gates.SLUG
PAGE = Path("gate") / SLUG / "silu_mul.qwen3.5-tiny.lora.md"


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Path:
    """A report of both kinds of data, rendered once; tests must not change it."""
    return gates.rendered(tmp_path_factory.mktemp("gate") / "reports")


def test_a_page_shows_every_check_beside_its_limit(full):
    page = (full / PAGE).read_text(encoding="utf-8")
    overview = gates.table(page, "closest to its limit")
    assert next(row for row in overview if row[0] == "2 gradient oracle")[2:] == [gates.RHO + ", step 0", "1.21", "1.5"]
    shown = [row for rows in tables(page) if rows[0][0] == "check" and "weights" in rows[0] for row in rows[1:]]
    assert [row[0] for row in shown] == [check.name for check in gates.CHECKS]
    assert shown[3] == [gates.RHO, "1.21", "1.5", "pass", "step 0", "model.layers.3.mlp.down_proj.weight"]
    assert [line for line in page.split("\n") if line.startswith("### ")] == [
        "### 1 preflight", "### 2 gradient oracle", "### 3 update oracle", "### 4 free-running loss",
        "### 5 exact structure", "### Other",
    ]  # fmt: skip


def test_a_failed_gate_says_what_failed(full):
    page = (full / PAGE.with_name("broken.qwen3.5-tiny.lora.md")).read_text(encoding="utf-8")
    assert "> **FAILED** (not lossless): 31.7 sigma" in page and f"1 of 7 checks failed: {gates.LOSS}" in page
    assert [gates.LOSS, "31.7", "6", "FAIL", "–", "step 3"] in [row for rows in tables(page) for row in rows]
    assert "| 4 free-running loss | **0 of 1** |" in page
    assert "No trace was made." in page and "None was made" in page


def test_the_loss_is_told_in_sigmas(tmp_path):
    record = gates.gate_record(losses=(2.0, 3.5), reference_losses=(2.0, 3.0), noise_sigma=(0.1, 0.25))
    page = gate_page(Gated(SLUG, record, 0))
    assert "Largest difference 2 σ, at step 1 of 0 to 1 (loss 3.5 beside 3, σ 0.25)" in page
    assert "number, is 1.41 σ" in page
    nothing = gate_page(Gated(SLUG, gates.gate_record(losses=()), 0))
    assert "## Loss" not in nothing and ".png" not in nothing


def test_where_the_difference_starts(full):
    page = (full / PAGE).read_text(encoding="utf-8")
    assert "**Forward**: bits first differ at `model.layers.1.mlp` (0.001 beside 0.002); first further" in page
    assert "oracle at `model.layers.2` (0.0041 beside 0.002)." in page
    assert "**Backward**: bits first differ at `model.layers.2` (0.001" in page
    rows = gates.table(page, "place")
    assert rows[1][0] == "model.embed_tokens" and rows[1][3] == "same bits" and rows[1][6] == "over 2×"


@pytest.mark.parametrize(("relative", "words"), [(0.0, "the same bits at all 1 places"), (math.nan, "oracle at `m` (nan")])
def test_no_difference_and_no_number_have_words_of_their_own(relative, words):
    row = {"module": "m", "phase": "forward", "same_bits": relative == 0, "relative": relative, "beside": 0.1}
    page = gate_page(Gated(SLUG, gates.gate_record(trace=(row,)), 0))
    assert words in page and "**Backward**" not in page


def test_what_ran_and_the_op_checks(full):
    page = (full / PAGE).read_text(encoding="utf-8")
    assert ["operators", "53", "49"] in gates.table(page, "reference")
    assert "Only the candidate runs: `isoloss::silu_mul x4`." in page and "`aten::silu -4`, `aten::mul -4`" in page
    assert "2 against fp64 truth, **1 failed**." in page
    assert gates.table(page, "workload")[1][:4] == ["–", "ragged", "2", "FAILED"]  # what failed comes first
    assert "BLOCK: 1024" in page and "total 190 s" in page and "python -m abtest.run --optimization silu_mul" in page


def test_op_checks_that_were_not_run_are_counted_apart():
    ran = {"op": "own", "workload": "small", "seed": 0, "level": "ROUNDING", "reason": "close"}
    idle = {"op": "own", "workload": "2B", "seed": 0, "level": "NOT_RUN", "reason": "needs a GPU"}
    page = gate_page(Gated(SLUG, gates.gate_record(op=(ran, ran, idle)), 0))
    assert "2 against fp64 truth, none failed; 1 not run here." in page


def test_a_census_may_be_counted_by_name_alone():
    census = {"reference": {"a": 2, "b": 1}, "candidate": {"a": 1}, "new": [], "gone": ["a -1", "b -1"]}
    page = gate_page(Gated(SLUG, gates.gate_record(census=census), 0))
    assert ["all", "3", "1"] in gates.table(page, "candidate") and "Only the candidate runs: nothing." in page


def test_long_tables_are_folded_away():
    rows = tuple({"workload": f"w{i}", "seed": i, "level": "ROUNDING", "reason": "r"} for i in range(30))
    page = gate_page(Gated(SLUG, gates.gate_record(op=rows), 0))
    assert "<details><summary>Every one of them: 30</summary>" in page and len(gates.table(page, "workload")) == 31


def test_the_newest_record_of_each_arm_model_and_method_counts(tmp_path):
    older = {"run_id": "old", "finished_at": "2025-01-01T00:00:00"}
    full_tuning = gates.gate_record(recipe=synthetic.RECIPE | {"method": "full"})
    for record in (gates.gate_record(), full_tuning, gates.gate_record(**older)):
        append_gate(tmp_path / "data", SLUG, record)
    made = render(tmp_path / "data", tmp_path)
    assert sorted(path.name for path in made if path.suffix == ".md") == [
        "README.md", "silu_mul.qwen3.5-tiny.full.md", "silu_mul.qwen3.5-tiny.lora.md"
    ]  # fmt: skip
    page = (tmp_path / PAGE).read_text(encoding="utf-8")
    assert "1 older record not shown" in page and "run `old`" not in page


def test_page_names_do_not_collide():
    names = [("a", "m", "lora"), ("a.m", "n", "lora"), ("a", "m.n", "lora"), ("A", "m", "lora"), ("a + b", "m", "full"),
             ("../a", "/models/x", "lora"), ("readme", "", ""), ("x" * 300, "m", "lora")]  # fmt: skip
    found = {file_name(gates.gate_record(n, recipe={"model": model, "method": how})).lower() for n, model, how in names}
    assert len(found) == len(names) and not any("/" in name or " " in name for name in found)
