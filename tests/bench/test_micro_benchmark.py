"""Every optimization with an op as a pytest-benchmark: checked first, and timed only if it matches.

Several processes at a time (`make test`) would time each other: there the op runs once, and no time is taken.
"""

from __future__ import annotations

import pytest
import torch

from abtest.opcheck import check_op, workloads_for
from abtest.verdict import Level
from bench.micro import INTERPRETED, forward_backward
from kernels.registry import discover, unmet

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", [name for name, optimization in discover().items() if optimization.op is not None])
def test_micro_benchmark(name, benchmark):
    optimization = discover()[name]
    missing = unmet(optimization.needs, DEVICE)
    if missing:
        pytest.skip(missing)
    workload = workloads_for(optimization.op, DEVICE)[0]
    report = check_op(optimization.op, workload, DEVICE, exactness=optimization.exactness)
    if report.verdict.level is Level.APPROX:
        pytest.skip("an approximation is not timed: only what matches is")
    if workload.dtype in optimization.fails.op:
        assert report.verdict.level is Level.FAILED, report.verdict.reason
        pytest.skip(f"a negative result that does not match is not timed: {report.verdict.reason}")
    assert report.passed, f"not timed, since it does not match: {report.verdict.reason}"
    if optimization.needs.triton and DEVICE.type != "cuda":
        pytest.skip(INTERPRETED)
    step = forward_backward(optimization.op.candidate, optimization.op.inputs(workload, DEVICE, 0))

    def finished_step() -> None:
        step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.extra_info["workload"] = workload.name
    benchmark.pedantic(finished_step, rounds=20, warmup_rounds=3)
    assert not benchmark.enabled or benchmark.stats.stats.rounds == 20
