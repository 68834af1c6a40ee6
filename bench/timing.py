"""Times two functions in turn, so that a machine that drifts drifts under both.

On CUDA each sample is device time between two events, with a cold L2: a buffer twice its size is written before. The
writing also lasts longer than the host needs to launch the function, so the sample holds no launch gaps.
On a CPU each sample is wall time; its caches are as warm as the previous call left them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

L2_FALLBACK_BYTES = 128 << 20  # where the driver does not tell
RESAMPLES = 2000


@dataclass(frozen=True)
class PairTiming:
    """Paired samples of both sides, microseconds. ratio: reference over candidate (above 1 is faster), the median of the
    pairs' ratios; ratio_low and ratio_high bound its 95 % bootstrap interval."""

    reference_samples_us: tuple[float, ...]
    candidate_samples_us: tuple[float, ...]
    ratio: float
    ratio_low: float
    ratio_high: float

    @property
    def reference_us(self) -> float:
        return float(np.median(self.reference_samples_us))

    @property
    def candidate_us(self) -> float:
        return float(np.median(self.candidate_samples_us))


def time_pair(
    reference: Callable[[], object],
    candidate: Callable[[], object],
    device: torch.device,
    samples: int = 50,
    warmup: int = 5,
    seed: int = 0,
) -> PairTiming:
    """Times `samples` pairs after `warmup` calls of each side; which side goes first alternates.

    Raises ValueError for fewer than two samples.
    """
    if samples < 2:
        raise ValueError(f"{samples} samples have no interval; take at least 2")
    timer = CudaTimer(device) if device.type == "cuda" else CpuTimer()
    for function in (reference, candidate):
        timer.prepare(function, warmup)
    pairs = []
    for index in range(samples):
        if index % 2:
            after, before = timer.sample(candidate), timer.sample(reference)
        else:
            before, after = timer.sample(reference), timer.sample(candidate)
        pairs.append((before, after))
    one, other = np.array(pairs).T
    ratio, low, high = ratio_interval(one, other, seed)
    return PairTiming(tuple(one.tolist()), tuple(other.tolist()), ratio, low, high)


def ratio_interval(reference: np.ndarray, candidate: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Median of the paired ratios reference / candidate [N], and its 95 % interval by bootstrap over the pairs."""
    ratios = np.asarray(reference, dtype=np.float64) / np.asarray(candidate, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(0, len(ratios), size=(RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(ratios[picks], axis=1), [2.5, 97.5])
    return float(np.median(ratios)), float(low), float(high)


def median_us(function: Callable[[], object], device: torch.device, samples: int) -> float:
    """The median of `samples` calls of one function, microseconds."""
    timer = CudaTimer(device) if device.type == "cuda" else CpuTimer()
    timer.prepare(function, 3)
    return float(np.median([timer.sample(function) for _ in range(samples)]))


class CpuTimer:
    """Wall time of one call, microseconds."""

    def prepare(self, function: Callable[[], object], warmup: int) -> None:
        for _ in range(warmup):
            function()

    def sample(self, function: Callable[[], object]) -> float:
        start = time.perf_counter_ns()
        function()
        return (time.perf_counter_ns() - start) / 1e3


class CudaTimer:
    """Device time of one call with a cold L2, microseconds."""

    def __init__(self, device: torch.device):
        self.device = device
        l2_bytes = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or L2_FALLBACK_BYTES
        self.flush_buffer = torch.empty(2 * l2_bytes, dtype=torch.uint8, device=device)
        self.flush_us = self._duration_of_flushes(20) / 20
        self.host_us = 0.0  # the longest that launching any function took
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def _duration_of_flushes(self, count: int) -> float:
        self.flush_buffer.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(self.device):
            start.record()
            for _ in range(count):
                self.flush_buffer.zero_()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) * 1e3

    def prepare(self, function: Callable[[], object], warmup: int) -> None:
        """Warms up, then measures how long the host takes to launch `function`, so that `sample` can hide it."""
        for _ in range(warmup):
            function()
        for _ in range(3):
            torch.cuda.synchronize(self.device)
            begin = time.perf_counter_ns()
            function()
            self.host_us = max(self.host_us, (time.perf_counter_ns() - begin) / 1e3)
        torch.cuda.synchronize(self.device)

    def sample(self, function: Callable[[], object]) -> float:
        flushes = 1 + int(2 * self.host_us / self.flush_us)
        with torch.cuda.device(self.device):
            for _ in range(flushes):
                self.flush_buffer.zero_()
            self.start.record()
            function()
            self.end.record()
            self.end.synchronize()
        return self.start.elapsed_time(self.end) * 1e3
