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
def test_an_update_is_made_of_a_micro_step_s_gradients_time_and_again(dtype, enable):
    watch = Stopwatch()
    watch.run, watch.dataset = build(dataclasses.replace(CONFIG, dtype=dtype), enable)
    watch.loaded = "a state"
    optimizer = watch.run.optimizer

    def weights() -> dict[str, torch.Tensor]:
        return {name: value.detach().clone() for name, value in trainable(watch.run.model).items()}

    def counts() -> set[float]:
        return {float(own["step"]) for own in optimizer.adamw.state.values()}

    watch.prepare_timing(1, 1)
    before = weights()
    assert not counts() and watch.prepare_updates() == {} and counts() == {1}, "it warms up"
    gradients = [gradient for _, gradient in watch.kept]
    assert any(gradient.abs().sum() > 0 for gradient in gradients)
    for turn in (2, 3):
        assert watch.time_update()["seconds"] > 0 and counts() == {turn}
    after = weights()
    assert any(not torch.equal(before[name], after[name]) for name in before) and watch.loaded is None
    assert watch.finish_updates() == {} and not watch.kept
    assert all(gradient is None for gradient in optimizer.gradients().values())
    assert watch.time_block()["seconds"] > 0
