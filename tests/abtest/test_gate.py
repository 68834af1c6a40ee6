"""The judge as a pure function: what makes a comparison worthless, what fails, and what passes at its limits exactly."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abtest import gate
from abtest.gate import Evidence, judge, loss_checks, noise_floor
from abtest.gradients import Comparison
from abtest.verdict import Level
from kernels.contract import Exactness

STEPS, NAME = 3, "faster"
ZERO_SIGMA = (0.25,) * STEPS
AT_LIMITS = Comparison(gate.RHO, "p", gate.GEOMEAN, gate.ROW, "p", gate.ALPHA, "p", gate.REFERENCE_ERROR, gate.SHARE)
CLOSE = Comparison(1.01, "p", 1.0, 1.5, "p", 0.0, "p", 0.01, 1.0)


def evidence() -> Evidence:
    """An arm that trained two parameters of 100 and 50 elements for three steps, with two probe batches a state."""
    build = {
        "weights": "w0", "elements": {"p": 100, "q": 50}, "data": {"content_hash": "d"}, "enabled": [NAME], "changed": True,
    }  # fmt: skip
    free_run = {
        "loss": [8.0, 7.5, 7.0], "gradients": ["g0", "g1", "g2"], "state": ["s0", "s1", "s2"], "rng": ["r"] * STEPS,
        "lr": [0.1, 0.2, 0.1], "batch": ["b0", "b1", "b2"], "supervised": [5, 7, 6],
    }  # fmt: skip
    probed = {
        "problems": [], "elements": 300, "fingerprints": ["f0", "f1"], "packing_error": 1e-6, "packing_error_name": "q",
    }  # fmt: skip
    return Evidence(build, free_run, {"start": probed, "end": copy.deepcopy(probed)})


def rounded(change: Callable[[Evidence], None] = lambda arm: None) -> Evidence:
    """A candidate whose gradients have other bits and whose loss is a tenth of a sigma off, then changed."""
    arm = copy.deepcopy(evidence())
    arm.free_run["gradients"][0] = "other"
    arm.free_run["loss"][2] += 0.025
    change(arm)
    return arm


def verdict(candidate: Evidence, claim=Exactness.ROUNDING, comparison: Comparison = CLOSE, **changes):
    """The judge's word on `candidate`, unless `changes` say otherwise beside a reference that repeats itself."""
    arguments = {"reference": evidence(), "repeat": evidence(), "wanted": (NAME,), "sigma": ZERO_SIGMA}
    compared = {state: comparison for state in candidate.gradients if not candidate.gradients[state]["problems"]}
    return judge(claim, candidate=candidate, compared=compared, **(arguments | changes))


def put(part: str, key: str, value) -> Callable[[Evidence], None]:
    return lambda arm: getattr(arm, part).__setitem__(key, value)


def problem(words: str) -> Callable[[Evidence], None]:
    return lambda arm: arm.gradients["end"].update(problems=[words])


@pytest.mark.parametrize("claim", Exactness)
def test_the_reference_beside_itself(claim):
    level = verdict(evidence(), claim).level
    assert level is (Level.APPROX if claim is Exactness.APPROX else Level.BITWISE)


def test_a_candidate_inside_the_noise_is_rounding():
    result = verdict(rounded())
    assert result.level is Level.ROUNDING and all(check.passed for check in result.checks)


PREFLIGHT = {
    "other initial weights": (put("build", "weights", "w1"), "same initial weights in both arms: no"),
    "a trained tensor is missing": (put("build", "elements", {"p": 100}), "same trained tensors in both arms: no"),
    "a trained tensor too many": (
        put("build", "elements", {"p": 100, "q": 50, "r": 1}), "same trained tensors in both arms: no",
    ),
    "other data": (put("build", "data", {"content_hash": "e"}), "same data in both arms: no"),
    "other batches": (put("free_run", "batch", ["b0", "b2", "b1"]), "same batches in both arms: no"),
    "another learning rate": (put("free_run", "lr", [0.1, 0.2, 0.2]), "same learning rates in both arms: no"),
    "other supervised counts": (put("free_run", "supervised", [5, 7, 7]), "same supervised tokens in both arms: no"),
    "not switched on": (put("build", "enabled", []), "the candidate is switched on: no (off: faster)"),
    "changed no seam": (put("build", "changed", False), "switching it on changed the run: no"),
    "NaN gradient": (problem("p: gradient is not finite in probe batch 1"), "p: gradient is not finite"),
    "aliased gradients": (problem("q: shares memory with the gradient of p"), "q: shares memory"),
    "no gradient": (problem("q: no gradient"), "q: no gradient"),
    "too few elements": (lambda arm: arm.gradients["start"].update(elements=150), "complete and finite, start: no"),
    "too few probe batches": (
        lambda arm: arm.gradients["start"].update(elements=150, fingerprints=["f0"]), "complete and finite, start: no",
    ),
    "no gradients at one state": (lambda arm: arm.gradients.pop("end"), "end: no (the candidate reported none)"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "words"), PREFLIGHT.values(), ids=PREFLIGHT)
