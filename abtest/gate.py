"""The first gate: is an arm lossless against the reference? Pure functions over what the arms reported.

Preflight (anything wrong is INVALID): the reference repeats itself bitwise in a second process; both arms saw the same
weights, batches, rates and counts; switching the optimization on changed a seam; no gradient is missing, aliased or not
finite; the reference itself is close to the oracle. Then BITWISE (losses, gradients, weights, moments, RNG state of every
step), or ROUNDING: loss inside the noise floor of kicked references, and gradients as close to the oracle as the
reference's. The limits come from a benign catalogue measured on a small prototype and are never widened for a candidate.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from abtest.gradients import Comparison
from abtest.verdict import Check, Level, Verdict
from kernels.contract import Exactness

LOSS_SIGMA, LOSS_SUM_SIGMA = 6.0, 4.0
RHO, GEOMEAN, ROW, ALPHA = 1.5, 1.15, 6.0, 0.003
# Per batch. The prototype's 0.05 held for 4 layers; bf16 alone gives 0.053 at 24 layers of 512 and 0.076 at 24 of 2048. That
# the reference is the right function is what PACKING_ERROR shows, in arithmetic that hides nothing.
REFERENCE_ERROR = 0.15
PACKING_ERROR = 1e-3
SHARE = 0.4  # of the parameters that must have an oracle gradient; LoRA's A has none while B is zero
FP32_ULP = 2.0**-23  # of a loss, relative: below it no difference can be told from rounding the loss itself


@dataclass(frozen=True)
class Evidence:
    """What one arm reported. build and free_run are the worker's answers; gradients its answer per state."""

    build: dict[str, Any]
    free_run: dict[str, Any]
    gradients: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def losses(self) -> tuple[float, ...]:
        return tuple(self.free_run["loss"])


