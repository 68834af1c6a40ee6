"""The processes behind a search: the best set's, which goes on living, and those that are timed beside it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

from abtest.arm import OUT_OF_MEMORY, Arm, ArmFailed, ArmSpec
from abtest.settings import OnProgress
from bench.clock import Lap, Ratio, TimingConfig, time_round_robin
from bench.search.trials import Set, Timing
from loop.config import Config
from loop.errors import UserError


def clear_winner(ratios: list[Ratio]) -> bool:
    """Whether the fastest is clearly faster than the reference, or all are clearly slower."""
    best = max(ratios)
    return best[1] > 1 or all(high < 1 for _, _, high in ratios)


def all_clear(ratios: list[Ratio]) -> bool:
    """Whether each is clearly faster or slower than the reference."""
    return all(low > 1 or high < 1 for _, low, high in ratios)


class SearchArms:
    """Use as a context manager. start(spec): a process for an arm. device_memory: whether peak memory is the device's, so
    that it may be compared."""

    def __init__(
        self, start: Callable[[ArmSpec], Arm], config: Config, timing: TimingConfig, most_blocks: int, device_memory: bool,
        on_progress: OnProgress,
    ) -> None:  # fmt: skip
        self.start, self.config, self.timing, self.most_blocks = start, config, timing, most_blocks
        self.device_memory, self.on_progress = device_memory, on_progress
        self.best: tuple[Set, Arm] | None = None
        self.batch: dict[Set, Arm] = {}
        self.started = 0
        self.room: int | None = None  # how many sets' processes had memory beside the best set's; None: all so far

    def __enter__(self) -> SearchArms:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end(kind, *self.batch.values(), *([self.best[1]] if self.best is not None else ()))

    def _end(self, kind: type[BaseException] | None, *arms: Arm) -> None:
        """All of them at the same time: a process with a GPU takes a while to end."""
        if arms:
            with ThreadPoolExecutor(len(arms)) as pool:
                list(pool.map(lambda arm: arm.__exit__(kind, None, None), arms))

    def renew(self) -> None:
        """Ends the best set's process; the next comparison starts another."""
        if self.best is not None:
            self._end(None, self.best[1])
            self.best = None

    def take(self, chosen: Set) -> None:
        """The process of `chosen` lives on as the best set's; if it is gone, the next comparison starts another."""
        self.renew()
        arm = self.batch.pop(chosen, None)
        if arm is not None:
            self.best = (chosen, arm)

    def time(self, against: Set, sets: Sequence[Set], thorough: bool) -> list[Timing]:
        """Each of `sets` beside `against`. thorough: until each is clear, and with memory and launches; else until the
        fastest is. What found too little memory beside others, or left too little, is timed once more beside fewer, and from
        then on no more processes are at work than had room. Raises UserError where `against` does not run at all."""
        timings: dict[Set, Timing] = {}
        left = list(sets)
        while left:
            room = self.room or len(left)
            now, left = left[:room], left[room:]
            try:
                timings |= self._together(against, now, thorough)
                short = [one for one in now if OUT_OF_MEMORY in (timings[one].why or "")]
            except ArmFailed as error:
                self.renew()
                timings |= {one: Timing(why=f"what it is compared with ended beside it: {error}") for one in now}
                short = now
            if short and len(now) > 1:
                self.room = max(1, len(now) - len(short) if len(short) < len(now) else len(now) // 2)
                left = short + left
        return [timings[one] for one in sets]

    def _together(self, against: Set, sets: Sequence[Set], thorough: bool) -> dict[Set, Timing]:
        self._end(None, *self.batch.values())
        self.batch = {}
        if self.best is None or self.best[0] != against:
            self.renew()
            self.best = (against, self._arm(against))
        reference = self.best[1]
        for one in sets:
            self.batch[one] = self._arm(one)
        arms = [reference, *self.batch.values()]
        with ThreadPoolExecutor(len(arms)) as pool:
            why, *obstacles = pool.map(_obstacle, arms)
        if why is not None:
            if len(sets) > 1:
                raise ArmFailed(why)
            raise UserError(f"{in_words(against)}, which other sets are to be compared with, does not run: {why}")
        ready = {one: self.batch[one] for one, obstacle in zip(sets, obstacles, strict=True) if obstacle is None}
        timed = self._timed(reference, ready, thorough) if ready else {}
        return {one: timed.get(one) or Timing(why=obstacle) for one, obstacle in zip(sets, obstacles, strict=True)}

    def _timed(self, reference: Arm, ready: dict[Set, Arm], thorough: bool) -> dict[Set, Timing]:
        first, laps = time_round_robin(
            reference, list(ready.values()), self.timing, self.most_blocks, all_clear if thorough else clear_winner,
            self.on_progress,
        )  # fmt: skip
        count = thorough and self.device_memory
        peak = reference.call("finish_timing")["peak_memory_bytes"] if count else None
        return {one: self._timing(lap, first, peak) for one, lap in zip(ready, laps, strict=True)}

    def _timing(self, lap: Lap, first: Lap, peak: int | None) -> Timing:
        if lap.failed is not None:
            return Timing(why=lap.failed)
        try:
            end = lap.arm.call("finish_timing") if peak is not None else {}
        except ArmFailed as error:
            return Timing(why=str(error))
        typical = statistics.median(lap.seconds)
        return Timing(
            *lap.ratio,
            blocks=len(lap.seconds),
            micro_step_ms=1e3 * typical / self.timing.micro_batches,
            against_micro_step_ms=1e3 * statistics.median(first.seconds) / self.timing.micro_batches,
            real_tokens_per_s=lap.totals["real_tokens"] / typical,
            peak_memory_bytes=end.get("peak_memory_bytes"),
            against_peak_memory_bytes=peak,
            launches=end.get("launches"),
        )

    def _arm(self, optimizations: Set) -> Arm:
        self.started += 1  # names are those of log files, too
        return self.start(ArmSpec(f"trial-{self.started}", self.config, optimizations))


def in_words(optimizations: Set) -> str:
    return " + ".join(optimizations) or "stock"


def _obstacle(arm: Arm) -> str | None:
    """Builds an arm if that is not done yet, and says why it is not what it should be, or None."""
    try:
        build = getattr(arm, "built", None) or arm.build()
    except ArmFailed as error:
        return str(error)
    return "; ".join(f"{name}: {reason}" for name, reason in build["refused"].items()) or None
