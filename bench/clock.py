"""Times the processes of two arms or more in turn, so that a machine that drifts drifts under all of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from abtest.arm import Arm, ArmFailed
from abtest.settings import OnProgress
from bench.records import Perf, Race, Record
from bench.timing import ratio_interval


@dataclass(frozen=True)
class TimingConfig:
    """blocks: pairs of samples. micro_batches: micro-steps a sample, over as many batches. warmup: samples thrown away.

    Where the ratio's interval is wider than `width` times the ratio, timing goes on with twice as many blocks, up to
    `most_blocks`, if those are more: a busy host needs them, a quiet one does not.
    """

    blocks: int = 12
    micro_batches: int = 2
    warmup: int = 1
    most_blocks: int = 0
    width: float = 0.03


UPDATES = 6  # pairs of samples of an update, each with a micro-step before it
RACE = 3  # times as many blocks for two that are both fast: they take no longer than those beside stock
Ratio = tuple[float, float, float]  # and the ends of its 95 % interval
ITSELF: Ratio = (1.0, 1.0, 1.0)  # the reference's


@dataclass
class Lap:
    """One of several arms that were timed in turn. totals: what a block processes. seconds: of every block. ratio: the
    reference's time over this arm's, at the last look. failed: why it did not get to the end."""

    arm: Arm
    totals: dict[str, int] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    ratio: Ratio = ITSELF
    failed: str | None = None


def time_arms(
    reference: Arm, candidate: Arm, settings: TimingConfig, matmul_rate: float, on_progress: OnProgress, updates: bool = True
) -> Perf:
    """Perf of `candidate` with its ratio to `reference`. Both have passed their gate and hold their runs.

    matmul_rate: the measured matrix-product rate of the device, FLOP/s. updates: the candidate's are its own, and timed.
    """
    totals, _, other, ratio = _in_turn(reference, candidate, settings, on_progress)
    perf = _perf(candidate, totals, other, ratio, settings, matmul_rate)
    if not updates:
        return perf
    _, milliseconds, ratio = _time_updates(reference, candidate)
    return _with_update(perf, milliseconds, ratio)


def time_equals(
    reference: Arm, repeat: Arm, settings: TimingConfig, matmul_rate: float, on_progress: OnProgress
) -> tuple[Perf, Perf]:
    """The reference and its second process in turn: Perf of the first, whose ratio is 1 by definition, and of the second."""
    totals, one, other, ratio = _in_turn(reference, repeat, settings, on_progress)
    first = _perf(reference, totals, one, ITSELF, settings, matmul_rate)
    second = _perf(repeat, totals, other, ratio, settings, matmul_rate)
    before, after, ratio = _time_updates(reference, repeat)
    return _with_update(first, before, ITSELF), _with_update(second, after, ratio)


def _time_updates(reference: Arm, candidate: Arm) -> tuple[float, float, Ratio]:
    """The median update of either, ms, timed in turn, and their ratio."""
    laps = [Lap(reference), Lap(candidate)]
    for lap in laps:
        lap.arm.call("prepare_updates")
    for turn in range(UPDATES):
        for lap in _order(laps, turn):
            lap.seconds.append(lap.arm.call("time_update")["seconds"])
    for lap in laps:
        lap.arm.call("finish_updates")
    before, after = (1e3 * statistics.median(lap.seconds) for lap in laps)
    return before, after, ratio_interval(*(np.array(lap.seconds) for lap in laps))


def _with_update(perf: Perf, milliseconds: float, ratio: Ratio) -> Perf:
    middle, low, high = ratio
    return replace(
        perf, update_ms=milliseconds, update_ratio=middle, update_ratio_low=low, update_ratio_high=high, update_in_step=True
    )


def race(peer: Arm, other: Arm, record: Record, settings: TimingConfig) -> Race:
    """The peer's time over that of the arm of `record`, which runs in `other`. Raises ArmFailed."""
    often = replace(settings, blocks=RACE * settings.blocks, most_blocks=RACE * settings.most_blocks)
    _, one, two, ratio = _in_turn(peer, other, often, lambda arm, phase, done, total: None)
    return Race(record.arm, record.optimizations, *ratio, len(one), *(_micro_step_ms(side, settings) for side in (one, two)))