@pytest.mark.parametrize("claim", Exactness)
@pytest.mark.parametrize("start", [evidence, rounded], ids=["same bits", "other bits"])
def test_a_failed_preflight_is_invalid(change, words, claim, start):
    candidate = start()
    change(candidate)
    result = verdict(candidate, claim)
    assert result.level is Level.INVALID
    assert words in result.reason


def test_a_reference_that_does_not_repeat_itself_is_invalid():
    repeat = rounded()
    result = verdict(evidence(), repeat=repeat)
    assert result.level is Level.INVALID
    assert result.reason == "the reference repeats itself bitwise: no (gradients of step 0)"


@pytest.mark.parametrize("error", [math.nextafter(gate.REFERENCE_ERROR, 1), math.nan, math.inf, 0.0])
def test_a_reference_far_from_the_oracle_or_equal_to_it_is_invalid(error):
    result = verdict(rounded(), comparison=dataclasses.replace(CLOSE, reference_error=error))
    assert result.level is Level.INVALID and "reference close to the oracle, start" in result.reason


@pytest.mark.parametrize("error", [math.nextafter(gate.PACKING_ERROR, 1), math.nan, math.inf])
@pytest.mark.parametrize("claim", Exactness)
@pytest.mark.parametrize("start", [evidence, rounded], ids=["same bits", "other bits"])
@pytest.mark.parametrize("state", ["start", "end"])
def test_a_reference_that_packs_wrongly_makes_every_arm_invalid_and_the_parameter_is_named(error, claim, start, state):
    reference = evidence()
    reference.gradients[state].update(packing_error=error, packing_error_name="layers.3.A_log")
    result = verdict(start(), claim, reference=reference)
    assert result.level is Level.INVALID
    assert result.reason.startswith(f"reference packed as unpacked, {state}: no, {error:.3g} beside 0.001")
    assert result.reason.endswith("(layers.3.A_log)")


def test_an_invalid_verdict_lists_the_numbers_too():
    candidate = rounded()
    broken = dataclasses.replace(CLOSE, rho=99.0, rho_name="the one")
    passing = verdict(candidate, comparison=broken)
    put("build", "weights", "w1")(candidate)
    result = verdict(candidate, comparison=broken)
    assert passing.level is Level.FAILED and result.level is Level.INVALID
    assert result.reason == "same initial weights in both arms: no"
    assert [check.name for check in result.checks] == [check.name for check in passing.checks]
    assert [(c.name, c.value) for c in result.checks if not c.passed and c.value] == [
        (f"gradient error ratio, worst parameter, {state}", 99.0) for state in ("start", "end")
    ]


def test_an_oracle_that_is_silent_on_most_parameters_is_invalid():
    result = verdict(rounded(), comparison=dataclasses.replace(CLOSE, share=math.nextafter(gate.SHARE, 0)))
    assert result.level is Level.INVALID and "share of parameters with a gradient, start" in result.reason


def test_a_reference_with_a_broken_gradient_is_invalid():
    reference = evidence()
    problem("p: no gradient")(reference)
    assert verdict(rounded(), reference=reference, repeat=None).level is Level.INVALID


def test_weights_that_never_move_are_invalid():
    frozen = evidence()
    frozen.free_run["state"] = ["s0"] * STEPS
    result = verdict(frozen, reference=frozen, repeat=frozen)
    assert result.level is Level.INVALID and "weights move" in result.reason


@pytest.mark.parametrize("key", ["loss", "gradients", "state", "rng"])
@pytest.mark.parametrize("step", range(STEPS))
def test_one_flipped_bit_breaks_a_bitwise_claim_and_the_first_step_is_named(key, step):
    candidate = evidence()
    for later in range(step, STEPS):
        value = candidate.free_run[key][later]
        candidate.free_run[key][later] = math.nextafter(value, 9) if key == "loss" else value + "'"
    result = verdict(candidate, Exactness.BITWISE)
    assert result.level is Level.FAILED
    assert result.reason == f"claimed BITWISE, but {key} of step {step} differs"


def test_one_probe_batch_with_other_bits_breaks_a_bitwise_claim():
    candidate = evidence()
    candidate.gradients["end"]["fingerprints"][1] = "f1'"
    result = verdict(candidate, Exactness.BITWISE)
    assert result.level is Level.FAILED and "probe batch 1 at state end" in result.reason


def test_fewer_steps_are_not_the_same_bits():
    assert gate.same_bits(evidence(), Evidence({}, {"loss": [8.0]})) == "the number of steps"


