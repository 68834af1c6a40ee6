"""How `bench.profile` measures a GPU, as far as that can be tried without one: clock, allocator and tracer are made up."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch.nn.modules import module

from bench.profile import measure, memory
from bench.profile.measure import Phase
from bench.profile.trace import Event, Trace, capture

CUDA = SimpleNamespace(type="cuda")


@pytest.fixture
def run(monkeypatch) -> SimpleNamespace:
    """A run on a device that only says that it is one."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    return SimpleNamespace(device=CUDA, enabled=["silu_mul", "rms_norm"])


def phase(name: str, calls: list[str], per: int = 1) -> Phase:
    def note(what: str):
        return lambda: calls.append(f"{what} {name}")

    return Phase(name, note("work"), per, note("prepare"), note("clear"))


def test_a_repetition_is_prepared_timed_and_cleared(run, monkeypatch):
    calls: list[str] = []
    clock = iter((10.0, 12.5))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append("synchronize"))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: calls.append("clock") or next(clock))
    assert measure._once(run, phase("step", calls)) == 2.5
    assert calls == ["prepare step", "synchronize", "clock", "work step", "synchronize", "clock", "clear step"]


@pytest.mark.parametrize("graphs", [False, True])
def test_one_session_traces_all_phases_and_graphs_step_aside_once(run, graphs, monkeypatch):
    calls: list[str] = []
    found = tuple(phase(name, calls, per) for name, per in (("micro_step", 2), ("update", 1), ("step", 1)))
    watched: list[bool] = []
    found = (dataclasses.replace(found[0], work=lambda: watched.append(bool(module._has_any_global_hook()))), *found[1:])
    sessions = []

    def counted(work, cuda) -> Trace:
        sessions.append(cuda)
        return capture(work, cuda=False)

    monkeypatch.setattr(measure, "capture", counted)
    trace = measure._trace(run, found, 2, graphs)
    names = [mark.name for mark in trace.marks]
    expected = [measure.WARM_UP, *(measure.MARK + one.name for one in found for _ in range(2))]
    assert names == expected + [measure.PLAIN] * graphs and sessions == [True]
    assert watched == [False, False, False] + [True] * graphs and not module._has_any_global_hook()
    assert calls.count("work update") == 2 and calls.count("clear step") == 2


def test_a_trace_becomes_phases_of_a_device(run):
    def kernel(name: str, begin: float, end: float, **known) -> Event:
        return Event(name, "kernel", begin, end, **known)

    shape = {"shape": ("[512, 1, 1]",)}
    marks = [
        Event(measure.MARK + "micro_step", "user_annotation", 0.0, 1.0),
        Event(measure.MARK + "update", "user_annotation", 2.0, 2.5),
        Event(measure.MARK + "step", "user_annotation", 3.0, 5.0),
        Event(measure.PLAIN, "user_annotation", 6.0, 9.0),
    ]
    trace = Trace(
        operators=(Event("isoloss::silu_mul", "cpu_op", 6.0, 6.2, external=1),),
        calls=(Event("cudaGraphLaunch", "cuda_runtime", 0.0, 0.1, correlation=4),),
        device=(
            kernel("_forward_kernel", 0.2, 0.6, correlation=4, **shape), kernel("gemm", 0.5, 0.8, correlation=4),
            kernel("gemm", 2.0, 2.5, correlation=5), kernel("gemm", 3.0, 4.5, correlation=6),
            kernel("_forward_kernel", 6.1, 6.4, external=1, **shape),
        ),
        marks=tuple(marks),
    )  # fmt: skip
    found = measure._traced(run, (phase("micro_step", [], 2), phase("update", []), phase("step", [])), trace)
    micro = found["micro_step"]
    assert (micro["traced_wall_s"], micro["busy_s"]) == pytest.approx((0.5, 0.3))
    assert (micro["kernels"], micro["launches"], micro["graph_launches"]) == (1.0, 0.5, 0.5)
    assert micro["groups"] == pytest.approx({"matrix": 0.15, "elementwise": 0.2})  # what was learned without the graph
    assert found["update"]["groups"] == pytest.approx({"optimizer": 0.5}) and found["step"]["busy_s"] == pytest.approx(1.5)


def test_the_allocator_tells_what_layers_keep_and_how_the_head_grows(monkeypatch):
    allocated, resets = iter((1000, 5000, 1300)), []
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: next(allocated))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 9000)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: resets.append(device))
    batch = SimpleNamespace(supervised_tokens=3)

    def head(model, hidden, batch) -> str:
        return "loss"

    def micro_step(run, batch, tokens) -> None:
        assert run.loss_head is not head and module._has_any_global_hook()
        assert run.loss_head("model", "hidden", batch) == "loss"

    optimizer = SimpleNamespace(zero_grad=lambda: None)
    run = SimpleNamespace(device=CUDA, loss_head=head, micro_step=micro_step, optimizer=optimizer)
    kept = memory._by_allocator(run, batch)
    assert run.loss_head is head and resets == [CUDA]
    assert kept({"frozen": {1: 800}, "gradients": {2: 200}}) == {
        "activations": 4000, "loss": 4000, "rest": 300, "counted_by": memory.COUNTED,
    }  # fmt: skip


def test_peaks_of_a_device_are_its_allocators(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 9)
    assert memory.peaks(CUDA) == {"peak": 7, "reserved": 9}


@pytest.mark.parametrize(("stays", "peak"), [(5, 7), (8, 8)])
def test_the_peak_is_at_least_what_stays_with_the_process(stays, peak, monkeypatch):
    reserved = iter((9, stays))  # with what is cached, and without
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: next(reserved))
    emptied: list[int] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    found = memory.peaks(CUDA)
    assert not emptied, "what is measured next would have to allocate anew"
    assert memory.with_graphs(found, CUDA) == {"peak": peak, "reserved": 9} and emptied
    assert memory.with_graphs(found, torch.device("cpu")) == found
