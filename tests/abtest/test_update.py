"""The update oracle lets honest AdamWs through, and nothing else."""

from __future__ import annotations

import dataclasses
import math

import pytest
from optimizers import (
    EVERYWHERE,
    ONLY_BF16,
    ONLY_FULL,
    ByHand,
    CountLost,
    CountShared,
    DecayOfNorms,
    Fused,
    LastMicroStepOnly,
    MastersInBf16,
    MomentMissing,
    MomentsInBf16,
    NoDecay,
    NormMisreported,
    NotCleared,
    NoWarmUp,
    OneNaN,
    OneNaNOnce,
    OneNotHeld,
    OneSkipped,
    RateMisreported,
)
from tiny import CONFIG, tiny

from abtest import limits
from abtest.catalogue.patching import swap_optimizer
from abtest.limits import UPDATE
from abtest.update import UpdateReport, check_update, rate_of, scenarios, update_config
from loop.config import Config, OptimConfig
from loop.optim import learning_rate

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 30
OPTIM = update_config(Config()).optim


def report_of(kind: type | None = None, method: str = "full", dtype: str = "float32", **changes) -> UpdateReport:
    run, _ = tiny(method=method, dtype=dtype, **({"steps": STEPS, "optim": OPTIM} | changes))
    if kind is not None:
        swap_optimizer(run, lambda old: kind)
    return check_update(run, 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("kind", [None, ByHand, Fused], ids=["loop", "by hand", "fused"])
def test_an_honest_adamw_passes_with_room_to_spare(kind, method, dtype):
    report = report_of(kind, method, dtype)
    assert report.problems == []
    assert 0 < report.error < UPDATE / 4, report.name
    assert report.passed


@pytest.mark.parametrize("kind", EVERYWHERE)
def test_a_planted_defect_fails(kind):
    report = report_of(kind, "lora")
    assert not report.passed, (report.error, report.name)


@pytest.mark.parametrize("kind", [*ONLY_BF16, *ONLY_FULL, MastersInBf16, MomentsInBf16, NoDecay, CountLost])
def test_a_planted_defect_fails_in_bf16(kind):
    report = report_of(kind, "full", "bfloat16")
    assert not report.passed, (report.error, report.name)


def test_portions_change_nothing_but_the_order_of_a_sum(monkeypatch):
    whole = report_of(Fused)
    monkeypatch.setattr("abtest.update.PORTION", 4097)
    part = report_of(Fused)
    assert part.problems == whole.problems == [] and part.name == whole.name
    assert part.error == pytest.approx(whole.error, rel=1e-9)
    for kind in (OneNaN, MomentMissing):
        assert not report_of(kind).passed


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


@pytest.mark.parametrize("kind", [OneNaN, OneNaNOnce])
def test_nan_is_the_worst_error_wherever_it_comes(kind):
    report = report_of(kind)
    assert math.isnan(report.error) and not report.passed
    assert list(tiny(method="full")[0].optimizer.parameters)[5] in report.name


@pytest.mark.parametrize("errors", [(math.nan, 3.0), (3.0, math.nan), (math.inf, math.nan, 0.0), (math.nan, math.inf)])
def test_nan_is_never_overwritten(errors):
    report = UpdateReport()
    for error in errors:
        report.add(error, f"{error}")
    assert math.isnan(report.error) and report.name == "nan" and not report.passed


def test_the_largest_error_is_kept():
    report = UpdateReport()
    for error in (1e-7, 3e-6, 2e-6):
        report.add(error, f"{error}")
    assert (report.error, report.name, report.passed) == (3e-6, "3e-06", True)
    report.add(UPDATE * 1.01, "worse")
    assert not report.passed and report.name == "worse"


def test_its_limits_are_among_the_recorded_ones():
    assert {"UPDATE", "RATE"} <= vars(limits).keys()


@pytest.mark.parametrize(("steps", "method"), [(1, "lora"), (2, "lora"), (12, "full")])
@pytest.mark.parametrize(
    "changes",
    [
        {"clip_norm": 0.0}, {"weight_decay": 0.0}, {"eps": 0.0}, {"eps": 1e-3}, {"warmup_steps": 0}, {"warmup_steps": 1000},
        {"lr": 1e-6}, {"min_lr_ratio": 0.0}, {"min_lr_ratio": 1e-6}, {"min_lr_ratio": 1.0}, {"beta1": 0.0, "beta2": 0.0},
        {"clip_norm": 1e-3, "beta1": 0.99, "weight_decay": 1e-4},
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_users_have(changes, steps, method):
    config = dataclasses.replace(CONFIG, steps=steps, optim=OptimConfig(**changes))
    report = report_of(None, method, steps=steps, optim=update_config(config).optim)
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
    assert any(scenario.excess > 5 for scenario in scenarios(30)) and any(
        scenario.excess < 0.5 for scenario in scenarios(30)
    )
