"""Which part of the gate a check belongs to, and which limit it has, by its name: raw outcomes hold names alone."""

from __future__ import annotations

from collections.abc import Mapping

from abtest.verdict import PARTS

# name: (part, name of its limit in abtest.limits). Checks with a number that has to stay below a limit.
NUMBERS = {
    "reference packed as unpacked": (1, "PACKING"),
    "oracle's delta rule as the recurrence": (1, "RECURRENCE"),
    "reference close to the oracle": (1, "REFERENCE_ERROR"),
    "gradient error ratio, worst parameter": (2, "RHO"),
    "gradient error ratio, geometric mean": (2, "GEOMEAN"),
    "gradient error ratio, worst row": (2, "ROW"),
    "gradient scale error": (2, "ALPHA"),
    "overfit gradient error ratio, worst parameter": (2, "RHO_OVERFIT"),
    "overfit gradient error ratio, geometric mean": (2, "GEOMEAN_OVERFIT"),
    "update beside fp64 AdamW": (3, "UPDATE"),
    "loss, worst step (sigma)": (4, "LOSS_SIGMA"),
    "loss, sum over steps (sigma)": (4, "LOSS_SUM_SIGMA"),
}
NAMED = {
    "the reference repeats itself bitwise": 1,
    "the candidate is switched on": 1,
    "switching it on changed the run": 1,
    "gradients complete and finite": 1,
    "share of parameters with a gradient": 1,
    "the reference's update is right": 1,
    "weights move": 1,
    "the candidate did work of its own": 1,
    "graph replays are whole micro-steps": 1,
    "the tripwire turns the gate red": 1,
    "update complete": 3,
    "runs to the end": 0,
    "bits of every step": 0,
    "op checks that fail": 0,
}
PREFLIGHT = ("reference: ",)  # how the names of other preflight checks begin
ORDER = [*NUMBERS, *NAMED]


def part_of(check: str) -> int:
    """A key of `PARTS`. What has no place in the tables is a finding of exact structure, whose names are its own."""
    if check in NUMBERS:
        return NUMBERS[check][0]
    if check in NAMED:
        return NAMED[check]
    inputs = check.startswith("same ") and check.endswith(" in both arms")
    return 1 if inputs or check.startswith(PREFLIGHT) else 5


def limit_of(check: str, limits: Mapping[str, float]) -> float | None:
    """The limit of a check with a number, out of a run's facts: filed there under the check's name or its limit's."""
    if check in limits:
        return limits[check]
    return limits.get(NUMBERS[check][1]) if check in NUMBERS else None


def rank(check: str) -> tuple[int, int, str]:
    """Sorts checks by part, then as the gate makes them, then by name."""
    part = part_of(check)
    return part or len(PARTS), ORDER.index(check) if check in ORDER else len(ORDER), check
