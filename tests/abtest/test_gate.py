"""The judge as a pure function: what makes a comparison worthless, what fails, and what passes at its limits exactly."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable

import pytest

from abtest import limits
from abtest.evidence import Evidence, same_bits
from abtest.gate import judge, loss_checks
from abtest.gradients import Comparison
from abtest.states import OVERFIT
from abtest.verdict import Level
from kernels.contract import Exactness

STEPS, NAME = 3, "faster"
STATES = ("step 0", "step 2", OVERFIT)
SIGMA = (0.25,) * STEPS
CLOSE = Comparison(1.01, "p", 1.0, 1.5, "p", 0.0, "p", 0.01, 1.0, 1.2, "*.q")
AT_LIMITS = Comparison(
    limits.RHO, "p", limits.GEOMEAN, limits.ROW, "p", limits.ALPHA, "p", limits.REFERENCE_ERROR, limits.SHARE,
    limits.RHO_FEW, "*.q",
)  # fmt: skip
AT_LIMITS_OVERFIT = dataclasses.replace(
    AT_LIMITS, rho=limits.RHO_OVERFIT, geomean=limits.GEOMEAN_OVERFIT, few=limits.RHO_FEW_OVERFIT
)


def evidence() -> Evidence:
    """The reference: two parameters of 100 and 50 elements trained for three steps, with two probes a state."""
    build = {
        "weights": "w0", "frozen": "f", "elements": {"p": 100, "q": 50}, "data": {"content_hash": "d"}, "seed": 0,
        "enabled": [], "changed": False,
    }  # fmt: skip
    free_run = {
        "loss": [8.0, 7.5, 7.0], "gradients": ["g0", "g1", "g2"], "state": ["s0", "s1", "s2"], "rng": ["r"] * STEPS,
        "lr": [0.1, 0.2, 0.1], "batch": ["b0", "b1", "b2"], "supervised": [5, 7, 6],
        "moved": [0.1, 0.2, 0.1], "rested": [["q"], [], []], "still": [], "replays": [0, 0, 0],
    }  # fmt: skip
    probed = {
        "problems": [], "elements": 300, "fingerprints": ["f0", "f1"], "packing_error": 1e-6, "packing_error_name": "q",
        "recurrence_error": [1e-9, "q"],
    }  # fmt: skip
    work = {"operators": {"mm": 4, "copy": 2}, "modules": {"Norm": 3}, "kernels": {"gemm": 4}, "kept": {"bytes": 800}}
    findings = [{"name": "inputs unmodified", "passed": True, "detail": ""}]
    update = {"error": 1e-7, "limit": limits.UPDATE, "name": "p", "problems": []}
    gradients = {state: copy.deepcopy(probed) for state in STATES}
    gradients[OVERFIT]["recurrence_error"] = None  # not asked for there
    return Evidence(build, free_run, gradients, findings, update, work)


def same(change: Callable[[Evidence], None] = lambda arm: None) -> Evidence:
    """A candidate with the reference's bits that copies less; then changed."""
    arm = dataclasses.replace(evidence(), tripwire={"red": True, "detail": ""})
    arm.build.update(enabled=[NAME], changed=True)
    arm.work["operators"]["copy"] -= 1
    change(arm)
    return arm


def rounded(change: Callable[[Evidence], None] = lambda arm: None) -> Evidence:
    """A candidate whose gradients have other bits and whose loss is a tenth of a sigma off, then changed."""
    arm = same()
    arm.free_run["gradients"][0] = "other"
    arm.free_run["loss"][2] += 0.025
    change(arm)
    return arm


def verdict(candidate: Evidence, claim=Exactness.ROUNDING, comparison: Comparison = CLOSE, **changes):
    """The judge's word on `candidate`; unless `changes` say otherwise, beside a reference that repeats itself."""
    arguments = {"reference": evidence(), "repeat": evidence(), "wanted": (NAME,), "sigma": SIGMA}
    arguments["compared"] = {s: comparison for s in candidate.gradients if not candidate.gradients[s]["problems"]}
    return judge(claim, candidate=candidate, **(arguments | changes))


def put(part: str, key: str, value) -> Callable[[Evidence], None]:
    return lambda arm: getattr(arm, part).__setitem__(key, value)


def problem(words: str) -> Callable[[Evidence], None]:
    return lambda arm: arm.gradients[OVERFIT].update(problems=[words])


