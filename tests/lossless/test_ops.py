"""Every op of every optimization against fp64 truth, in every configuration that an autotuner may choose and beyond 2^31
elements, and every custom op against PyTorch's own rules for one."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
import torch

from abtest.autotune import check_every_configuration, complaints, tuners
from abtest.huge import check_beyond_int32, unfit
from abtest.opcheck import SEEDS, check_op, workloads_for
from abtest.verdict import Level
from kernels.contract import Exactness
from kernels.registry import discover, unmet

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = [
    pytest.param(optimization, workload, id=f"{name}-{workload.name}".replace(" ", "_"))
    for name, optimization in discover().items()
    if optimization.op is not None
    for workload in workloads_for(optimization.op, DEVICE)
]
BEYOND = [
    pytest.param(optimization, workload, id=f"{name}-{workload.name}".replace(" ", "_"))
    for name, optimization in discover().items()
    if optimization.op is not None
    for workload in optimization.op.workloads
    if workload.beyond_int32
]
# Packages may bring tuners, which are known once they have run.
TUNED = [
    pytest.param(optimization, id=name)
    for name, optimization in discover().items()
    if optimization.op is not None and ((optimization.needs.triton and optimization.needs.packages) or tuners(optimization))
]


@pytest.fixture(autouse=True)
def room() -> Iterator[None]:
    """Truth in fp64 for a whole vocabulary takes tens of GiB; what is left of it in the cache the arms' processes lack."""
    yield
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


@pytest.mark.lossless
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("optimization", "workload"), CASES)
def test_op_is_as_close_to_the_truth_as_pytorch(optimization, workload, seed):
    missing = unmet(optimization.needs, DEVICE)
    if missing:
        pytest.skip(missing)
    report = check_op(optimization.op, workload, DEVICE, seed, optimization.exactness)
    if workload.dtype in optimization.fails.op:
        assert report.verdict.level is Level.FAILED, f"a negative result passes now: {report.verdict.reason}"
    elif optimization.exactness is Exactness.APPROX:
        assert report.verdict.level is Level.APPROX or report.passed, report.verdict.reason
    else:
        assert report.passed, report.verdict.reason


@pytest.mark.lossless
@pytest.mark.parametrize("optimization", TUNED)
def test_every_configuration_that_an_autotuner_may_choose_is_right(optimization):
    missing = unmet(optimization.needs, DEVICE)
    if missing:
        pytest.skip(missing)
    reports = check_every_configuration(optimization, DEVICE, SEEDS[0])
    assert complaints(reports, optimization.exactness, DEVICE) == []
    if all(report.verdict.level is Level.NOT_RUN for _, _, report in reports):
        pytest.skip("no configuration fits this device" if reports else "no kernel of it is autotuned")


@pytest.mark.lossless
@pytest.mark.gpu
@pytest.mark.parametrize(("optimization", "workload"), BEYOND)
def test_op_reaches_beyond_32_bit_offsets(optimization, workload):
    reason = unmet(optimization.needs, DEVICE) or unfit(optimization.op, workload, DEVICE)
    if reason:
        pytest.skip(reason)
    check = check_beyond_int32(optimization.op, workload, DEVICE)
    assert check.passed, check.detail


@pytest.mark.lossless
def test_every_op_has_a_workload_for_a_box_without_a_gpu():
    lacking = [
        name
        for name, optimization in discover().items()
        if optimization.op is not None
        and not optimization.needs.cuda
        and not any(workload.small for workload in optimization.op.workloads)
    ]
    assert not lacking


@pytest.mark.lossless
@pytest.mark.parametrize("shape", [(4, 24), (3, 7), (0, 8)], ids=str)
def test_silu_mul_is_a_well_behaved_custom_op(shape):
    importlib.import_module("kernels.silu_mul.kernel")  # registers the two ops
    dy, gate, up = (torch.randn(shape, device=DEVICE) for _ in range(3))
    differentiable = (gate.clone().requires_grad_(), up.clone().requires_grad_())
    for operator, arguments in (
        (torch.ops.isoloss.silu_mul.default, differentiable),
        (torch.ops.isoloss.silu_mul_backward.default, (dy, gate, up)),
    ):
        outcome = torch.library.opcheck(operator, arguments)
        assert set(outcome.values()) == {"SUCCESS"}, outcome
