"""Is an arm lossless against the reference? Pure functions over what the arms reported.

1 preflight (anything wrong is INVALID), 2 gradients beside an oracle's, 3 one optimizer update beside fp64 AdamW, 4 the loss
of the free run beside the noise of kicked references, 5 exact structure. BITWISE asks for equal bits at every step and
probe, and for 3 and 5; ROUNDING for 2 to 5. The limits are in `abtest.limits`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from abtest.evidence import Evidence, same_bits
from abtest.gradients import Comparison
from abtest.limits import (
    ALPHA,
    GEOMEAN,
    GEOMEAN_OVERFIT,
    LOSS_SIGMA,
    LOSS_SUM_SIGMA,
    RHO,
    RHO_FEW,
    RHO_FEW_OVERFIT,
    RHO_OVERFIT,
    ROW,
    STEP_SIZE,
)
from abtest.preflight import incomplete, preflight, same_inputs
from abtest.states import OVERFIT
from abtest.verdict import Check, Level, Verdict
from kernels.contract import Exactness


def loss_checks(reference: Sequence[float], candidate: Sequence[float], sigma: Sequence[float]) -> list[Check]:
    """Free-running loss in units of the noise floor: the worst step, and the sum over steps. No floor, no pass."""
    z = [_distance(a, b, s) for a, b, s in zip(reference, candidate, sigma, strict=True)]
    worst = max(range(len(z)), key=lambda i: math.inf if math.isnan(z[i]) else abs(z[i]))
    drift = abs(sum(z)) / math.sqrt(len(z))
    return [
        Check("loss, worst step (sigma)", abs(z[worst]), LOSS_SIGMA, abs(z[worst]) <= LOSS_SIGMA, f"step {worst}", 4),
        Check("loss, sum over steps (sigma)", drift, LOSS_SUM_SIGMA, drift <= LOSS_SUM_SIGMA, "", 4),
    ]


def step_checks(reference: Evidence, candidate: Evidence) -> list[Check]:
    """Every step's update beside the reference's: its length, and that it reached every tensor. Where arms are resynced, a
    step that never came leaves no other trace."""
    sides = list(zip(reference.free_run["moved"], candidate.free_run["moved"], strict=True))
    off = [abs(other / own - 1) if own > 0 else (0.0 if other == own else math.inf) for own, other in sides]
    worst = max(range(len(off)), key=lambda step: math.inf if math.isnan(off[step]) else off[step])
    rested = zip(reference.free_run["rested"], candidate.free_run["rested"], strict=True)
    left = [f"{name} at step {step}" for step, (own, other) in enumerate(rested) for name in sorted({*other} - {*own})]
    return [
        Check("update size, worst step", off[worst], STEP_SIZE, off[worst] <= STEP_SIZE, f"step {worst}", 4),
        Check("every step moves every tensor", None, None, not left, left[0] if left else "", 4),
    ]


def _distance(reference: float, candidate: float, sigma: float) -> float:
    if not math.isfinite(sigma):
        return math.nan  # a replica that diverged would let anything through
    if sigma > 0:
        return (candidate - reference) / sigma
    return 0.0 if candidate == reference else math.inf


def gradient_checks(state: str, c: Comparison) -> list[Check]:
    """Gradients beside the reference's, both against the oracle. A NaN is never within a limit."""
    overfit = state == OVERFIT
    prefix = "overfit " if overfit else ""
    rho, geomean = (RHO_OVERFIT, GEOMEAN_OVERFIT) if overfit else (RHO, GEOMEAN)
    worst = c.words.get("rho", c.rho_name)
    checks = [
        Check(f"{prefix}gradient error ratio, worst parameter", c.rho, rho, c.rho <= rho, worst, 2, state),
        Check(f"{prefix}gradient error ratio, geometric mean", c.geomean, geomean, c.geomean <= geomean, "", 2, state),
    ]
    if c.few_name:
        limit, worst = RHO_FEW_OVERFIT if overfit else RHO_FEW, c.words.get("few", c.few_name)
        checks.append(
            Check(f"{prefix}gradient error ratio, worst small tensor", c.few, limit, c.few <= limit, worst, 2, state)
        )
    if not overfit:
        worst = c.words.get("row", c.row_name)
        checks.append(Check("gradient error ratio, worst row", c.row, ROW, c.row <= ROW, worst, 2, state))
        checks.append(Check("gradient scale error", c.alpha, ALPHA, c.alpha <= ALPHA, c.alpha_name, 2, state))
    return checks


