"""Beyond 2^31 elements: the machinery on a stand-in size, the real size is one of the lossless gates."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from abtest.huge import check_beyond_int32, unfit
from abtest.opcheck import workloads_for
from kernels.contract import Op, Workload
from kernels.registry import discover, unmet

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WRAP = 1000  # the stand-in for 2^31
CASE = Workload("stand-in", {"T": 200, "I": 12}, "float32", beyond_int32=True)
BEYOND = [
    pytest.param(optimization, workload, id=f"{name}-{workload.name}".replace(" ", "_"))
    for name, optimization in discover().items()
    if optimization.op is not None
    for workload in optimization.op.workloads
    if workload.beyond_int32
]


def inputs(workload: Workload, device: torch.device, seed: int) -> tuple[Tensor, Tensor, float]:
    generator = torch.Generator(device).manual_seed(seed)
    shape = (workload.shape["T"], workload.shape["I"])
    one, two = (torch.randn(shape, generator=generator, device=device).requires_grad_() for _ in range(2))
    return one, two, 3.0


def product(one: Tensor, two: Tensor, factor: float) -> Tensor:
    return one * two * factor


class Wrapped(torch.autograd.Function):
    """The product, where offsets of a direction beyond WRAP start again at 0."""

    @staticmethod
    def forward(ctx, one: Tensor, two: Tensor, factor: float, forward: bool, backward: bool) -> Tensor:
        ctx.save_for_backward(one, two)
        ctx.factor, ctx.backward_wraps = factor, backward
        return product(_wrap(one, forward), two, factor)

    @staticmethod
    def backward(ctx, dy: Tensor):
        one, two = ctx.saved_tensors
        return dy * _wrap(two, ctx.backward_wraps) * ctx.factor, dy * one * ctx.factor, None, None, None


def _wrap(x: Tensor, wraps: bool) -> Tensor:
    return x.flatten()[torch.arange(x.numel()) % (WRAP if wraps else x.numel())].view_as(x)


def op_of(candidate, make=inputs) -> Op:
    return Op(product, candidate, make, (CASE,), lambda w: 1 << 30, lambda w: 1)


def check(candidate, make=inputs):
    return check_beyond_int32(op_of(candidate, make), CASE, CPU, wraps_at=WRAP)


def test_a_row_wise_op_passes():
    result = check(product)
    assert result.passed and result.value == 0.0 and result.part == 5


@pytest.mark.parametrize(("forward", "backward", "where"), [(True, False, "output 0"), (False, True, "d one")])
def test_offsets_that_wrap_are_found(forward, backward, where):
    result = check(lambda one, two, factor: Wrapped.apply(one, two, factor, forward, backward))
    assert not result.passed and where in result.detail
    assert result.value == 3.0, "all blocks but the first hold elements behind the wrap"


def test_what_is_left_unwritten_at_the_end_is_found():
    def candidate(one: Tensor, two: Tensor, factor: float) -> Tensor:
        kept = torch.arange(len(one)) < 190
        return product(one, two, factor) * kept[:, None]

    result = check(candidate)
    assert not result.passed and "rows 136 to 199" in result.detail


def test_a_fault_is_a_failure_in_words():
    def candidate(one: Tensor, two: Tensor, factor: float) -> Tensor:
        raise RuntimeError("an illegal memory access was encountered")

    result = check(candidate)
    assert not result.passed and "illegal memory access" in result.detail


def test_what_it_cannot_judge_is_refused():
    with pytest.raises(ValueError, match="more than 1000000 are needed"):
        check_beyond_int32(op_of(product), CASE, CPU, wraps_at=10**6)
    with pytest.raises(ValueError, match="one number of rows"):
        check(product, lambda *a: (torch.ones(200, 12), torch.ones(12), 1.0))


def test_such_a_workload_is_neither_checked_in_fp64_nor_timed():
    op = dataclasses.replace(op_of(product), workloads=(CASE, Workload("plain", {"T": 1, "I": 1}, small=True)))
    for device in ("cpu", "cuda"):
        assert [workload.name for workload in workloads_for(op, torch.device(device))] == ["plain"]
    assert unfit(op, CASE, CPU) == "stand-in needs a GPU"


def test_the_real_workloads_are_beyond():
    assert BEYOND
    for case in BEYOND:
        _, workload = case.values
        assert workload.shape["T"] * workload.shape["I"] > 2**31 and not workload.small


@pytest.mark.parametrize(("optimization", "workload"), BEYOND)
def test_the_kernel_on_a_stand_in_size(optimization, workload):
    missing = unmet(optimization.needs, DEVICE)
    if missing:
        pytest.skip(missing)
    small = dataclasses.replace(workload, shape={"T": 130, "I": 24}, dtype="float32")
    assert check_beyond_int32(optimization.op, small, DEVICE, wraps_at=WRAP).passed
