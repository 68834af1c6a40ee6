"""One part of a step: what it moves and computes at least, and the time that takes at a device's ceilings."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from bench.ceilings import Ceilings
from kernels.contract import Op, Workload
from kernels.registry import module_of

Kind = Literal["matrix", "attention", "recurrence", "elementwise"]
Phase = Literal["forward", "recompute", "backward", "update"]
KINDS: tuple[Kind, ...] = ("matrix", "attention", "recurrence", "elementwise")
# Ops whose traffic or arithmetic depends on where documents end, and what makes them.
BY_DOCUMENTS = {"conv_silu_norm": "mixer_op", "packed_attention": "attention_op", "ssm_fast_path": "delta_rule_op"}


@dataclass(frozen=True)
class Work:
    bytes: int
    flops: int

    def __sub__(self, other: Work) -> Work:
        return Work(self.bytes - other.bytes, self.flops - other.flops)

    def bound(self, ceilings: Ceilings) -> str:
        """Which ceiling the floor is at."""
        moving = self.bytes / ceilings.copy_bytes_per_s
        return "bytes" if moving >= self.flops / ceilings.matmul_flops_per_s else "FLOPs"


@dataclass(frozen=True)
class Part:
    """One kernel, or one node of several that hand nothing large to one another.

    count: how often a micro-step runs it. work, launches: of one time. ops: the optimizations that replace it; the first
    states its bytes and FLOPs. assumes: what counts as moved. in_layer: checkpointing recomputes it.
    """

    name: str
    kind: Kind
    phase: Phase
    count: int
    work: Work
    launches: int
    assumes: str
    ops: tuple[str, ...] = ()
    in_layer: bool = True

    @property
    def bytes(self) -> int:
        return self.count * self.work.bytes

    @property
    def flops(self) -> int:
        return self.count * self.work.flops

    @property
    def all_launches(self) -> int:
        return self.count * self.launches

    def floor_us(self, ceilings: Ceilings) -> float:
        """Of all `count` times together."""
        return self.count * ceilings.floor_us(self.work.bytes, self.work.flops)

    def bound(self, ceilings: Ceilings) -> str:
        return self.work.bound(ceilings)


def op_of(name: str, workload: Workload, lengths: tuple[int, ...]) -> Op:
    """The op of the optimization `name` for a workload of documents of these lengths."""
    if name in BY_DOCUMENTS:
        return getattr(importlib.import_module(f"{module_of(name)}.op"), BY_DOCUMENTS[name])((workload, lengths))
    return importlib.import_module(module_of(name)).OPTIMIZATION.op


def op_work(name: str, shape: Mapping[str, int], dtype: str, lengths: tuple[int, ...] = ()) -> Work:
    """Forward plus backward, as the op of `name` states them for this shape."""
    workload = Workload("roofline", dict(shape), dtype)
    op = op_of(name, workload, lengths)
    return Work(op.bytes_moved(workload), op.flops(workload))


def both_ways(
    name: str, kind: Kind, count: int, work: Work, forward: Work, launches: tuple[int, int], assumes: str,
    ops: tuple[str, ...] = (), in_layer: bool = True,
) -> list[Part]:  # fmt: skip
    """The forward and the backward of a part, of whose `work` together `forward` is the forward's."""
    ways = (("forward", forward, launches[0]), ("backward", work - forward, launches[1]))
    return [Part(name, kind, phase, count, own, number, assumes, ops, in_layer) for phase, own, number in ways]
