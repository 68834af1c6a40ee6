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
    "gradient error ratio, worst small tensor": (2, "RHO_FEW"),
    "gradient error ratio, worst row": (2, "ROW"),
    "gradient scale error": (2, "ALPHA"),
    "overfit gradient error ratio, worst parameter": (2, "RHO_OVERFIT"),
    "overfit gradient error ratio, geometric mean": (2, "GEOMEAN_OVERFIT"),
    "overfit gradient error ratio, worst small tensor": (2, "RHO_FEW_OVERFIT"),
    "update beside fp64 AdamW": (3, "UPDATE"),
    "loss, worst step (sigma)": (4, "LOSS_SIGMA"),
    "loss, sum over steps (sigma)": (4, "LOSS_SUM_SIGMA"),
    "update size, worst step": (4, "STEP_SIZE"),
}
NAMED = {
    "everything was measured": 1,
    "the reference repeats itself bitwise": 1,
    "the candidate is switched on": 1,
    "switching it on changed the run": 1,
    "gradients complete and finite": 1,
    "share of parameters with a gradient": 1,
    "the reference's update is right": 1,
    "weights move": 1,
    "the candidate did work of its own": 1,
    "every step replays as many graphs": 1,
    "the tripwire turns the gate red": 1,
    "update complete": 3,
    "every step moves every tensor": 4,
    "inputs unmodified": 5,
    "no gradient on what does not train": 5,
    "a micro-step without dropout draws no random numbers": 5,
    "the same batch gives the same gradients after another one": 5,
    "other tokens give other gradients": 5,
    "other labels give other gradients": 5,
    "other boundaries give other gradients": 5,
    "other weights give other gradients": 5,
    "gradients follow weights that change": 5,
    "nothing depends on uninitialised memory": 5,
    "a second backward gives the same gradients": 5,
    "editing a document leaves the loss of the others unchanged": 5,
    "editing a document leaves the input gradient of the others unchanged": 5,
    "editing documents outside the loss leaves the micro-step unchanged": 5,
    "dropout: the same seed gives the same bits": 5,
    "dropout: another seed gives another mask": 5,
    "dropout: every micro-step draws a new mask": 5,
    "dropout: on average nothing is lost": 5,
    "dropout: backward uses forward's mask": 5,
    "dropout: each adapter's backward is the adjoint of its forward": 5,
    "runs to the end": 0,
    "bits of every step": 0,
    "op checks that fail": 0,
}
# (how a name begins, how it ends, part) of checks whose names vary: with a kind of input, a finding, a number of repeats.
FAMILIES = (("same ", " in both arms", 1), ("reference: ", "", 1), ("", " repeats have the same bits", 5))
ORDER = [*NUMBERS, *NAMED]


def is_known(check: str) -> bool:
    """Whether the tables have a place for a check of this name."""
    return check in NUMBERS or check in NAMED or any(check.startswith(a) and check.endswith(z) for a, z, _ in FAMILIES)


def part_of(check: str) -> int:
    """A key of `PARTS`. What has no place in the tables, as in records of another version, belongs to no part."""
    if check in NUMBERS:
        return NUMBERS[check][0]
    if check in NAMED:
        return NAMED[check]
    return next((part for start, end, part in FAMILIES if check.startswith(start) and check.endswith(end)), 0)


def limit_of(check: str, limits: Mapping[str, float]) -> float | None:
    """The limit of a check with a number, out of a run's facts: filed there under the check's name or its limit's."""
    if check in limits:
        return limits[check]
    return limits.get(NUMBERS[check][1]) if check in NUMBERS else None


def rank(check: str) -> tuple[int, int, str]:
    """Sorts checks by part, then as the gate makes them, then by name."""
    part = part_of(check)
    return part or len(PARTS), ORDER.index(check) if check in ORDER else len(ORDER), check
