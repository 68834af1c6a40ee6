"""The update oracle lets honest AdamWs through, and nothing else."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from tiny import CONFIG, tiny
from torch import Tensor

from abtest.catalogue.patching import swap_optimizer
from abtest.update import UPDATE, UpdateReport, check_update, rate_of, scenarios, update_config
from loop.config import Config, OptimConfig
from loop.optim import MasterAdamW, learning_rate

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 30
OPTIM = update_config(Config()).optim


def report_of(kind: type | None = None, method: str = "full", dtype: str = "float32", **changes) -> UpdateReport:
    run, _ = tiny(method=method, dtype=dtype, **({"steps": STEPS, "optim": OPTIM} | changes))
    if kind is not None:
        swap_optimizer(run, lambda old: kind)
    return check_update(run, 0)


class ByHand(MasterAdamW):
    """AdamW written out in fp32; what a defect changes is a method of its own."""

    def coefficient(self, norm: Tensor) -> Tensor:
        limit = self.config.clip_norm or math.inf
        return (limit / (norm + 1e-6)).clamp(max=1.0)

    def denominator(self, square: Tensor) -> Tensor:
        return square.sqrt() + self.config.eps

    def decay(self, master: Tensor) -> float:
        return self.config.weight_decay if master.ndim >= 2 else 0.0

    def rate(self, step: int) -> float:
        return learning_rate(self.config, step, self.steps)

    @torch.no_grad()
    def step(self, step: int) -> tuple[float, Tensor]:
        held = [master.grad for master in self.masters.values()]
        norm, rate = torch.stack([g.norm() for g in held]).norm(), self.rate(step)
        for name, master in self.masters.items():
            self.update(name, master, master.grad * self.coefficient(norm), rate)
        self.publish()
        self.zero_grad()
        return learning_rate(self.config, step, self.steps), norm

    def update(self, name: str, master: Tensor, gradient: Tensor, rate: float) -> None:
        state, config = self.adamw.state[master], self.config
        if not state:
            state |= {"step": torch.tensor(0.0)} | {key: torch.zeros_like(master) for key in ("exp_avg", "exp_avg_sq")}
        state["step"] += 1
        count = float(state["step"])
        state["exp_avg"].lerp_(gradient, 1 - config.beta1)
        state["exp_avg_sq"].mul_(config.beta2).addcmul_(gradient, gradient, value=1 - config.beta2)
        mean, square = state["exp_avg"] / (1 - config.beta1**count), state["exp_avg_sq"] / (1 - config.beta2**count)
        master.mul_(1 - rate * self.decay(master)).sub_(rate * mean / self.denominator(square))


class Fused(MasterAdamW):
    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        for group in self.adamw.param_groups:
            group.update(fused=True, foreach=False)


# Defects, most of a line or two.


class NoDecay(ByHand):
    def decay(self, master):
        return 0.0


class DecayOfNorms(ByHand):
    def decay(self, master):
        return self.config.weight_decay


class CoupledDecay(ByHand):
    def decay(self, master):
        return 0.0

    def update(self, name, master, gradient, rate):
        super().update(name, master, gradient + super().decay(master) * master, rate)


class NoClipping(ByHand):
    def coefficient(self, norm):
        return torch.ones_like(norm)


class ClippedByTensor(NoClipping):
    def update(self, name, master, gradient, rate):
        super().update(name, master, gradient * ByHand.coefficient(self, gradient.norm()), rate)


class ClippedByTheNormBefore(ByHand):
    before = None

    def coefficient(self, norm):
        return super().coefficient(norm if self.before is None else self.before)

    def step(self, step):
        rate, norm = super().step(step)
        self.before = norm
        return rate, norm


class ClippedByTheNormOfAMicroStep(ByHand):
    def coefficient(self, norm):
        return super().coefficient(norm * 0.99)


class BiasCorrectionOffByOne(ByHand):
    def update(self, name, master, gradient, rate):
        state = self.adamw.state[master]
        if state:
            state["step"] += 1
        super().update(name, master, gradient, rate)
        state["step"] -= 1


class EpsInsideTheRoot(ByHand):
    def denominator(self, square):
        return (square + self.config.eps).sqrt()


class WithSettings(ByHand):
    settings: dict[str, float]  # what it takes for the configuration's

    def __init__(self, parameters, config, steps):
        super().__init__(parameters, dataclasses.replace(config, **self.settings), steps)


class OtherBeta2(WithSettings):
    settings = {"beta2": 0.99}


class NoWarmUp(WithSettings):
    settings = {"warmup_steps": 0}


class DecaysToZero(WithSettings):
    settings = {"min_lr_ratio": 0.0}


class OneStepAhead(ByHand):
    def rate(self, step):
        return super().rate(step + 1)


class HalfTheRate(ByHand):
    def rate(self, step):
        return super().rate(step) / 2


class RateMisreported(ByHand):
    def step(self, step):
        rate, norm = super().step(step)
        return rate * (1 + 1e-4), norm


class NormMisreported(ByHand):
    def step(self, step):
        rate, norm = super().step(step)
        return rate, norm * 1.001


class NormAfterClipping(ByHand):
    def step(self, step):
        rate, norm = super().step(step)
        return rate, norm * self.coefficient(norm)


class MomentsInBf16(ByHand):
    def update(self, name, master, gradient, rate):
        super().update(name, master, gradient, rate)
        state = self.adamw.state[master]
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = state[key].bfloat16().float()


class MastersInBf16(ByHand):
    def update(self, name, master, gradient, rate):
        super().update(name, master, gradient, rate)
        master.copy_(master.bfloat16())


class OneSkipped(ByHand):
    def update(self, name, master, gradient, rate):
        if name != list(self.masters)[5]:
            super().update(name, master, gradient, rate)


class SkipsZeroGradients(ByHand):
    def update(self, name, master, gradient, rate):
        if gradient.any():
            super().update(name, master, gradient, rate)


class OneNotHeld(ByHand):
    def __init__(self, parameters, config, steps):
        super().__init__({name: p for name, p in parameters.items() if name != list(parameters)[5]}, config, steps)


class OneNaN(ByHand):
    def update(self, name, master, gradient, rate):
        super().update(name, master, gradient, rate)
        if name == list(self.masters)[5]:
            master.view(-1)[3] = math.nan


class AccumulatedInBf16(ByHand):
    def _master(self, parameter):
        return parameter.detach().float().clone()

    def gradients(self):
        return {name: p.grad for name, p in self.parameters.items()}

    def step(self, step):
        for name, master in self.masters.items():
            master.grad = self.parameters[name].grad.float()
            self.parameters[name].grad = None
        return super().step(step)


class LastMicroStepOnly(ByHand):
    def gradients(self):
        for master in self.masters.values():
            master.grad = master.grad if master.grad is None else 0.9 * master.grad
        return super().gradients()


class NotPublished(ByHand):
    def publish(self):
        pass


class PublishedTooEarly(ByHand):
    """The rounded weights are a step behind."""

    def step(self, step):
        old = {name: p.detach().clone() for name, p in self.parameters.items()}
        out = super().step(step)
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(old[name])
        return out


class NotCleared(ByHand):
    def zero_grad(self):
        pass


class CountLost(ByHand):
    def load_state(self, state):
        super().load_state({key: torch.zeros_like(value) if key.startswith("step.") else value for key, value in state.items()})


class CountShared(ByHand):
    """One tensor counts for all, and each parameter adds 1."""

    def load_state(self, state):
        super().load_state(state)
        shared = torch.tensor(float(next((value for key, value in state.items() if key.startswith("step.")), 0.0)))
        for moments in self.adamw.state.values():
            moments["step"] = shared


class MomentsNotLoaded(ByHand):
    def load_state(self, state):
        super().load_state({key: value for key, value in state.items() if key.startswith("master.")})


class MomentMissing(ByHand):
    def state(self):
        return {key: value for key, value in super().state().items() if key != f"exp_avg_sq.{list(self.masters)[5]}"}


class SquareMomentHalfRate(ByHand):
    """The square is taken before the gradient is clipped."""

    def update(self, name, master, gradient, rate):
        super().update(name, master, gradient, rate)
        self.adamw.state[master]["exp_avg_sq"].add_(gradient.square(), alpha=1e-5)


EVERYWHERE = [
    NoDecay, CoupledDecay, NoClipping, ClippedByTensor, ClippedByTheNormBefore, ClippedByTheNormOfAMicroStep,
    BiasCorrectionOffByOne, EpsInsideTheRoot, OtherBeta2, NoWarmUp, DecaysToZero, OneStepAhead, HalfTheRate, RateMisreported,
    NormMisreported, NormAfterClipping, MomentsInBf16, MastersInBf16, OneSkipped, SkipsZeroGradients, OneNotHeld, OneNaN,
    LastMicroStepOnly, NotCleared, CountLost, CountShared, MomentsNotLoaded, MomentMissing, SquareMomentHalfRate,
]  # fmt: skip
ONLY_FULL = [DecayOfNorms]  # adapters are matrices
ONLY_BF16 = [AccumulatedInBf16, NotPublished, PublishedTooEarly]  # in fp32 the parameter is its own master


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("kind", [None, ByHand, Fused], ids=["loop", "by hand", "fused"])
def test_an_honest_adamw_passes_with_room_to_spare(kind, method, dtype):
    report = report_of(kind, method, dtype)
    assert report.problems == []
    assert 0 < report.error < UPDATE / 4, report.name
    assert report.passed


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("kind", EVERYWHERE)
def test_a_planted_defect_fails(kind, method):
    report = report_of(kind, method)
    assert not report.passed, (report.error, report.name)


@pytest.mark.parametrize("kind", [*EVERYWHERE, *ONLY_BF16, *ONLY_FULL])
def test_a_planted_defect_fails_in_bf16(kind):
    report = report_of(kind, "full", "bfloat16")
    assert not report.passed, (report.error, report.name)


def test_the_decay_of_norms_fails_in_fp32():
    report = report_of(DecayOfNorms)
    assert report.error > 100 * UPDATE and report.problems == []


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (OneNotHeld, "does not hold"),
        (NormMisreported, "the norm before clipping is"),
        (RateMisreported, "the schedule says"),
        (NoWarmUp, "step 0, cold: the learning rate is 0.2, the schedule says 0.0666666667"),
        (NotCleared, "were not cleared"),
        (CountShared, "the state's step."),
        (MomentMissing, "has no exp_avg_sq."),
        (LastMicroStepOnly, "do not add up in fp32"),
    ],
)
def test_a_problem_says_what_is_wrong(kind, words):
    assert any(words in problem for problem in report_of(kind).problems)


def test_the_worst_tensor_is_named():
    report = report_of(OneSkipped)
    assert report.error == pytest.approx(1.0) or report.error == math.inf
    assert list(tiny(method="full")[0].optimizer.parameters)[5] in report.name
    assert math.isnan(report_of(OneNaN).error)


@pytest.mark.parametrize("steps", [1, 2, 12])
@pytest.mark.parametrize(
    "changes",
    [
        {"clip_norm": 0.0}, {"weight_decay": 0.0}, {"eps": 0.0}, {"eps": 1e-3}, {"warmup_steps": 0}, {"warmup_steps": 1000},
        {"lr": 1e-6}, {"min_lr_ratio": 0.0}, {"min_lr_ratio": 1e-6}, {"min_lr_ratio": 1.0}, {"beta1": 0.0, "beta2": 0.0},
        {"clip_norm": 1e-3, "beta1": 0.99, "weight_decay": 1e-4},
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_users_have(changes, steps):
    config = dataclasses.replace(CONFIG, steps=steps, optim=OptimConfig(**changes))
    report = report_of(None, "full", steps=steps, optim=update_config(config).optim)
    assert report.passed and report.error < UPDATE / 2, report


def test_the_configuration_keeps_what_is_off_off():
    optim = update_config(Config(optim=OptimConfig(lr=1e-4, weight_decay=0.0, clip_norm=0.0, min_lr_ratio=0.0))).optim
    assert (optim.weight_decay, optim.clip_norm, optim.min_lr_ratio) == (0.0, 0.0, 0.0) and optim.lr >= 0.05
    assert update_config(Config(optim=OptimConfig(weight_decay=2.0))).optim.weight_decay == 2.0


@pytest.mark.parametrize(("steps", "warmup"), [(30, 3), (30, 0), (5, 10), (1, 0), (1, 1), (4, 3), (5, 4)])
def test_the_schedule_is_the_loop_s(steps, warmup):
    config = OptimConfig(lr=0.3, warmup_steps=warmup, min_lr_ratio=0.2)
    for step in range(steps + 2):
        assert rate_of(config, step, steps) == pytest.approx(learning_rate(config, step, steps), rel=1e-12)


def test_scenarios_stay_inside_the_run():
    assert [scenario.step for scenario in scenarios(30)] == [0, 1, 10, 29, 29]
    assert {scenario.step for scenario in scenarios(1)} == {0}
    assert any(scenario.excess > 5 for scenario in scenarios(30)) and any(scenario.excess < 0.5 for scenario in scenarios(30))
