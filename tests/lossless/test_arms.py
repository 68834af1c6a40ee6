"""Every optimization through the whole gate, in processes of its own, on a small hybrid model.

As much evidence as `python -m abtest.run` gathers; only the model and its packs are smaller. On a GPU in bf16; elsewhere in
fp32, since Triton's interpreter truncates bf16.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from abtest.arm import ArmSpec
from abtest.command import gate_config
from abtest.experiment import Experiment
from abtest.settings import GateConfig
from abtest.verdict import PARTS, Level
from kernels.contract import Exactness
from kernels.registry import discover, is_negative, unmet
from loop.config import Config, DataConfig, LoraConfig

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SETTINGS = GateConfig(parallel=2)  # everything else as the command has it: fewer steps or probes would be another gate
CONFIG = gate_config(
    Config(
        model="qwen3.5-tiny",
        device=DEVICE.type,
        dtype="bfloat16" if DEVICE.type == "cuda" else "float32",
        gradient_checkpointing=True,
        lora=LoraConfig(rank=8, alpha=16.0),
        data=DataConfig(pack_length=192),
    ),
    SETTINGS,
)
PASSES = {
    Exactness.BITWISE: {Level.BITWISE},
    Exactness.ROUNDING: {Level.BITWISE, Level.ROUNDING},
    Exactness.APPROX: {Level.APPROX},
}


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Experiment]:
    """Stock, its repeat, its oracle and its noise floor. One thread an arm: tiny matrices gain nothing from more."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if DEVICE.type == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    folder = tmp_path_factory.mktemp("arms")
    with Experiment(CONFIG, SETTINGS, folder, environment, lambda arm, phase, done, total: None) as prepared:
        prepared.prepare()
        yield prepared


@pytest.mark.lossless
def test_the_reference_repeats_itself(experiment):
    verdict = experiment.repeat_verdict()
    assert verdict.level is Level.BITWISE, verdict.reason


@pytest.mark.lossless
@pytest.mark.parametrize("optimization", [pytest.param(item, id=name) for name, item in discover().items()])
def test_arm_keeps_its_claim(optimization, request):
    missing = unmet(optimization.needs, DEVICE)
    if missing:
        pytest.skip(missing)
    if is_negative(optimization.name) and DEVICE.type == "cpu":
        pytest.skip("a negative result: its op is gated here, its whole run where there is a GPU")
    experiment = request.getfixturevalue("experiment")  # not made for what is skipped
    spec = ArmSpec(optimization.name, CONFIG, (optimization.name,))
    candidate = experiment.gate_arm(spec, optimization.exactness)
    with candidate.arm:
        verdict = candidate.verdict
    if verdict.level is Level.NOT_RUN:
        pytest.skip(verdict.reason)
    assert {check.part for check in verdict.checks} >= PARTS.keys() - {0}, "a part of the gate did not run"
    if CONFIG.dtype in optimization.fails.arm:
        assert verdict.level is Level.FAILED, f"a negative result is {verdict.level.value} now: {verdict.reason}"
    else:
        assert verdict.level in PASSES[optimization.exactness], verdict.reason