def noise_floor(reference: Sequence[float], replicas: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Per step, the root mean square distance of kicked references from the reference; at least one ulp of the loss."""
    sigma = []
    for step, loss in enumerate(reference):
        distances = [replica[step] - loss for replica in replicas]
        spread = math.sqrt(statistics.fmean(d * d for d in distances)) if distances else 0.0
        sigma.append(max(spread, FP32_ULP * abs(loss)))
    return tuple(sigma)


def same_bits(one: Evidence, other: Evidence) -> str | None:
    """None if every step of both arms has the same bits, else the first thing that differs."""
    if len(one.losses) != len(other.losses):
        return "the number of steps"
    for step in range(len(one.losses)):
        for key in ("loss", "gradients", "state", "rng"):
            if one.free_run[key][step] != other.free_run[key][step]:  # NaN differs from itself, and so never passes
                return f"{key} of step {step}"
    for state in one.gradients.keys() & other.gradients.keys():
        for batch, (a, b) in enumerate(
            zip(one.gradients[state]["fingerprints"], other.gradients[state]["fingerprints"], strict=True)
        ):
            if a != b:
                return f"gradients of probe batch {batch} at state {state}"
    return None


def preflight(
    reference: Evidence, repeat: Evidence | None, candidate: Evidence, wanted: Sequence[str], compared: dict[str, Comparison]
) -> list[Check]:
    """Everything without which the comparison cannot be trusted. `wanted`: the optimizations that should be on."""
    checks = []
    if repeat is not None:
        difference = same_bits(reference, repeat)
        checks.append(Check("the reference repeats itself bitwise", None, None, difference is None, difference or ""))
    for name, a, b in (
        ("initial weights", reference.build["weights"], candidate.build["weights"]),
        ("trained tensors", reference.build["elements"], candidate.build["elements"]),
        ("data", reference.build["data"]["content_hash"], candidate.build["data"]["content_hash"]),
        ("batches", reference.free_run["batch"], candidate.free_run["batch"]),
        ("learning rates", reference.free_run["lr"], candidate.free_run["lr"]),
        ("supervised tokens", reference.free_run["supervised"], candidate.free_run["supervised"]),
    ):
        checks.append(Check(f"same {name} in both arms", None, None, a == b))
    off = sorted(set(wanted) - set(candidate.build["enabled"]))
    checks.append(Check("the candidate is switched on", None, None, not off, f"off: {', '.join(off)}" if off else ""))
    if wanted:
        changed = bool(candidate.build["changed"])
        checks.append(Check("switching it on changed the run", None, None, changed, "" if changed else "no seam changed"))
    expected = sum(reference.build["elements"].values())
    for state, own in reference.gradients.items():
        answer = candidate.gradients.get(state, {"problems": ["the candidate reported none"], "elements": 0})
        problems, count = answer["problems"] + own["problems"], answer["elements"]
        complete = not problems and count == own["elements"] == expected * len(own["fingerprints"])
        checks.append(
            Check(f"gradients complete and finite, {state}", float(count), None, complete, problems[0] if problems else "")
        )
    for state, own in reference.gradients.items():
        error, where = own["packing_error"], own["packing_error_name"]
        passed = error <= PACKING_ERROR
        checks.append(Check(f"reference packed as unpacked, {state}", error, PACKING_ERROR, passed, where))
    for state, comparison in compared.items():
        error = comparison.reference_error
        near = 0 < error <= REFERENCE_ERROR  # no error at all means that the oracle is no oracle
        checks.append(Check(f"reference close to the oracle, {state}", error, REFERENCE_ERROR, near))
        share = comparison.share
        checks.append(Check(f"share of parameters with a gradient, {state}", share, SHARE, share >= SHARE))
    frozen = reference.free_run["state"][0] == reference.free_run["state"][-1] and len(reference.free_run["state"]) > 1
    checks.append(Check("weights move", None, None, not frozen))
    return checks


def loss_checks(reference: Sequence[float], candidate: Sequence[float], sigma: Sequence[float]) -> list[Check]:
    """Free-running loss in units of the noise floor: the worst step, and the sum over steps. No floor, no pass."""
    z = [_distance(a, b, s) for a, b, s in zip(reference, candidate, sigma, strict=True)]
    worst = max(range(len(z)), key=lambda i: math.inf if math.isnan(z[i]) else abs(z[i]))
    drift = abs(sum(z)) / math.sqrt(len(z))
    return [
        Check("loss, worst step (sigma)", abs(z[worst]), LOSS_SIGMA, abs(z[worst]) <= LOSS_SIGMA, f"step {worst}"),
        Check("loss, sum over steps (sigma)", drift, LOSS_SUM_SIGMA, drift <= LOSS_SUM_SIGMA),
    ]


def _distance(reference: float, candidate: float, sigma: float) -> float:
    if not math.isfinite(sigma):
        return math.nan  # a replica that diverged would let anything through
    if sigma > 0:
        return (candidate - reference) / sigma
    return 0.0 if candidate == reference else math.inf


def gradient_checks(state: str, c: Comparison) -> list[Check]:
    """Gradients beside the reference's, both against the oracle. A NaN is never within a limit."""
    return [
        Check(f"gradient error ratio, worst parameter, {state}", c.rho, RHO, c.rho <= RHO, c.rho_name),
        Check(f"gradient error ratio, geometric mean, {state}", c.geomean, GEOMEAN, c.geomean <= GEOMEAN),
        Check(f"gradient error ratio, worst row, {state}", c.row, ROW, c.row <= ROW, c.row_name),
        Check(f"gradient scale error, {state}", c.alpha, ALPHA, c.alpha <= ALPHA, c.alpha_name),
    ]


def judge(
    claim: Exactness,
    reference: Evidence,
    repeat: Evidence | None,
    candidate: Evidence,
    wanted: Sequence[str],
    sigma: Sequence[float],
    compared: dict[str, Comparison],
) -> Verdict:
    """The level an arm reached, with every check and the number that decided."""
    checks = preflight(reference, repeat, candidate, wanted, compared)
    numeric = loss_checks(reference.losses, candidate.losses, sigma) if _same_length(reference, candidate) else []
    for state, comparison in compared.items():
        numeric += gradient_checks(state, comparison)
    broken = [check for check in checks if not check.passed]
    if broken:
        worst = broken[0]
        beside = (
            "" if worst.value is None or worst.limit is None else f", {_number(worst.value)} beside {_number(worst.limit)}"
        )
        return Verdict(Level.INVALID, f"{worst.name}: no{beside}{_because(worst)}", tuple(checks + numeric))
    difference = same_bits(reference, candidate)
    steps = len(reference.losses)
    if difference is None:
        checks.append(Check("bits of every step", 0.0, 0.0, True))
        same = f"losses, gradients, weights and moments have the same bits at all {steps} steps"
        if claim is Exactness.APPROX:
            return Verdict(Level.APPROX, f"another function by its author's word; {same}", tuple(checks))
        return Verdict(Level.BITWISE, same, tuple(checks))
    if claim is Exactness.BITWISE:
        checks.append(Check("bits of every step", None, None, False, f"first difference: {difference}"))
        return Verdict(Level.FAILED, f"claimed BITWISE, but {difference} differs", tuple(checks))
    return _by_numbers(claim, checks, numeric)


def _same_length(reference: Evidence, candidate: Evidence) -> bool:
    return len(reference.losses) == len(candidate.losses)  # if not, preflight has said so


def _by_numbers(claim: Exactness, checks: list[Check], numeric: list[Check]) -> Verdict:
    failed = [check for check in numeric if not check.passed]
    closest = max(numeric, key=_share)
    words = f"{closest.name} {_number(closest.value)} of at most {_number(closest.limit)}{_because(closest)}"
    every = tuple(checks + numeric)
    if claim is Exactness.APPROX:
        return Verdict(Level.APPROX, f"another function by its author's word; {words}", every)
    if failed:
        return Verdict(Level.FAILED, words, every)
    return Verdict(Level.ROUNDING, words, every)


def _share(check: Check) -> float:
    """How much of its limit a check uses; not-a-number uses more than all of it."""
    share = check.value / check.limit
    return math.inf if math.isnan(share) else share


def _number(value: float) -> str:
    return f"{value:.3g}"


def _because(check: Check) -> str:
    return f" ({check.detail})" if check.detail else ""
