"""What one arm reported, and the noise that a difference is measured by."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from abtest.limits import FP32_ULP

WINDOW = 2  # steps to either side that share their noise: eight replicas alone are few for a standard deviation


@dataclass(frozen=True)
class Evidence:
    """The worker's answers. gradients: one answer per state. findings: check 5. update: check 3. work: the census of one
    micro-step. tripwire: what bending the arm's own parts did; None where that was not asked (the reference). autotune: the
    configuration that each kernel of the arm's optimizations chose."""

    build: dict[str, Any]
    free_run: dict[str, Any]
    gradients: dict[str, dict[str, Any]] = field(default_factory=dict)
    findings: list[dict[str, Any]] = field(default_factory=list)
    update: dict[str, Any] | None = None
    work: dict[str, dict[str, int]] | None = None
    tripwire: dict[str, Any] | None = None
    autotune: dict[str, str] = field(default_factory=dict)

    @property
    def losses(self) -> tuple[float, ...]:
        return tuple(self.free_run["loss"])


def noise_floor(reference: Sequence[float], replicas: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Per step, the root mean square distance of kicked references from the reference: of this step, or of the steps around
    it if that is more; at least one ulp of the loss."""
    squares = [statistics.fmean((replica[step] - loss) ** 2 for replica in replicas) if replicas else 0.0
               for step, loss in enumerate(reference)]  # fmt: skip
    sigma = []
    for step, loss in enumerate(reference):
        around = statistics.fmean(squares[max(0, step - WINDOW) : step + WINDOW + 1])
        sigma.append(max(math.sqrt(max(squares[step], around)), FP32_ULP * abs(loss)))
    return tuple(sigma)


def same_bits(one: Evidence, other: Evidence) -> str | None:
    """None if every step and every probe of both arms has the same bits, else the first thing that differs."""
    if len(one.losses) != len(other.losses):
        return "the number of steps"
    for step in range(len(one.losses)):
        for key in ("loss", "gradients", "state", "rng"):
            if one.free_run[key][step] != other.free_run[key][step]:  # NaN differs from itself, and so never passes
                return f"{key} of step {step}"
    for state in one.gradients.keys() & other.gradients.keys():
        marks, others = one.gradients[state]["fingerprints"], other.gradients[state]["fingerprints"]
        if len(marks) != len(others):
            return f"the number of probes at {state}"
        for probe, (a, b) in enumerate(zip(marks, others, strict=True)):
            if a != b:
                return f"gradients of probe {probe} at {state}"
    return None
