"""Between strategy and processes: what was timed before is not timed again, and what is timed is kept at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from bench.report.text import ratio
from bench.search.arms import SearchArms, in_words
from bench.search.strategy import OutOfTime
from bench.search.trials import LEAVE_ONE_OUT, Set, Trial, TrialLedger


class Conductor:
    """A `bench.search.strategy.Clock`. until: a reading of time.monotonic() after which nothing should still be timed, None:
    no limit. A batch is expected to take as long as the longest so far; the first begins whatever the time is."""

    def __init__(
        self, arms: SearchArms, ledger: TrialLedger, say: Callable[[str], None], until: float | None = None
    ) -> None:
        self.arms, self.ledger, self.say, self.until = arms, ledger, say, until
        self.longest: float | None = None  # seconds

    def measure(self, stage: str, number: int, against: Set, sets: Sequence[Set]) -> list[Trial]:
        left = [one for one in sets if (stage, against, one) not in self.ledger.known]
        if left:
            if self.longest is not None and self.until is not None and time.monotonic() + self.longest > self.until:
                raise OutOfTime
            self._time(stage, number, against, left)
        return [self.ledger.known[stage, against, one] for one in sets]

    def _time(self, stage: str, number: int, against: Set, sets: Sequence[Set]) -> None:
        began = time.monotonic()
        self.say(f"round {number}, {stage}: {', '.join(_change(against, one) for one in sets)}; now on: {in_words(against)}")
        timings = self.arms.time(against, sets, thorough=stage == LEAVE_ONE_OUT)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        for one, timing in zip(sets, timings, strict=True):
            trial = self.ledger.keep(stage, number, against, one, timing, now)
            self.say(f"  {_change(against, one)}: {ratio(trial.timing) if timing.why is None else timing.why}")
        self.longest = max(self.longest or 0.0, time.monotonic() - began)

    def take(self, chosen: Set) -> None:
        self.say(f"  best so far: {in_words(chosen)}")
        self.arms.take(chosen)

    def renew(self) -> None:
        self.arms.renew()


def _change(against: Set, optimizations: Set) -> str:
    """What makes another set of it: "+ silu_mul", "− static_lora + lora_matmul"."""
    gone = [f"− {name}" for name in against if name not in optimizations]
    return " ".join((*gone, *(f"+ {name}" for name in optimizations if name not in against)))
