"""Check 3: one optimizer update from given weights, moments and gradients, beside AdamW in fp64.

The arithmetic is Loshchilov and Hutter's (Decoupled Weight Decay Regularization, arXiv 1711.05101, algorithm 2), written
down once more here: an oracle that called the optimizer's own code would agree with its mistakes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from abtest.limits import RATE, UPDATE
from abtest.quantity import same_bits
from loop.config import Config, OptimConfig
from loop.model import trainable
from loop.run import Run

# Rates at which an update can be told from rounding. A weight near 1 has an ulp of 1.2e-7: at a rate of 1e-4 that is a
# thousandth of the update, a hundred times the limit. And fp32 AdamW multiplies by 1 - rate * decay, which is rounded to
# 6e-8: of a rate * decay of 1e-6 that leaves two digits.
LEARNING_RATE, WEIGHT_DECAY, LOWEST_RATIO, LONGEST_WARMUP = 0.2, 0.5, 0.1, 10

SIZE = 0.05  # root mean square of the weights at most, for the same reason: norms are brought down from 1
NOISE = 0.02  # added to them, since a LoRA's B is all zeros and a norm's weight all ones
MICRO_STEPS = 2
PORTION = 1 << 26  # numbers that are compared in fp64 at a time: half a GB each way
MOST_PROBLEMS = 50  # that a report holds; a systematic one repeats for every tensor


@dataclass
class UpdateReport:
    """error: the largest relative error of any tensor's update or moment, and `name` where; NaN once any is NaN. problems:
    what is wrong in kind, which no error measures. Passed when the error is at most UPDATE and there are no problems."""

    error: float = 0.0
    name: str = ""
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return self.error <= UPDATE and not self.problems

    def add(self, error: float, name: str) -> None:
        if not math.isnan(self.error) and not error <= self.error:  # NaN is the worst, and the first one stays
            self.error, self.name = error, name


@dataclass(frozen=True)
class Scenario:
    """One step. excess: the gradients' norm over the clipping limit. start: "cold" without moments, "on" from where the step
    before left the optimizer, "warm" from given weights, moments and step counts."""

    step: int
    excess: float
    start: str

    @property
    def where(self) -> str:
        return f"step {self.step}, {self.start}"


def update_config(config: Config) -> Config:
    """The configuration that a run must be built with for this check: the same one with rates at which an update can be told
    from rounding. What is off stays off."""
    optim = config.optim
    changed = dataclasses.replace(
        optim,
        lr=LEARNING_RATE,
        weight_decay=max(optim.weight_decay, WEIGHT_DECAY) if optim.weight_decay else 0.0,
        min_lr_ratio=max(optim.min_lr_ratio, LOWEST_RATIO) if optim.min_lr_ratio else 0.0,
        warmup_steps=min(optim.warmup_steps, LONGEST_WARMUP),
    )
    return dataclasses.replace(config, optim=changed)


def scenarios(steps: int) -> list[Scenario]:
    """The first two steps of a run, one behind the warm-up and the last; clipped by far, by a hair, or not at all."""
    cases = ((0, 500.0, "cold"), (1, 0.1, "on"), (10, 1.02, "warm"), (29, 7.0, "warm"), (29, 0.3, "warm"))
    return [Scenario(min(step, steps - 1), excess, start) for step, excess, start in cases]


def check_update(run: Run, seed: int) -> UpdateReport:
    """Every scenario in turn on the run's own optimizer, whose masters and state are overwritten with seeded values.

    The run should be built from `update_config`; afterwards it is spoilt for anything else. `run.optimizer` needs the
    methods of `loop.optim.MasterAdamW`, and `state` and `load_state` its names. Raises what the optimizer raises.
    """
    report = UpdateReport()
    if not _check_names(run, report):
        return report
    run.optimizer.zero_grad()
    for number, scenario in enumerate(scenarios(run.config.steps)):
        _Update(run, scenario, 1000 * seed + 10 * number, report).check()
    return report


def rate_of(config: OptimConfig, step: int, steps: int) -> float:
    """The schedule in words: up in a straight line over the warm-up steps, whose last has the full rate; then half a cosine
    down to `min_lr_ratio` of it, which the last step has."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    share = (step - config.warmup_steps) / max(steps - config.warmup_steps - 1, 1)
    floor = config.lr * config.min_lr_ratio
    return floor + (config.lr - floor) * (1 + math.cos(math.pi * min(share, 1.0))) / 2


