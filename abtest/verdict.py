"""What the gate says of an arm: a level, the checks behind it, and the number that decided."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Level(Enum):
    """Ordered from best to worst. Only BITWISE and ROUNDING are lossless."""

    BITWISE = "BITWISE"  # losses, gradients, weights, optimizer and RNG state have the reference's bits
    ROUNDING = "ROUNDING"  # inside the noise floor and as close to the oracle as the reference
    APPROX = "APPROX"  # another function, by its author's own word
    FAILED = "FAILED"  # not what was claimed
    INVALID = "INVALID"  # the comparison itself cannot be trusted
    NOT_RUN = "NOT_RUN"  # cannot run here; the reason says why

    @property
    def lossless(self) -> bool:
        return self in (Level.BITWISE, Level.ROUNDING)


PARTS = {
    0: "other",
    1: "preflight",
    2: "gradient oracle",
    3: "update oracle",
    4: "free-running loss",
    5: "exact structure",
}


@dataclass(frozen=True)
class Check:
    """One number beside its limit. `detail` names what was worst: a parameter, a step, a document.

    part: which of the gate's checks it belongs to, a key of PARTS. state: the weights it was taken at, "" for none.
    """

    name: str
    value: float | None
    limit: float | None
    passed: bool
    detail: str = ""
    part: int = 0
    state: str = ""


@dataclass(frozen=True)
class Verdict:
    """The gate's answer. `reason` is one sentence with the number that decided it."""

    level: Level
    reason: str
    checks: tuple[Check, ...] = ()