@pytest.mark.parametrize("claim", [Exactness.BITWISE, Exactness.ROUNDING])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("both", [False, True], ids=["candidate", "both arms"])
def test_losses_that_are_no_numbers_never_pass(claim, value, both):
    candidate, reference = rounded(), evidence()
    candidate.free_run["loss"][1] = value
    if both:
        reference.free_run["loss"][1] = value
    sigma = noise_floor(reference.losses, [reference.losses])
    result = verdict(candidate, claim, reference=reference, repeat=reference, sigma=sigma)
    assert not result.level.lossless


@pytest.mark.parametrize("diverged", [math.nan, math.inf])
def test_a_replica_that_diverged_lets_nothing_through(diverged):
    sigma = noise_floor(evidence().losses, [(8.0, diverged, 7.0)])
    assert verdict(rounded(), sigma=sigma).level is Level.FAILED


def test_exactly_at_every_limit_passes():
    candidate = rounded()
    candidate.free_run["loss"] = [8.0, 7.5, 7.0 + gate.LOSS_SIGMA * 0.25]
    reference = evidence()
    for answer in reference.gradients.values():
        answer["packing_error"] = gate.PACKING_ERROR
    result = verdict(candidate, comparison=AT_LIMITS, reference=reference)
    assert result.level is Level.ROUNDING
    at_limit = [check for check in result.checks if check.limit and check.value == check.limit]
    assert len(at_limit) == 1 + 2 * 7  # the worst step; seven numbers at each of two states


@pytest.mark.parametrize(("number", "words"), [("rho", "worst parameter"), ("geomean", "geometric mean"),
                                              ("row", "worst row"), ("alpha", "scale error")])  # fmt: skip
@pytest.mark.parametrize("excess", [0.0, math.nan, math.inf], ids=["one ulp", "NaN", "infinite"])
def test_beyond_any_limit_fails_and_the_reason_names_it(number, words, excess):
    beyond = excess or math.nextafter(getattr(AT_LIMITS, number), 100)
    comparison = dataclasses.replace(CLOSE, rho_name="the one", **{number: beyond})
    result = verdict(rounded(), comparison=comparison)
    assert result.level is Level.FAILED and words in result.reason
    assert ("(the one)" in result.reason) == (number == "rho")


def test_loss_limits_are_hit_exactly():
    zeros, sigma = (0.0,) * 4, (0.25,) * 4
    worst, drift = loss_checks(zeros, (0.0, -1.5, 0.5, 1.0), sigma)
    assert (worst.value, worst.passed, worst.detail, drift.value) == (6.0, True, "step 1", 0.0)
    assert not loss_checks(zeros, (0.0, math.nextafter(1.5, 2), 0.0, 0.0), sigma)[0].passed
    _, drift = loss_checks(zeros, (0.5, 0.5, 0.5, 0.5), sigma)
    assert (drift.value, drift.passed) == (4.0, True)
    assert not loss_checks(zeros, (0.5, 0.5, 0.5, 0.5 + 1e-12), sigma)[1].passed


def test_without_a_floor_only_equal_losses_pass():
    assert all(check.passed for check in loss_checks((0.0, 0.0), (0.0, 0.0), (0.0, 0.0)))
    assert not any(check.passed for check in loss_checks((0.0, 0.0), (0.0, 1e-300), (0.0, 0.0)))


@pytest.mark.parametrize("comparison", [CLOSE, AT_LIMITS, dataclasses.replace(CLOSE, rho=99.0, alpha=1.0)])
def test_an_approximation_is_never_lossless(comparison):
    result = verdict(rounded(), Exactness.APPROX, comparison)
    assert result.level is Level.APPROX and not result.level.lossless
    assert "another function by its author's word" in result.reason


def test_lossless_levels():
    assert {level for level in Level if level.lossless} == {Level.BITWISE, Level.ROUNDING}


def test_the_noise_floor_is_the_root_mean_square_distance():
    assert noise_floor((8.0, 2.0), [(8.25, 2.0), (7.25, 2.5)]) == (math.sqrt((0.25**2 + 0.75**2) / 2), math.sqrt(0.125))


def test_the_noise_floor_is_at_least_an_ulp_of_the_loss():
    assert noise_floor((8.0, -2.0, 0.0), []) == (8 * 2.0**-23, 2 * 2.0**-23, 0.0)
    assert noise_floor((8.0,), [(8.0,), (8.0,)]) == (8 * 2.0**-23,)


@given(st.lists(st.floats(-4, 4), min_size=1, max_size=8), st.floats(0.5, 16))
def test_the_noise_floor_does_not_depend_on_the_order_or_sign_of_replicas(distances, loss):
    forward = noise_floor((loss,), [(loss + d,) for d in distances])[0]
    backward = noise_floor((loss,), [(loss - d,) for d in reversed(distances)])[0]
    assert forward == pytest.approx(backward, rel=1e-6, abs=1e-6)
    assert forward <= max(abs(d) for d in distances) * (1 + 1e-9) + loss * 2.0**-22
