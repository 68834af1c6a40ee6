"""From stock to the answer of a search: every member by leaving it out, and what is left over."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import synthetic_records as synthetic
from rendered import tables
from synthetic_trials import forward, timing, trial, whole

from abtest import jsonl
from abtest.verdict import Level
from bench import records
from bench.records import Record
from bench.report import differences, plots, render, waterfall
from bench.report.waterfall import Answer, Waterfall, picture
from bench.search import trials
from bench.search.trials import LEAVE_ONE_OUT, Timing, Trial

SLUG = "example-gpu-x1"
IMAGE = f"search/{SLUG}-qwen3.5-tiny-lora-512-bfloat16.members.png"


def gated(*optimizations: str, ratio: float = 2.0, arm: str = "search", micro_step_ms: float = 100.0, **changes) -> Record:
    perf = synthetic.perf(ratio, micro_step_ms=micro_step_ms)
    return synthetic.record(
        arm, **{"role": "combination", "optimizations": optimizations, "perf": perf, "run_id": "r", "losses": ()} | changes
    )


def stock(**changes) -> Record:
    return synthetic.reference(run_id="r", losses=(), **changes)


def without(ratio: float) -> Timing:
    """Leaving it out makes a micro-step take `ratio` times as long, in these exact numbers."""
    return timing(1 / ratio, ratio_low=1 / (ratio + 0.02), ratio_high=1 / (ratio - 0.02))


def rendered(reports: Path, found: list[Trial], *kept: Record) -> str:
    for one in found:
        jsonl.append(trials.path_of(reports, SLUG), jsonl.dumps(one))
    for record in kept:
        records.append(reports / "data" / SLUG / "run.jsonl", record)
    render(reports / "data", reports)
    return (reports / "search" / "README.md").read_text(encoding="utf-8")


def rows(text: str) -> list[list[str]]:
    return next(table for table in tables(text) if table[0] == list(waterfall.HEADER))[1:]


def milliseconds(cell: str) -> float:
    return float(cell.replace("−", "-").replace(",", ""))


def test_every_member_counts_by_what_is_lost_without_it(tmp_path):
    text = rendered(tmp_path, whole(without(1.3), without(1.5)), stock(), gated("b", "c"))
    assert rows(text) == [
        ["stock", "200.0", "–", "–"],
        ["c", "−50.0", "[−52.0, −48.0]", "1.500x [1.480, 1.520]"],
        ["b", "−30.0", "[−32.0, −28.0]", "1.300x [1.280, 1.320]"],
        ["interaction", "−20.0", "–", "–"],
        ["what ships", "100.0", "–", "2.00x [1.98, 2.02] in all"],
    ]
    assert waterfall.LEGEND in text and "#### From stock to what ships\n" in text and "No waterfall" not in text
    assert Path(IMAGE).name in text and plots.is_ours((tmp_path / IMAGE).read_bytes())
    assert "](search/README.md): from stock to the fastest set" in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert differences(tmp_path / "data", tmp_path) == []


@pytest.mark.parametrize("micro_step_ms", [0.777, 9.87654, 106.207, 2345.6789, 123456.789])
@pytest.mark.parametrize("ratio", [1.00017, 3.14159])
def test_what_is_shown_adds_up_exactly(micro_step_ms, ratio):
    """Also where members do the same work, or each needs the other, or one is slower than without it."""
    for gains in ((1.0123, 1.0456), (1.777, 2.999), (0.991, 1.03)):
        left_out = [trial(LEAVE_ONE_OUT, 4, "bc", on, without(gain)) for on, gain in zip("bc", gains, strict=True)]
        fall = Waterfall(Answer(gated("b", "c", ratio=ratio, micro_step_ms=micro_step_ms), True), tuple(left_out))
        *parts, last = rows("\n\n".join(waterfall.section(fall, "x.png")))
        total = sum(milliseconds(row[1]) for row in parts)
        assert round(total, fall.decimals) == milliseconds(last[1])
        assert milliseconds(last[1]) == pytest.approx(micro_step_ms, rel=1e-2)
        picture(fall, "X1")


def test_a_member_without_which_nothing_runs_is_part_of_the_interaction(tmp_path):
    text = rendered(tmp_path, whole(without(1.3), Timing(why="b: needs c")), stock(), gated("b", "c"))
    assert [row[:2] for row in rows(text)] == [
        ["stock", "200.0"], ["b", "−30.0"], ["c: without it the rest does not run, so it is in the interaction", "–"],
        ["interaction", "−70.0"], ["what ships", "100.0"],
    ]  # fmt: skip


def test_a_slower_member_and_what_is_counted_twice_go_up(tmp_path):
    text = rendered(tmp_path, whole(without(0.99), without(2.5)), stock(), gated("b", "c", ratio=1.5))
    assert "no: it does nothing here" in text and waterfall.NO_LEAVE_ONE_OUT in text, "b goes, so this is not the answer"
    memory = dataclasses.replace(without(0.99), peak_memory_bytes=1000, against_peak_memory_bytes=900)
    text = rendered(tmp_path, [dataclasses.replace(one, run_id="s") for one in whole(memory, without(2.5))],
                    stock(), gated("b", "c", ratio=1.5, run_id="s"))  # fmt: skip
    assert [row[1] for row in rows(text)] == ["150.0", "−150.0", "+1.0", "+99.0", "100.0"]


def test_an_answer_that_does_not_ship_is_not_said_to(tmp_path):
    text = rendered(
        tmp_path,
        whole(without(1.3), without(1.5)),
        stock(),
        gated("b", "c", arm="partial_search"),
        gated("d", ratio=3.0, arm="combination"),
    )
    assert rows(text)[-1][0] == "the answer" and "#### From stock to the answer\n" in text and "what ships" not in text


def test_the_newest_record_of_the_set_counts_also_of_an_earlier_run(tmp_path):
    later = {"run_id": "later", "finished_at": "2026-02-01T00:00:00Z"}
    kept = [stock(), gated("b", "c", ratio=9.0), gated("b", "c", ratio=3.0), dataclasses.replace(stock(), **later)]
    text = rendered(tmp_path, whole(without(1.3), without(1.5)), *kept)
    assert rows(text)[0][1] == "300.0" and rows(text)[-1][0] == "the answer"


def test_the_answer_of_a_search_from_a_set_may_be_the_combination_that_it_began_with(tmp_path):
    begun = whole(without(1.3), without(1.5))[-2:]
    text = rendered(tmp_path, begun, stock(), gated("b", "c", arm="combination"))
    assert rows(text)[0][1] == "200.0" and rows(text)[-1][0] == "what ships" and "step by step" not in text


@pytest.mark.parametrize("also", [False, True], ids=["kept on", "left out all the same"])
def test_what_a_micro_step_does_not_show_need_not_be_left_out(also, tmp_path):
    update = "fused_adamw"
    found = [
        dataclasses.replace(one, against=(*one.against, update), optimizations=(*one.optimizations, update))
        for one in whole(without(1.3), without(1.5))[-2:]
    ]
    if also:
        found.append(dataclasses.replace(found[0], optimizations=("b", "c"), timing=timing(1.001)))
    text = rendered(tmp_path, found, stock(), gated("b", "c", update, arm="combination"))
    assert rows(text)[0][1] == "200.0" and rows(text)[-1][0] == "what ships"
    assert "**`b` + `c` + `fused_adamw`** is the fastest set." in text


@pytest.mark.parametrize(
    ("found", "kept"),
    [
        (forward(), ("b", "c")),
        (whole(without(1.3), without(1.5))[:-1], ("b", "c")),
        (whole(timing(1.0), without(1.5)), ("b", "c")),
    ],
)
def test_where_members_were_not_left_out_one_line_says_so(found, kept, tmp_path):
    text = rendered(tmp_path, found, stock(), gated(*kept))
    assert f"\n\n{waterfall.NO_LEAVE_ONE_OUT}\n\n" in text and not (tmp_path / IMAGE).exists()


@pytest.mark.parametrize(
    "kept",
    [
        (),
        (gated("b"),),
        (gated("b", "c", run_id="s"),),
        (gated("b", "c", perf=None, untimed="timing broke off"),),
        (gated("b", "c", level=Level.FAILED, perf=None),),
        (gated("b", "c", perf=synthetic.perf(float("nan"))),),
    ],
)
def test_an_answer_without_a_time_beside_stock_gets_one_line(kept, tmp_path):
    text = rendered(tmp_path, whole(without(1.3), without(1.5)), stock(), *kept)
    assert f"\n\n{waterfall.NO_TIME}\n\n" in text and not (tmp_path / IMAGE).exists()


def test_a_waterfall_of_other_numbers_is_another_one():
    def drawn(gain: float, ships: bool = True) -> bytes:
        left_out = trial(LEAVE_ONE_OUT, 4, "b", "", without(gain))
        return picture(Waterfall(Answer(gated("b"), ships), (left_out,)), "X1")

    assert drawn(1.3) == drawn(1.3)
    assert not plots.same_image(drawn(1.3), drawn(1.301)) and not plots.same_image(drawn(1.3), drawn(1.3, False))
