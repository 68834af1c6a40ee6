"""The microbenchmark's section, from what `bench.micro.run_micro` returns."""

from __future__ import annotations

import pytest
import synthetic_records as synthetic
from rendered import tables

from bench import records
from bench.report import render
from bench.report.micro import HEADER, micro_cell, micro_section

CHECKED = {
    "shape": "tokens=2048 width=5504", "dtype": "bfloat16", "level": "ROUNDING", "max_error_ratio": 1.0,
    "mean_error_ratio": 0.98765,
}  # fmt: skip
TIMES = {
    "reference_us": 123.456, "candidate_us": 61.728, "ratio": 2.0, "ratio_low": 1.98, "ratio_high": 2.03, "samples": 50,
    "tb_per_s": 3.21, "tflop_per_s": 0.5, "of_ceiling": 0.876, "forward_us": 25.5, "of_copies": 0.933,
}  # fmt: skip
COMMON = {"optimization": "silu_mul", "device": "Example GPU X1", "exactness": "rounding", "level": "ROUNDING"}
TIMED = COMMON | {
    "reason": "hidden, seed 1: max ratio 1 of at most 2",
    "untimed": None,
    "ceilings": {"copy_bytes_per_s": 4.1e12, "matmul_flops_per_s": 6.7e14},
    "workloads": {"hidden": CHECKED | TIMES, "one | token": CHECKED | TIMES | {"of_ceiling": None}},
}
UNTIMED = COMMON | {
    "reason": "hidden, seed 1: max ratio 1 of at most 2", "untimed": "Triton's interpreter is not timed", "ceilings": None,
    "workloads": {"hidden": CHECKED, "odd shape": CHECKED | {"level": "FAILED", "max_error_ratio": "nan"}},
}  # fmt: skip


def cells(markdown: str) -> list[list[str]]:
    """The rows of the section's table, if it has one, as plain text."""
    return [row for table in tables(markdown) for row in table]


def test_what_was_timed_shows_times_ratio_and_ceiling():
    section = micro_section(TIMED)
    header, first, second = cells(section)
    assert header == list(HEADER)
    assert first == [
        "hidden", "tokens=2048 width=5504", "bfloat16", "ROUNDING", "1, 0.988", "123.5", "61.73", "25.5",
        "2.00x [1.98, 2.03]", "3.21", "0.5", "88 %", "93 %",
    ]  # fmt: skip
    assert second == ["one | token", *first[1:-2], "–", "93 %"]  # no ceiling was measured
    assert section.startswith("## Microbenchmark\n") and "Op check: **ROUNDING**; hidden, seed 1" in section
    assert "Times are of forward plus backward" in section and "Not timed" not in section


def test_what_was_not_timed_shows_its_check_and_why():
    section = micro_section(UNTIMED)
    _, first, second = cells(section)
    assert first == ["hidden", "tokens=2048 width=5504", "bfloat16", "ROUNDING", "1, 0.988", *["–"] * 8]
    assert second == ["odd shape", "tokens=2048 width=5504", "bfloat16", "FAILED", "nan, 0.988", *["–"] * 8]
    assert "Not timed: Triton's interpreter is not timed." in section and "Times are of" not in section


def test_nothing_that_could_run_has_no_table():
    reason = "needs CUDA"
    section = micro_section(COMMON | {"level": "NOT_RUN", "reason": reason, "untimed": reason, "workloads": {}})
    assert cells(section) == []
    assert "Op check: **NOT_RUN**; needs CUDA." in section and "Not timed: needs CUDA." in section


def test_another_mapping_is_shown_as_it_is():
    rows = cells(micro_section({"speedup": 1.8, "worst_error": 3e-7}))
    assert rows[1:] == [["speedup", "1.8"], ["worst error", "3e-07"]]


@pytest.mark.parametrize("micro", [TIMED, UNTIMED], ids=["timed", "untimed"])
def test_the_section_is_on_the_page_of_its_arm(micro, tmp_path):
    path = tmp_path / "data" / "example-gpu-x1" / "run.jsonl"
    for record in (synthetic.reference(), synthetic.record("silu_mul", perf=synthetic.perf(), micro=micro)):
        records.append(path, record)
    render(tmp_path / "data", tmp_path)
    page = (tmp_path / "example-gpu-x1" / "silu_mul.md").read_text(encoding="utf-8")
    assert micro_section(micro).strip() in page


@pytest.mark.parametrize(
    ("micro", "cell"),
    [
        (TIMED, "2.00x, 88 %"),
        (UNTIMED, "op ROUNDING, not timed"),
        (COMMON | {"level": "NOT_RUN", "workloads": {}}, "–"),
        ({"speedup": 1.8}, "–"),
        (None, "–"),
    ],
)
def test_one_cell_says_how_fast_and_how_close_to_the_limit(micro, cell):
    assert micro_cell(micro, "bfloat16") == cell


def test_workloads_in_the_dtype_that_was_trained_speak_for_the_op():
    small = CHECKED | TIMES | {"dtype": "float32", "ratio": 0.5, "of_ceiling": 0.99}
    slower = CHECKED | TIMES | {"ratio": 1.25, "of_ceiling": 0.5}
    micro = COMMON | {"workloads": {"large": CHECKED | TIMES, "slower": slower, "small": small}}
    assert micro_cell(micro, "bfloat16") == "1.25 to 2.00x, 88 %"
    assert micro_cell(micro, "float32") == "0.50x, 99 %"
    assert micro_cell(micro, "float16") == "0.50 to 2.00x, 99 %"  # none is in it, so all speak
