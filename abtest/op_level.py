"""The op level of an optimization: every workload and seed beside fp64 truth, and every autotune configuration."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from abtest.autotune import check_every_configuration
from abtest.opcheck import SEEDS, check_op, workloads_for
from abtest.verdict import Verdict
from kernels.contract import Optimization


def op_reports(optimizations: Iterable[Optimization], device: torch.device) -> list[dict[str, Any]]:
    """A row a check, as JSON values: `op`, `workload`, `seed`, `level` and `reason`. None for what has no op of its own."""
    rows = []
    for optimization in optimizations:
        if optimization.op is None:
            continue
        for workload in workloads_for(optimization.op, device):
            for seed in SEEDS:
                report = check_op(optimization.op, workload, device, seed, optimization.exactness)
                rows.append(_row(optimization.name, workload.name, seed, report.verdict))
        for kernel, configuration, report in check_every_configuration(optimization, device, SEEDS[0]):
            case = f"{report.workload.name}, {report.workload.dtype}, {configuration}"
            rows.append(_row(f"{optimization.name}, {kernel}", case, report.seed, report.verdict))
    return rows


def _row(name: str, workload: str, seed: int, verdict: Verdict) -> dict[str, Any]:
    return {"op": name, "workload": workload, "seed": seed, "level": verdict.level.value, "reason": verdict.reason}
