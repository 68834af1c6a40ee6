"""A leak in the reference itself, which every arm shares: no comparison of arms can see it, and in bf16 it looks like
rounding. The packed path in the oracle's arithmetic shows it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from tiny import CONFIG as TINY
from tiny import tiny, two_probes

import loop.model
from abtest import states
from abtest.arm import ArmSpec
from abtest.catalogue import find
from abtest.in_process import InProcessExperiment
from abtest.limits import PACKING
from abtest.oracle import exact_gradients, make_exact, packing_error
from abtest.settings import GateConfig
from abtest.verdict import Level
from kernels.contract import Exactness
from loop.config import DataConfig
from loop.run import Run

BF16 = dataclasses.replace(TINY, steps=3, dtype="bfloat16", data=DataConfig(pack_length=128))
LITTLE = GateConfig(steps=3, replicas=2, probes=3, repeats=2)
CHECK = "reference packed as unpacked"
BITWISE = "static_lora"  # has the reference's bits, beside any reference
LEAKS = ("state_leak:first:0.25", "conv_leak:last:0.25", "attention_leak:first:0.25", "boundaries_dropped:first:0.25",
         "boundaries_late:last:0.25", "state_leaks_faded:first:0.1", "backward_state_leak:first:1")  # fmt: skip
pytestmark = pytest.mark.usefixtures("one_thread")


def silent(arm: str, phase: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def packed(plant: Callable[[Run], None]) -> list[tuple[float, str]]:
    """`packing_error` of each probe, for a run into which something was planted before the oracle took it."""
    run, _ = tiny(dtype="bfloat16")
    plant(run)
    dtype, found = make_exact(run), []
    for probe in two_probes(run):
        truth = {name: gradient.clone() for name, gradient in exact_gradients(run, probe, dtype).items()}
        found.append(packing_error(run, probe, dtype, truth))
    return found


def test_without_a_leak_only_rounding_is_left():
    assert all(error < 1e-12 for error, _ in packed(lambda run: None))


@pytest.mark.parametrize("case", LEAKS)
def test_a_leak_is_above_the_limit(case):
    worst, where = max(packed(find(case).apply))
    assert worst > PACKING and "lora_" in where


# Through the whole gate


def nothing_isolated(model) -> int:
    return 0  # transformers' own layers stay, which ignore where documents begin


def test_beside_a_leaking_reference_every_arm_is_invalid(tmp_path, monkeypatch):
    monkeypatch.setattr(states, "OVERFIT_STEPS", 5)
    monkeypatch.setattr(loop.model, "isolate_documents", nothing_isolated)
    settings = dataclasses.replace(LITTLE, oracle_cache=tmp_path / "oracle")
    with InProcessExperiment(BF16, settings, tmp_path, {}, silent) as experiment:
        experiment.prepare()
        assert experiment.repeat_verdict().level is Level.BITWISE  # a leak repeats itself
        verdict = experiment.gate_arm(ArmSpec(BITWISE, BF16, (BITWISE,)), Exactness.BITWISE).verdict
    assert verdict.level is Level.INVALID
    assert verdict.reason.startswith(f"{CHECK} at step 0: no, ") and "(model.layers." in verdict.reason
    failed = [check for check in verdict.checks if not check.passed]
    assert [check.state for check in failed if check.name == CHECK] == list(experiment.states)
    assert any(check.name == "reference: editing a document leaves the loss of the others unchanged" for check in failed)
    assert all(check.part == 1 or check.name.startswith("editing") for check in failed), failed  # no comparison of arms
