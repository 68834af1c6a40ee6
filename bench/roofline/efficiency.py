"""How near to their floors kernels come, from the microbenchmarks in a device's records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bench.records import Record
from bench.roofline.parts import Kind, Part
from bench.roofline.setting import Setting

# Whose microbenchmark speaks for which kind of part.
OPS: dict[Kind, tuple[str, ...]] = {
    "matrix": (
        "lora_matmul", "static_lora", "sm121a_matmul", "tma_matmul", "full_ft_linear", "supervised_logits",
        "linear_cross_entropy",
    ),
    "attention": ("packed_attention",),
    "recurrence": ("ssm_fast_path", "kept_delta_states", "chunk_delta_backward"),
    "elementwise": ("silu_mul", "rms_norm", "gated_rms_norm", "rope_qk_norm", "conv_silu_norm"),
}  # fmt: skip


@dataclass(frozen=True)
class Timed:
    """Microseconds over the workloads of one op, or of several: the floor, the optimization's own time, PyTorch's."""

    floor_us: float
    candidate_us: float
    reference_us: float

    def of(self, ours: bool) -> float:
        """The floor's part of the time, the optimization's or else PyTorch's."""
        return self.floor_us / (self.candidate_us if ours else self.reference_us)

    def __add__(self, other: Timed) -> Timed:
        times = (self.floor_us + other.floor_us, self.candidate_us + other.candidate_us)
        return Timed(*times, self.reference_us + other.reference_us)


@dataclass(frozen=True)
class Efficiencies:
    """`by_op`: every op with a time. What has none takes the efficiency of its kind, and a kind without any has none."""

    by_op: Mapping[str, Timed]

    def kind(self, kind: Kind) -> Timed | None:
        """All ops of a kind together: their floors over their times."""
        return _sum(self.by_op[name] for name in OPS[kind] if name in self.by_op)

    def of(self, part: Part, enabled: Iterable[str] | None) -> float | None:
        """The part's floor over its time with the optimizations `enabled`, None for all of them; without one for this part
        the time is PyTorch's. None where nothing of its kind was timed."""
        names = [name for name in part.ops if name in self.by_op]
        on = names if enabled is None else [name for name in names if name in enabled]
        if on or names:
            return self.by_op[(on or names)[0]].of(bool(on))
        known = self.kind(part.kind)
        return None if known is None else known.of(enabled is None or any(name in enabled for name in part.ops))


def measured(records: Iterable[Record], setting: Setting) -> Efficiencies:
    """From the newest microbenchmark of each optimization: workloads in the setting's dtype of no fewer rows than a pack."""
    by_op: dict[str, Timed] = {}
    for record in records:
        found = _timed(record.micro or {}, setting) if len(record.optimizations) == 1 else None
        if found is not None:
            by_op[record.optimizations[0]] = found
    return Efficiencies(by_op)


def _timed(micro: Mapping[str, Any], setting: Setting) -> Timed | None:
    rows = [row for row in (micro.get("workloads") or {}).values() if row.get("of_ceiling") and "candidate_us" in row]
    fitting = [row for row in rows if row["dtype"] == setting.dtype and _rows(row["shape"]) >= setting.positions]
    each = (Timed(row["of_ceiling"] * row["candidate_us"], row["candidate_us"], row["reference_us"]) for row in fitting)
    return _sum(each)


def _rows(shape: str) -> int:
    """Positions of a workload, from its shape in words: "T=5376 I=6144", or B packs of L."""
    named = (part.partition("=") for part in str(shape).split())
    sizes = {name: int(size) for name, _, size in named if size.isdigit()}
    return sizes.get("T", sizes.get("B", 0) * sizes.get("L", 0))


def _sum(times: Iterable[Timed]) -> Timed | None:
    total = None
    for timed in times:
        total = timed if total is None else total + timed
    return total
