"""Which arm is next: what the run has no record of, no other command is at, and there is time for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from bench.budget import Budget
from bench.claims import Claims
from bench.ledger import Ledger
from bench.plan import ArmPlan, combination
from loop.config import Config


class Turns:
    """Iterate for the arms that this command measures, one after another; an arm is this command's until the next is asked
    for.

    arms: in order. combine: at last, when the run has a record of each of `arms`, also all that passed in it together,
    whoever measured them. Of commands with the same arms that run at the same time it is thus the last to finish that
    measures the combination; commands with different arms would each measure one, of what had passed by then.
    skip(plan) is called for an arm of `arms` that will not be measured here after all.
    """

    def __init__(
        self, arms: Sequence[ArmPlan], config: Config, combine: bool, ledger: Ledger, claims: Claims, budget: Budget,
        skip: Callable[[ArmPlan], None],
    ) -> None:  # fmt: skip
        self.arms, self.config, self.combine, self.skip = arms, config, combine, skip
        self.ledger, self.claims, self.budget = ledger, claims, budget

    def __iter__(self) -> Iterator[ArmPlan]:
        for plan in self.arms:
            yield from self._turn(plan)
        if self.combine and not self._unmeasured():
            together = self._together()
            if together is not None:
                yield from self._turn(together)

    def _turn(self, plan: ArmPlan) -> Iterator[ArmPlan]:
        if self.claims.take(plan.name):
            # Asked only now: whoever had it before has recorded it.
            mine = not self.ledger.has(plan) and self.budget.begin(plan)
            if mine:
                yield plan
            self.claims.let_go(plan.name)
            if mine:
                return
        self.skip(plan)

    def _unmeasured(self) -> list[str]:
        return [plan.name for plan in self.arms if not self.ledger.has(plan)]

    def _together(self) -> ArmPlan | None:
        return combination(self.ledger.passed(), self.config)

    def left(self) -> list[str]:
        """Arms, the combination among them, of which the run has no record yet."""
        left = self._unmeasured()
        if self.combine:
            together = None if left else self._together()
            left += ["combination"] if left or (together is not None and not self.ledger.has(together)) else []
        return left
