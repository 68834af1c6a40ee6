"""What timing says of a GPU's memory, as far as that can be tried without one: the allocator is made up."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from tiny import CONFIG

from abtest import stopwatch
from abtest.stopwatch import Stopwatch
from loop.model import trainable
from loop.training import build

CUDA = SimpleNamespace(type="cuda")


class Allocator:
    """As PyTorch's: `reserved` is what tensors and graphs hold, and `cached` besides until the cache is emptied."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, peak: int, reserved: int, cached: int) -> None:
        self.peak, self.reserved, self.cached = peak, reserved, cached
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.peak)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: self.reserved + self.cached)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: setattr(self, "cached", 0))


@pytest.mark.parametrize(("reserved", "expected"), [(300, 1000), (4000, 4000)], ids=["tensors", "pools of graphs"])
def test_peak_memory_counts_what_graphs_hold_but_not_what_is_cached(reserved, expected, monkeypatch):
    allocator = Allocator(monkeypatch, peak=1000, reserved=reserved, cached=1 << 30)

    def census(work) -> tuple[int, dict[str, int]]:
        allocator.peak = 1 << 40  # the profiler's own is nobody's
        work()
        return 7, {"kernel": 7}

    monkeypatch.setattr(stopwatch, "count_launches", census)
    calls: list[int] = []
    watch = Stopwatch()
    watch.batches = ["a batch"]
    optimizer = SimpleNamespace(zero_grad=lambda: calls.append(0))
    watch.run = SimpleNamespace(device=CUDA, optimizer=optimizer, micro_step=lambda run, batch, tokens: calls.append(tokens))
    assert watch.finish_timing() == {"peak_memory_bytes": expected, "launches": 7, "kernels": {"kernel": 7}}
    assert calls == [1, 0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("enable", [(), ("static_lora",)])
def test_an_update_has_a_micro_step_of_its_own_time_and_again(dtype, enable):
    watch = Stopwatch()
    watch.run, watch.dataset = build(dataclasses.replace(CONFIG, dtype=dtype), enable)
    watch.loaded = "a state"
    optimizer = watch.run.optimizer

    def weights() -> dict[str, torch.Tensor]:
        return {name: value.detach().clone() for name, value in trainable(watch.run.model).items()}

    def counts() -> set[float]:
        return {float(own["step"]) for own in optimizer.adamw.state.values()}

    watch.prepare_timing(1, 1)
    before, micro_step, steps = weights(), watch.run.micro_step, []
    watch.run.micro_step = lambda *arguments: steps.append(counts()) or micro_step(*arguments)
    assert not counts() and watch.prepare_updates() == {} and counts() == {1}, "it warms up"
    for turn in (2, 3):
        assert watch.time_update()["seconds"] > 0 and counts() == {turn}
    assert steps == [set(), {1}, {2}], "each update has gradients of its own"
    after = weights()
    assert any(not torch.equal(before[name], after[name]) for name in before) and watch.loaded is None
    assert watch.finish_updates() == {}
    assert all(gradient is None for gradient in optimizer.gradients().values())
    assert watch.time_block()["seconds"] > 0


def test_on_a_gpu_an_update_is_timed_from_the_end_of_a_micro_step_by_events(monkeypatch):
    """The host is not waited for between the two: what it does while the device is at the micro-step costs nothing."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("event")

        def synchronize(self) -> None:
            log.append("waits")

        def elapsed_time(self, other: Event) -> float:
            return 1.25

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("waits"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: log.append("gives back"))
    watch = Stopwatch()
    watch.batches = [SimpleNamespace(supervised_tokens=5), "another"]
    optimizer = SimpleNamespace(zero_grad=lambda: log.append("clears"), step=lambda step: log.append(f"update {step}"))
    watch.run = SimpleNamespace(
        device=CUDA, optimizer=optimizer, micro_step=lambda run, batch, tokens: log.append(f"micro-step {tokens}")
    )
    assert watch.time_update() == {"seconds": 0.00125}
    assert log == ["clears", "micro-step 5", "event", "update 0", "event", "waits"]
    assert watch.finish_updates() == {} and log[-1] == "gives back"