def update_checks(candidate: Evidence) -> list[Check]:
    """One optimizer update of given weights, moments and gradients beside fp64 AdamW."""
    update = candidate.update
    problems, error, limit = update["problems"], update["error"], update["limit"]
    return [
        Check("update beside fp64 AdamW", error, limit, error <= limit, update["name"], 3),
        Check("update complete", None, None, not problems, problems[0] if problems else "", 3),
    ]


def structure_checks(candidate: Evidence) -> list[Check]:
    return [Check(f["name"], None, None, f["passed"], f["detail"], 5) for f in candidate.findings]


def judge(
    claim: Exactness,
    reference: Evidence,
    repeat: Evidence | None,
    candidate: Evidence,
    wanted: Sequence[str],
    sigma: Sequence[float],
    compared: dict[str, Comparison],
) -> Verdict:
    """The level an arm reached, with every check and the number that decided. What was not measured is INVALID."""
    lacking = incomplete(reference, candidate, wanted, sigma, compared)
    if not lacking.passed:
        return Verdict(Level.INVALID, f"{lacking.name}: no{_because(lacking)}", (lacking,))
    checks = [lacking, *preflight(reference, repeat, candidate, wanted, compared)]
    numeric = loss_checks(reference.losses, candidate.losses, sigma)
    moved, reached = step_checks(reference, candidate)
    numeric.append(moved)
    for state, comparison in compared.items():
        numeric += gradient_checks(state, comparison)
    exact = [*structure_checks(candidate), *update_checks(candidate), reached]
    every = tuple(checks + numeric + exact)
    broken = next((check for check in checks if not check.passed), None)
    if broken is not None:
        return Verdict(Level.INVALID, f"{broken.name}{_at(broken)}: no{_beside(broken)}{_because(broken)}", every)
    difference = same_bits(reference, candidate)
    untrue = next((check for check in exact if not check.passed), None)
    if difference is None and untrue is None:
        return _bitwise(claim, len(reference.losses), (*every, Check("bits of every step", 0.0, 0.0, True)))
    off = [check for check in numeric if not check.passed]
    far = f"; {_closest(off)}" if off else ""  # not bits alone, nor structure
    if claim is Exactness.BITWISE and difference is not None:
        found = Check("bits of every step", None, None, False, f"first difference: {difference}")
        return Verdict(Level.FAILED, f"claimed BITWISE, but {difference} differs{far}", (*every, found))
    if claim is Exactness.APPROX and (untrue is None or untrue.part != 5):  # another function still keeps documents apart
        return Verdict(Level.APPROX, f"another function by its author's word; {_closest(numeric)}", every)
    if untrue is not None:
        return Verdict(Level.FAILED, f"{untrue.name}: no{_beside(untrue)}{_because(untrue)}{far}", every)
    return Verdict(Level.FAILED if off else Level.ROUNDING, _closest(numeric), every)


def repeats(reference: Evidence, repeat: Evidence) -> Verdict:
    """The reference's free run beside its own in a second process: anything but BITWISE makes every comparison worthless."""
    difference = same_bits(reference, repeat)
    found = Check("bits of every step", None, None, difference is None, difference or "")
    checks = (*same_inputs(reference, repeat), found)
    broken = next((check for check in checks if not check.passed), None)
    if broken is not None:
        return Verdict(Level.INVALID, f"{broken.name}: no{_because(broken)}", checks)
    return _bitwise(Exactness.BITWISE, len(reference.losses), checks)


def _bitwise(claim: Exactness, steps: int, checks: tuple[Check, ...]) -> Verdict:
    same = f"losses, gradients, weights and moments have the same bits at all {steps} steps"
    if claim is Exactness.APPROX:
        return Verdict(Level.APPROX, f"another function by its author's word; {same}", checks)
    return Verdict(Level.BITWISE, same, checks)


def _closest(numeric: list[Check]) -> str:
    """The check that uses most of its limit, in words."""
    closest = max(numeric, key=_share)
    return f"{closest.name}{_at(closest)} {_number(closest.value)} of at most {_number(closest.limit)}{_because(closest)}"


def _share(check: Check) -> float:
    """How much of its limit a check uses; not-a-number uses more than all of it."""
    share = check.value / check.limit
    return math.inf if math.isnan(share) else share


def _number(value: float) -> str:
    return f"{value:.3g}"


def _at(check: Check) -> str:
    return f" at {check.state}" if check.state else ""


def _beside(check: Check) -> str:
    if check.value is None or check.limit is None:
        return ""
    return f", {_number(check.value)} beside {_number(check.limit)}"


def _because(check: Check) -> str:
    return f" ({check.detail})" if check.detail else ""
