"""A leak in the reference itself, which every arm shares: no comparison of arms can see it, and in bf16 it looks like
rounding. Only the packed path in the oracle's arithmetic shows it."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import planted
import pytest
from in_process import CONFIG, InProcessExperiment, silent
from planted import plant

import loop.model
from abtest import gate
from abtest.arm import ArmSpec
from abtest.experiment import STATES, GateConfig
from abtest.verdict import Level, Verdict
from kernels import registry
from kernels.contract import Exactness
from loop.delta_net import PackedDeltaNet, isolate_documents

BF16 = dataclasses.replace(CONFIG, dtype="bfloat16")
LITTLE = GateConfig(steps=2, replicas=1, probes=4)
CHECKS = [f"reference packed as unpacked, {state}" for state in STATES]
pytestmark = pytest.mark.usefixtures("one_thread")


def failing(verdict: Verdict) -> list[str]:
    return [check.name for check in verdict.checks if not check.passed]


def nothing_isolated(model) -> int:
    return 0  # transformers' own layers stay, which ignore where documents begin


def leaky_layers(kind: type):
    def isolate(model) -> int:
        swapped = isolate_documents(model)
        planted.swap_modules(PackedDeltaNet, kind)(SimpleNamespace(model=model))
        return swapped

    return isolate


def leaky_attention(model) -> None:
    planted.attention_across_documents(SimpleNamespace(model=model))


HIDDEN = {
    "transformers' own layer": nothing_isolated,
    "convolution": leaky_layers(planted.ConvLeak),
    "delta-rule state": leaky_layers(planted.StateLeak),
}


@pytest.fixture
def verdicts(tmp_path, monkeypatch):
    """Verdicts on two arms that would pass, beside whatever reference is built at the moment."""
    arms = {"wrapped": planted.wrapped_reference, "other order": planted.head(planted.other_order)}
    monkeypatch.setattr(registry, "discover", lambda: {name: plant(name, apply) for name, apply in arms.items()})

    def judge() -> list[Verdict]:
        with InProcessExperiment(BF16, LITTLE, tmp_path, {}, silent) as experiment:
            experiment.prepare()
            assert experiment.repeat_verdict().level is Level.BITWISE  # a leak repeats itself
            return [experiment.gate_arm(ArmSpec(name, BF16, (name,)), Exactness.ROUNDING).verdict for name in arms]

    return judge


def test_without_a_leak_the_packed_path_is_within_fp32_rounding(verdicts):
    for verdict in verdicts():
        assert verdict.level.lossless
        values = {check.name: check.value for check in verdict.checks if check.name in CHECKS}
        assert list(values) == CHECKS and all(0 < value < gate.PACKING_ERROR / 100 for value in values.values())


@pytest.mark.parametrize("isolate", HIDDEN.values(), ids=HIDDEN)
def test_a_leak_that_hides_in_bf16_makes_every_arm_invalid(isolate, verdicts, monkeypatch):
    monkeypatch.setattr(loop.model, "isolate_documents", isolate)
    for verdict in verdicts():
        assert verdict.level is Level.INVALID
        assert verdict.reason.startswith(f"{CHECKS[0]}: no, ") and "(model.layers." in verdict.reason
        assert failing(verdict) == CHECKS  # nothing else notices


def test_attention_across_documents_is_too_large_to_hide(verdicts, monkeypatch):
    monkeypatch.setattr(loop.model, "use_repeatable_attention", leaky_attention)
    for verdict in verdicts():
        assert verdict.level is Level.INVALID and verdict.reason.startswith(f"{CHECKS[0]}: no, ")
        assert failing(verdict) == [*CHECKS, *(f"reference close to the oracle, {state}" for state in STATES)]