class _Update:
    """One scenario on one run: what each part of it shares."""

    def __init__(self, run: Run, scenario: Scenario, seed: int, report: UpdateReport) -> None:
        self.run, self.optimizer, self.config = run, run.optimizer, run.config.optim
        self.scenario, self.seed, self.report = scenario, seed, report
        self.names = list(run.optimizer.parameters)
        self.scales, self.zero = self._scales()

    def check(self) -> None:
        before = self._start()
        norm = self._deliver()
        said_rate, said_norm = self.optimizer.step(self.scenario.step)
        said_norm = float(said_norm)
        rate = rate_of(self.config, self.scenario.step, self.run.config.steps)
        if not abs(said_rate - rate) <= RATE * rate:
            self._problem(f"the learning rate is {said_rate:.9g}, the schedule says {rate:.9g}")
        if abs(said_norm - norm) <= UPDATE * norm:
            norm = said_norm  # its rounding, which squares double, is not counted again in what follows
        else:
            self._problem(f"the norm before clipping is {said_norm:.9g}, the gradients' is {norm:.9g}")
        clip = min(1.0, self.config.clip_norm / (norm + 1e-6)) if self.config.clip_norm > 0 else 1.0
        after = self.optimizer.state()
        for index, name in enumerate(self.names):
            self._compare(name, before, after, self._gradient(index) * clip, rate)
        self._check_published()
        self._check_cleared()

    def _problem(self, words: str) -> None:
        if len(self.report.problems) < MOST_PROBLEMS:
            self.report.problems.append(f"{self.scenario.where}: {words}")

    def _scales(self) -> tuple[list[float], int | None]:
        """Root mean square of each tensor's gradient, apart by up to 1e5 and one near AdamW's eps once clipped; and which
        one is all zeros."""
        limit = self.config.clip_norm or 1.0
        factors = [10.0 ** (index % 6 - 4) for index in range(len(self.names))]
        sizes = [parameter.numel() for parameter in self.optimizer.parameters.values()]
        unit = math.sqrt(sum(n * f * f for n, f in zip(sizes, factors, strict=True)))
        scales = [factor * limit * self.scenario.excess / unit for factor in factors]
        if len(scales) < 4:
            return scales, None
        tiny = len(scales) // 3
        scales[tiny] = min(scales[tiny], (self.config.eps or 1e-12) * max(1.0, self.scenario.excess))
        return scales, 2 * len(scales) // 3 if self.config.eps > 0 else None  # without eps it would be 0 / 0

    def _normal(self, index: int, use: int) -> Tensor:
        """Standard normal fp32 values in the parameter's shape, the same ones for the same arguments."""
        parameter = self.optimizer.parameters[self.names[index]]
        generator = torch.Generator(parameter.device).manual_seed(((self.seed * 100_003 + index) * 10 + use) % 2**63)
        return torch.randn(parameter.shape, generator=generator, device=parameter.device)

    def _parts(self, index: int) -> Iterator[Tensor]:
        """The gradients of the micro-steps in the parameter's dtype; of different size, so that a sum in bf16 rounds."""
        dtype = self.optimizer.parameters[self.names[index]].dtype
        scale = 0.0 if index == self.zero else self.scales[index] / math.sqrt(10)
        for part in range(MICRO_STEPS):
            yield ((1 + 2 * part) * scale * self._normal(index, part)).to(dtype)

    def _gradient(self, index: int) -> Tensor:
        """What one tensor's gradients add up to, in fp64. Drawn anew instead of kept: memory for one tensor at a time."""
        return sum(part.double() for part in self._parts(index))

    def _deliver(self) -> float:
        """Gives gradients to the parameters the way backward does. Returns the norm of all in fp64."""
        for index, parameter in enumerate(self.optimizer.parameters.values()):
            for part in self._parts(index):
                torch.autograd.backward([parameter], [part])
        held, squares = self.optimizer.gradients(), []
        for index, name in enumerate(self.names):
            gradient = self._gradient(index)
            squares.append(gradient.square().sum())
            if held.get(name) is None:
                self._problem(f"{name} lost the gradient that was delivered to it")
            elif not _distance(held[name], gradient) <= UPDATE:
                self._problem(f"{name}: the gradients of {MICRO_STEPS} micro-steps do not add up in fp32")
        return math.sqrt(sum(float(square) for square in squares))

    def _start(self) -> dict[str, Tensor]:
        """Sets the optimizer's state, unless it goes on with its own. Returns copies of it."""
        state = {name: value.detach().clone() for name, value in self.optimizer.state().items()}
        if self.scenario.start == "on":
            return state
        has_moments = any(name.startswith("exp_avg.") for name in state)
        for index, name in enumerate(self.names):
            own = state[f"master.{name}"]
            clipped = self.scales[index] / max(1.0, self.scenario.excess)  # so that gradient and moment both matter
            damped = clipped / (clipped + self.config.eps)  # by eps, the update; the weights likewise, or it would drown
            own.mul_(SIZE / own.square().mean().sqrt().clamp_min(SIZE)).add_(NOISE * self._normal(index, 4)).mul_(damped)
            if self.scenario.start == "warm":
                state[f"exp_avg.{name}"] = clipped * self._normal(index, 5)
                state[f"exp_avg_sq.{name}"] = clipped**2 * (0.5 + self._normal(index, 6).abs())
                state[f"step.{name}"] = torch.tensor(float(self.scenario.step))
            elif has_moments:
                state |= {f"{key}.{name}": torch.zeros_like(own) for key in ("exp_avg", "exp_avg_sq")}
                state[f"step.{name}"] = torch.tensor(0.0)
        self.optimizer.load_state(state)
        self._check_published()
        return state

    def _compare(
        self, name: str, before: dict[str, Tensor], after: dict[str, Tensor], gradient: Tensor, rate: float
    ) -> None:
        """One tensor's update and moments beside fp64 AdamW, by portions: seven times the largest in fp64 would be 30 GB."""
        config, steps = self.config, int(before.get(f"step.{name}", torch.zeros(()))) + 1
        decay = config.weight_decay if before[f"master.{name}"].ndim >= 2 else 0.0
        held = {key: after.get(f"{key}.{name}") for key in ("exp_avg", "exp_avg_sq", "master")}
        squares = {key: _Squares() for key in held}
        for part in _portions(gradient.numel()):
            slope, weight = gradient.reshape(-1)[part], _flat(before[f"master.{name}"], part, gradient)
            mean, square = (_flat(before.get(f"{key}.{name}"), part, gradient) for key in ("exp_avg", "exp_avg_sq"))
            mean = config.beta1 * mean + (1 - config.beta1) * slope
            square = config.beta2 * square + (1 - config.beta2) * slope.square()
            adam = mean / (1 - config.beta1**steps) / ((square / (1 - config.beta2**steps)).sqrt() + config.eps)
            wanted = {"exp_avg": mean, "exp_avg_sq": square, "master": -rate * (adam + decay * weight)}
            for key, truth in wanted.items():
                found = _flat(held[key], part, gradient)
                squares[key].add(found - weight if key == "master" else found, truth)
        for key, found in held.items():
            if found is None:
                self._problem(f"the optimizer's state has no {key}.{name}")
                continue
            what = f"update of {name}" if key == "master" else f"{key}.{name}"
            self.report.add(squares[key].distance(), f"{what}, {self.scenario.where}")
        counted = after.get(f"step.{name}")
        if counted is None or float(counted) != steps:
            self._problem(f"the state's step.{name} is {'missing' if counted is None else float(counted)}, not {steps}")

    def _check_published(self) -> None:
        """The weights that compute are the masters, rounded."""
        held = self.optimizer.state()
        for name, parameter in self.optimizer.parameters.items():
            master = held.get(f"master.{name}")
            if master is not None and not same_bits(parameter.detach(), master.to(parameter.dtype)):
                self._problem(f"{name} computes with other weights than the optimizer holds")

    def _check_cleared(self) -> None:
        gradients = self.optimizer.gradients()
        left = [name for name, gradient in gradients.items() if gradient is not None and bool(gradient.any())]
        parameters = self.optimizer.parameters.items()
        left += [name for name, p in parameters if name not in left and p.grad is not None and bool(p.grad.any())]
        if left:
            self._problem(f"{len(left)} gradients were not cleared, first {left[0]}")


