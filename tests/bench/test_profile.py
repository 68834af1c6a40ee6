"""What `bench.profile` reads out of a trace: covered time, gaps, launches, owners. Traces are made up."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.cross_compile.folders import folders
from bench.profile import owners, phases
from bench.profile.intervals import gaps, length, union
from bench.profile.owners import Owners
from bench.profile.trace import Event, Trace, capture, parse, segments
from kernels.registry import discover

# Intervals


@pytest.mark.parametrize(
    ("given_", "covered"),
    [
        ([], []),
        ([(1, 1)], []),
        ([(2, 1)], []),
        ([(0, 4), (1, 2)], [(0, 4)]),
        ([(3, 5), (0, 1), (4, 6)], [(0, 1), (3, 6)]),
        ([(0, 1), (1, 2)], [(0, 2)]),
        ([(0, 1), (0, 1), (0.5, 0.5)], [(0, 1)]),
    ],
)
def test_union(given_, covered):
    assert union(given_) == covered


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30))))
def test_union_covers_just_what_the_intervals_cover_and_gaps_are_the_rest(intervals):
    points = {point for begin, end in intervals for point in range(begin, end)}
    covered = union(intervals)
    assert {point for begin, end in covered for point in range(begin, end)} == points
    assert all(one[1] < other[0] for one, other in pairwise(covered))
    idle = gaps(covered, 5, 25)
    inside = {point for point in points if 5 <= point < 25}
    assert {point for begin, end in idle for point in range(begin, end)} == set(range(5, 25)) - inside
    assert length(idle) == 20 - len(inside)


def test_gaps_of_nothing_is_everything_and_of_everything_nothing():
    assert gaps([], 1, 3) == [(1, 3)] and gaps([(0, 9)], 1, 3) == [] and gaps([], 3, 3) == []


# Traces


def row(name: str, category: str, begin: float, microseconds: float, thread: Any = 1, **arguments: Any) -> dict[str, Any]:
    words = {key.replace("_", " "): value for key, value in arguments.items()}
    when = {"ts": 1e12 + begin, "dur": microseconds}
    return {"ph": "X", "cat": category, "name": name, "pid": 1, "tid": thread, "args": words} | when


def document(*rows: dict[str, Any]) -> dict[str, Any]:
    flow = {"ph": "s", "id": 1, "pid": 1, "tid": 1, "ts": 0, "cat": "ac2g", "name": "ac2g"}
    return {"traceEvents": [{"ph": "M", "name": "process_name", "ts": 0, "pid": 1, "tid": 0, "args": {}}, flow, *rows]}


MARK = row("phase", "user_annotation", 0, 100)


def ranges_of(*rows: dict[str, Any]) -> list[Trace]:
    return list(parse(document(MARK, *rows)).ranges("phase"))


def of_device(*rows: dict[str, Any], names: tuple[str, ...] = (), per: int = 1, phase: str = "micro_step") -> dict[str, Any]:
    return phases.of_device(ranges_of(*rows), phase, Owners(names), per)


def kernel(name: str, begin: float, microseconds: float, stream: int = 7, **arguments: Any) -> dict[str, Any]:
    return row(name, "kernel", begin, microseconds, stream, **arguments)


def test_streams_that_overlap_are_busy_once_and_count_twice_in_their_groups():
    found = of_device(
        kernel("gemm_a", 10, 20, stream=7, correlation=1), kernel("gemm_b", 15, 30, stream=8, correlation=2),
        kernel("flash_c", 20, 5, stream=9, correlation=3), kernel("nothing_d", 50, 0, correlation=4),
        row("Memcpy HtoD", "gpu_memcpy", 60, 5, 7, correlation=5), row("Memset", "gpu_memset", 64, 6, 7, correlation=6),
    )  # fmt: skip
    assert found["busy_s"] == pytest.approx(45e-6)  # 10 to 45, 60 to 70
    assert found["idle_s"] == pytest.approx(55e-6)
    assert found["groups"] == pytest.approx({"matrix": 50e-6, "attention": 5e-6, "copy": 11e-6, "other": 0.0})
    assert (found["kernels"], found["copies"], found["launches"], found["graph_launches"]) == (4, 2, 4, 0)


def test_an_annotation_as_the_device_saw_it_is_no_work():
    found = of_device(kernel("gemm", 10, 20), row("phase", "gpu_user_annotation", 0, 100, 7))
    assert found["busy_s"] == pytest.approx(20e-6) and found["kernels"] == 1


def test_what_lies_outside_of_the_marks_does_not_count():
    found = of_device(kernel("gemm", 10, 20), kernel("gemm", 100, 20), kernel("gemm", 300, 20))
    assert found["groups"] == pytest.approx({"matrix": 20e-6})


def test_a_phase_without_work_is_idle():
    found = of_device(row("aten::view", "cpu_op", 0, 30))
    assert found["busy_s"] == 0 and found["groups"] == {} and found["names"] == []
    assert found["gaps"] == [{"at_s": 0, "seconds": pytest.approx(1e-4), "host": phases.PYTHON}]


def test_counts_and_times_are_of_one_micro_step():
    rows = [
        row("phase", "user_annotation", 200, 100),
        kernel("gemm", 10, 20, correlation=1),
        kernel("gemm", 210, 40, correlation=2),
    ]
    found = of_device(*rows, per=2)  # two repetitions of two micro-steps
    assert found["groups"] == pytest.approx({"matrix": 15e-6}) and found["kernels"] == found["launches"] == 0.5
    assert found["busy_s"] == pytest.approx(15e-6)
    (only,) = found["names"]
    assert only == {"name": "gemm", "group": "matrix", "owner": None, "seconds": pytest.approx(15e-6), "count": 0.5}


def test_kernels_of_a_graph_are_one_launch():
    replay = row("cudaGraphLaunch", "cuda_runtime", 1, 3, correlation=5)
    inside = [kernel("gemm", 10 + at, 1, correlation=5) for at in range(40)]
    copy = kernel("elementwise_kernel", 60, 1, correlation=6)
    found = of_device(replay, row("cudaLaunchKernel", "cuda_runtime", 5, 1, correlation=6), *inside, copy)
    assert (found["kernels"], found["launches"], found["graph_launches"]) == (41, 2, 1)


def test_kernels_without_a_call_count_each():
    assert of_device(kernel("gemm", 10, 1), kernel("gemm", 20, 1))["launches"] == 2


def test_gaps_say_what_the_host_was_at():
    found = of_device(
        kernel("gemm", 10, 10), kernel("gemm", 60, 10), kernel("gemm", 75, 25),
        row("aten::item", "cpu_op", 15, 44), row("cudaStreamSynchronize", "cuda_runtime", 20, 38, correlation=1),
        row("aten::add", "cpu_op", 71, 3),
    )  # fmt: skip
    assert [(gap["host"], round(gap["seconds"] * 1e6)) for gap in found["gaps"]] == [
        ("cudaStreamSynchronize in aten::item", 40), (phases.PYTHON, 10), ("aten::add", 5),
    ]  # fmt: skip
    assert found["idle_by"] == pytest.approx(
        {"cudaStreamSynchronize in aten::item": 40e-6, phases.PYTHON: 10e-6, "aten::add": 5e-6}
    )


def test_what_began_long_before_a_gap_is_seen():
    short = [row("aten::view", "cpu_op", 31 + at, 0.5) for at in range(20)]
    found = of_device(kernel("gemm", 0, 30), row("cudaDeviceSynchronize", "cuda_runtime", 1, 99, 2, correlation=1), *short)
    assert found["gaps"][0]["host"].startswith("cudaDeviceSynchronize")


def test_only_the_longest_gaps_are_kept_but_all_count():
    found = of_device(*(kernel("gemm", 2 * at, 1) for at in range(50)))
    assert len(found["gaps"]) == phases.GAPS and found["idle_s"] == pytest.approx(50e-6)


def test_an_update_is_the_optimizer_by_whatever_name():
    found = of_device(kernel("gemm", 10, 20), row("Memcpy DtoH", "gpu_memcpy", 40, 2), phase="update")
    assert found["groups"] == pytest.approx({"optimizer": 22e-6})


def test_what_no_group_knows_is_named_however_little_it_takes():
    known = [kernel(f"gemm_{number}", number, 1) for number in range(phases.NAMES + 5)]
    names = [entry["name"] for entry in of_device(*known, kernel("stranger", 60, 0.001))["names"]]
    assert len(names) == phases.NAMES + 1 and names[-1] == "stranger"


def test_a_time_is_an_operators_own_without_those_inside():
    (trace,) = ranges_of(
        row("aten::linear", "cpu_op", 10, 30), row("aten::mm", "cpu_op", 15, 20), row("aten::empty", "cpu_op", 16, 2),
        row("aten::add", "cpu_op", 40, 5), row("aten::mm", "cpu_op", 12, 8, 2),
    )  # fmt: skip
    found = phases.of_host([trace], "micro_step", Owners(()), 1)
    times = {entry["name"]: entry["seconds"] for entry in found["names"]}
    assert times == pytest.approx({"aten::linear": 10e-6, "aten::mm": 26e-6, "aten::empty": 2e-6, "aten::add": 5e-6})
    assert found["groups"] == pytest.approx({"matrix": 36e-6, "host": 2e-6, "elementwise": 5e-6})


def test_segments_of_events_that_end_together_or_too_late():
    def event(name: str, begin: float, end: float) -> Event:
        return Event(name, "cpu_op", begin, end)

    found = segments([event("b", 0, 10), event("a", 0, 12), event("late", 8, 13), event("c", 20, 20)])
    assert [(one.event.name, one.begin, one.end) for one in found] == [("b", 0, 8), ("late", 8, 13)]
    assert segments([]) == []


def test_a_real_trace_has_marks_and_operators():
    import torch

    def work() -> None:
        with torch.profiler.record_function("outer"):
            torch.ones(8, 8) @ torch.ones(8, 8)
        torch.ones(8, 8).exp()

    (inside,) = capture(work, cuda=False).ranges("outer")
    names = {event.name for event in inside.operators}
    assert "aten::mm" in names and "aten::exp" not in names and not inside.device


# Owners


def test_kernels_belong_to_the_folders_that_define_them():
    assert {"_row_kernel", "_exp"} <= owners.kernels_in(folders()["linear_cross_entropy"][1])
    assert "product_kernel" in owners.kernels_in(folders()["fp8_mma"][1])
    assert "isoloss::silu_mul_backward" in owners.operators_in(folders()["silu_mul"][1])
    known = Owners(discover())
    assert known.of(Event("_row_kernel", "kernel", 0, 1)) == "linear_cross_entropy"
    assert known.of(Event("void product_kernel<128, 64>(unsigned char const*, int)", "kernel", 0, 1)) == "fp8_mma"
    assert known.of(Event("void at::native::reduce_kernel<512, 1>(at::native::ReduceOp<float>)", "kernel", 0, 1)) is None


def test_kernels_of_one_name_are_told_apart_by_their_operator():
    assert Owners(["silu_mul"]).of(Event("_forward_kernel", "kernel", 0, 1)) == "silu_mul"
    both = Owners(["silu_mul", "rms_norm"])
    event = Event("_forward_kernel", "kernel", 0, 1)
    assert both.of(event, "isoloss::silu_mul") == "silu_mul" and both.of(event, "isoloss::rms_norm") == "rms_norm"
    assert both.of(event) == "rms_norm or silu_mul"
    assert both.of(event, "aten::mm") == "rms_norm or silu_mul"


def test_in_a_graph_they_are_told_apart_by_what_was_learned_of_them_one_by_one():
    both, shapes = Owners(["silu_mul", "rms_norm"]), {"silu_mul": [512, 1, 1], "rms_norm": [64, 1, 1]}
    rows = []
    for number, (name, grid) in enumerate(shapes.items()):
        rows.append(row(f"isoloss::{name}", "cpu_op", 10 * number, 5, External_id=number + 1))
        rows.append(kernel("_forward_kernel", 10 * number + 2, 3, External_id=number + 1, grid=grid))
    both.learn(parse(document(*rows)))
    replayed = [
        kernel("_forward_kernel", 10 * number, 3, correlation=9, grid=grid) for number, grid in enumerate(shapes.values())
    ]
    strange = kernel("_forward_kernel", 50, 3, correlation=9, grid=[7, 7, 7])
    found = phases.of_device(ranges_of(*replayed, strange), "micro_step", both, 1)
    assert {entry["owner"]: entry["group"] for entry in found["names"]} == {
        "silu_mul": "elementwise", "rms_norm": "norm", "rms_norm or silu_mul": "other",
    }  # fmt: skip


def test_a_kernel_of_an_optimization_is_in_its_folders_group():
    assert of_device(kernel("_row_kernel", 1, 2), names=("linear_cross_entropy",))["groups"] == pytest.approx({"loss": 2e-6})


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("void at::native::(anonymous namespace)::nll_loss<float>(float*)", "nll_loss<float>(float*)"),
        ("x" * 300, "x" * 109 + "…"),
        ("gemm", "gemm"),
    ],
)
def test_names_are_shortened(name, short):
    assert phases.shortened(name) == short
