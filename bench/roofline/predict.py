"""From floors to times: each part by the efficiency of its kind, and the host by what a launch costs it.

The device works through its kernels while the host launches them, so a micro-step takes the longer of the two.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from bench.ceilings import Ceilings
from bench.records import Record
from bench.roofline.efficiency import Efficiencies
from bench.roofline.parts import Part
from bench.roofline.setting import Setting, setting_of
from bench.roofline.step import HEAD_OPS, Step, step_of

ROLES = ("reference", "repeat", "optimization", "combination")  # what this program launched, from Python
GRAPHS = "cuda_graphs"  # launches the whole micro-step at once


@dataclass(frozen=True)
class Forecast:
    """One arm, milliseconds of a micro-step. floor_ms: of what it runs. host_us: what a launch costs, from the other arms;
    None where none tells, and for a graph, which launches everything at once."""

    arm: str
    launches: int
    floor_ms: float
    device_ms: float
    host_us: float | None
    measured_ms: float

    @property
    def host_ms(self) -> float:
        return self.launches * (self.host_us or 0.0) / 1e3

    @property
    def predicted_ms(self) -> float:
        return max(self.device_ms, self.host_ms)

    @property
    def error(self) -> float:
        """Of the prediction, as a part of what was measured."""
        return self.predicted_ms / self.measured_ms - 1


def device_us(
    parts: Iterable[Part], ceilings: Ceilings, efficiencies: Efficiencies, enabled: Iterable[str] | None = None
) -> float:
    """Floors over efficiencies. enabled: what is switched on, None for everything; a part of whose kind nothing was timed
    is taken at its floor."""
    names = None if enabled is None else tuple(enabled)
    return sum(part.floor_us(ceilings) / (efficiencies.of(part, names) or 1.0) for part in parts)


def forecasts(setting: Setting, records: Sequence[Record], ceilings: Ceilings, efficiencies: Efficiencies) -> list[Forecast]:
    """Every timed arm of this setting whose launches were counted, predicted without its own time: from the device's
    efficiencies, and what a launch costs in the other arms. Peers are left out, as their host code is not this program's."""
    arms = [record for record in records if _usable(record, setting)]
    steps = {record.arm: arm_step(setting, record) for record in arms}
    device = {
        record.arm: device_us(steps[record.arm].micro_step, ceilings, efficiencies, record.optimizations) / 1e3
        for record in arms
    }
    found = []
    for record in arms:
        others = [other for other in arms if other is not record and GRAPHS not in other.optimizations]
        costs = [_launch_us(other) for other in others if device[other.arm] < other.perf.micro_step_ms / 2]
        host = None if GRAPHS in record.optimizations or not costs else statistics.median(costs)
        floor = steps[record.arm].floor_us(ceilings) / 1e3
        times = (floor, device[record.arm], host, record.perf.micro_step_ms)
        found.append(Forecast(record.arm, record.perf.launches, *times))
    return found


def _usable(record: Record, setting: Setting) -> bool:
    timed = record.perf is not None and bool(record.perf.launches)
    return timed and record.role in ROLES and setting_of(record) == setting


def _launch_us(record: Record) -> float:
    return 1e3 * record.perf.micro_step_ms / record.perf.launches


def arm_step(setting: Setting, record: Record) -> Step:
    """What this arm runs: logits of every position unless it leaves some out, recomputation unless it keeps activations."""
    on = set(record.optimizations)
    again = bool(record.recipe.get("gradient_checkpointing")) and "keep_activations" not in on
    supervised = setting.supervised if on.intersection(HEAD_OPS) else 1.0
    return step_of(replace(setting, gradient_checkpointing=again, supervised=supervised))
