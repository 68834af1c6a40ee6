"""Check 1: without these the comparison cannot be trusted, and the answer is INVALID, never a pass."""

from __future__ import annotations

from collections.abc import Sequence

from abtest.census import changes
from abtest.evidence import Evidence, same_bits
from abtest.gradients import Comparison
from abtest.limits import PACKING, RECURRENCE, REFERENCE_ERROR, SHARE
from abtest.states import OVERFIT
from abtest.verdict import Check


def preflight(
    reference: Evidence, repeat: Evidence | None, candidate: Evidence, wanted: Sequence[str], compared: dict[str, Comparison]
) -> list[Check]:
    """Everything without which the comparison cannot be trusted. `wanted`: the optimizations that should be on."""
    checks = []
    if repeat is not None:
        difference = same_bits(reference, repeat)
        checks.append(_check("the reference repeats itself bitwise", difference is None, difference or ""))
    checks += same_inputs(reference, candidate) + _switched_on(candidate, wanted)
    checks += _gradients_complete(reference, candidate)
    checks += _reference_right(reference, compared)
    checks += _moving(reference, candidate)
    if wanted:
        checks += _ran(reference, candidate)
    return checks


PER_STEP = ("loss", "gradients", "state", "rng", "lr", "batch", "supervised", "moved", "rested")


def incomplete(
    reference: Evidence, candidate: Evidence, wanted: Sequence[str], sigma: Sequence[float], compared: dict[str, Comparison]
) -> Check:
    """Whether everything was measured that a verdict rests on; `detail` names the first thing that was not."""
    sides = (("reference", reference), ("candidate", candidate))
    lacking = [f"{side}: {what}" for side, arm in sides for what in _lacks(arm)]
    steps = len(reference.free_run.get("loss", ()))
    if len(candidate.free_run.get("loss", ())) != steps:
        lacking.append(f"candidate: {len(candidate.free_run['loss'])} steps instead of {steps}")
    if len(sigma) != steps:
        lacking.append(f"noise floor: {len(sigma)} steps instead of {steps}")
    for state, own in reference.gradients.items():
        lacking += [f"reference: no {key} at {state}" for key in ("packing_error", "recurrence_error") if key not in own]
        answer = candidate.gradients.get(state)
        if state not in compared and answer is not None and not (answer["problems"] or own["problems"]):
            lacking.append(f"gradients not compared at {state}")
        wanted_probes = len(own["fingerprints"])
        if answer is not None and len(answer["fingerprints"]) != wanted_probes:
            lacking.append(f"candidate: {len(answer['fingerprints'])} probes at {state} instead of {wanted_probes}")
    if wanted and candidate.tripwire is None:
        lacking.append("candidate: no tripwire")
    return _check("everything was measured", not lacking, lacking[0] if lacking else "")


def _lacks(arm: Evidence) -> list[str]:
    steps = len(arm.free_run.get("loss", ()))
    lacks = [f"no {key} of every step" for key in PER_STEP if not steps or len(arm.free_run.get(key, ())) != steps]
    parts = {"gradients": arm.gradients, "findings": arm.findings, "update": arm.update, "census": arm.work}
    return lacks + [f"no {name}" for name, part in parts.items() if not part]


def _check(name: str, passed: bool, detail: str = "", state: str = "", value=None, limit=None) -> Check:
    return Check(name, value, limit, passed, detail, 1, state)


def same_inputs(reference: Evidence, candidate: Evidence) -> list[Check]:
    """Both arms saw the same weights, data, batches, rates and seed."""
    sides = (
        ("initial weights", reference.build["weights"], candidate.build["weights"]),
        ("frozen weights", reference.build["frozen"], candidate.build["frozen"]),
        ("trained tensors", reference.build["elements"], candidate.build["elements"]),
        ("data", reference.build["data"]["content_hash"], candidate.build["data"]["content_hash"]),
        ("seed", reference.build["seed"], candidate.build["seed"]),
        ("batches", reference.free_run["batch"], candidate.free_run["batch"]),
        ("learning rates", reference.free_run["lr"], candidate.free_run["lr"]),
        ("supervised tokens", reference.free_run["supervised"], candidate.free_run["supervised"]),
    )
    return [_check(f"same {name} in both arms", one == other) for name, one, other in sides]


