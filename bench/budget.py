"""How much fits into a command that must end in time."""

from __future__ import annotations

import time

from bench.plan import ArmPlan


class Budget:
    """minutes: from `began`, a reading of time.monotonic(), until the last arm should have ended; None: no limit.

    An arm is expected to take as long as the longest so far; one with a stock of its own takes that stock's time, too. The
    first one begins whatever the time is, so that every command gets further.
    """

    def __init__(self, minutes: float | None, began: float) -> None:
        self.end = None if minutes is None else began + 60 * minutes
        self.stock = 0.0
        self.longest = {False: 0.0, True: 0.0}  # seconds, by whether the arm has a stock of its own
        self.started = False

    def note_stock(self, seconds: float) -> None:
        """What preparing and timing the reference took."""
        self.stock = seconds

    def note(self, plan: ArmPlan, seconds: float) -> None:
        """What an arm took, all of it."""
        self.longest[plan.own_stock] = max(self.longest[plan.own_stock], seconds)

    def estimate(self, plan: ArmPlan) -> float:
        """Seconds that the arm will probably take."""
        seconds = self.longest[False]
        return max(self.longest[True], seconds + self.stock) if plan.own_stock else seconds

    def begin(self, plan: ArmPlan) -> bool:
        """Whether there is time for the arm. One that can't run here takes none."""
        if plan.missing is not None:
            return True
        fits = self.end is None or not self.started or time.monotonic() + self.estimate(plan) <= self.end
        self.started = self.started or fits
        return fits
