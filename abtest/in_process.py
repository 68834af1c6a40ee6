"""The whole gate without processes: an arm's worker answers in this one, through the same JSON.

For hundreds of gates on a small model, where starting a process would cost more than the gate.
"""

from __future__ import annotations

import io
import json
from typing import Any

import torch

from abtest.arm import Arm, ArmFailed, ArmSpec
from abtest.experiment import Experiment
from abtest.worker import Worker

# What wrong code raises, written out: a process would end with any of them.
CRASHES = (
    ArithmeticError, AssertionError, AttributeError, LookupError, NameError, RuntimeError, TypeError, ValueError,
)  # fmt: skip


class InProcessArm(Arm):
    """An arm whose commands run here. Nothing to end: `__exit__` lets go of the run."""

    def __init__(self, spec: ArmSpec) -> None:
        self.spec, self.worker = spec, Worker(io.StringIO())

    def close(self) -> None:
        """Nothing to tell: `__exit__` is all."""

    def __exit__(self, kind, error, trace) -> None:
        del self.worker

    def call(self, command: str, on_step=None, **arguments: Any) -> dict[str, Any]:
        """As in a process: what wrong code raises ends the arm."""
        try:
            answer = getattr(self.worker, command)(**json.loads(json.dumps(arguments)))
        except CRASHES as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            first = (str(error).strip().splitlines() or [""])[0]
            raise ArmFailed(f"{command} of arm {self.spec.name}: {type(error).__name__}: {first}") from error
        return json.loads(json.dumps(answer))


class InProcessExperiment(Experiment):
    """`abtest.experiment` as it is, on arms without processes, one at a time."""

    def _arm(self, spec: ArmSpec, ahead_of_others: bool = False) -> InProcessArm:
        return InProcessArm(spec)
