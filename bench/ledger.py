"""What a run has so far: the records under its id, whichever commands made them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.plan import ArmPlan
from bench.records import Record, read
from kernels import registry
from loop.errors import UserError

STATE_OF_THE_CODE = {"git_sha": "commit", "git_dirty": "uncommitted changes"}


class Ledger:
    """The records of run `run_id` in the file `path`, read anew at every question: other commands may append to it.

    recipe: this command's, as `bench.command.recipe_of` gives it.
    """

    def __init__(self, path: Path, run_id: str, recipe: dict[str, Any]) -> None:
        self.path, self.run_id, self.recipe = path, run_id, recipe

    def records(self) -> list[Record]:
        """In the order in which they were appended; empty before the first."""
        return [record for record in read(self.path) if record.run_id == self.run_id] if self.path.exists() else []

    def check(self, environment: dict[str, Any]) -> None:
        """Raises UserError unless the run's records are of this command's recipe and of this state of the code.

        Every command's first record is of its reference, so references alone say what the run's recipe is; an arm may have
        had a recipe of its own.
        """
        for record in self.records():
            for key, words in STATE_OF_THE_CODE.items():
                had, has = record.environment.get(key), environment.get(key)
                if had != has:
                    raise UserError(f"--run {self.run_id}: measured with {words} {had}, but now {has}; take another --run")
            if record.role == "reference" and record.recipe != self.recipe:
                key, had, has = _first_difference(record.recipe, self.recipe)
                raise UserError(f"--run {self.run_id}: measured with {key} = {had}, but now {has}; take another --run")

    def has(self, plan: ArmPlan) -> bool:
        """Whether the arm is recorded; a combination, whether that of the same optimizations is."""
        found = [record for record in self.records() if record.arm == plan.name]
        return any(plan.role != "combination" or record.optimizations == plan.optimizations for record in found)

    def fastest(self) -> Record | None:
        """The record of the fastest arm that is lossless beside the run's own stock and timed; None before the first."""
        return max(self._able("optimization", "combination"), key=lambda record: record.perf.ratio, default=None)

    def passed(self) -> dict[str, float]:
        """Optimizations that are lossless beside the run's own stock and timed, in the registry's order: stock's time over
        theirs."""
        ratios = {record.arm: record.perf.ratio for record in self._able("optimization")}
        return {name: ratios[name] for name in registry.discover() if name in ratios}

    def _able(self, *roles: str) -> list[Record]:
        """The newest record of each arm of these roles, as far as it is lossless, timed and beside the run's own stock."""
        newest = {record.arm: record for record in self.records() if record.role in roles}
        return [
            record for record in newest.values()
            if record.verdict.level.lossless and record.perf is not None and record.recipe == self.recipe
        ]  # fmt: skip


def _first_difference(one: Any, other: Any, prefix: str = "") -> tuple[str, Any, Any]:
    """The dotted key at which two recipes begin to differ, and both values."""
    for key in [*one, *(key for key in other if key not in one)]:
        had, has = one.get(key), other.get(key)
        if had != has:
            if isinstance(had, dict) and isinstance(has, dict):
                return _first_difference(had, has, f"{prefix}{key}.")
            return prefix + key, had, has
    raise ValueError("the recipes are the same")
