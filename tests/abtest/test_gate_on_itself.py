"""The gate itself under test: the reference against itself, arms the wrong way round, and candidates that lack something.

Each goes through the whole gate in this process, beside one reference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from tiny import CONFIG as TINY

from abtest import gate, states
from abtest.arm import ArmSpec
from abtest.catalogue.patching import around_micro_step, swap_optimizer
from abtest.evidence import Evidence
from abtest.experiment import Candidate
from abtest.gradients import Comparison, compare
from abtest.in_process import InProcessExperiment
from abtest.settings import GateConfig
from abtest.tripwire import read_distances
from abtest.verdict import Level, Verdict
from kernels import registry
from kernels.contract import Exactness, Optimization
from loop.config import DataConfig
from loop.optim import learning_rate
from loop.run import Run

CONFIG = dataclasses.replace(TINY, model="qwen3-shallow-tiny", steps=6, data=DataConfig(pack_length=96))
SETTINGS = GateConfig(steps=6, replicas=4, probes=4, repeats=3)
SCALED = "lora_scale_off:first:0.01"


def silent(arm: str, phase: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


@pytest.fixture(scope="module")
def experiment(one_thread, tmp_path_factory):
    """The reference with its repeat, oracle and noise floor, made once."""
    settings = dataclasses.replace(SETTINGS, oracle_cache=tmp_path_factory.mktemp("oracle"))
    with InProcessExperiment(CONFIG, settings, tmp_path_factory.mktemp("gate"), {}, silent) as made:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(states, "OVERFIT_STEPS", 10)  # how well it knows its documents plays no part here
            made.prepare()
        yield made


@pytest.fixture
def gated(experiment, monkeypatch) -> Callable[..., Candidate]:
    """Gates an optimization of this test's own, which claims ROUNDING."""

    def through(apply: Callable[[Run], None], eligible=lambda run: None) -> Candidate:
        own = Optimization("own", "a test's", Exactness.ROUNDING, "it isn't", eligible, apply)
        monkeypatch.setattr(registry, "discover", lambda: {"own": own})
        return experiment.gate_arm(ArmSpec("own", CONFIG, ("own",)), Exactness.ROUNDING)

    return through


@pytest.fixture(scope="module")
def scaled(experiment) -> Candidate:
    """A candidate that is wrong by one percent in one adapter."""
    return experiment.gate_arm(ArmSpec("scaled", CONFIG, (), SCALED), Exactness.ROUNDING)


@pytest.fixture(scope="module")
def again(experiment) -> Candidate:
    """The reference once more, through everything a candidate goes through."""
    return experiment.gate_arm(ArmSpec("stock once more", CONFIG), Exactness.ROUNDING)


def judged(experiment, evidence: Evidence, claim=Exactness.ROUNDING, wanted=(), compared=None) -> Verdict:
    compared = experiment._compare(evidence) if compared is None else compared
    return gate.judge(claim, experiment.reference, experiment.repeat, evidence, wanted, experiment.sigma, compared)


def failing(verdict: Verdict) -> list[str]:
    return [check.name for check in verdict.checks if not check.passed]


# The reference against itself


def test_the_reference_repeats_itself_bitwise(experiment):
    verdict = experiment.repeat_verdict()
    assert verdict.level is Level.BITWISE and not failing(verdict)


@pytest.mark.parametrize("claim", [Exactness.BITWISE, Exactness.ROUNDING])
def test_the_reference_as_a_candidate_is_bitwise(claim, again, experiment):
    verdict = judged(experiment, again.evidence, claim)
    assert verdict.level is Level.BITWISE and not failing(verdict)
    assert {check.part for check in verdict.checks} >= {1, 2, 3, 4, 5}
    assert "same bits at all 6 steps" in verdict.reason


def test_the_reference_is_at_distance_nothing_from_itself(again, experiment):
    for comparison in experiment._compare(again.evidence).values():
        assert (comparison.rho, comparison.geomean, comparison.row, comparison.alpha) == (1, pytest.approx(1), 1, 0)


def test_the_reference_under_a_candidates_name_is_invalid(again, experiment):
    verdict = judged(experiment, again.evidence, wanted=("own",))
    assert verdict.level is Level.INVALID
    assert verdict.reason == "the candidate is switched on: no (off: own)"
    assert "the candidate did work of its own" in failing(verdict)


# The arms exchanged


def exchanged(experiment, candidate: Candidate) -> tuple[Evidence, dict[str, Comparison]]:
    """The candidate's evidence in the reference's place, with what the oracle noted; and the comparisons the other way."""
    own, notes = candidate.evidence, ("packing_error", "packing_error_name", "recurrence_error")
    gradients = {
        state: answer | {key: experiment.reference.gradients[state][key] for key in notes}
        for state, answer in own.gradients.items()
    }
    sides = {s: (read_distances(own.gradients[s]), read_distances(experiment.reference.gradients[s])) for s in gradients}
    compared = {state: compare(*pair, own.build["elements"]) for state, pair in sides.items()}
    return dataclasses.replace(own, gradients=gradients), compared