def _in_turn(
    reference: Arm, candidate: Arm, settings: TimingConfig, on_progress: OnProgress
) -> tuple[dict[str, int], list[float], list[float], Ratio]:
    """What a block processes, the seconds of every block of either side, and their ratio. Raises ArmFailed."""

    def narrow(ratios: list[Ratio]) -> bool:
        return all(high - low <= settings.width * middle for middle, low, high in ratios)

    most = max(settings.most_blocks, settings.blocks)
    one, (other,) = time_round_robin(reference, [candidate], settings, most, narrow, on_progress, reference_first=False)
    reference.call("give_back")  # it waits now, perhaps beside arms that need the memory
    if other.failed is not None:
        raise ArmFailed(other.failed)
    return other.totals, one.seconds, other.seconds, other.ratio


def time_round_robin(
    reference: Arm, arms: Sequence[Arm], settings: TimingConfig, most_blocks: int, enough: Callable[[list[Ratio]], bool],
    on_progress: OnProgress, reference_first: bool = True,
) -> tuple[Lap, list[Lap]]:  # fmt: skip
    """The reference and each of `arms`, timed in turn; no two of them have the same name. reference_first: gets ready first.

    Their ratios are looked at after `settings.blocks` blocks and whenever there are twice as many, until `enough(ratios)` or
    `most_blocks` is reached: few looks, because each is one more chance for noise to look like a gain. An arm that fails
    leaves the turns. Raises ArmFailed when the reference does.
    """
    laps = [Lap(reference), *map(Lap, arms)]
    # What an arm works in stays with it between blocks, and graphs need most while they are captured.
    for lap in laps if reference_first else (*laps[1:], laps[0]):
        _guarded(lap, laps[0], lambda lap: lap.totals.update(_prepare(lap.arm, settings)))
    until = settings.blocks
    while True:
        for block in range(len(laps[0].seconds), until):
            for lap in _order([lap for lap in laps if lap.failed is None], block):
                _guarded(lap, laps[0], lambda lap: lap.seconds.append(lap.arm.call("time_block")["seconds"]))
            on_progress(arms[0].spec.name, "timing", block + 1, until)
        running = [lap for lap in laps[1:] if lap.failed is None]
        for lap in running:
            lap.ratio = ratio_interval(np.array(laps[0].seconds), np.array(lap.seconds))
        if not running or until >= most_blocks or enough([lap.ratio for lap in running]):
            return laps[0], laps[1:]
        until = min(2 * until, most_blocks)


def _guarded(lap: Lap, reference: Lap, step: Callable[[Lap], None]) -> None:
    try:
        step(lap)
    except ArmFailed as error:
        if lap is reference:
            raise
        lap.failed = str(error)


def _order(laps: list[Lap], block: int) -> list[Lap]:
    """Everybody is first in turn, and comes behind another neighbour in every second block."""
    step = 1 if block % 2 == 0 else -1
    return [laps[(block + step * place) % len(laps)] for place in range(len(laps))]


def _prepare(arm: Arm, settings: TimingConfig) -> dict[str, int]:
    return arm.call("prepare_timing", micro_batches=settings.micro_batches, warmup=settings.warmup)


def _micro_step_ms(seconds: Sequence[float], settings: TimingConfig) -> float:
    """The median, of blocks that took so long."""
    return 1e3 * statistics.median(seconds) / settings.micro_batches


def _perf(arm: Arm, totals, seconds, ratio: Ratio, settings: TimingConfig, matmul_rate: float) -> Perf:
    end = arm.call("finish_timing")
    typical = statistics.median(seconds)
    flops = arm.built["flops"] * totals["positions"]
    return Perf(
        positions_per_s=totals["positions"] / typical,
        real_tokens_per_s=totals["real_tokens"] / typical,
        supervised_tokens_per_s=totals["supervised_tokens"] / typical,
        micro_step_ms=_micro_step_ms(seconds, settings),
        ratio=ratio[0],
        ratio_low=ratio[1],
        ratio_high=ratio[2],
        blocks=len(seconds),
        peak_memory_bytes=end["peak_memory_bytes"],
        mfu=flops / typical / matmul_rate,
        launches=end["launches"],
    )
