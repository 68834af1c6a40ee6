"""Predictions from made-up records, and the page as what it says of them."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from abtest.verdict import Level, Verdict
from bench.ceilings import Ceilings
from bench.records import Perf, Record, append
from bench.roofline import device_page, page, spark
from bench.roofline.__main__ import main
from bench.roofline.efficiency import measured
from bench.roofline.page import ceilings_of
from bench.roofline.predict import device_us, forecasts
from bench.roofline.setting import Setting, setting_of
from bench.roofline.step import step_of
from loop.errors import UserError

RATES = Ceilings(4e12, 800e12, 0, 0, "bfloat16")
SETTING = Setting(supervised=0.5, documents=4)
ENVIRONMENT = {
    "device": "Example GPU X1", "device_slug": "example-gpu-x1", "copy_bytes_per_s": 4e12, "matmul_flops_per_s": 800e12,
    "matmul_dtype": "bfloat16",
}  # fmt: skip
RECIPE = {
    "model": "qwen3.5-2b", "method": "lora", "dtype": "bfloat16", "gradient_checkpointing": True,
    "lora": {"rank": 128, "targets": list(SETTING.targets)}, "data": {"pack_length": 5376, "packs_per_micro_step": 1},
}  # fmt: skip


def timed(shape: str, floor: float, candidate: float, reference: float, dtype: str = "bfloat16") -> dict:
    return {
        "shape": shape, "dtype": dtype, "candidate_us": candidate, "reference_us": reference,
        "of_ceiling": floor / candidate,
    }  # fmt: skip


MICRO = {
    "silu_mul": {
        "a": timed("T=5376 I=6144", 80.0, 100.0, 200.0), "longer": timed("T=10752 I=6144", 160.0, 300.0, 300.0),
        "short": timed("T=1024 I=6144", 10.0, 90.0, 90.0), "other": timed("T=5376 I=6144", 10.0, 90.0, 90.0, "float32"),
        "untimed": {"shape": "T=5376 I=64", "dtype": "bfloat16"},
    },
    "static_lora": {"a": timed("T=5376 D_in=2048 D_out=6144 R=128", 300.0, 500.0, 600.0)},
}  # fmt: skip


def arm(name: str, milliseconds: float | None, launches: int | None = 1000, on: tuple[str, ...] = (), **changes) -> Record:
    perf = None
    if milliseconds is not None:
        perf = Perf(5376e3 / milliseconds, 5376e3 / milliseconds, 1.0, milliseconds, 1.0, 1.0, 1.0, 10, launches=launches)
    values = {
        "run_id": "r", "arm": name, "role": "optimization" if on else "reference", "optimizations": on,
        "verdict": Verdict(Level.ROUNDING, "as measured"), "summary": "", "exactness": "rounding", "why_exact": "",
        "environment": ENVIRONMENT, "recipe": RECIPE, "command": "", "finished_at": "2026-01-02T03:04:05Z", "perf": perf,
        "data": {"documents": 8, "packs": 2, "supervised_fraction": 0.5},
        "micro": {"workloads": MICRO[name]} if name in MICRO else None,
    }  # fmt: skip
    return Record(**(values | changes))


def run() -> list[Record]:
    """Arms bound by the host at 30 µs a launch and about, and one that a graph launches."""
    return [
        arm("stock", 600.0, 20_000),
        arm("silu_mul", 558.0, 18_000, ("silu_mul",)),
        arm("static_lora", 640.0, 20_000, ("static_lora",)),
        arm("keep_activations", 310.0, 10_000, ("keep_activations",)),
        arm("all", 150.0, 2_000, ("silu_mul", "static_lora", "cuda_graphs", "supervised_logits", "keep_activations")),
    ]


# What records say


def test_a_record_gives_the_setting_without_its_checkpointing_and_its_ceilings():
    assert setting_of(arm("stock", 1.0)) == SETTING
    assert ceilings_of(arm("stock", 1.0)) == RATES


@pytest.mark.parametrize(
    "changes",
    [
        {"recipe": RECIPE | {"model": "/home/me/model"}}, {"recipe": RECIPE | {"dtype": "auto"}}, {"data": {}},
        {"recipe": RECIPE | {"data": {}}}, {"data": {"documents": 8, "packs": 0, "supervised_fraction": 0.5}},
        {"recipe": RECIPE | {"data": {"pack_length": 5376, "rows": "padded"}}},
    ],
)  # fmt: skip
def test_a_record_that_does_not_say_has_no_setting(changes):
    record = arm("stock", 1.0, **changes)
    assert setting_of(record) is None and device_page([record]) is None


def test_without_rates_or_a_reference_there_is_no_page():
    assert device_page([]) is None
    assert device_page([arm("silu_mul", 1.0, on=("silu_mul",))]) is None
    for broken in ({}, ENVIRONMENT | {"copy_bytes_per_s": 0}, ENVIRONMENT | {"matmul_flops_per_s": "fast"}):
        assert device_page([arm("stock", 1.0, environment=broken)]) is None


def test_efficiency_is_all_floors_over_all_times_of_long_workloads_in_the_dtype():
    found = measured(run(), SETTING)
    assert set(found.by_op) == {"silu_mul", "static_lora"}
    assert found.kind("elementwise").of(ours=True) == pytest.approx(240 / 400)
    assert found.kind("elementwise").of(ours=False) == pytest.approx(240 / 500)
    assert found.kind("attention") is None
    assert measured([arm("stock", 1.0, micro={"speedup": 2.0})], SETTING).by_op == {}


def test_a_part_takes_its_own_number_then_its_kind_s_and_the_candidate_s_only_where_it_is_on():
    found, parts = measured(run(), SETTING), {part.name: part for part in step_of(SETTING).micro_step}
    silu, norm, lora = (parts[name] for name in ("SiLU(gate) * up", "gated RMSNorm", "gate_proj, up_proj"))
    assert found.of(silu, None) == found.of(silu, ("silu_mul",)) == pytest.approx(240 / 400)
    assert found.of(silu, ()) == found.of(silu, ("static_lora",)) == pytest.approx(240 / 500)
    assert found.of(norm, ("silu_mul",)) == pytest.approx(240 / 500)
    assert found.of(norm, ("gated_rms_norm",)) == found.of(norm, None) == pytest.approx(240 / 400)
    assert found.of(lora, ("static_lora",)) == pytest.approx(300 / 500)
    assert found.of(lora, ("lora_matmul",)) == pytest.approx(300 / 600)  # it was not timed
    assert found.of(parts["attention within documents"], None) is None


def test_device_time_is_floors_over_efficiencies_and_the_floor_where_nothing_is_known():
    step = step_of(SETTING)
    kinds = step.by_kind(RATES)
    expected = kinds["matrix"] / 0.6 + kinds["elementwise"] / 0.6 + kinds["attention"] + kinds["recurrence"]
    assert device_us(step.micro_step, RATES, measured(run(), SETTING)) == pytest.approx(expected)
    assert device_us(step.micro_step, RATES, measured([], SETTING)) == pytest.approx(step.floor_us(RATES))


# Predictions


def predicted(records: list[Record]) -> dict[str, float]:
    found = forecasts(SETTING, records, RATES, measured(records, SETTING))
    return {one.arm: one.predicted_ms for one in found}


def test_an_arm_is_predicted_by_the_others_launches():
    found = {one.arm: one for one in forecasts(SETTING, run(), RATES, measured(run(), SETTING))}
    assert found["stock"].host_us == pytest.approx(31.0)  # of 31, 32 and 31
    assert found["stock"].predicted_ms == pytest.approx(20_000 * 0.031)
    assert found["stock"].error == pytest.approx(620 / 600 - 1)
    assert found["static_lora"].host_us == pytest.approx(31.0)  # of 30, 31 and 31


def test_an_arm_s_own_time_is_not_in_its_prediction():
    slower = [arm("stock", 900.0, 20_000), *run()[1:]]
    assert predicted(slower)["stock"] == predicted(run())["stock"]
    assert predicted(slower)["static_lora"] == predicted(run())["static_lora"]  # a median
    twice = [dataclasses.replace(one, perf=dataclasses.replace(one.perf, micro_step_ms=2 * one.perf.micro_step_ms))
             for one in run()[1:]]  # fmt: skip
    assert predicted([run()[0], *twice])["stock"] == pytest.approx(2 * predicted(run())["stock"])


def test_a_graph_costs_the_host_nothing_and_tells_nothing_of_launches():
    found = {one.arm: one for one in forecasts(SETTING, run(), RATES, measured(run(), SETTING))}
    step = step_of(SETTING)  # as it keeps activations and leaves logits out
    on = run()[-1].optimizations
    assert found["all"].host_us is None and found["all"].host_ms == 0
    assert found["all"].predicted_ms == pytest.approx(device_us(step.micro_step, RATES, measured(run(), SETTING), on) / 1e3)
    assert predicted(run()[:-1])["stock"] == predicted(run())["stock"]


def test_an_arm_that_the_device_holds_up_tells_nothing_of_launches():
    busy = arm("packed_attention", 150.0, 1_000, ("packed_attention",))  # 150 µs a launch, of which most is the device's
    assert predicted([*run(), busy])["stock"] == predicted(run())["stock"]


def test_what_an_arm_runs_is_what_it_is_predicted_from():
    found = {one.arm: one.floor_ms for one in forecasts(SETTING, run(), RATES, measured(run(), SETTING))}
    again = dataclasses.replace(SETTING, gradient_checkpointing=True, supervised=1.0)
    for name, setting in (
        ("stock", again), ("keep_activations", dataclasses.replace(SETTING, supervised=1.0)), ("all", SETTING),
    ):  # fmt: skip
        assert found[name] == pytest.approx(step_of(setting).floor_us(RATES) / 1e3)


@pytest.mark.parametrize(
    "other",
    [
        arm("peer", 100.0, 5_000, role="peer"), arm("negative", 100.0, 5_000, ("x",), role="negative"),
        arm("cpu", 100.0, None, ("x",)), arm("untimed", None, on=("x",)),
        arm("shorter", 100.0, 5_000, ("x",), recipe=RECIPE | {"data": {"pack_length": 2048}}),
        arm("full", 100.0, 5_000, ("x",), recipe=RECIPE | {"method": "full"}),
    ],
    ids=lambda record: record.arm,
)  # fmt: skip
def test_arms_of_other_programs_settings_or_without_numbers_are_left_out(other):
    assert predicted([*run(), other]) == predicted(run())


# The page


def cells(text: str, heading: str) -> list[list[str]]:
    """The rows of the first table behind a heading, its own header not among them."""
    lines = text.partition(heading)[2].splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return rows[2:]


def test_the_page_is_a_function_of_its_arguments_and_says_what_it_is_of():
    text = device_page(run())
    assert text == device_page(run()) == page(SETTING, RATES, "Example GPU X1", run())
    assert "# The floor of a step on Example GPU X1" in text and text.endswith("\n") and "\n\n\n" not in text
    assert "LoRA r=128, 125.0M numbers train" in text and "4 documents of equal length" in text and "50.0 %" in text
    assert "copies 4,000 GB/s" in text and "products 800 TFLOP/s" in text


def test_the_rows_of_the_parts_add_up_to_their_sum():
    rows = cells(device_page(run()), "## Every part")
    parts, sums = [row for row in rows if "**" not in row[0]], [row for row in rows if "**" in row[0]]
    micro_step = [row for row in parts if row[1] != "update"]
    assert len(sums) == 2 and len(micro_step) == len(step_of(SETTING).micro_step)
    total = float(sums[0][9].strip("*"))
    assert sum(float(row[9]) for row in micro_step) == pytest.approx(total, rel=2e-3)
    assert total == pytest.approx(step_of(SETTING).floor_us(RATES) / 1e3, rel=1e-3)
    launches = sum(int(row[3]) * int(row[6]) for row in micro_step)
    assert sums[0][6] == f"{launches:,} in all"
    reached = {row[0].replace("\\", ""): row[10] for row in micro_step}
    assert reached["SiLU(gate) * up"] == "60 %" and reached["embedding"] == "–"


def test_every_row_has_as_many_cells_as_its_header():
    for text in (device_page(run()), page(Setting(method="full", supervised=0.0), RATES, "a | b")):
        for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
            assert len({len(re.split(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1, block


def test_arms_stand_beside_the_floor_fastest_first_and_peers_with_their_verdict():
    floor = step_of(SETTING).floor_us(RATES) / 1e3
    peers = [
        arm("peft_fla", 100.0, 5_000, role="peer", verdict=Verdict(Level.FAILED, "leaks")),
        arm("peft", 140.0, 5_000, role="peer"),
    ]
    rows = cells(device_page([*run(), *peers]), "## What the arms reach")
    names = ["`peft_fla` (peer, FAILED)", "`peft` (peer, ROUNDING)", "`all`", "`keep_activations`"]
    assert [row[0] for row in rows][:4] == names
    assert rows[2][3] == f"{floor / 150 * 100:.1f} %"


def test_the_error_is_stated_arm_by_arm_and_over_all():
    text = device_page(run())
    errors = {row[0]: row[-1] for row in cells(text, "## The prediction checked")}
    assert errors["`stock`"] == "**+3 %**" and set(errors) == {f"`{record.arm}`" for record in run()}
    assert "largest" in text and "`all`, is off by" in text and "The host decides in 4 of 5" in text


def test_without_microbenchmarks_nothing_is_predicted():
    records = [dataclasses.replace(record, micro=None) for record in run()]
    text = device_page(records)
    assert "Without one time no prediction is made." in text and "not checked." in text
    assert [row[5] for row in cells(text, "beside 451")] == ["–"] * 4
    assert "no time in this run: taken at its floor" in text


def test_the_other_device_s_floor_is_from_its_own_rates():
    text = device_page(run())
    everything = step_of(dataclasses.replace(SETTING, supervised=1.0))
    rate = everything.per_second(everything.floor_us(spark.CEILINGS))
    assert f"The published 3,461 tokens/s are {346_100 / rate:.1f} % of the floor's {rate:,.0f}" in text
    assert rate < everything.per_second(everything.matrix_floor_us(spark.CEILINGS))
    rows = cells(text, "beside 451")
    assert [row[:2] for row in rows] == [["100.0 %", "no"], ["100.0 %", "yes"], ["50.0 %", "no"], ["50.0 %", "yes"]]
    assert rows[0][4] == f"{rate:,.0f}" and rows[0][6] == f"{346_100 / rate:.1f} %"


def test_the_published_rate_is_held_against_its_own_model_and_method_alone():
    for other in (Setting(method="full"), Setting(model="qwen3.5-0.8b")):
        assert "3,461" not in page(other, RATES, "x")


# The command


@pytest.fixture
def reports(tmp_path) -> Path:
    for record in run():
        folder = tmp_path / "data" / "example-gpu-x1"
        folder.mkdir(parents=True, exist_ok=True)
        append(folder / "records.jsonl", record)
    return tmp_path


def test_the_command_prints_the_page_of_a_device(reports, capsys):
    assert main(["--device-slug", "example-gpu-x1", "--reports", str(reports)]) == 0
    assert capsys.readouterr().out == device_page(run())


def test_flags_win_over_the_device_s_setting_whose_times_are_then_no_check(reports, capsys):
    main(["--device-slug", "example-gpu-x1", "--reports", str(reports), "--supervised", "1.0"])
    out = capsys.readouterr().out
    assert "100.0 % of positions supervised" in out and "4 documents" in out and "not checked." in out
    assert "## What the arms reach" not in out and "`silu_mul`" in out


def test_the_command_takes_two_rates_instead(capsys):
    assert main(["--copy-tb-s", "4", "--matmul-tflops", "800", "--supervised", "0.5", "--documents", "4"]) == 0
    assert capsys.readouterr().out == page(SETTING, RATES, "a device of these rates")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give both"), (["--copy-tb-s", "4"], "give both"), (["--copy-tb-s", "0", "--matmul-tflops", "1"], "above 0"),
        (["--device-slug", "x"], "no records of it; there are example-gpu-x1"),
        (["--device-slug", "example-gpu-x1", "--copy-tb-s", "1"], "leave --copy-tb-s"),
        (["--copy-tb-s", "1", "--matmul-tflops", "1", "--documents", "0"], "documents is 0"),
    ],
)  # fmt: skip
def test_the_command_names_a_mistake(reports, arguments, words):
    with pytest.raises(UserError, match=words):
        main([*arguments, "--reports", str(reports)])