BROKEN = {  # what was found of an arm
    "structure": lambda arm: arm.findings.append({"name": "repeats", "passed": False, "detail": "run 3 of 20"}),
    "update": lambda arm: arm.update.update(error=2 * limits.UPDATE),
    "update that is no number": lambda arm: arm.update.update(error=math.nan),
    "update that lacks a tensor": lambda arm: arm.update.update(problems=["q: no moment"]),
}
REASONS = {"structure": "repeats: no (run 3 of 20)", "update that lacks a tensor": "update complete: no (q: no moment)"}


def failing(result) -> list[str]:
    return [check.name for check in result.checks if not check.passed]


@pytest.mark.parametrize("claim", Exactness)
@pytest.mark.parametrize("candidate", [evidence(), same()], ids=["the reference itself", "a candidate"])
def test_the_reference_s_bits_are_bitwise(claim, candidate):
    result = verdict(candidate, claim) if candidate.tripwire else verdict(candidate, claim, wanted=(), repeat=None)
    assert result.level is (Level.APPROX if claim is Exactness.APPROX else Level.BITWISE)
    assert not failing(result) and "bits of every step" in [check.name for check in result.checks]


def test_a_candidate_inside_the_noise_is_rounding_by_all_five_parts():
    result = verdict(rounded())
    assert result.level is Level.ROUNDING and not failing(result)
    assert [check.part for check in result.checks if check.part != 1] == [4, 4, 4] + [2] * (5 + 5 + 3) + [5, 3, 3, 4]
    assert {check.state for check in result.checks if check.part == 2} == set(STATES)
    assert {check.state for check in result.checks if check.part in (3, 4, 5)} == {""}


def test_exactly_at_every_limit_passes():
    candidate = rounded(put("free_run", "loss", [8.0, 7.5, 7.0 + limits.LOSS_SIGMA * 0.25]))
    candidate.update["error"] = limits.UPDATE
    reference = evidence()
    reference.update["error"] = limits.UPDATE
    for answer in reference.gradients.values():
        answer.update(packing_error=limits.PACKING, recurrence_error=[limits.RECURRENCE, "q"])
    compared = {state: AT_LIMITS_OVERFIT if state == OVERFIT else AT_LIMITS for state in STATES}
    result = verdict(candidate, reference=reference, compared=compared)
    assert result.level is Level.ROUNDING, result.reason
    at_limit = [check for check in result.checks if check.limit and check.value == check.limit]
    # One of the loss and one of the update; nine at each of two states, and six at the overfit one.
    assert len(at_limit) == 2 + 2 * 9 + 6


PREFLIGHT = {
    "other initial weights": (put("build", "weights", "w1"), "same initial weights in both arms: no"),
    "other frozen weights": (put("build", "frozen", "g"), "same frozen weights in both arms: no"),
    "a trained tensor is missing": (put("build", "elements", {"p": 100}), "same trained tensors in both arms: no"),
    "a trained tensor too many": (put("build", "elements", {"p": 100, "q": 50, "r": 1}), "same trained tensors"),
    "other data": (put("build", "data", {"content_hash": "e"}), "same data in both arms: no"),
    "another seed": (put("build", "seed", 1), "same seed in both arms: no"),
    "other batches": (put("free_run", "batch", ["b0", "b2", "b1"]), "same batches in both arms: no"),
    "another learning rate": (put("free_run", "lr", [0.1, 0.2, 0.2]), "same learning rates in both arms: no"),
    "other supervised counts": (put("free_run", "supervised", [5, 7, 7]), "same supervised tokens in both arms: no"),
    "not switched on": (put("build", "enabled", []), "the candidate is switched on: no (off: faster)"),
    "changed no seam": (put("build", "changed", False), "switching it on changed the run: no (no seam changed)"),
    "NaN gradient": (problem("p: gradient is not finite in probe batch 1"), f"at {OVERFIT}: no (p: gradient is not finite"),
    "aliased gradients": (problem("q: shares memory with the gradient of p"), "q: shares memory"),
    "too few elements": (lambda arm: arm.gradients["step 0"].update(elements=150), "complete and finite at step 0: no"),
    "no gradients at one state": (lambda arm: arm.gradients.pop("step 2"), "at step 2: no (the candidate reported none)"),
    "a weight that never moves": (put("free_run", "still", ["q"]), "weights move: no (1 never move, first q)"),
    "a tripwire not red": (lambda arm: arm.tripwire.update(red=False, detail="why"), "turns the gate red: no (why)"),
    "a step without its replays": (put("free_run", "replays", [2, 2, 0]), "as many graphs: no (0 to 2 in the second half)"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "words"), PREFLIGHT.values(), ids=PREFLIGHT)
