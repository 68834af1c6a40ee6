"""How much evidence the gate gathers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

OnProgress = Callable[[str, str, int, int], None]  # arm, phase, done, total


@dataclass(frozen=True)
class GateConfig:
    """How much evidence the gate gathers, and how. None of these is a tolerance."""

    steps: int = 30  # of the free run
    replicas: int = 8  # kicked references behind the noise floor
    probes: int = 10  # batches on which gradients are compared, at each of four states
    repeats: int = 20  # of one micro-step, which must all have the same bits
    seed: int = 0  # of the probes
    parallel: int = 1  # arms that work at the same time; more of them need more memory
    oracle_cache: Path = Path(".cache/isoloss/oracle")  # exact gradients, kept from run to run
    oracle_cache_gib: float = 24.0  # at most so much of them