def _switched_on(candidate: Evidence, wanted: Sequence[str]) -> list[Check]:
    off = sorted(set(wanted) - set(candidate.build["enabled"]))
    checks = [_check("the candidate is switched on", not off, f"off: {', '.join(off)}" if off else "")]
    if wanted:
        changed = bool(candidate.build["changed"])
        checks.append(_check("switching it on changed the run", changed, "" if changed else "no seam changed"))
    return checks


def _gradients_complete(reference: Evidence, candidate: Evidence) -> list[Check]:
    checks = []
    expected = sum(reference.build["elements"].values())
    for state, own in reference.gradients.items():
        answer = candidate.gradients.get(state, {"problems": ["the candidate reported none"], "elements": 0})
        problems, count = answer["problems"] + own["problems"], answer["elements"]
        complete = not problems and count == own["elements"] == expected * len(own["fingerprints"])
        first = problems[0] if problems else ""
        checks.append(_check("gradients complete and finite", complete, first, state, float(count)))
    return checks


def _reference_right(reference: Evidence, compared: dict[str, Comparison]) -> list[Check]:
    checks = []
    for state, own in reference.gradients.items():
        error = own["packing_error"]
        checks.append(
            _check("reference packed as unpacked", error <= PACKING, own["packing_error_name"], state, error, PACKING)
        )
        if own.get("recurrence_error") is not None:
            error, where = own["recurrence_error"]
            checks.append(
                _check("oracle's delta rule as the recurrence", error <= RECURRENCE, where, state, error, RECURRENCE)
            )
    for state, comparison in compared.items():
        if state != OVERFIT:  # there even an honest gradient is mostly rounding
            error = comparison.reference_error
            near = 0 < error <= REFERENCE_ERROR  # no error at all means that the oracle is no oracle
            checks.append(_check("reference close to the oracle", near, "", state, error, REFERENCE_ERROR))
        share = comparison.share
        checks.append(_check("share of parameters with a gradient", share >= SHARE, "", state, share, SHARE))
    for finding in reference.findings:
        if not finding["passed"]:
            checks.append(_check(f"reference: {finding['name']}", False, finding["detail"]))
    wrong = reference.update["problems"] or not reference.update["error"] <= reference.update["limit"]
    return [*checks, _check("the reference's update is right", not wrong, reference.update["name"])]


def _moving(reference: Evidence, candidate: Evidence) -> list[Check]:
    states = reference.free_run["state"]
    frozen = states[0] == states[-1] and len(states) > 1
    stuck = sorted(set(candidate.free_run["still"]) - set(reference.free_run["still"]))
    return [_check("weights move", not frozen and not stuck, f"{len(stuck)} never move, first {stuck[0]}" if stuck else "")]


def _ran(reference: Evidence, candidate: Evidence) -> list[Check]:
    """Proof that the candidate ran: other bits than the reference, or some of the reference's work no longer done."""
    change = changes(reference.work, candidate.work)
    replays = candidate.free_run["replays"]
    settled = replays[len(replays) // 2 :]  # by then all graphs are captured
    differs = same_bits(reference, candidate) is not None
    ran = differs or bool(change.gone) or settled[-1] > 0
    detail = "" if ran else "it has the reference's bits and still does all of the reference's work"
    checks = [_check("the candidate did work of its own", ran, detail)]
    if any(settled):
        few, many = min(settled), max(settled)
        checks.append(_check("every step replays as many graphs", few == many, f"{few} to {many} in the second half"))
    wire = candidate.tripwire
    return [*checks, _check("the tripwire turns the gate red", wire["red"], wire["detail"])]
