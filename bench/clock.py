"""Times two arms' processes in turn, so that a machine that drifts drifts under both."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import numpy as np

from abtest.arm import Arm
from abtest.settings import OnProgress
from bench.records import Perf
from bench.timing import ratio_interval


@dataclass(frozen=True)
class TimingConfig:
    """blocks: pairs of samples. micro_batches: micro-steps a sample, over as many batches. warmup: samples thrown away."""

    blocks: int = 12
    micro_batches: int = 2
    warmup: int = 1


def time_arms(reference: Arm, candidate: Arm, settings: TimingConfig, matmul_rate: float, on_progress: OnProgress) -> Perf:
    """Perf of `candidate` with its ratio to `reference`. Both have passed their gate and hold their runs.

    matmul_rate: the measured matrix-product rate of the device, FLOP/s.
    """
    totals, one, other = _in_turn(reference, candidate, settings, on_progress)
    return _perf(candidate, totals, other, ratio_interval(one, other), settings, matmul_rate)


def time_equals(
    reference: Arm, repeat: Arm, settings: TimingConfig, matmul_rate: float, on_progress: OnProgress
) -> tuple[Perf, Perf]:
    """The reference and its second process in turn: Perf of the first, whose ratio is 1 by definition, and of the second."""
    totals, one, other = _in_turn(reference, repeat, settings, on_progress)
    return (
        _perf(reference, totals, one, (1.0, 1.0, 1.0), settings, matmul_rate),
        _perf(repeat, totals, other, ratio_interval(one, other), settings, matmul_rate),
    )


def _in_turn(
    reference: Arm, candidate: Arm, settings: TimingConfig, on_progress: OnProgress
) -> tuple[dict[str, int], np.ndarray, np.ndarray]:
    """What a block processes, and the seconds of every block of either side; who goes first alternates."""
    totals = _prepare(candidate, settings)
    _prepare(reference, settings)
    pairs = []
    for block in range(settings.blocks):
        order = (reference, candidate) if block % 2 == 0 else (candidate, reference)
        seconds = {arm.spec.name: arm.call("time_block")["seconds"] for arm in order}
        pairs.append((seconds[reference.spec.name], seconds[candidate.spec.name]))
        on_progress(candidate.spec.name, "timing", block + 1, settings.blocks)
    one, other = np.array(pairs).T
    return totals, one, other


def _prepare(arm: Arm, settings: TimingConfig) -> dict[str, int]:
    return arm.call("prepare_timing", micro_batches=settings.micro_batches, warmup=settings.warmup)


def _perf(arm: Arm, totals, seconds, ratio: tuple[float, float, float], settings: TimingConfig, matmul_rate: float) -> Perf:
    end = arm.call("finish_timing")
    typical = statistics.median(seconds)
    flops = arm.built["flops"] * totals["positions"]
    return Perf(
        positions_per_s=totals["positions"] / typical,
        real_tokens_per_s=totals["real_tokens"] / typical,
        supervised_tokens_per_s=totals["supervised_tokens"] / typical,
        micro_step_ms=1e3 * typical / settings.micro_batches,
        ratio=ratio[0],
        ratio_low=ratio[1],
        ratio_high=ratio[2],
        blocks=settings.blocks,
        peak_memory_bytes=end["peak_memory_bytes"],
        mfu=flops / typical / matmul_rate,
        launches=end["launches"],
    )
