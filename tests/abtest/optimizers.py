"""AdamWs to try the update oracle on: honest ones, and one class a defect, most of a line or two."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from loop.optim import MasterAdamW, learning_rate


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


# Defects.


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
    settings: Mapping[str, float] = MappingProxyType({})  # what it takes for the configuration's

    def __init__(self, parameters, config, steps):
        super().__init__(parameters, dataclasses.replace(config, **self.settings), steps)


class OtherBeta2(WithSettings):
    settings = MappingProxyType({"beta2": 0.99})


class NoWarmUp(WithSettings):
    settings = MappingProxyType({"warmup_steps": 0})


class DecaysToZero(WithSettings):
    settings = MappingProxyType({"min_lr_ratio": 0.0})


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


class OneNaNOnce(ByHand):
    def update(self, name, master, gradient, rate):
        super().update(name, master, gradient, rate)
        state = self.adamw.state[master]
        if name == list(self.masters)[5] and state["step"] == 1:
            state["exp_avg"].view(-1)[0] = math.nan


class AccumulatedInBf16(ByHand):
    def __init__(self, parameters, config, steps):
        super().__init__(parameters, config, steps)
        self.release()

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
        super().load_state(
            {key: torch.zeros_like(value) if key.startswith("step.") else value for key, value in state.items()}
        )


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


class SquareMomentTooLarge(ByHand):
    def update(self, name, master, gradient, rate):
        super().update(name, master, gradient, rate)
        self.adamw.state[master]["exp_avg_sq"].add_(gradient.square(), alpha=1e-5)


EVERYWHERE = [
    NoDecay, CoupledDecay, NoClipping, ClippedByTensor, ClippedByTheNormBefore, ClippedByTheNormOfAMicroStep,
    BiasCorrectionOffByOne, EpsInsideTheRoot, OtherBeta2, NoWarmUp, DecaysToZero, OneStepAhead, HalfTheRate, RateMisreported,
    NormMisreported, NormAfterClipping, MomentsInBf16, MastersInBf16, OneSkipped, SkipsZeroGradients, OneNotHeld, OneNaN,
    OneNaNOnce, LastMicroStepOnly, NotCleared, CountLost, CountShared, MomentsNotLoaded, MomentMissing, SquareMomentTooLarge,
]  # fmt: skip
ONLY_FULL = [DecayOfNorms]  # adapters are matrices
ONLY_BF16 = [AccumulatedInBf16, NotPublished, PublishedTooEarly]  # in fp32 the parameter is its own master
