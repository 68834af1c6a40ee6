"""Every optimization through the whole gate, in processes of its own, on a small hybrid model.

As much evidence as `python -m abtest.run` gathers; only the model and its packs are smaller. On a GPU in bf16; elsewhere in
fp32, since Triton's interpreter truncates bf16, and with one layer of either kind, since it takes its time over each.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import torch

from abtest.arm import ArmFailed, ArmSpec
from abtest.command import gate_config
from abtest.experiment import Experiment
from abtest.settings import GateConfig
from abtest.verdict import PARTS, Level
from kernels.contract import Exactness
from kernels.registry import discover, is_negative, unmet, with_recipes
from loop.config import Config, DataConfig, LoraConfig

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SETTINGS = GateConfig(parallel=2)  # everything else as the command has it: fewer steps or probes would be another gate
CONFIG = gate_config(
    Config(
        model="qwen3.5-tiny" if DEVICE.type == "cuda" else "qwen3.5-turned-tiny",
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
def experiment_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Config], Experiment]]:
    """Stock of a recipe, its repeat, its oracle and its noise floor. One thread an arm: tiny matrices want no more."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if DEVICE.type == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    prepared: dict[Config, Experiment] = {}
    with ExitStack() as stack:

        def of(config: Config) -> Experiment:
            if config not in prepared:
                folder = tmp_path_factory.mktemp("arms")
                one = Experiment(config, SETTINGS, folder, environment, lambda arm, phase, done, total: None)
                stack.enter_context(one).prepare()
                prepared[config] = one
            return prepared[config]

        yield of


@pytest.mark.lossless
def test_the_reference_repeats_itself(experiment_of):
    verdict = experiment_of(CONFIG).repeat_verdict()
    assert verdict.level is Level.BITWISE, verdict.reason


@pytest.mark.lossless
@pytest.mark.parametrize("optimization", [pytest.param(item, id=name) for name, item in discover().items()])
def test_arm_keeps_its_claim(optimization, experiment_of):
    missing = unmet(optimization.needs, DEVICE)
    if missing:
        pytest.skip(missing)
    if is_negative(optimization.name) and DEVICE.type == "cpu":
        pytest.skip("a negative result: its op is gated here, its whole run where there is a GPU")
    config = with_recipes(CONFIG, [optimization.name])
    spec = ArmSpec(optimization.name, config, (optimization.name,))
    declared = CONFIG.dtype in optimization.fails.arm
    try:
        candidate = experiment_of(config).gate_arm(spec, optimization.exactness)
    except ArmFailed as error:  # as `abtest.run` has it: an arm that ends is one that failed
        assert declared, error
        return
    with candidate.arm:
        verdict = candidate.verdict
    if verdict.level is Level.NOT_RUN:
        pytest.skip(verdict.reason)
    assert {check.part for check in verdict.checks} >= PARTS.keys() - {0}, "a part of the gate did not run"
    if declared:
        assert verdict.level is Level.FAILED, f"a negative result is {verdict.level.value} now: {verdict.reason}"
    else:
        assert verdict.level in PASSES[optimization.exactness], verdict.reason
