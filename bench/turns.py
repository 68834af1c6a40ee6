"""Which arms are next: what the run has no record of, no other command is at, and there is time for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from bench.budget import Budget
from bench.claims import Claims
from bench.ledger import Ledger
from bench.plan import ArmPlan, combination
from loop.config import Config


class Turns:
    """Iterate for the arms that this command measures, as batches, one after another; an arm is this command's until the
    next batch is asked for.

    arms: in order. width: how many may be gated side by side, those that `beside(plan)` says yes to; the first batch, which
    the reference is at work beside, is of one.
    combine: when the run has a record of each of `arms`, also all that passed in it together, whoever measured them. Of
    commands with the same arms that run at the same time it is thus the last to finish that measures the combination;
    commands with different arms would each measure one, of what had passed by then. Peers come behind it: each is timed in
    turn with the fastest that has passed. Without `combine` they keep their places.
    skip(plan) is called for an arm of `arms` that will not be measured here after all.
    """

    def __init__(
        self, arms: Sequence[ArmPlan], config: Config, combine: bool, ledger: Ledger, claims: Claims, budget: Budget,
        skip: Callable[[ArmPlan], None], beside: Callable[[ArmPlan], bool], width: int = 1,
    ) -> None:  # fmt: skip
        self.in_order = arms
        self.arms, self.peers = ([plan for plan in arms if (plan.role == "peer") is peer] for peer in (False, True))
        self.config, self.combine, self.skip = config, combine, skip
        self.beside, self.width = beside, width
        self.ledger, self.claims, self.budget = ledger, claims, budget

    def __iter__(self) -> Iterator[tuple[ArmPlan, ...]]:
        if not self.combine:
            yield from self._batches(self.in_order)
            return
        yield from self._batches(self.arms)
        together = self._together()
        if together is not None and self._take(together):
            yield from self._hand_out([together])
        yield from self._batches(self.peers)

    def _batches(self, plans: Sequence[ArmPlan]) -> Iterator[tuple[ArmPlan, ...]]:
        batch, width = [], 1
        for plan in plans:
            if batch and not self.beside(plan):
                yield from self._hand_out(batch)
                batch, width = [], self.width
            if self._take(plan):
                batch.append(plan)
            if batch and (len(batch) == width or not self.beside(plan)):
                yield from self._hand_out(batch)
                batch, width = [], self.width
        if batch:
            yield from self._hand_out(batch)

    def _take(self, plan: ArmPlan) -> bool:
        """Whether the arm is this command's from now on."""
        if self.claims.take(plan.name):
            # Asked only now: whoever had it before has recorded it.
            if not self.ledger.has(plan) and self.budget.begin(plan):
                return True
            self.claims.let_go(plan.name)
        self.skip(plan)
        return False

    def _hand_out(self, batch: list[ArmPlan]) -> Iterator[tuple[ArmPlan, ...]]:
        yield tuple(batch)
        for plan in batch:
            self.claims.let_go(plan.name)

    def _unmeasured(self) -> list[str]:
        return [plan.name for plan in self.arms if not self.ledger.has(plan)]

    def _together(self) -> ArmPlan | None:
        """What passed, all of it, once the run has a record of every arm."""
        return None if self._unmeasured() else combination(self.ledger.passed(), self.config)

    def left(self) -> list[str]:
        """Arms, the combination among them, of which the run has no record yet."""
        left = self._unmeasured()
        if self.combine:
            together = self._together()
            left += ["combination"] if left or (together is not None and not self.ledger.has(together)) else []
        return left + [plan.name for plan in self.peers if not self.ledger.has(plan)]
