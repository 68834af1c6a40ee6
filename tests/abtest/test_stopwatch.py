"""What timing says of a GPU's memory, as far as that can be tried without one: the allocator is made up."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from abtest import stopwatch
from abtest.stopwatch import Stopwatch

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