@pytest.mark.parametrize("claim", Exactness)
@pytest.mark.parametrize("start", [same, rounded], ids=["same bits", "other bits"])
def test_a_failed_preflight_is_invalid(change, words, claim, start):
    result = verdict(start(change), claim)
    assert result.level is Level.INVALID and words in result.reason
    assert all(check.part == 1 for check in result.checks if not check.passed)


MISSING = {  # what was not measured, of either arm
    "no losses": (put("free_run", "loss", []), "no loss of every step"),
    "a step less": (put("free_run", "state", ["s0", "s1"]), "no state of every step"),
    "no update sizes": (lambda arm: arm.free_run.pop("moved"), "no moved of every step"),
    "no gradients": (lambda arm: arm.gradients.clear(), "no gradients"),
    "no findings": (lambda arm: arm.findings.clear(), "no findings"),
    "no update": (lambda arm: arm.update.clear(), "no update"),
    "no census": (lambda arm: arm.work.clear(), "no census"),
}


@pytest.mark.parametrize(("change", "words"), MISSING.values(), ids=MISSING)
@pytest.mark.parametrize("side", ["candidate", "reference"])
@pytest.mark.parametrize("start", [same, rounded], ids=["same bits", "other bits"])
def test_what_was_not_measured_is_invalid(change, words, side, start):
    arms = {"candidate": start(), "reference": evidence()}
    change(arms[side])
    compared = dict.fromkeys(STATES, CLOSE)
    result = verdict(arms["candidate"], reference=arms["reference"], compared=compared)
    assert (result.level, result.reason) == (Level.INVALID, f"everything was measured: no ({side}: {words})")


def test_a_comparison_a_noise_floor_or_a_tripwire_that_lacks_is_invalid():
    for changes, words in (
        ({"compared": {}}, "gradients not compared at step 0"),
        ({"compared": dict.fromkeys(STATES[:2], CLOSE)}, f"gradients not compared at {OVERFIT}"),
        ({"sigma": SIGMA[:2]}, "noise floor: 2 steps instead of 3"),
    ):
        result = verdict(rounded(), **changes)
        assert (result.level, result.reason) == (Level.INVALID, f"everything was measured: no ({words})")
    bare = dataclasses.replace(same(), tripwire=None)
    assert verdict(bare).reason == "everything was measured: no (candidate: no tripwire)"
    swapped = verdict(evidence(), reference=same(lambda arm: [own.pop("packing_error") for own in arm.gradients.values()]))
    assert swapped.level is Level.INVALID and "reference: no packing_error at step 0" in swapped.reason
    fewer = same(lambda arm: arm.gradients[OVERFIT].update(fingerprints=["f0"]))
    assert verdict(fewer).reason == f"everything was measured: no (candidate: 1 probes at {OVERFIT} instead of 2)"
    assert same_bits(evidence(), fewer) == f"the number of probes at {OVERFIT}"


STEPPED = {
    "an update too long": (put("free_run", "moved", [0.1, 0.2, 0.12]), "update size, worst step", "step 2"),
    "an update that never came": (put("free_run", "moved", [0.1, 0.0, 0.1]), "update size, worst step", "step 1"),
    "an update that is no number": (put("free_run", "moved", [0.1, math.nan, 0.1]), "update size, worst step", "step 1"),
    "a tensor left alone": (put("free_run", "rested", [["q"], ["q"], []]), "every step moves every tensor", "q at step 1"),
}


@pytest.mark.parametrize(("change", "check", "detail"), STEPPED.values(), ids=STEPPED)
def test_every_step_updates_as_the_reference_does(change, check, detail):
    result = verdict(rounded(change))
    assert result.level is Level.FAILED and failing(result) == [check] and detail in result.reason


def test_a_reference_that_does_not_repeat_itself_is_invalid():
    result = verdict(same(), repeat=rounded())
    assert (result.level, result.reason) == (Level.INVALID, "the reference repeats itself bitwise: no (gradients of step 0)")


@pytest.mark.parametrize("what", BROKEN)
def test_a_reference_that_fails_its_own_checks_is_invalid(what):
    reference = evidence()
    BROKEN[what](reference)
    result = verdict(rounded(), reference=reference)
    words = "reference: repeats: no (run 3 of 20)" if what == "structure" else "the reference's update is right: no (p)"
    assert result.level is Level.INVALID and result.reason == words


