"""The whole gate without processes: an arm's worker answers in this one, through the same JSON."""

from __future__ import annotations

import io
import json
from typing import Any

from abtest.arm import Arm, ArmSpec
from abtest.experiment import Experiment, GateConfig
from abtest.worker import Worker
from loop.config import Config, DataConfig, LoraConfig

SETTINGS = GateConfig(steps=4, replicas=4, probes=4)
CONFIG = Config(
    steps=SETTINGS.steps,
    device="cpu",
    dtype="float32",
    grad_accum=2,
    gradient_checkpointing=True,
    repeatable_attention=True,
    lora=LoraConfig(rank=4, alpha=8.0),
    data=DataConfig(pack_length=128),
)


class InProcessArm(Arm):
    """An arm whose commands run here. Nothing to end: `__exit__` lets go of the run."""

    def __init__(self, spec: ArmSpec) -> None:
        self.spec, self.worker = spec, Worker(io.StringIO())

    def __exit__(self, kind, error, trace) -> None:
        del self.worker

    def call(self, command: str, on_step=None, **arguments: Any) -> dict[str, Any]:
        return json.loads(json.dumps(getattr(self.worker, command)(**json.loads(json.dumps(arguments)))))


class InProcessExperiment(Experiment):
    """`abtest.experiment` as it is, on arms without processes."""

    def _arm(self, spec: ArmSpec) -> InProcessArm:
        return InProcessArm(spec)


def silent(arm: str, phase: str, done: int, total: int) -> None:
    """Progress that nobody watches."""
