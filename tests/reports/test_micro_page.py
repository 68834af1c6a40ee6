"""The page of microbenchmarks: rendered from its records alone, with what misses its aim first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import synthetic_records as synthetic
from markdown_it import MarkdownIt
from rendered import tables

from abtest import jsonl
from bench import records as device_records
from bench.micro_records import MicroRecord
from bench.report import differences, render
from loop.errors import UserError

PAGE = Path("micro") / "README.md"
SLUG = "example-gpu-x1"
WEIRD = 'a|b\n<script> `c` "d" ](http://e) 漢字 **f** __g__'
CEILINGS = {
    "copy_bytes_per_s": 4.2e12, "matmul_flops_per_s": 8e14, "copied_bytes": 1 << 30, "matmul_size": 8192,
    "matmul_dtype": "bfloat16",
}  # fmt: skip
CHECKED = {
    "shape": "T=5376 I=6144", "dtype": "bfloat16", "small": False, "level": "ROUNDING", "max_error_ratio": 1.0,
    "mean_error_ratio": 0.75,
}  # fmt: skip
TIMES = {
    "reference_us": 200.0, "candidate_us": 100.0, "forward_us": 40.0, "ratio": 2.0, "ratio_low": 1.9, "ratio_high": 2.1,
    "samples": 50, "tb_per_s": 3.8, "tflop_per_s": 4.5, "of_ceiling": 0.91, "of_copies": 0.97,
}  # fmt: skip
TIMED = CHECKED | TIMES
COMMAND = "python -m bench.micro --record --optimization "


def result(name: str = "silu_mul", **changes: Any) -> dict[str, Any]:
    values = {
        "optimization": name, "device": "Example GPU X1", "exactness": "rounding", "level": "ROUNDING",
        "reason": "pack, seed 0: max ratio 1 (limit 2)", "untimed": None, "ceilings": CEILINGS, "workloads": {"pack": TIMED},
    }  # fmt: skip
    return values | changes


def untimed(name: str, why: str, **changes: Any) -> dict[str, Any]:
    return result(name, **({"untimed": why, "ceilings": None, "workloads": {"pack": CHECKED}} | changes))


def record(result: dict[str, Any], second: int = 0, slug: str = SLUG, **environment: Any) -> MicroRecord:
    known = synthetic.ENVIRONMENT | {"device_slug": slug} | environment
    return MicroRecord(f"2026-01-02T03:04:{second:02d}+00:00", COMMAND + result["optimization"], known, result)


def rendered(reports: Path, *records: MicroRecord) -> str:
    for one in records:
        path = reports / "data" / "micro" / f"{one.environment['device_slug']}.jsonl"
        jsonl.append(path, jsonl.dumps(one))
    render(reports / "data", reports)
    return (reports / PAGE).read_text(encoding="utf-8")


def below(text: str) -> str:
    return text.split("### Below the aim")[1].split("### All of them")[0]


def test_what_was_timed_is_one_table_without_the_small(tmp_path):
    rows = {"pack": TIMED, "small": TIMED, "ragged": TIMED | {"small": True}, "old": {**TIMED, "ratio": 1.5}}
    del rows["old"]["small"]
    text = rendered(tmp_path, record(result(workloads=rows)), record(result("rms_norm")))
    all_of_them = tables(text)[0]
    assert all_of_them[0] == [
        "optimization", "workload", "dtype", "op check", "reference µs", "candidate µs", "forward µs", "ratio", "TB/s",
        "TFLOP/s", "of the ceiling", "of copies",
    ]  # fmt: skip
    numbers = ["bfloat16", "ROUNDING", "200", "100", "40", "2.00x [1.90, 2.10]", "3.8", "4.5", "91 %", "97 %"]
    assert all_of_them[1] == ["rms_norm", "pack", *numbers]
    assert [row[:2] for row in all_of_them[2:]] == [["silu_mul", "old"], ["silu_mul", "pack"]]


def test_aims_that_are_met_leave_nothing_below(tmp_path):
    product = TIMED | {"of_copies": None, "of_ceiling": 0.4, "ratio": 0.95}
    text = rendered(tmp_path, record(result(workloads={"at the aim": TIMED | {"of_ceiling": 0.85}, "product": product})))
    assert "None: all 2 that were timed reach it." in below(text) and tables(below(text)) == []


def test_aims_that_are_missed_say_by_how_much(tmp_path):
    rows = {
        "met": TIMED,
        "slow": TIMED | {"of_ceiling": 0.8, "of_copies": 0.934, "ratio": 9.0},
        "slower": TIMED | {"of_ceiling": 0.6},
        "product": TIMED | {"of_copies": None, "of_ceiling": 0.99, "ratio": 0.9, "ratio_low": 0.89, "ratio_high": 0.91},
        "small": TIMED | {"of_ceiling": 0.01},
    }
    text = rendered(tmp_path, record(result(workloads=rows)))
    assert "3 of 4 fall short." in below(text) and "copies of only as many bytes as the workload moves" in below(text)
    (found,) = tables(below(text))
    assert [row[1] for row in found[1:]] == ["slower", "product", "slow"]  # the farthest from its aim first
    assert found[1][3:] == ["traffic", "60.0 %", "25 points", "97.0 %"]
    assert found[2][3:] == ["arithmetic", "0.90x [0.89, 0.91]", "0.05x", "–"]
    assert found[3][3:] == ["traffic", "80.0 %", "5 points", "93.4 %"]


def test_the_newest_record_of_an_optimization_counts(tmp_path):
    older = record(result(workloads={"pack": TIMED | {"of_ceiling": 0.1}}), second=1)
    text = rendered(tmp_path, record(result(), second=2), older)  # the order in the file does not decide
    assert "None: all 1 that were timed reach it." in text
    text = rendered(tmp_path, record(untimed("silu_mul", "not timed: FAILED on 'pack': wrong", level="FAILED"), second=3))
    assert "- `silu_mul`: **FAILED**; FAILED on 'pack': wrong." in text and "2.00x" not in text


def test_each_device_has_its_own_section_and_provenance(tmp_path):
    other = result("rms_norm", ceilings=CEILINGS | {"copy_bytes_per_s": 4.4e12})
    text = rendered(
        tmp_path, record(result()), record(other, git_sha="fedcba9876", git_dirty=True),
        record(result(), slug="other-gpu", device="Other GPU", driver="600.2"),
    )  # fmt: skip
    first, second = text.split("\n## ")[1:]
    assert first.startswith("Example GPU X1\n\nExample GPU X1; driver 570.1; torch 2.11.0; triton 3.7.1; commit ")
    assert "`fedcba9` **with uncommitted changes**, `0123abc`" in first
    assert "copies 4,200.0 GB/s to 4,400.0 GB/s (read and written), bfloat16 8192³ products 800.0 TFLOP/s." in first
    assert second.startswith("Other GPU\n\nOther GPU; driver 600.2;") and "rms_norm" not in second
    assert [row[3] for row in tables(first)[-1][1:]] == [COMMAND + "rms_norm", COMMAND + "silu_mul"]


def test_what_was_not_timed_is_listed_with_its_reason(tmp_path):
    nothing = untimed("packing", "changes the whole loop", level="NOT_RUN", workloads={})
    text = rendered(tmp_path, record(nothing), record(result("tiny", workloads={"small": TIMED})))
    assert "- `packing`: **NOT_RUN**; changes the whole loop.\n- `tiny`: **ROUNDING**; only small workloads" in text
    assert "No workload that is not small was timed." in below(text)


def test_names_and_words_that_need_escapes(tmp_path):
    odd = result(WEIRD, workloads={WEIRD: TIMED | {"of_ceiling": 0.1, "dtype": WEIRD}})
    text = rendered(tmp_path, record(odd, device=WEIRD, driver=WEIRD, git_sha=WEIRD), record(untimed("other", WEIRD)))
    assert "<script>" not in MarkdownIt("commonmark").enable("table").render(text)
    for rows in tables(text):
        assert {len(row) for row in rows} == {len(rows[0])}


def test_one_command_renders_and_checks_it_with_the_rest(tmp_path):
    data = tmp_path / "data"
    device_records.append(data / SLUG / "run.jsonl", synthetic.record())
    text = rendered(tmp_path, record(result()))
    index = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "](micro/README.md)" in index and len(tables(index)[0]) == 2  # the folder of microbenchmarks is no device
    assert differences(data, tmp_path) == []
    (tmp_path / PAGE).write_text(text.replace("2.00x", "3.00x"), encoding="utf-8")
    assert differences(data, tmp_path) == [f"{PAGE} (differs)"]
    (data / "micro" / f"{SLUG}.jsonl").unlink()
    render(data, tmp_path)
    assert not (tmp_path / PAGE).exists()
    assert "micro/" not in (tmp_path / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"schema": 2}, "record schema 2 is not 1"),
        ({"finished_at": "yesterday"}, "finished_at 'yesterday' is not an ISO 8601 time"),
        ({"extra": 1}, "unknown key 'extra'"),
        ({"environment": {"device_slug": "other"}}, "it is of device 'other', which belongs in other.jsonl"),
        ({"environment": {}}, "no key 'device_slug'"),
        ({"result": result(level="FAILED")}, "'silu_mul' is FAILED: what does not match its reference holds no time"),
        ({"result": result(untimed="why")}, "a time and a reason for having none"),
        ({"result": result(workloads={})}, "untimed does not say why"),
        ({"result": result(workloads={"pack": CHECKED})}, "or neither"),
        ({"result": result(workloads={"pack": TIMED | {"ratio": "nan"}})}, "ratio is 'nan', not a finite number"),
        ({"result": result(workloads={"pack": TIMED | {"speed": 1}})}, "unknown key 'speed'"),
        ({"result": result(ceilings=None)}, "ceilings is None, not an object"),
        ({"result": result(level="GREAT")}, "GREAT"),
    ],
)
def test_a_line_that_is_no_record_is_named(tmp_path, changed, words):
    file = tmp_path / "data" / "micro" / f"{SLUG}.jsonl"
    file.parent.mkdir(parents=True)
    row = json.loads(jsonl.dumps(record(result())))
    file.write_text(f"{json.dumps(row)}\n{json.dumps(row | changed)}\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        render(tmp_path / "data", tmp_path)
    assert f"{file}:2: not a valid record: " in str(caught.value) and words in str(caught.value)
    assert not (tmp_path / PAGE).exists()


def test_an_arm_without_its_microbenchmark_shows_the_newest_of_its_own(tmp_path):
    """On its page and in the overview; one that was measured in the run itself stays, and so does another device's."""
    own = result(workloads={"in the run": TIMED | {"ratio": 9.87}})
    arms = [synthetic.record("silu_mul"), synthetic.record("rms_norm", micro=own), synthetic.record("static_lora")]
    for arm in arms:
        device_records.append(tmp_path / "data" / SLUG / "records.jsonl", arm)
    older = record(result(workloads={"pack": TIMED | {"ratio": 3.21}}), second=1)
    newer = record(result(workloads={"pack": TIMED | {"ratio": 4.56}}), second=2)
    other = record(result("static_lora", workloads={"pack": TIMED | {"ratio": 6.54}}), slug="other-gpu")
    rendered(tmp_path, newer, older, record(result("rms_norm")), other)
    pages = {name: (tmp_path / SLUG / f"{name}.md").read_text(encoding="utf-8") for name in ("silu_mul", "rms_norm")}
    overview = (tmp_path / SLUG / "README.md").read_text(encoding="utf-8")
    assert "4.56x" in pages["silu_mul"] and "3.21x" not in pages["silu_mul"] and "4.56x" in overview
    assert "9.87x" in pages["rms_norm"] and "2.00x" not in pages["rms_norm"]
    assert "6.54x" not in overview