@pytest.mark.parametrize("error", [math.nextafter(limits.REFERENCE_ERROR, 1), math.nan, math.inf, 0.0])
def test_a_reference_far_from_the_oracle_or_equal_to_it_is_invalid(error):
    far = dataclasses.replace(CLOSE, reference_error=error)
    result = verdict(rounded(), comparison=far)
    assert result.level is Level.INVALID and result.reason.startswith("reference close to the oracle at step 0: no, ")
    near = dict.fromkeys(STATES[:2], CLOSE)
    assert verdict(rounded(), compared=near | {OVERFIT: far}).level is Level.ROUNDING  # mostly rounding there
    silent = dataclasses.replace(CLOSE, share=math.nextafter(limits.SHARE, 0))
    result = verdict(rounded(), compared=near | {OVERFIT: silent})
    assert result.level is Level.INVALID and f"share of parameters with a gradient at {OVERFIT}: no" in result.reason


@pytest.mark.parametrize("error", [0.002, math.nan, math.inf])
@pytest.mark.parametrize("start", [same, rounded], ids=["same bits", "other bits"])
@pytest.mark.parametrize("state", STATES)
def test_a_reference_that_is_not_the_right_function_makes_every_arm_invalid(error, start, state):
    wrong = {
        "reference packed as unpacked": {"packing_error": error, "packing_error_name": "A_log"},
        "oracle's delta rule as the recurrence": {"recurrence_error": [error, "A_log"]},
    }
    for words, notes in wrong.items():
        reference = evidence()
        reference.gradients[state].update(notes)
        result = verdict(start(), reference=reference)
        assert result.level is Level.INVALID and result.reason == f"{words} at {state}: no, {error:.3g} beside 0.001 (A_log)"


def test_weights_that_never_move_are_invalid_but_not_those_that_nobody_moves():
    frozen = same(put("free_run", "state", ["s0"] * STEPS))
    result = verdict(frozen, reference=frozen, repeat=frozen)
    assert result.level is Level.INVALID and result.reason == "weights move: no"
    still = evidence()
    still.free_run["still"] = ["q"]
    assert verdict(same(put("free_run", "still", ["q"])), reference=still).level is Level.BITWISE


def test_an_invalid_verdict_lists_the_numbers_too():
    broken = dataclasses.replace(CLOSE, rho=99.0, rho_name="the one")
    passing = verdict(rounded(), comparison=broken)
    result = verdict(rounded(put("build", "weights", "w1")), comparison=broken)
    assert passing.level is Level.FAILED and result.level is Level.INVALID
    assert [check.name for check in result.checks] == [check.name for check in passing.checks]
    assert set(failing(result)) - set(failing(passing)) == {"same initial weights in both arms"}
    assert [check.value for check in result.checks if not check.passed and check.part == 2] == [99.0] * 3


@pytest.mark.parametrize("key", ["loss", "gradients", "state", "rng"])
@pytest.mark.parametrize("step", range(STEPS))
def test_one_flipped_bit_breaks_a_bitwise_claim_and_the_first_step_is_named(key, step):
    candidate = same()
    for later in range(step, STEPS):
        value = candidate.free_run[key][later]
        candidate.free_run[key][later] = math.nextafter(value, 9) if key == "loss" else value + "'"
    result = verdict(candidate, Exactness.BITWISE)
    assert result.level is Level.FAILED and result.reason == f"claimed BITWISE, but {key} of step {step} differs"
    assert "bits of every step" in failing(result)


def test_one_probe_with_other_bits_breaks_a_bitwise_claim_and_fewer_steps_are_other_bits():
    candidate = same(lambda arm: arm.gradients[OVERFIT].update(fingerprints=["f0", "f1'"]))
    result = verdict(candidate, Exactness.BITWISE)
    assert result.level is Level.FAILED and result.reason.endswith(f"but gradients of probe 1 at {OVERFIT} differs")
    assert same_bits(evidence(), Evidence({}, {"loss": [8.0]})) == "the number of steps"


@pytest.mark.parametrize(("number", "words"), [("rho", "worst parameter"), ("few", "worst small tensor"),
                                              ("geomean", "geometric mean"),
                                              ("row", "worst row"), ("alpha", "scale error")])  # fmt: skip