def test_exchanged_arms_are_invalid(scaled, experiment):
    reference, compared = exchanged(experiment, scaled)
    candidate = dataclasses.replace(experiment.reference, tripwire={"red": True, "detail": ""})
    rest = (candidate, (SCALED,), experiment.sigma, compared)
    verdict = gate.judge(Exactness.ROUNDING, reference, experiment.repeat, *rest)
    assert verdict.level is Level.INVALID
    assert verdict.reason.startswith("the reference repeats itself bitwise: no (")
    verdict = gate.judge(Exactness.ROUNDING, reference, reference, *rest)  # even where the repeat is exchanged with it
    assert verdict.level is Level.INVALID
    assert verdict.reason == f"the candidate is switched on: no (off: {SCALED})"


def test_a_wrong_reference_does_not_make_a_right_candidate_pass(scaled, experiment):
    reference, compared = exchanged(experiment, scaled)
    verdict = gate.judge(Exactness.ROUNDING, reference, None, experiment.reference, (), experiment.sigma, compared)
    assert verdict.level is Level.FAILED
    assert "gradient scale error" in failing(verdict)
    assert "gradient error ratio, worst parameter" not in failing(verdict)  # it is closer to the truth


# Gradients that are wrong in kind


def not_a_number(run: Run) -> None:
    """One element of one gradient."""
    name = next(name for name in run.optimizer.masters if "layers.1" in name)

    def change(original, *arguments):
        loss = original(*arguments)
        run.optimizer.masters[name].grad.view(-1)[3] = torch.nan
        return loss

    around_micro_step(run, change)


def without_one(run: Run) -> None:
    name = next(name for name in run.optimizer.masters if "layers.1" in name)

    def change(original, *arguments):
        loss = original(*arguments)
        run.optimizer.masters[name].grad = None
        return loss

    around_micro_step(run, change)


@pytest.mark.parametrize(
    ("apply", "words"), [(not_a_number, "gradient is not finite in probe batch 0"), (without_one, "no gradient")]
)
def test_a_gradient_wrong_in_kind_is_invalid(apply, words, gated, experiment):
    verdict = gated(apply).verdict
    name = next(name for name in experiment.reference.build["elements"] if "layers.1" in name)
    assert verdict.level is Level.INVALID
    assert verdict.reason == f"gradients complete and finite at step 0: no ({name}: {words})"


def test_a_tensor_less_that_trains_is_invalid(again, experiment):
    build = dict(again.evidence.build)
    build["elements"] = dict(list(build["elements"].items())[1:])
    verdict = judged(experiment, dataclasses.replace(again.evidence, build=build))
    assert verdict.level is Level.INVALID and verdict.reason == "same trained tensors in both arms: no"


def test_gradients_in_one_buffer_are_invalid(experiment):
    case = "gradients_in_one_buffer:first:1"
    verdict = experiment.gate_arm(ArmSpec("aliased", CONFIG, (), case), Exactness.ROUNDING).verdict
    assert verdict.level is Level.INVALID
    assert "shares memory with the gradient of" in verdict.reason


def test_a_state_without_gradients_is_invalid(again, experiment):
    first, *others = experiment.states
    fewer = dataclasses.replace(again.evidence, gradients={state: again.evidence.gradients[state] for state in others})
    compared = {state: c for state, c in experiment._compare(again.evidence).items() if state != first}
    verdict = judged(experiment, fewer, compared=compared)
    assert verdict.level is Level.INVALID
    assert verdict.reason.startswith(f"gradients complete and finite at {first}: no")
    assert "the candidate reported none" in verdict.reason


# A candidate that is not there


def test_an_optimization_that_does_nothing_is_invalid(gated):
    verdict = gated(lambda run: None).verdict
    assert verdict.level is Level.INVALID
    assert verdict.reason == "switching it on changed the run: no (no seam changed)"
    assert "the candidate did work of its own" in failing(verdict)


def test_an_optimization_that_the_run_refuses_is_not_run(gated):
    candidate = gated(lambda run: None, eligible=lambda run: "wants another run")
    assert candidate.verdict == Verdict(Level.NOT_RUN, "wants another run")
    assert candidate.evidence is None


# A candidate that lacks steps


def test_an_arm_with_fewer_steps_is_invalid(experiment, monkeypatch):
    monkeypatch.setattr(
        experiment, "_free_run", lambda arm: arm.call("free_run", steps=SETTINGS.steps - 1, resync=experiment.resync)
    )
    candidate = experiment.gate_arm(ArmSpec("short", CONFIG, (), "loss_by_logsumexp:all:0"), Exactness.ROUNDING)
    assert len(candidate.evidence.losses) == SETTINGS.steps - 1
    assert candidate.verdict.level is Level.INVALID
    assert candidate.verdict.reason == "everything was measured: no (candidate: 5 steps instead of 6)"


def skips_every_second(kind: type) -> type:
    class Skips(kind):
        def step(self, step: int):
            if step % 2 == 0:
                return super().step(step)
            norm = torch.stack([g.square().sum() for g in self.gradients().values()]).sum().sqrt()
            self.zero_grad()
            return learning_rate(self.config, step, self.steps), norm

    return Skips


def test_an_optimizer_that_skips_steps_fails(gated):
    verdict = gated(lambda run: swap_optimizer(run, skips_every_second)).verdict
    assert verdict.level is Level.FAILED
    assert verdict.reason.startswith("update beside fp64 AdamW: no, 1 beside 1e-05 (update of ")
    assert ", step 1, " in verdict.reason