def _check_names(run: Run, report: UpdateReport) -> bool:
    """Whether the optimizer holds just what trains in the model, and a master of each."""
    optimizer, wanted = run.optimizer, {id(parameter): name for name, parameter in trainable(run.model).items()}
    held = {id(parameter) for parameter in optimizer.parameters.values()}
    report.problems += [
        f"the optimizer does not hold {name}, which trains" for key, name in wanted.items() if key not in held
    ]
    frozen = [name for name, parameter in optimizer.parameters.items() if not parameter.requires_grad]
    report.problems += [f"{name} takes no gradient any more" for name in frozen]
    state = optimizer.state()
    lacking = [name for name in optimizer.parameters if f"master.{name}" not in state]
    report.problems += [f"the optimizer's state has no master.{name}" for name in lacking]
    return not lacking and not frozen and bool(optimizer.parameters)


@dataclass
class _Squares:
    """Sums over portions of the squares of found - truth, and of truth."""

    apart: float = 0.0
    truth: float = 0.0

    def add(self, found: Tensor, truth: Tensor) -> None:
        self.apart += float((found - truth).square().sum())
        self.truth += float(truth.square().sum())

    def distance(self) -> float:
        """|found - truth| / |truth|; infinite for anything but zero where zero is right."""
        norm, error = math.sqrt(self.truth), math.sqrt(self.apart)
        return error / norm if norm > 0 else (0.0 if error == 0 else math.inf)


def _distance(found: Tensor, truth: Tensor) -> float:
    """|found - truth| / |truth| in fp64."""
    squares = _Squares()
    for part in _portions(truth.numel()):
        squares.add(_flat(found, part, truth), truth.reshape(-1)[part])
    return squares.distance()


def _portions(numbers: int) -> Iterator[slice]:
    return (slice(start, start + PORTION) for start in range(0, numbers, PORTION))


def _flat(tensor: Tensor | None, part: slice, like: Tensor) -> Tensor:
    """A portion of the tensor in the dtype and on the device of `like`; zeros where there is none."""
    if tensor is None:
        return like.new_zeros(())
    return tensor.reshape(-1)[part].to(like)