@pytest.mark.parametrize("excess", [0.0, math.nan, math.inf], ids=["one ulp", "NaN", "infinite"])
def test_beyond_any_limit_fails_and_the_reason_names_it(number, words, excess):
    beyond = excess or math.nextafter(getattr(AT_LIMITS, number), 100)
    comparison = dataclasses.replace(CLOSE, rho_name="the one", **{number: beyond})
    result = verdict(rounded(), comparison=comparison)
    assert result.level is Level.FAILED and f"{words} at step 0" in result.reason
    assert ("(the one)" in result.reason) == (number == "rho")


@pytest.mark.parametrize("claim", [Exactness.BITWISE, Exactness.ROUNDING])
@pytest.mark.parametrize("far", [False, True])
def test_what_is_refused_for_bits_or_structure_says_how_far_its_numbers_are_off(claim, far):
    candidate = rounded(BROKEN["structure"])
    result = verdict(candidate, claim, comparison=dataclasses.replace(CLOSE, geomean=6.77) if far else CLOSE)
    first = "claimed BITWISE, but gradients of step 0 differs" if claim is Exactness.BITWISE else REASONS["structure"]
    numbers = f"; gradient error ratio, geometric mean at step 0 6.77 of at most {limits.GEOMEAN:.3g}"
    assert result.level is Level.FAILED and result.reason == first + (numbers if far else "")


@pytest.mark.parametrize("number", ["rho", "geomean"])
def test_the_overfit_state_has_limits_of_its_own(number):
    beyond = dataclasses.replace(CLOSE, **{number: math.nextafter(getattr(AT_LIMITS_OVERFIT, number), 100)})
    result = verdict(rounded(), compared=dict.fromkeys(STATES[:2], CLOSE) | {OVERFIT: beyond})
    assert result.level is Level.FAILED and result.reason.startswith("overfit gradient error ratio")


@pytest.mark.parametrize("claim", [Exactness.BITWISE, Exactness.ROUNDING])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("both", [False, True], ids=["candidate", "both arms"])
def test_losses_that_are_no_numbers_never_pass(claim, value, both):
    candidate, reference = rounded(), evidence()
    for arm in (candidate, reference)[: 1 + both]:
        arm.free_run["loss"][1] = value
    for sigma in (SIGMA, (0.25, math.nan, 0.25), (math.inf,) * STEPS):
        assert not verdict(candidate, claim, reference=reference, repeat=reference, sigma=sigma).level.lossless


def test_without_any_noise_only_the_reference_s_losses_pass():
    for kicks in ((math.ulp(0.0), 0.0), (math.ulp(0.0), -math.ulp(0.0))):  # whose sum is nothing, but no number either
        assert not any(check.passed for check in loss_checks((0.0, 0.0), kicks, (0.0, 0.0)))
    assert [check.value for check in loss_checks((0.0, 1.0), (0.0, 1.0), (0.0, 0.0)) if check.passed] == [0.0, 0.0]


def test_a_bias_that_no_step_shows_fails_by_its_sum():
    for bias, passed in ((limits.LOSS_SUM_SIGMA / 2, True), (math.nextafter(limits.LOSS_SUM_SIGMA / 2, 9), False)):
        assert [check.passed for check in loss_checks((0.0,) * 4, (-bias,) * 4, (1.0,) * 4)] == [True, passed]


@pytest.mark.parametrize("start", [same, rounded], ids=["same bits", "other bits"])
@pytest.mark.parametrize("what", BROKEN)
def test_equal_bits_do_not_excuse_a_broken_structure_or_update(start, what):
    """A free run never fills a buffer that only 20 repeats fill, nor takes the rates that the update is tried at."""
    result = verdict(start(BROKEN[what]))
    assert result.level is Level.FAILED and len(failing(result)) == 1
    assert result.reason.startswith(REASONS.get(what, "update beside fp64 AdamW: no, "))
    assert verdict(same(BROKEN[what]), Exactness.BITWISE).reason == result.reason


@pytest.mark.parametrize("comparison", [CLOSE, AT_LIMITS, dataclasses.replace(CLOSE, rho=99.0, alpha=1.0)])
def test_an_approximation_is_never_lossless(comparison):
    result = verdict(rounded(), Exactness.APPROX, comparison)
    assert result.level is Level.APPROX
    assert {level for level in Level if level.lossless} == {Level.BITWISE, Level.ROUNDING}
    assert "another function by its author's word" in result.reason


@pytest.mark.parametrize("what", BROKEN)
def test_an_approximation_keeps_documents_apart_all_the_same(what):
    level = verdict(rounded(BROKEN[what]), Exactness.APPROX).level
    assert level is (Level.FAILED if what == "structure" else Level.APPROX)
